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

MODULES = (
    "qwen_jax.attention",
    "qwen_jax.decoding",
    "qwen_jax.kernels",
    "qwen_jax.leaves",
    "qwen_jax.meshes",
    "qwen_jax.model",
    "train.data.batches",
    "train.step",
)


def install() -> None:
    """Wrap the functions of `MODULES`; before anything imports one of them."""
    jaxtyping.install_import_hook(list(MODULES), "tests.support.axes.checked")


def _says_axes(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        return any(_says_axes(x) for x in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether the arrays in a value, which may be a tuple of annotated ones, have their axes."""
    if typing.get_origin(annotation) is tuple and isinstance(value, tuple):
        each = zip(value, typing.get_args(annotation), strict=True)
        return all(not _says_axes(a) or _fits(x, a) for x, a in each)
    # An array of numpy may stand in for one of jax, whose axes alone are annotated.
    return not isinstance(value, jax.Array) or isinstance(value, annotation)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises TypeError for an array of other axes than its annotation says.

    jaxtyping passes two empty functions of the same annotations: one is called with the arguments
    before each call; the other, which returns an argument of its own, also with the result after.
    """
    annotations = inspect.get_annotations(function)
    wanted = {name: x for name, x in annotations.items() if _says_axes(x)}
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
