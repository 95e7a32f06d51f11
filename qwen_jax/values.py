"""Numbers and flags out of files that somebody else wrote, and out of arguments, checked.

Each function returns the value that it was given, as the type that it must have, or raises a
ValueError of one line: name, value, what is allowed. `name` is the field with what comes before the
value, as in "seq_length is". Nothing here knows what a value is for.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_jax import texts

INT32 = 2**31 - 1
INT64 = 2**63 - 1
FLOAT32 = 3.4028234663852886e38  # the largest number of float32, and the smallest without loss
TINY = 1.1754943508222875e-38


@contextlib.contextmanager
def named(file: Any) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with a value in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Values by their names, as JSON has them."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be values by their names, got {texts.described(value)}")
    return value


def whole(name: str, value: Any, least: int = 1, most: int = INT32) -> int:
    """A whole number; some tools write one as 50.0."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        said = texts.shown(value)
        raise ValueError(f"{name} {said}: must be a whole number from {least} to {most}")
    return number


def number(name: str, value: Any, least: float = TINY, most: float = FLOAT32) -> float:
    """A number within limits, so neither NaN nor infinite."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most  # exact for an int that no float holds
    ):
        said = texts.shown(value)
        raise ValueError(f"{name} {said}: must be a number from {least:g} to {most:g}")
    return value


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} {texts.shown(value)}: must be true or false")
    return value
