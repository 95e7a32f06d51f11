"""The jitted training step: gradients of the loss, clipping and AdamW, on the current mesh.

Knows no files and no loop. Weights are float32, sharded as `sharding.spec` says; a step computes in
`dtype`. Layers are stacked and scanned, so a program's size does not depend on their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax import model
from qwen_jax.config import Config
from qwen_jax.leaves.weights import SUMMED, Weight
from qwen_jax.meshes import sharding
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import Decoder
from train.data.batch import Batch
from train.step.loss import Metrics, loss


def _projections(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """A `jax.checkpoint` policy that stores the results of products with weights. Row-parallel
    products are stored once summed: partial sums are not needed, and a scan cannot store them.
    """
    result = parameters.get("out_sharding")
    if result is not None and result.spec.unreduced:
        return False
    policies = jax.checkpoint_policies
    either = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SUMMED)
    )
    return either(primitive, *operands, **parameters)


# What the backward pass finds stored, beside the residual between blocks; the rest it recomputes.
REMAT: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "projections": _projections,
    "none": None,
}
FLOATS = ("float32", "bfloat16")  # of moments, and of gradients


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm.

    learning_rate: a constant, or a function of the step. weight_decay: of matrices; norms and
    biases do not decay. moments: their dtype between steps, "float32" or "bfloat16"; updates
    compute in float32. Raises ValueError for other `moments`, or a beta outside [0, 1).
    """

    learning_rate: float | Callable[[Any], Any] = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: str = "float32"

    def __post_init__(self) -> None:
        if self.moments not in FLOATS:
            raise ValueError(f"moments {self.moments!r}: allowed are {', '.join(FLOATS)}")
        for name, beta in {"b1": self.b1, "b2": self.b2}.items():
            if not 0 <= np.float32(beta) < 1:
                raise ValueError(f"{name} {beta:.9g}: at least 0, and in float32 below 1")

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step."""
        rate = self.learning_rate
        return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)

    def transform(
        self, finite: jax.Array | bool = True, step: jax.Array | int = 0
    ) -> optax.GradientTransformation:
        """Build optax's AdamW for one step of clipped gradients. If not `finite`, the betas are 1,
        so that gradients of 0 leave the moments unchanged. step: seeds the moments' rounding.
        """
        b1, b2 = (b if finite is True else jnp.where(finite, b, 1.0) for b in (self.b1, self.b2))
        adamw = optax.adamw(
            self.learning_rate,
            b1,
            b2,
            self.eps,
            weight_decay=self.weight_decay,
            mask=_is_matrix,
        )
        if self.moments == "float32":
            return adamw
        return _kept_in_bfloat16(adamw, jax.random.fold_in(jax.random.key(0), step))


def _kept_in_bfloat16(
    inner: optax.GradientTransformation, key: jax.Array
) -> optax.GradientTransformation:
    """Store the state of `inner` in bfloat16 between steps, stochastically rounded with `key`.

    Rounding to nearest would lose every change below 2**-9 of a moment: at a beta 2 of 0.999, a
    second moment would never shrink.
    """

    def cast(state: Any, one: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
        leaves, tree = jax.tree.flatten(state)
        keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        zipped = zip(leaves, floats, keys, strict=True)
        return tree.unflatten([one(x, k) if floating else x for x, floating, k in zipped])

    def init(params: Any) -> Any:
        return cast(inner.init(params), lambda x, _: x.astype(jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = cast(state, lambda x, _: x.astype(jnp.float32))
        updates, state = inner.update(updates, wide, params)
        return updates, cast(state, _stochastically_rounded)

    return optax.GradientTransformation(init, update)


def _stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up or down at random so that the expected value is x; a value that
    bfloat16 holds stays. The noise depends on the key and the element's index, not on the mesh.
    """
    spec = jax.typeof(x).sharding.spec
    noise = jax.random.bits(key, x.shape, jnp.uint32, out_sharding=spec) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _is_matrix(tree: Any) -> Any:
    """The weight decay mask: True for each weight with two or more axes besides the layers'."""

    def one(leaf: Weight) -> Any:
        return jax.tree.map(lambda _: len(leaf.letters.removeprefix("L")) > 1, leaf)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Weight))


@struct.dataclass
class State:
    """The state of a training run between steps.

    weights: the trained parameters, float32: a stacked decoder, or parameters attached to one.
    moments: the optimizer's state. step: int32 [], the number of updates so far.
    """

    weights: Any
    moments: Any
    step: jax.Array


@functools.partial(jax.jit, static_argnames="optimizer")
def create_state(decoder: Decoder, optimizer: Optimizer) -> State:
    """Create the state before the first step, from a decoder on the current mesh."""
    return _begin(stacked(decoder), optimizer)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames="weights")
def state_of(weights: Any, optimizer: Optimizer) -> State:
    """Create the state before the first step from any tree of weights, which are donated."""
    return _begin(weights, optimizer)


def _begin(weights: Any, optimizer: Optimizer) -> State:
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    return State(weights, optimizer.transform().init(weights), jnp.int32(0))


def stacked(decoder: Decoder) -> Decoder:
    """The decoder with its layers stacked along a leading axis, as a step takes it."""
    return decoder if isinstance(decoder.layers, model.Block) else model.stack(decoder)


def abstract_state(config: Config, optimizer: Optimizer, *, mesh: Any) -> State:
    """The training state as shapes and shardings on `mesh`, whose devices may be absent."""
    with jax.set_mesh(mesh):
        decoder = model.abstract(config, jnp.float32)
        state = jax.eval_shape(functools.partial(create_state, optimizer=optimizer), decoder)
    return sharding.on_devices(mesh, state)


def abstract_batch(batch: int, length: int, *, mesh: Any) -> Batch:
    """A batch of `batch` rows of `length` tokens, as shapes and shardings on `mesh`."""
    rows = sharding.named("BT", mesh)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32, sharding=rows)
    return Batch(ids, ids, ids, ids, weights)


@struct.dataclass
class Report:
    """The metrics of a step, with scalars for the log.

    gradient_norm: the global norm of all gradients, before clipping. finite: whether that norm and
    the loss are finite and the step's `so_far` was true; if not, the state is unchanged.
    """

    metrics: Metrics
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array


def make_step(
    optimizer: Optimizer,
    attend: Callable[..., Any],
    *,
    dtype: Any = jnp.bfloat16,
    remat: str = "full",
    sequence_parallel: bool = False,
    accumulate: int = 1,
    z_loss: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    attach: Callable[[Any, Any, jax.Array | None], Decoder] | None = None,
    gradient_dtype: str = "float32",
) -> Any:
    """Build the jitted training step: (State, Batch, base, so_far) -> (State, Report).

    The input state is donated. so_far: bool, True by default; if it is False, the step changes
    nothing. Pass the previous step's `Report.finite`, and no step changes the state after a NaN or
    infinite loss or gradient.

    remat: a name in `REMAT`. accumulate: the number of parts into which a batch's rows are split,
    computed one after the other; their gradients add up to the batch's. dropout: the rate; masks
    follow from `seed` and the step. attach: (weights, base, key) -> decoder, if the weights are no
    decoder but adapters; base: the frozen weights, else None. gradient_dtype: the dtype in which
    the mesh sums gradients: "float32", or "bfloat16" if `dtype` is that. The other arguments are
    those of `loss.loss`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: allowed are {', '.join(REMAT)}")
    if gradient_dtype not in ("float32", *({jnp.dtype(dtype).name} & {*FLOATS})):
        raise ValueError(
            f"gradient_dtype {gradient_dtype!r}: float32, or bfloat16 where dtype is bfloat16"
        )

    def of(weights: Any, batch: Batch, total: Any, key: Any, base: Any) -> tuple[Any, Metrics]:
        # Gradients are summed in the dtype of the leaves that they are of (`moves.unshard`).
        weights = jax.tree.map(lambda x: x.astype(gradient_dtype), weights)
        decoder = weights if attach is None else attach(weights, base, jax.random.fold_in(key, 1))
        drop = Dropout(jax.random.fold_in(key, 0), dropout) if dropout else None
        return loss(
            decoder,
            batch,
            attend=attend,
            dtype=dtype,
            remat=REMAT[remat],
            sequence_parallel=sequence_parallel,
            total=total,
            z_loss=z_loss,
            dropout=drop,
        )

    def gradients(weights: Any, batch: Batch, key: Any, base: Any) -> tuple[Any, Metrics]:
        grad = jax.grad(of, has_aux=True)
        if accumulate == 1:
            return grad(weights, batch, None, key, base)
        total = jnp.sum(batch.weights)

        def add(so_far: Any, given: tuple[Batch, Any]) -> tuple[Any, None]:
            part, number = given
            found = grad(weights, part, total, jax.random.fold_in(key, number), base)
            return jax.tree.map(jnp.add, so_far, found), None

        zeros = jnp.float32(0)
        begin = jax.tree.map(jnp.zeros_like, weights), Metrics(zeros, zeros, zeros)
        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        return jax.lax.scan(add, begin, (parts, jnp.arange(accumulate)))[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: State, batch: Batch, base: Any = None, so_far: Any = True
    ) -> tuple[State, Report]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        found, metrics = gradients(state.weights, batch, key, base)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(found)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss) & so_far
            report = Report(metrics, norm, optimizer.rate(state.step), finite)

            new = _updated(state, found, norm=norm, finite=finite, optimizer=optimizer)
        return new, report

    return step


def _updated(
    state: State, gradients: Any, *, norm: jax.Array, finite: jax.Array, optimizer: Optimizer
) -> State:
    """Return the state after AdamW's update; if not `finite`, the same state. Each array depends on
    its own old values alone, so XLA updates it in place; choosing between states would hold two.
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
    attend: Callable[..., Any],
    dtype: Any = jnp.bfloat16,
    sequence_parallel: bool = False,
    attach: Callable[[Any, Any, jax.Array | None], Decoder] | None = None,
) -> Any:
    """Build a jitted (weights, Batch, base) -> Metrics, without dropout; else as `make_step`."""

    @jax.jit
    def evaluate(weights: Any, batch: Batch, base: Any = None) -> Metrics:
        decoder = weights if attach is None else attach(weights, base, None)
        return loss(
            decoder,
            batch,
            attend=attend,
            dtype=dtype,
            remat=None,
            sequence_parallel=sequence_parallel,
        )[1]

    return evaluate


def _parts(x: jax.Array, count: int) -> jax.Array:
    """Split the rows of a batch, [B, T] -> [count, B/count, T]; every row stays on its device."""
    rows, tokens = jax.typeof(x).sharding.spec
    batch, length = x.shape
    shape = (batch // count, count, length)
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=P(rows, None, tokens)), 1, 0)
