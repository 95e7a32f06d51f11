"""Arrays checked against the axes that they are annotated with, while tests run.

`install` has every function of the rooms below wrapped as its module is imported: an array that is
passed for `q: Float[Array, "B T N H"]` must have four axes, and B must be the same in all arguments
and results of the call. Fields of dataclasses are checked as arguments of their constructor. Other
annotations are pyright's. In programs that `jax.jit` compiles the check runs while they are traced,
and costs nothing after that. jaxtyping's own hook does the same for several times the cost: it
wraps functions that name no axes, too, and binds the arguments of each call three times.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

import jax
import jaxtyping
import numpy as np
from jaxtyping._storage import pop_shape_memo, push_shape_memo  # `jaxtyped` without its checks

MODULES = (
    "convert.copying",
    "convert.verify",
    "qwen_jax.attention",
    "qwen_jax.checkpoint.adapter_files",
    "qwen_jax.decoding",
    "qwen_jax.engine",
    "qwen_jax.kernels",
    "qwen_jax.leaves",
    "qwen_jax.meshes",
    "qwen_jax.model",
    "qwen_jax.quantise",
    "train.data",
    "train.measuring",
    "train.step",
)
_DECORATOR = "_axes_checked"  # what modules of `MODULES` have `checked` as


def install() -> None:
    """Wrap the functions of `MODULES`; before anything imports one of them."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds `MODULES` and what is in them, and leaves all others to the finders that come after."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{name}.".startswith(tuple(f"{module}." for module in MODULES)):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Loads a module with its functions and classes decorated with `checked`."""

    def get_code(self, fullname: str) -> types.CodeType:  # Python's own files of it are of no use
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        return compile(ast.fix_missing_locations(_Decorate().visit(tree)), path, "exec")

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, _DECORATOR, checked)
        super().exec_module(module)


class _Decorate(ast.NodeTransformer):
    """Puts `checked` below the other decorators of functions, and above those of classes."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(ast.Name(_DECORATOR, ast.Load()))
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.decorator_list.insert(0, ast.Name(_DECORATOR, ast.Load()))
        self.generic_visit(node)
        return node


def _fitting(annotation: Any) -> Callable[[Any], bool] | None:
    """Whether a value has the axes that an annotation names, as a function; None if it names none.

    An array must fit one of the arrays in a union, and a tuple one of its tuples.
    """
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    tuples = [fits for member in members if (fits := _fitting_tuple(member))]
    kinds = tuple(x for x in members if _is_array(x))
    if not tuples and not kinds:
        return None
    # An array of numpy may stand in for one of jax, if jax's axes alone are annotated.
    of_jax = all(kind.array_type is jax.Array for kind in kinds)
    arrays = jax.Array if of_jax else (jax.Array, np.ndarray)

    def fits(value: Any) -> bool:
        if isinstance(value, tuple):
            return not tuples or any(of_tuple(value) for of_tuple in tuples)
        return not kinds or not isinstance(value, arrays) or isinstance(value, kinds)

    return fits


def _fitting_tuple(annotation: Any) -> Callable[[tuple[Any, ...]], bool] | None:
    """Whether each member of a tuple fits, as a function; None if no member names axes."""
    if typing.get_origin(annotation) is not tuple:
        return None
    members = [_fitting(member) for member in typing.get_args(annotation)]
    if not any(members):
        return None
    if typing.get_args(annotation)[-1] is Ellipsis:
        return lambda value: all(map(members[0], value))
    return lambda value: all(
        fits is None or fits(x) for fits, x in zip(members, value, strict=False)
    )


def _is_array(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def checked(function: Any) -> Any:
    """The function, or the dataclass with a constructor, which raises TypeError for an array of
    other axes than its annotation says.
    """
    if isinstance(function, type):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    annotations = inspect.get_annotations(function)
    fitting = {name: fits for name, x in annotations.items() if (fits := _fitting(x))}
    result = fitting.pop("return", None)
    if not fitting and result is None:
        return function
    parameters = inspect.signature(function).parameters
    defaults = {name: x.default for name, x in parameters.items() if x.default is not x.empty}

    def refuse(name: str, value: Any) -> None:
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", value)
        what = "the result" if name == "return" else name
        raise TypeError(f"{function.__qualname__}: {what} is {shapes}, not {annotations[name]}")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(parameters, args, strict=False)), **kwargs}
        push_shape_memo(given)  # what the letters stand for in this call
        try:
            for name, fits in fitting.items():
                if not fits(given.get(name)):
                    refuse(name, given[name])
            returned = function(*args, **kwargs)
            if result is not None and not result(returned):
                refuse("return", returned)
        finally:
            pop_shape_memo()
        return returned

    return run
