"""AdamW on clipped gradients, with moments in float32 or, stochastically rounded, in bfloat16.

Builds the optimizer for optax and knows no model: it sees a tree of `Weight`s and their gradients.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from qwen_jax.leaves.weights import Weight

FLOATS = ("float32", "bfloat16")  # the dtypes that moments and summed gradients may have


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm.

    learning_rate: a constant, or a function of the step. weight_decay: of matrices; norms and
    biases do not decay. moments: their dtype between steps, "float32" or "bfloat16"; updates
    compute in float32. Raises ValueError for other `moments`, or a beta outside [0, 1).
    """

    learning_rate: float | optax.Schedule = 3e-4
    _: dataclasses.KW_ONLY
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: str = "float32"

    def __post_init__(self) -> None:
        """Raise ValueError for a dtype of the moments or a beta that is not allowed."""
        if self.moments not in FLOATS:
            raise ValueError(f"moments {self.moments!r}: allowed are {', '.join(FLOATS)}")
        for name, beta in {"b1": self.b1, "b2": self.b2}.items():
            if not 0 <= np.float32(beta) < 1:
                raise ValueError(f"{name} {beta:.9g}: at least 0, and in float32 below 1")

    def rate(self, step: jax.Array) -> jax.Array:
        """Return the learning rate of a step."""
        rate = self.learning_rate
        return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)

    def transform(
        self, finite: jax.Array | bool = True, step: jax.Array | int = 0
    ) -> optax.GradientTransformation:
        """Build optax's AdamW for one step of clipped gradients.

        finite: whether loss and gradients are finite; if not, the betas are 1, so that gradients of
            0 leave the moments unchanged.
        step: the number of the step, which seeds the moments' rounding.
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

    def cast(state: PyTree, one: Callable[[jax.Array, jax.Array], jax.Array]) -> PyTree:
        """Apply `one` to each float array of a state, with a key of its own."""
        leaves, tree = jax.tree.flatten(state)
        keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        zipped = zip(leaves, floats, keys, strict=True)
        return tree.unflatten([one(x, k) if floating else x for x, floating, k in zipped])

    def init(params: PyTree) -> PyTree:
        return cast(inner.init(params), lambda x, _: x.astype(jnp.bfloat16))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        wide = cast(state, lambda x, _: x.astype(jnp.float32))
        updates, state = inner.update(updates, wide, params)
        return updates, cast(state, _stochastically_rounded)

    return optax.GradientTransformation(init, update)


def _stochastically_rounded(x: Float[Array, "..."], key: jax.Array) -> Float[Array, "..."]:
    """Round float32 to bfloat16, up or down at random, so that the expected value is x.

    A value that bfloat16 holds stays. The noise depends on the key and the element's index, not on
    the mesh.
    """
    spec = jax.typeof(x).sharding.spec
    noise = jax.random.bits(key, x.shape, jnp.uint32, out_sharding=spec) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _is_matrix(tree: PyTree[Weight]) -> PyTree[bool]:
    """Return the weight decay mask: True for weights with two or more axes besides the layers'."""

    def one(leaf: Weight) -> PyTree[bool]:
        return jax.tree.map(lambda _: len(leaf.letters.removeprefix("L")) > 1, leaf)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Weight))
