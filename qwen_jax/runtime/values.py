"""Numbers, flags, names and objects that others pass or write into files, checked one by one.

Each function returns the value that it was given as Python's own, or raises a ValueError of one
line: name, value, what is allowed. `name` is whatever comes before the value, as "seq_length is".
True and False are no numbers; scalars of numpy and jax are what they hold. Nothing here knows what
a value is for.
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
TINY = 1.1754943508222875e-38  # the smallest number that float32 holds in full, and the largest
FLOAT32 = 3.4028234663852886e38
POSITIVE = (TINY, FLOAT32)
NO_SEQUENCE = (str, bytes, bytearray, memoryview, Mapping, Set)  # though Python iterates over them


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


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number, from `least` to `most` where those are given."""
    plain = _plain(value)
    try:
        found = None if isinstance(plain, bool) else operator.index(plain)
    except TypeError:
        found = None
    if found is None or not _within(found, least, most):
        raise ValueError(f"{name} {texts.shown(plain)}: must be a whole number{_said(least, most)}")
    return found


def from_file(value: Any) -> Any:
    """A value of a file where a whole number is wanted: some tools write 50.0 for 50."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(
    name: str, value: Any, least: float | None = None, most: float | None = None
) -> int | float:
    """A real number, from `least` to `most` where those are given; NaN is within no limits.

    An int that no int32 holds comes back as a float: jax takes no other.
    """
    plain = _plain(value)
    real = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
    if not real or not _within(plain, least, most):
        raise ValueError(f"{name} {texts.shown(plain)}: must be a number{_said(least, most)}")
    if isinstance(plain, int) and abs(plain) <= INT32:
        return plain
    try:
        return float(plain)
    except OverflowError:
        shown = texts.shown(plain)
        raise ValueError(f"{name} {shown}: must be a number that a float holds") from None


def flag(name: str, value: Any) -> bool:
    """True or False."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name} {texts.shown(plain)}: must be true or false")
    return plain


def choice(name: str, value: Any, allowed: Iterable[str], or_none: bool = False) -> None:
    """Raise ValueError unless the value is one of these texts, or None where that is allowed. A
    dtype of numpy is equal to its name.
    """
    known = list(allowed)
    named = isinstance(value, str | np.dtype) and value in known
    if not (named or (value is None and or_none)):
        others = " or None" if or_none else ""
        raise ValueError(f"{name} {texts.shown(value)}: allowed are {', '.join(known)}{others}")


def instance(name: str, value: Any, kind: type[_T] | tuple[type[_T], ...]) -> _T:
    """The value, which must be an object of this class, or of one of these."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        what = " or a ".join(one.__name__ for one in kinds)
        raise ValueError(f"{name} {texts.shown(value)}: must be a {what}")
    return value


def _plain(value: Any) -> Any:
    """A scalar of numpy or jax as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _within(value: Any, least: float | None, most: float | None) -> bool:
    """Exact for an int that no float holds."""
    return (least is None or value >= least) and (most is None or value <= most)


def _said(least: float | None, most: float | None) -> str:
    """The limits, for a message."""
    if least is None:
        return ""
    shown = [f"{x:d}" if isinstance(x, int) else f"{x:g}" for x in (least, most) if x is not None]
    return f" from {' to '.join(shown)}" if most is not None else f" of at least {shown[0]}"


def ids(name: str, given: Any, below: int | None = None) -> list[int]:
    """Token ids, out of any sequence or array of one axis: whole numbers from 0, and below `below`.

    ValueError for anything else: a float may be a number's rounding, a text is no ids, and a set or
    a mapping has no order.
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
