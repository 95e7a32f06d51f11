"""Texts that come from outside: arguments checked, and the bytes of a file as text.

What is no text is refused in one line. Files are UTF-8; the byte order mark that some editors write
before it is no part of the text. Nothing here knows what a text is for.
"""

import codecs
import json
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


def check(name: str, value: Any) -> str:
    """The value as a plain `str`. ValueError that names the argument where it is no text."""
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as numpy's: the characters alone
    hint = ": decode them first" if isinstance(value, bytes | bytearray) else ""
    raise ValueError(f"{name} must be text (str), got {described(value)}{hint}")


def check_whole(name: str, value: Any) -> str:
    """`check` for what a model reads: ValueError for half a character, too (a lone surrogate).

    Such halves come from text that was cut within an emoji, and from bytes that were not UTF-8.
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


def described(value: Any) -> str:
    """Type and value for a message, short and in one line."""
    if value is None:
        return "None"
    return f"{type(value).__name__} {shown(value)}"


def shown(value: Any) -> str:
    """A value for a message, short and in one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python prints no number of so many digits
        return "of thousands of digits"


def printable(text: str) -> str:
    """The text with `\\udcff` in place of what is in no encoding, such as bytes of a file name."""
    return text.encode("utf-8", "backslashreplace").decode()


def foreign(data: bytes) -> str | None:
    """What the first bytes of a file say of another encoding, in words; None for UTF-8."""
    name = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    return name and f"it is {name}: save it as UTF-8"


def unmarked(data: bytes) -> bytes:
    """The bytes of a file after its byte order mark, if there is one."""
    return data.removeprefix(codecs.BOM_UTF8)


def decode(data: bytes) -> str:
    """The text of a file. ValueError says what is wrong, and where, but not with which file."""
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
    return f"at byte {at}, in line {data.count(10, 0, at) + 1}"


def read(path: str | Path) -> str:
    """The text of a UTF-8 file, local or remote. ValueError names the file where it is none."""
    data = paths.parse(path).read_bytes()
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a UTF-8 file; ValueError that names the file when it is not one."""
    data = paths.parse(path).read_bytes()
    try:
        value = json.loads(decode(data))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
