"""Array arguments checked against the axes that they are annotated with, while tests run.

`install` has every function of the rooms below wrapped as its module is imported: an array that is
passed for `q: Float[Array, "B T N H"]` must have four axes, and B must be the same in all arguments
of the call. Other annotations are pyright's. In programs that `jax.jit` compiles the check runs
while they are traced, and costs nothing after that.
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
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_says_axes(x) for x in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises TypeError for an array of other axes than its annotation says."""
    annotations = inspect.get_annotations(function)
    wanted = {name: x for name, x in annotations.items() if _says_axes(x) and name != "return"}
    if not wanted:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            # An array of numpy may stand in for one of jax, whose axes alone are annotated.
            if isinstance(value, jax.Array) and not isinstance(value, wanted.get(name, object)):
                shape = f"{value.dtype}{list(value.shape)}"
                raise TypeError(f"{function.__qualname__}: {name} is {shape}, not {wanted[name]}")
        return function(*args, **kwargs)

    return run
