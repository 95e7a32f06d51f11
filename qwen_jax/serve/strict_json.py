"""JSON from strangers: UTF-8, finite numbers, whole characters, and a limit to its depth."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from qwen_jax.serve.refusals import Refusal, invalid, named


def read(data: bytes, *, depth: int) -> Any:
    """Parse the JSON of a request.

    depth: the most objects and lists inside each other.

    Raises Refusal, which names the place of a text with half a character and of a value too deep.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        what = f"the body is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}"
        raise Refusal(400, what) from None
    except RecursionError:
        raise Refusal(400, f"the body is nested too deeply: at most {depth} levels") from None
    except ValueError as error:  # or a number of thousands of digits
        raise Refusal(400, f"the body is not JSON: {error}") from None
    _check(value, depth)
    return value


def _no_number(name: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{name} is no number of JSON")


def _check(value: object, depth: int) -> None:
    """Raise Refusal for a value that is too deep, or a text with half a character."""
    left: list[tuple[object, tuple[int | str, ...]]] = [(value, ())]
    while left:
        part, place = left.pop()
        if isinstance(part, str):
            if not part.isascii() and not _whole(part):
                raise invalid(named(place) or "body", "half a character (a lone surrogate)")
        elif isinstance(part, dict | list):
            if len(place) >= depth:
                where = named(place[:8])
                raise invalid(where, f"nested too deeply: at most {depth} levels")
            left += _parts(part, place)


def _parts(
    value: dict[str, object] | list[object], place: tuple[int | str, ...]
) -> Iterator[tuple[object, tuple[int | str, ...]]]:
    """Yield the texts, lists and objects inside a value, and its names, with their places."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        if isinstance(key, str) and not key.isascii():
            yield key, place
        if isinstance(part, str | dict | list):
            yield part, (*place, key)


def _whole(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
