"""Checks single values from callers and files: numbers, flags, names, objects.

Each function returns the value as a plain Python object, or raises a ValueError of one line with
the name, the value and the allowed values. `name` is the start of that message, such as "seq_length
is". True and False are not numbers; a scalar of numpy or jax counts as a Python number. This module
does not know what a value is used for.
"""

import contextlib
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, TypeVar

import numpy as np

from qwen_jax.runtime import texts

_T = TypeVar("_T")
INT32 = 2**31 - 1
INT64 = 2**63 - 1
TINY = 1.1754943508222875e-38  # the smallest normal number of float32
FLOAT32 = 3.4028234663852886e38  # the largest
POSITIVE = (TINY, FLOAT32)
NO_SEQUENCE = (str, bytes, bytearray, memoryview, Mapping, Set)  # iterable, but not lists of values


@contextlib.contextmanager
def named(file: object) -> Iterator[None]:
    """Context manager that puts a file's name before the message of a ValueError in its block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """Check that a value is a mapping with text keys, such as a JSON object, and return it."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must map names to values, got {texts.described(value)}")
    return value


def whole(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """Check that a value is a whole number from `least` to `most`, if given; return an int."""
    plain = _plain(value)
    try:
        found = None if isinstance(plain, bool) else operator.index(plain)
    except TypeError:
        found = None
    if found is None or not _within(found, least, most=most):
        raise ValueError(f"{name} {texts.shown(plain)}: must be a whole number{_said(least, most)}")
    return found


def from_file(value: Any) -> Any:
    """Turn a float with an integer value into an int: some tools write 50.0 for 50 into files."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(
    name: str, value: object, *, least: float | None = None, most: float | None = None
) -> int | float:
    """Check that a value is a real number, from `least` to `most` if given, and return it.

    NaN fails any limit. An int outside int32 is returned as a float, since jax cannot take it as an
    int.
    """
    plain = _plain(value)
    real = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
    if not real or not _within(plain, least, most=most):
        raise ValueError(f"{name} {texts.shown(plain)}: must be a number{_said(least, most)}")
    if isinstance(plain, int) and abs(plain) <= INT32:
        return plain
    try:
        return float(plain)
    except OverflowError:
        shown = texts.shown(plain)
        raise ValueError(f"{name} {shown}: must be a number that a float holds") from None


def flag(name: str, value: object) -> bool:
    """Check that a value is True or False, and return it as a bool."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name} {texts.shown(plain)}: must be true or false")
    return plain


def choice(name: str, value: object, *, allowed: Iterable[str], or_none: bool = False) -> None:
    """Raise ValueError unless the value is one of the allowed texts, or None if `or_none` is set.

    A numpy dtype counts as its name.
    """
    known = list(allowed)
    named = isinstance(value, str | np.dtype) and value in known
    if not (named or (value is None and or_none)):
        others = " or None" if or_none else ""
        raise ValueError(f"{name} {texts.shown(value)}: allowed are {', '.join(known)}{others}")


def instance(name: str, value: object, *, kind: type[_T] | tuple[type[_T], ...]) -> _T:
    """Check that the value is an object of one of these classes, and return it."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        what = " or a ".join(one.__name__ for one in kinds)
        raise ValueError(f"{name} {texts.shown(value)}: must be a {what}")
    return value


def _plain(value: Any) -> Any:
    """Return a scalar of numpy or jax as a Python number, and any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _within(value: Any, least: float | None, *, most: float | None) -> bool:
    """Whether a number is within the limits, None for no limit; exact even for the largest ints."""
    return (least is None or value >= least) and (most is None or value <= most)


def _said(least: float | None, most: float | None) -> str:
    """Format the limits of a number for a message, such as " from 0 to 5"; "" without `least`."""
    if least is None:
        return ""
    shown = [f"{x:d}" if isinstance(x, int) else f"{x:g}" for x in (least, most) if x is not None]
    return f" from {' to '.join(shown)}" if most is not None else f" of at least {shown[0]}"


def ids(name: str, given: Any, *, below: int | None = None) -> list[int]:
    """Check token ids, given in any sequence or one-axis array, and return them as a list of ints.

    name: the argument's name, for messages.
    below: one more than the largest allowed id; None for no limit.

    Raises ValueError for other values: a float may be the result of rounding, text holds no ids,
    and a set or mapping has no order.
    """
    try:
        if isinstance(given, NO_SEQUENCE):
            raise TypeError
        each = list(given)
        found = list(map(operator.index, each))
        if bool in set(map(type, each)):
            raise TypeError
    except TypeError:
        got = texts.described(given)
        raise ValueError(f"{name} must be whole numbers (token ids), got {got}") from None
    if found and (min(found) < 0 or (below is not None and max(found) >= below)):
        bad = next(i for i in found if i < 0 or (below is not None and i >= below))
        limit = "from 0" if below is None else f"from 0 to {below - 1}"
        raise ValueError(f"{name}: token id {texts.shown(bad)} is out of range: {limit}")
    return found
