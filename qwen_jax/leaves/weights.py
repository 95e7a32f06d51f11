"""Weights as named leaves: how they are drawn, named and multiplied with. Knows no layer.

Every leaf has its output axes first, as PyTorch stores them, so that a checkpoint converts without
a transposition and a matrix-vector product on a CPU reads whole rows.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_jax.meshes import sharding

SUMMED = "summed"  # the name of a row-parallel product, for policies of `jax.checkpoint`


class Weight(nnx.Param):
    """A leaf of a decoder; its metadata `letters` names its axes, and so its partitioning."""


class Leaf:
    """A leaf that is made of several arrays; `product` knows how it multiplies."""


class Maker:
    """Draws the leaves of a decoder: sizes by axis letter, storage dtype and PRNG in one place."""

    def __init__(self, sizes: Mapping[str, int], key: jax.Array, dtype: Any):
        self._sizes, self._key, self._dtype = sizes, key, dtype
        self._drawn = 0

    def normal(self, letters: str, std: float) -> Weight:
        """A leaf drawn from N(0, std^2) in float32, then stored as the dtype asked for."""
        shape, spec = self._place(letters)
        drawn = jax.random.normal(self._next(), shape, jnp.float32, out_sharding=spec)
        return Weight((std * drawn).astype(self._dtype), letters=letters)

    def uniform(self, letters: str) -> Weight:
        """A leaf drawn from U(-1/sqrt(n), 1/sqrt(n)), n the length of its last axis."""
        shape, spec = self._place(letters)
        bound = shape[-1] ** -0.5
        drawn = jax.random.uniform(
            self._next(), shape, jnp.float32, -bound, bound, out_sharding=spec
        )
        return Weight(drawn.astype(self._dtype), letters=letters)

    def _next(self) -> jax.Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)

    def full(self, letters: str, value: float) -> Weight:
        """A leaf of one value."""
        shape, spec = self._place(letters)
        return Weight(jnp.full(shape, value, self._dtype, out_sharding=spec), letters=letters)

    def _place(self, letters: str) -> tuple[tuple[int, ...], P]:
        shape = tuple(self._sizes[letter] for letter in letters)
        return shape, sharding.spec(letters, self._sizes)


def contract(
    equation: str, x: jax.Array, weight: Any, out: P | None = None, **kwargs: Any
) -> jax.Array:
    """einsum of an activation with a weight. float32 is computed as float32 on every backend.

    equation: as "BTD,FD->BTF". out: the partitioning of the result of a row-parallel product, whose
    operands leave it open. weight: a leaf of any kind that `product` knows.
    """
    return product(weight, equation, x, out, **kwargs)


@functools.singledispatch
def product(weight: Any, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    """`contract` by the kind of leaf; each kind registers its own."""
    raise TypeError(f"{type(weight).__name__} is no kind of leaf")


@product.register
def _(weight: Weight, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    w, preferred = weight[...], kwargs.get("preferred_element_type")

    def multiply(into: P | None) -> jax.Array:
        if jnp.promote_types(w.dtype, x.dtype) != x.dtype:
            return _rounded_product(x, w, equation, into, preferred)
        return _einsum(equation, x, w, into, preferred)

    *kept, summed = jax.typeof(x).sharding.spec.partitions
    apart = frozenset(sharding.entries(summed))
    if out is None or not apart:
        return multiply(out)
    # Each device has a part of the sum; that the parts are still to be added is said, so that the
    # gradient is gathered before it is multiplied. Whoever keeps products for the backward pass
    # keeps the sum, by its name.
    parts = multiply(P(*kept, None, unreduced=apart))
    return checkpoint_name(jax.reshard(parts, out), SUMMED)


def scaled_product(
    weight: Any, scale: Any, equation: str, x: jax.Array, out: P | None, **kwargs: Any
) -> jax.Array:
    """`product` times a scale: a number, or an array [outputs] of any float dtype.

    float16 ends at 65504, which a sum may pass whose scaled value is small: it is kept in float32
    until it is scaled. Other dtypes scale the rounded sum, so that it travels in its own width.
    """
    dtype = kwargs.pop("preferred_element_type", x.dtype)
    wide = jnp.float32 if dtype == jnp.float16 else dtype
    sums = product(weight, equation, x, out, preferred_element_type=wide, **kwargs)
    return (sums * jnp.asarray(scale, wide)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rounded_product(
    x: jax.Array, w: jax.Array, equation: str, out: P | None, preferred: Any
) -> jax.Array:
    """einsum of x with a weight of a wider dtype, which is rounded to that of x.

    The weight's gradient comes in its own dtype: the products of rounded operands add up unrounded,
    over tokens here, and over the mesh in `sharding.unshard`.
    """
    return _einsum(equation, x, w.astype(x.dtype), out, preferred)


def _einsum(equation: str, x: jax.Array, y: jax.Array, out: P | None, preferred: Any) -> jax.Array:
    settings: Any = {"precision": precision(x), "preferred_element_type": preferred}
    return jnp.einsum(equation, x, y, out_sharding=out, **settings)


def _rounded_product_forward(
    x: jax.Array, w: jax.Array, equation: str, out: P | None, preferred: Any
) -> tuple[jax.Array, Any]:
    rounded, no_weights = w.astype(x.dtype), jnp.zeros(0, w.dtype)  # the latter says the dtype
    return _einsum(equation, x, rounded, out, preferred), (x, rounded, no_weights)


def _rounded_product_backward(
    equation: str, out: P | None, preferred: Any, saved: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, like = saved
    given, leaf, result = equation.replace("->", ",").split(",")
    dy = dy.astype(x.dtype)
    dx = _einsum(f"{result},{leaf}->{given}", dy, w, _of_gradient(x), None)
    dw = _einsum(f"{result},{given}->{leaf}", dy, x, _of_gradient(w), like.dtype)
    # XLA's CPU backend otherwise folds transpositions into this product after it has decided how to
    # compute it, and then cannot.
    return dx, jax.lax.optimization_barrier(dw)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _of_gradient(x: jax.Array) -> P:
    """The partitioning of the gradient of x."""
    spec = jax.typeof(x).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """GPUs and TPUs otherwise multiply float32 in TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def named_leaves(tree: Any) -> dict[str, Weight]:
    """The leaves of a module by path, `layers.0.attn.q` for instance, in the order of the tree."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    return {".".join(_key(step) for step in path): leaf for path, leaf in found}


def map_leaves(leaf: Callable[[str, Weight], Any], tree: Any) -> Any:
    """The same module with every leaf, of whatever kind, replaced by `leaf(path, leaf)`."""

    def put(path: Any, x: Weight) -> Any:
        return leaf(".".join(_key(step) for step in path), x)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=_is_leaf)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Weight | Leaf)


def _key(step: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)
