"""Compiles all programs of a serving engine, for devices that need not exist.

The calls of `engine.steps.Programs` are traced from shapes alone. Each compiled function that a
call runs, such as a group of layers in prefill, is then a program of its own here too. This module
knows no hardware rates and prints nothing.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.sharding import Mesh

from qwen_jax import attention, model
from qwen_jax.config import Config
from qwen_jax.engine import from_model
from qwen_jax.engine.steps import Programs, Shape
from qwen_jax.meshes import sharding
from train.planning import stored_weights
from train.planning.compilation import Program, compile_program
from train.planning.flops import nbytes

STATE = "state"  # the call that makes the pages and the rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """The model and the options of an engine.

    config: the model's architecture.
    max_length: the most tokens of a request.
    attention: the name of a registered implementation.
    rows, page, chunk: as for `from_model.sizes`; None for what an engine takes by default.
    cache_dtype: None for pages in the model's own dtype, or "int8".
    weights: how the matrices of layers are stored, one of `stored_weights.FORMS`.
    kernel: the kernel that multiplies by integers; None makes floats of them for each product.
    dtype: the dtype of the weights.
    """

    config: Config
    max_length: int
    attention: str
    rows: int | None = None
    page: int | None = None
    chunk: int | None = None
    cache_dtype: str | None = None
    dtype: str = "bfloat16"
    weights: str = "float"
    kernel: str | None = None

    def shape(self, mesh: sharding.MeshOrSizes, *, room: int) -> Shape:
        """Return the sizes of the engine's programs. room: bytes for pages on each device.

        Raises ValueError for sizes that do not fit each other, or a cache of less than two pages.
        """
        return from_model.sizes(
            self.config,
            mesh,
            dtype=self.dtype,
            max_length=self.max_length,
            room=room,
            rows=self.rows,
            page=self.page,
            chunk=self.chunk,
            cache_dtype=self.cache_dtype,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled program, and where it runs.

    name: the name of the function.
    call: the name of the first call in `Programs.idle` that runs it, or `STATE`.
    times: how often that call runs it.
    program: its memory, work and collectives. The parts "weights", "cache" and "rows" are what its
        arguments hold of them, and "batch" is the other arguments.
    """

    name: str
    call: str
    times: int
    program: Program


@dataclasses.dataclass(frozen=True)
class Engine:
    """The compiled programs of an engine.

    shape: the sizes of the programs.
    weights: the bytes of the weights on a device.
    runs: the programs, each once.
    """

    shape: Shape
    weights: int
    runs: tuple[Run, ...]

    def of_call(self, *calls: str) -> list[Run]:
        """Return the programs that occur first in one of these calls."""
        return [run for run in self.runs if run.call in calls]


class _Function(NamedTuple):
    """A compiled function that calls of an engine run.

    name, call, times: as in `Run`.
    equation: its call in a jaxpr.
    held: of which kind each of its arguments is: "weights", "cache", "rows" or "batch".
    """

    name: str
    call: str
    times: int
    equation: JaxprEqn
    held: list[str]


def engine(
    serving: Serving, shape: Shape, *, mesh: Mesh, only: Collection[str] | None = None
) -> Engine:
    """Compile the programs of an engine.

    shape: the sizes of its programs, from `Serving.shape`.
    only: the names of the functions to compile; None compiles all.
    """
    with jax.set_mesh(mesh):
        attend = from_model.with_kernels(
            attention.get(serving.attention),
            serving.config,
            shape=shape,
            dtype=serving.dtype,
            mesh=mesh,
        )
        decoder = stored_weights.decoder(
            serving.config, serving.dtype, form=serving.weights, kernel=serving.kernel
        )
        found = _functions(decoder, attend, shape=shape)
    found = [x for x in found if only is None or x.name in only]
    runs = [Run(x.name, x.call, x.times, _compiled(x, mesh)) for x in found]
    return Engine(shape, nbytes(decoder), tuple(runs))


def _functions(
    decoder: model.Decoder, attend: attention.Attend, *, shape: Shape
) -> list[_Function]:
    """Return the compiled functions that an engine's calls run, each once."""

    def programs(decoder: model.Decoder) -> Programs:
        return Programs(decoder, attend, shape=shape)

    state = jax.eval_shape(lambda x: programs(x).state(), decoder)
    calls = {STATE: jax.make_jaxpr(lambda x, _: programs(x).state())(decoder, state)}
    for name, (method, arguments) in programs(decoder).idle().items():
        calls[name] = jax.make_jaxpr(
            lambda x, state, method=method, arguments=arguments: getattr(programs(x), method)(
                state, **arguments
            )
        )(decoder, state)
    kinds = [
        *["weights"] * len(jax.tree.leaves(decoder)),
        *["cache"] * len(jax.tree.leaves(state.layers)),
        *["rows"] * len(jax.tree.leaves(state.rows)),
    ]
    found: dict[int, _Function] = {}
    for call, traced in calls.items():
        of = dict(zip(traced.jaxpr.invars, kinds, strict=True))
        for equation in traced.jaxpr.eqns:
            if not isinstance(equation.params.get("jaxpr"), ClosedJaxpr):
                continue  # an operation outside a program, on a few numbers
            key = id(equation.params["jaxpr"])  # equal calls of a function have one jaxpr
            if key not in found:
                held = [
                    "batch" if isinstance(x, Literal) else of.get(x, "batch")
                    for x in equation.invars
                ]
                found[key] = _Function(equation.params["name"], call, 0, equation, held)
            found[key] = found[key]._replace(times=found[key].times + (found[key].call == call))
    return list(found.values())


def _compiled(function: _Function, mesh: Mesh) -> Program:
    """Compile a function for the devices of a mesh."""
    closed, donated = (function.equation.params[x] for x in ("jaxpr", "donated_invars"))

    def run(*arguments: jax.Array) -> list[jax.Array]:
        return jaxpr_as_fun(closed)(*arguments)

    run.__name__ = function.name
    compiled = jax.jit(run, donate_argnums=[i for i, given in enumerate(donated) if given])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in closed.in_avals]
    shapes = stored_weights.on_devices(mesh, shapes)
    sizes: dict[str, int] = dict.fromkeys(("weights", "cache", "rows", "batch"), 0)
    for kind, x in zip(function.held, shapes, strict=True):
        sizes[kind] += nbytes(x)
    return compile_program(lambda: compiled.trace(*shapes), mesh, held=sizes, layers=0)
