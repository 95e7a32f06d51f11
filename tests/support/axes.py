"""Arrays checked against the axes that they are annotated with, while tests run.

`install` has every function of the rooms below wrapped as its module is imported: an array that is
passed for `q: Float[Array, "B T N H"]` must have four axes, and B must be the same in all arguments
and results of the call. Fields of dataclasses are checked as arguments of their constructor. Other
annotations are pyright's. In programs that `jax.jit` compiles the check runs while they are traced,
and costs nothing after that.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np

MODULES = (
    "convert.copying",
    "convert.peft",
    "convert.verify",
    "qwen_jax.attention",
    "qwen_jax.decoding",
    "qwen_jax.kernels",
    "qwen_jax.leaves",
    "qwen_jax.meshes",
    "qwen_jax.model",
    "train.data",
    "train.measuring",
    "train.step",
)


def install() -> None:
    """Wrap the functions of `MODULES`; before anything imports one of them."""
    jaxtyping.install_import_hook(list(MODULES), "tests.support.axes.checked")


def _kinds(annotation: Any) -> list[Any]:
    """The arrays with axes that an annotation names, itself or within a union or a tuple."""
    if typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        return [kind for x in typing.get_args(annotation) for kind in _kinds(x)]
    is_array = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return [annotation] if is_array else []


def _fits(value: Any, annotation: Any) -> bool:
    """Whether the arrays in a value, which may be a tuple of annotated ones, have their axes."""
    if typing.get_origin(annotation) is tuple and isinstance(value, tuple):
        return all(map(_fits, value, typing.get_args(annotation)))
    kinds = _kinds(annotation)
    # An array of numpy may stand in for one of jax, if jax's axes alone are annotated.
    arrays = jax.Array if all(x.array_type is jax.Array for x in kinds) else (jax.Array, np.ndarray)
    return not kinds or not isinstance(value, arrays) or isinstance(value, tuple(kinds))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises TypeError for an array of other axes than its annotation says.

    jaxtyping passes two empty functions of the same annotations: one is called with the arguments
    before each call; the other, which returns an argument of its own, also with the result after.
    """
    annotations = inspect.get_annotations(function)
    wanted = {name: x for name, x in annotations.items() if _kinds(x)}
    result = wanted.pop("return", None)
    if not wanted and result is None:
        return function
    signature = inspect.signature(function)

    def check(name: str, value: Any, annotation: Any) -> None:
        if not _fits(value, annotation):
            shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", value)
            raise TypeError(f"{function.__qualname__}: {name} is {shapes}, not {annotation}")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in wanted:
                check(name, value, wanted[name])
        returned = function(*args, **kwargs)
        if result is not None:
            check("the result", returned, result)
        return returned

    return run
