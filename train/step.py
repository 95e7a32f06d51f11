"""A training step: state, gradients, AdamW, on the mesh in force. No data, no loop, no files.

Weights and moments are float32 and split over the mesh as `sharding.spec` says; a step computes in
`dtype`. Layers are stacked and scanned, so a program's size does not depend on their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from qwen_jax import model, sharding
from qwen_jax.config import Config
from qwen_jax.model import Decoder
from qwen_jax.weights import SUMMED, Weight
from train.loss import Batch, Metrics, loss


def _projections(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """A `jax.checkpoint` policy: products with weights are stored; row-parallel ones summed, as
    their parts are neither needed nor, in a scan, possible to store.
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


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) after clipping the gradients by their global norm.

    learning_rate: a number, or a function of the step. Weights decay where they are matrices; norms
    and biases do not.
    """

    learning_rate: float | Callable[[Any], Any] = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def transform(self) -> optax.GradientTransformation:
        adamw = optax.adamw(
            self.learning_rate,
            self.b1,
            self.b2,
            self.eps,
            weight_decay=self.weight_decay,
            mask=_is_matrix,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def _is_matrix(tree: Any) -> Any:
    """For each leaf, whether it is multiplied with: those, and no others, have two sides."""

    def one(leaf: Weight) -> Any:
        letters = leaf.letters.removeprefix("L")
        return jax.tree.map(lambda _: len(letters) > 1 and "D" in letters, leaf)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Weight))


@struct.dataclass
class State:
    """decoder: stacked, float32; moments: the optimizer's state; step int32: updates made."""

    decoder: Decoder
    moments: Any
    step: jax.Array


def create_state(decoder: Decoder, optimizer: Optimizer) -> State:
    """The state before the first step, from a decoder on the mesh in force, stacked or not."""

    @jax.jit
    def begin(decoder: Decoder) -> State:
        stacked = decoder if isinstance(decoder.layers, model.Block) else model.stack(decoder)
        stacked = jax.tree.map(lambda x: x.astype(jnp.float32), stacked)
        return State(stacked, optimizer.transform().init(stacked), jnp.int32(0))

    return begin(decoder)


def abstract_state(config: Config, optimizer: Optimizer, mesh: Any) -> State:
    """The state as shapes and shardings on a mesh, whose devices need not be there."""
    with jax.set_mesh(mesh):
        decoder = model.abstract(config, jnp.float32)
        state = jax.eval_shape(functools.partial(create_state, optimizer=optimizer), decoder)
    return sharding.on_devices(mesh, state)


def abstract_batch(batch: int, length: int, mesh: Any) -> Batch:
    """A batch of `batch` rows as shapes and shardings on a mesh."""
    rows = sharding.named("BT", mesh)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32, sharding=rows)
    return Batch(ids, ids, ids, ids, weights)


@struct.dataclass
class Report:
    """What a step says, float32 scalars. gradient_norm: over all weights, before it is clipped."""

    metrics: Metrics
    gradient_norm: jax.Array


def make_step(
    optimizer: Optimizer,
    attend: Callable[..., Any],
    dtype: Any = jnp.bfloat16,
    remat: str = "full",
    sequence_parallel: bool = False,
) -> Any:
    """A jitted (State, Batch) -> (State, Report); the state passed in is consumed.

    remat: a name in `REMAT`. The other arguments are those of `loss`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: allowed are {', '.join(REMAT)}")
    transform = optimizer.transform()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, Report]:
        def of(decoder: Decoder) -> tuple[jax.Array, Metrics]:
            return loss(decoder, batch, attend, dtype, REMAT[remat], sequence_parallel)

        gradients, metrics = jax.grad(of, has_aux=True)(state.decoder)
        with jax.named_scope("optimizer"):
            report = Report(metrics, optax.tree.norm(gradients))
            decoder: Any = state.decoder  # optax names its trees by the types of their nodes
            updates, moments = transform.update(gradients, state.moments, decoder)
            decoder = optax.apply_updates(decoder, updates)
        return State(decoder, moments, state.step + 1), report

    return step
