"""Weights with named axes: drawing them at random, finding them by path, and products with them.

Every weight has its output axes first, as in PyTorch, so that a checkpoint converts without a
transposition and a matrix-vector product on a CPU reads whole matrix rows. Nothing here knows of
layers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from qwen_jax.meshes import sharding

_Tree = TypeVar("_Tree")
SUMMED = "summed"  # `jax.checkpoint` policies know a row-parallel product by this name


class Weight(nnx.Param):
    """One array of a decoder. Its metadata `letters` names its axes, and so its partitioning."""


class Leaf:
    """The base class of weights made of several arrays. Each kind has its own `product`."""


class Maker:
    """Draws the initial weights of a decoder, each with a PRNG key of its own.

    sizes: the lengths of array axes by letter.
    key: the PRNG key from which the weights' keys are derived, in the order of drawing.
    dtype: the dtype of the weights.
    """

    def __init__(self, sizes: Mapping[str, int], key: Key[Array, ""], *, dtype: DTypeLike):
        self._sizes, self._key, self._dtype = sizes, key, dtype
        self._drawn = 0

    def normal(self, letters: str, std: float) -> Weight:
        """Draw a weight with the axes `letters` from N(0, std^2).

        It is drawn in float32 and cast to the maker's dtype.
        """
        shape, spec = self._place(letters)
        drawn = jax.random.normal(self._next(), shape, jnp.float32, out_sharding=spec)
        return Weight((std * drawn).astype(self._dtype), letters=letters)

    def uniform(self, letters: str) -> Weight:
        """Draw a weight with the axes `letters` from U(-1/sqrt(n), 1/sqrt(n)).

        n is the length of its last axis.
        """
        shape, spec = self._place(letters)
        bound = shape[-1] ** -0.5
        drawn = jax.random.uniform(
            self._next(), shape, jnp.float32, -bound, bound, out_sharding=spec
        )
        return Weight(drawn.astype(self._dtype), letters=letters)

    def _next(self) -> Key[Array, ""]:
        """Return the PRNG key of the next weight to draw."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)

    def full(self, letters: str, value: float) -> Weight:
        """Make a weight with the axes `letters` whose elements all equal `value`."""
        shape, spec = self._place(letters)
        return Weight(jnp.full(shape, value, self._dtype, out_sharding=spec), letters=letters)

    def _place(self, letters: str) -> tuple[tuple[int, ...], P]:
        """Return the shape and the partitioning of a weight with the axes `letters`."""
        shape = tuple(self._sizes[letter] for letter in letters)
        return shape, sharding.spec(letters, self._sizes)


def contract(
    equation: str,
    x: Float[Array, "B T _"],
    *,
    weight: Weight | Leaf,
    out: P | None = None,
    **kwargs: Any,
) -> Float[Array, "B T _"]:
    """Multiply an activation x by a weight of any kind, as an einsum equation says.

    equation: an einsum equation such as "BTD,FD->BTF".
    weight: a leaf of any kind that `product` knows.
    out: the partitioning of the result of a row-parallel product, which its operands do not
        determine; None for other products.

    A product in float32 is computed in full float32 on every backend.
    """
    return product(weight, equation, x, out, **kwargs)


@functools.singledispatch
def product(
    weight: Weight | Leaf,
    equation: str,
    x: Float[Array, "B T _"],
    out: P | None,
    **kwargs: Any,
) -> Float[Array, "B T _"]:
    """Multiply an activation x by one kind of weight. Each kind registers its own implementation.

    equation: an einsum equation such as "BTD,FD->BTF".
    out: the partitioning of the result of a row-parallel product; None for other products.

    Raises TypeError for a kind without an implementation.
    """
    raise TypeError(f"{type(weight).__name__} is no kind of leaf")


@product.register
def _(weight: Weight, equation: str, x: jax.Array, out: P | None, **kwargs: Any) -> jax.Array:
    w, preferred = weight[...], kwargs.get("preferred_element_type")

    def multiply(into: P | None) -> jax.Array:
        if jnp.promote_types(w.dtype, x.dtype) != x.dtype:
            return _rounded_product(x, w, equation, into, preferred)
        return _einsum(equation, x, y=w, out=into, preferred=preferred)

    *kept, summed = jax.typeof(x).sharding.spec.partitions
    apart = frozenset(sharding.entries(summed))
    if out is None or not apart:
        return multiply(out)
    # Each device has a part of the sum. The type says `unreduced`, so that the gradient is gathered
    # before it is multiplied. The name lets remat policies that keep products keep the sum instead.
    parts = multiply(P(*kept, None, unreduced=apart))
    return checkpoint_name(jax.reshard(parts, out), SUMMED)


def scaled_product(
    weight: Weight | Leaf,
    scale: Float[Array, " outputs"] | float,
    *,
    equation: str,
    x: jax.Array,
    out: P | None,
    **kwargs: Any,
) -> jax.Array:
    """Multiply an activation x by a weight, and the result by a scale.

    scale: a number, or an array [outputs] of any float dtype.
    equation: an einsum equation such as "BTD,FD->BTF".
    out: the partitioning of the result of a row-parallel product; None for other products.

    float16 ends at 65504, and a sum may exceed it although its scaled value is small, so float16
    sums stay in float32 until they are scaled. Other dtypes scale the rounded sum, which then
    travels between devices in its own width.
    """
    dtype = kwargs.pop("preferred_element_type", x.dtype)
    wide = jnp.float32 if dtype == jnp.float16 else dtype
    sums = product(weight, equation, x, out, preferred_element_type=wide, **kwargs)
    return (sums * jnp.asarray(scale, wide)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rounded_product(
    x: jax.Array, w: jax.Array, equation: str, out: P | None, preferred: DTypeLike | None
) -> jax.Array:
    """Multiply x by a weight w of a wider dtype, which is rounded to x's dtype first.

    out, preferred: the partitioning and the dtype of the result, or None, as in `jnp.einsum`.

    The weight's gradient has the weight's own dtype: products of rounded operands are summed
    unrounded over tokens here, and over the mesh in `gathering.unshard`.
    """
    return _einsum(equation, x, y=w.astype(x.dtype), out=out, preferred=preferred)


def _einsum(
    equation: str, x: jax.Array, *, y: jax.Array, out: P | None, preferred: DTypeLike | None
) -> jax.Array:
    """Compute the einsum of x and y, in full float32 if x is float32."""
    return jnp.einsum(
        equation,
        x,
        y,
        out_sharding=out,
        precision=precision(x),
        preferred_element_type=preferred,
    )


def _rounded_product_forward(
    x: jax.Array, w: jax.Array, equation: str, out: P | None, preferred: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Compute `_rounded_product`, and what its gradients need."""
    rounded, no_weights = w.astype(x.dtype), jnp.zeros(0, w.dtype)  # empty: it carries the dtype
    return _einsum(equation, x, y=rounded, out=out, preferred=preferred), (x, rounded, no_weights)


def _rounded_product_backward(
    equation: str,
    out: P | None,
    preferred: DTypeLike | None,
    saved: tuple[jax.Array, jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The backward pass of `_rounded_product`: the gradients of x and of the weight.

    saved: x, the rounded weight, and an empty array in the weight's own dtype. dy: the result's
    gradient. Each gradient has the dtype of its array.
    """
    x, w, like = saved
    given, leaf, result = equation.replace("->", ",").split(",")
    dy = dy.astype(x.dtype)
    dx = _einsum(f"{result},{leaf}->{given}", dy, y=w, out=_of_gradient(x), preferred=None)
    dw = _einsum(f"{result},{given}->{leaf}", dy, y=x, out=_of_gradient(w), preferred=like.dtype)
    # Without the barrier, XLA's CPU backend folds transpositions into this product after it has
    # chosen how to compute it, and then fails.
    return dx, jax.lax.optimization_barrier(dw)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _of_gradient(x: jax.Array) -> P:
    """Return the partitioning of the gradient of x.

    The gradient is a partial sum over the mesh axes that x's type calls `reduced`.
    """
    spec = jax.typeof(x).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """Return the precision of products with x: the highest for float32, else None, jax's default.

    GPUs and TPUs otherwise multiply float32 in TF32 or bfloat16.
    """
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def named_leaves(tree: PyTree) -> dict[str, Weight]:
    """Return a module's weights by path, such as `layers.0.attn.q`, in the order of the tree."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    return {".".join(_key(step) for step in path): leaf for path, leaf in found}


def map_leaves(leaf: Callable[[str, Weight], PyTree], tree: _Tree) -> _Tree:
    """Return the same module with each weight, of any kind, replaced by `leaf(path, weight)`."""

    def put(path: tuple[object, ...], x: Weight) -> PyTree:
        return leaf(".".join(_key(step) for step in path), x)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=_is_leaf)


def _is_leaf(x: object) -> bool:
    """Return whether x is a whole leaf of a decoder, below which paths do not go."""
    return isinstance(x, Weight | Leaf)


def _key(step: object) -> str:
    """Return the name of one step of a path in a jax tree: an attribute, a key or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)
