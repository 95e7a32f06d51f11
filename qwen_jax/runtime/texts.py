"""Checks and decodes text from outside: arguments, and files in UTF-8.

Invalid text is refused with a one-line message. The byte order mark that some editors write at the
start of a file is not part of the text. This module does not know what a text is used for.
"""

import codecs
import json
import re
import reprlib
from pathlib import Path
from typing import Any

from qwen_jax.runtime import paths

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check(name: str, value: object) -> str:
    """Return an argument as a plain `str`. Raises ValueError if it is not text.

    name: the argument's name, for the message.
    """
    if isinstance(value, str):
        return str.__str__(value)  # plain characters, even if it is a subclass such as numpy's
    hint = ": decode them first" if isinstance(value, bytes | bytearray) else ""
    raise ValueError(f"{name} must be text (str), got {described(value)}{hint}")


def check_whole(name: str, value: object) -> str:
    """Return an argument as a plain `str` without lone surrogates, as a model needs it.

    name: the argument's name, for messages.

    Raises ValueError if the value is not text, or contains a lone surrogate (half a character),
    which comes from text that was cut within an emoji, or from bytes that are not UTF-8. Surrogates
    that form a pair become one character.
    """
    text = check(name, value)
    try:
        text.encode()
    except UnicodeEncodeError:
        try:  # two halves that belong together are one character
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            half = next(c for c in text if "\ud800" <= c <= "\udfff")
            raise ValueError(
                f"{name} holds half a character, {half!a}, at {text.index(half)}: it was cut, or "
                "is not UTF-8 text"
            ) from None
    return text


def described(value: object) -> str:
    """Format an object's type and value for a message, short and in one line."""
    if value is None:
        return "None"
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """Format a value for a message, short and in one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python refuses to print a number of so many digits
        return "of thousands of digits"


def printable(text: str) -> str:
    """Replace characters that cannot be encoded, such as raw bytes of a file name, by escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def brief(line: str) -> str:
    """Shorten a message: words of over 300 characters to about 200, and the whole to about 2000."""
    line = re.sub(r"\S{301,}", lambda word: _middle_cut(word[0], 180, 20), line)
    return line if len(line) <= 2000 else _middle_cut(line, 1400, 600)


def _middle_cut(text: str, first: int, last: int) -> str:
    """Keep only so many characters at the start and the end of a text."""
    return f"{text[:first]}...{text[-last:]}"


def foreign(data: bytes) -> str | None:
    """Return an error message if a file has another encoding's byte order mark, else None.

    data: the bytes of the file.
    """
    name = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    return name and f"it is {name}: save it as UTF-8"


def unmarked(data: bytes) -> bytes:
    """Return the bytes of a file without the UTF-8 byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8)


def decode(data: bytes) -> str:
    """Decode the bytes of a UTF-8 file.

    Raises ValueError with the problem and its position; the caller adds the name of the file.
    """
    if problem := foreign(data):
        raise ValueError(problem)
    skipped = len(data) - len(unmarked(data))
    try:
        text = data[skipped:].decode()
    except UnicodeDecodeError as error:
        at = skipped + error.start
        raise ValueError(f"0x{data[at]:02x} {_place(data, at)}: save it as UTF-8") from None
    if (at := data.find(0)) >= 0:
        raise ValueError(f"a zero {_place(data, at)}: it is no text, or in another encoding")
    return text


def _place(data: bytes, at: int) -> str:
    """Format the position of byte `at` in a file, with its line number, for a message."""
    return f"at byte {at}, in line {data.count(10, 0, at) + 1}"


def read(path: str | Path) -> str:
    """Read a UTF-8 text file, local or remote. Raises ValueError that names the file."""
    data = paths.parse(path).read_bytes()
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a UTF-8 file. Raises ValueError that names the file otherwise."""
    data = paths.parse(path).read_bytes()
    try:
        value = json.loads(decode(data))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number with too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
