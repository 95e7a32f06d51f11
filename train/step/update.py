"""Builds the jitted training step: gradients of the loss, clipping and AdamW, on the current mesh.

Knows no files and no loop. Weights are float32, sharded as `sharding.spec` says; a step computes in
`dtype`. Layers are stacked and scanned, so a program's size does not depend on their number.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from qwen_jax import model
from qwen_jax.attention import Attend
from qwen_jax.config import Config
from qwen_jax.leaves.weights import SUMMED
from qwen_jax.meshes import sharding
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import Decoder
from train.data.batch import Batch
from train.step.loss import Metrics, loss
from train.step.optimizer import FLOATS, Optimizer

# Makes a decoder of the trained weights, the frozen weights (or None), and a key for dropout.
Attach = Callable[[PyTree, PyTree, jax.Array | None], Decoder]


def _projections(primitive: object, *operands: object, **parameters: Any) -> bool:
    """Say, as a `jax.checkpoint` policy, whether a result is a product with weights, to be stored.

    Row-parallel products are stored after summation: partial sums are not needed, and a scan cannot
    store them.
    """
    result = parameters.get("out_sharding")
    if result is not None and result.spec.unreduced:
        return False
    policies = jax.checkpoint_policies
    either = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SUMMED)
    )
    return either(primitive, *operands, **parameters)


# The policies that say which results the forward pass stores for the backward pass, beside the
# residual between blocks; all others are recomputed.
REMAT: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "projections": _projections,
    "none": None,
}


@struct.dataclass
class State:
    """The state of a training run between steps.

    weights: the trained parameters, float32: a stacked decoder, or adapters. moments: the
    optimizer's state. step: int32 [], the number of updates so far.
    """

    weights: PyTree
    moments: optax.OptState
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames="optimizer")
def create_state(decoder: Decoder, optimizer: Optimizer) -> State:
    """Create the state before the first step, from a decoder on the current mesh."""
    return _before_training(stacked(decoder), optimizer)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames="weights")
def state_of(weights: PyTree, optimizer: Optimizer) -> State:
    """Create the state before the first step from any tree of weights, whose memory is reused."""
    return _before_training(weights, optimizer)


def _before_training(weights: PyTree, optimizer: Optimizer) -> State:
    """Return the state with these weights, cast to float32, and fresh moments."""
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    return State(weights, optimizer.transform().init(weights), jnp.int32(0))


def stacked(decoder: Decoder) -> Decoder:
    """Return a decoder with its layers stacked along a leading axis, as a step takes it."""
    return decoder if isinstance(decoder.layers, model.Block) else model.stack(decoder)


def abstract_state(config: Config, optimizer: Optimizer, *, mesh: Mesh) -> State:
    """Return the training state as shapes and shardings on `mesh`, whose devices may be absent."""
    with jax.set_mesh(mesh):
        decoder = model.abstract(config, jnp.float32)
        state = jax.eval_shape(functools.partial(create_state, optimizer=optimizer), decoder)
    return sharding.on_devices(mesh, state)


def abstract_batch(batch: int, length: int, *, mesh: Mesh) -> Batch:
    """Return a batch of `batch` rows of `length` tokens, as shapes and shardings on `mesh`."""
    rows = sharding.named("BT", mesh)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32, sharding=rows)
    return Batch(ids, ids, ids, ids, weights)


@struct.dataclass
class Report:
    """The metrics of a step, with further scalars for the log.

    gradient_norm: the global norm of all gradients, before clipping. finite: whether this norm and
    the loss are finite and the step's `so_far` was true; if not, the state is unchanged.
    """

    metrics: Metrics
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


def make_step(
    optimizer: Optimizer,
    attend: Attend,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    remat: str = "full",
    sequence_parallel: bool = False,
    accumulate: int = 1,
    z_loss: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    attach: Attach | None = None,
    gradient_dtype: str = "float32",
) -> jax.stages.Wrapped:
    """Build the jitted training step: (State, Batch, base, so_far) -> (State, Report).

    The step donates its State. base: the frozen weights below adapters, else None. so_far: bool [],
    by default True; if it is False, the step changes nothing. Pass the previous step's
    `Report.finite`, and no step changes the state after a NaN or infinite loss or gradient.

    remat: a name in `REMAT`. accumulate: the number of parts of a batch that are computed in turn,
    to add their gradients. dropout: the rate; masks depend on `seed` and the step. attach:
    (weights, base, key) -> decoder, if the weights are adapters. gradient_dtype: the dtype in which
    the mesh sums gradients, "float32" or, if `dtype` is that, "bfloat16". Other arguments:
    `loss.loss`.
    """
    _check(remat, gradient_dtype, dtype=dtype)
    options: dict[str, Any] = {"attend": attend, "dtype": dtype, "remat": REMAT[remat]}
    options |= {"sequence_parallel": sequence_parallel, "z_loss": z_loss}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: State, batch: Batch, base: PyTree = None, so_far: jax.Array | bool = True
    ) -> tuple[State, Report]:
        def objective(
            weights: PyTree, part: Batch, total: jax.Array | None, key: jax.Array
        ) -> tuple[jax.Array, Metrics]:
            # The mesh sums gradients in the dtype of their leaves (`gathering.unshard`).
            weights = jax.tree.map(lambda x: x.astype(gradient_dtype), weights)
            decoder = attach(weights, base, jax.random.fold_in(key, 1)) if attach else weights
            drop = Dropout(jax.random.fold_in(key, 0), dropout) if dropout else None
            return loss(decoder, part, total=total, dropout=drop, **options)

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = _gradients(
            objective, state.weights, batch=batch, key=key, parts=accumulate
        )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss) & so_far
            report = Report(metrics, norm, optimizer.rate(state.step), finite)
            new = _updated(state, gradients, norm=norm, finite=finite, optimizer=optimizer)
        return new, report

    return step


def _check(remat: str, gradient_dtype: str, *, dtype: DTypeLike) -> None:
    """Raise ValueError for options of `make_step` that are not allowed."""
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: allowed are {', '.join(REMAT)}")
    if gradient_dtype not in ("float32", *({jnp.dtype(dtype).name} & {*FLOATS})):
        raise ValueError(
            f"gradient_dtype {gradient_dtype!r}: float32, or bfloat16 where dtype is bfloat16"
        )


def _gradients(
    objective: Callable[..., tuple[jax.Array, Metrics]],
    weights: PyTree,
    *,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[PyTree, Metrics]:
    """Return the gradients of a batch's loss and its metrics, as the sums over parts of its rows.

    objective: (weights, batch, total, key) -> (loss, metrics), of the whole batch, or of one part
    if `total` is the sum of the whole batch's weights. key: for dropout, of which each part gets
    its own.
    """
    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        return gradient(weights, batch, None, key)
    total = jnp.sum(batch.weights)

    def add(sums: PyTree, numbered: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        part, number = numbered
        found = gradient(weights, part, total, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, sums, found), None

    zero = jnp.float32(0)
    zeros = jax.tree.map(jnp.zeros_like, weights), Metrics(zero, zero, zero)
    split = jax.tree.map(lambda x: _parts(x, parts), batch)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _updated(
    state: State, gradients: PyTree, *, norm: jax.Array, finite: jax.Array, optimizer: Optimizer
) -> State:
    """Return the state after AdamW's update; if not `finite`, the old state.

    Each array depends on its own old values alone, so XLA updates it in place; choosing between two
    states would hold both. norm: the global norm of the gradients.
    """
    clip_norm = optimizer.clip_norm

    def clipped(g: jax.Array) -> jax.Array:
        # Not a product with a factor: libtpu then keeps all gradients in float32 (1.7 GB more a
        # device: 72B, fsdp 512, v5p).
        shorter = jnp.where(norm < clip_norm, g, g / norm * clip_norm)
        return jnp.where(finite, shorter, 0)

    gradients = jax.tree.map(clipped, gradients)
    transform = optimizer.transform(finite, state.step)
    updates, moments = transform.update(gradients, state.moments, state.weights)
    weights = jax.tree.map(lambda w, u: jnp.where(finite, w + u, w), state.weights, updates)

    def counted(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.integer) else new

    moments = jax.tree.map(counted, moments, state.moments)
    return State(weights, moments, state.step + finite.astype(jnp.int32))


def make_evaluation(
    attend: Attend,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    sequence_parallel: bool = False,
    attach: Attach | None = None,
) -> jax.stages.Wrapped:
    """Build the jitted evaluation (weights, Batch, base) -> Metrics, without dropout.

    The arguments are those of a training step (`make_step`).
    """

    @jax.jit
    def evaluate(weights: PyTree, batch: Batch, base: PyTree = None) -> Metrics:
        decoder = attach(weights, base, None) if attach else weights
        return loss(
            decoder, batch, attend=attend, dtype=dtype, sequence_parallel=sequence_parallel
        )[1]

    return evaluate


def _parts(x: Shaped[Array, "B T"], count: int) -> Shaped[Array, "parts rows T"]:
    """Split a batch's rows, [B, T] -> [count, B/count, T]; every row stays on its device."""
    rows, tokens = jax.typeof(x).sharding.spec
    batch, length = x.shape
    shape = (batch // count, count, length)
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=P(rows, None, tokens)), 1, 0)
