"""The shared parts of the flash attention kernels: refused calls, visible blocks, the derivative.

A `Body` is a forward and a backward kernel for one kind of hardware. The softmax is in base 2: a
score is q k^T scale log2(e), so that one exponential instruction serves. Neither this module nor a
body holds an array of queries times keys (FlashAttention-2, arXiv 2307.08691).

The scale comes in two parts. H**-0.5 multiplies the float32 scores (`score_factor`). The rest,
which is 1 without LogN and YaRN, multiplies the query, rounded to its dtype (`factored`). So a LogN
query is rounded as in the original PyTorch code, and a query without LogN is not rounded at all.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.kernels.mask import Mask

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
LOG2E = math.log2(math.e)
# Scores and running maxima before the first visible key. A masked score is far below the initial
# maximum, so that its exponential is 0 even in a row that has seen nothing: no NaN, no branch.
MASKED = -1e30
LOWEST = -1e20
_NEVER = 2**30  # beyond every position
_NO_SEGMENT = jnp.iinfo(jnp.int32).min  # the segment of padding keys, in `places`
_MASKED_LSE = 1e30  # the log-sum-exp that backward bodies get for a query that sees no key

# What a kernel's body reads and writes: blocks and barriers, whose classes jax keeps private.
Ref = Any


@runtime_checkable
class Quantised(Protocol):
    """The interface of 8-bit keys or values, as `leaves.int8.Int8`, which describes its fields."""

    @property
    def values(self) -> jax.Array: ...
    @property
    def scale(self) -> jax.Array: ...
    @property
    def zero(self) -> jax.Array | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """Compute the float array that they stand for."""
        ...


KeysOrValues = Float[Array, "B S K H"] | Quantised  # in the order that attention takes
# The factor on each query's scores, float32: one for all of them, or one each.
Scale = Float[Array, "#B #T"] | Float[Array, ""]
# What an attention function returns: o, and with return_lse the log-sum-exp of the scores.
Attended = Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]
CacheLeaf = Float[Array, "B K S H"] | Quantised  # keys or values in the order of the cache
PoolLeaf = Float[Array, "P 2 K page H"] | Quantised  # keys and values in pages
# What is written into pages: one token for each of n pages, or n whole pages.
NewPart = Float[Array, "n 2 K *page H"] | Quantised


class Body(Protocol):
    """A forward and a backward attention kernel for one kind of hardware.

    It must be hashable. All arrays are those of one device.

    q: [B, T, N, H].
    k, v: [B, S, K, H], in q's dtype.
    mask: an `attention.Mask`.
    scale: float32 [B, T], the factor on each query's scores.
    """

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute o [B, T, N, H] in `dtype`, and the log-sum-exp (base e), float32 [B, T, N].

        A query that sees no key has o = 0 and a log-sum-exp of -inf.
        """
        ...

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        do: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute the gradients dq in float32 or q's dtype, and dk, dv in the dtypes of k, v.

        lse: float32 [B, T, N], the log-sum-exp as from `forward`, but a large number for a query
            that sees no key.
        delta: float32 [B, T, N], sum(do * o) minus the gradient of lse.
        do: [B, T, N, H], the gradient of o.
        """
        ...


def attend_through(
    body: Body,
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> Attended:
    """Attend by the kernels of `body`. Other arguments and results are those of `attention.xla`.

    Differentiable in q, k, v (arrays) and scale, log-sum-exp included.

    known: float32 o and the log-sum-exp of these queries over a larger set of keys that contains k
        and v. They are returned unchanged, and the gradients are those of this part of the keys.
    """
    k, v = (x.dequantize(q.dtype) if isinstance(x, Quantised) else x for x in (k, v))
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])
    dtype = jnp.dtype(jnp.float32 if return_lse else q.dtype)
    out: Any
    if known is None:
        out = _flash(body, dtype, q, k, v, mask, scale)
    else:
        out = _part(body, q, k, v, mask, scale, *known)
    return out if return_lse else out[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(
    body: Body,
    dtype: DTypeLike,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run a body's forward kernel, with its backward kernel as derivative."""
    return body.forward(q, k, v, mask, scale, dtype)


def _flash_forward(
    body: Body,
    dtype: DTypeLike,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array,
) -> tuple[Any, Any]:
    """Compute `_flash`, and what its gradients need."""
    o, lse = body.forward(q, k, v, mask, scale, dtype)
    return (o, lse), (q, k, v, mask, scale, o, lse)


def _flash_backward(body: Body, dtype: Any, saved: Any, cotangents: Any) -> Any:
    """Compute the gradients of q, k, v and scale by a body's backward kernel."""
    q, k, v, mask, scale, o, lse = saved
    do, dlse = cotangents
    empty = lse == -jnp.inf
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1) - jnp.where(empty, 0, dlse)
    lse = jnp.where(empty, _MASKED_LSE, lse)
    dq, dk, dv = body.backward(q, k, v, mask, scale, lse, delta, do.astype(q.dtype))
    # A score is scale times q k^T, so d/dscale is q dq summed over heads, over scale.
    dscale = jnp.sum(q.astype(jnp.float32) * dq.astype(jnp.float32), (2, 3))
    dscale = jnp.where(scale == 0, 0, dscale / jnp.where(scale == 0, 1, scale))
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)
    return dq.astype(q.dtype), dk, dv, no_gradient, dscale


_flash.defvjp(_flash_forward, _flash_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(
    body: Body,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array,
    o: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return o and lse, which are known, unchanged, with the gradients of this part of the keys."""
    return o, lse


def _part_forward(body: Body, *saved: Any) -> tuple[Any, Any]:
    return saved[-2:], saved


def _part_backward(body: Body, saved: Any, cotangents: Any) -> Any:
    o, lse = saved[-2:]
    gradients = _flash_backward(body, None, saved, cotangents)
    return *gradients, jnp.zeros_like(o), jnp.zeros_like(lse)


_part.defvjp(_part_forward, _part_backward)


def decline(
    name: str,
    q: jax.Array,
    *,
    k: KeysOrValues | PoolLeaf,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
) -> None:
    """Raise NotImplementedError for a dtype, head dim or number of heads that is not supported.

    name: the kernel's name in the error.
    k: the keys, or pages; both have the key/value heads along axis 2.
    dtypes, head_dims: the dtypes and head dims that the kernel supports.
    """
    if q.dtype.name not in dtypes:
        raise NotImplementedError(f"{name}: dtype {q.dtype.name}, only {', '.join(dtypes)}")
    if q.shape[-1] not in head_dims:
        dims = ", ".join(map(str, head_dims))
        raise NotImplementedError(f"{name}: head dim {q.shape[-1]}, only {dims}")
    if q.shape[2] % k.shape[2]:
        raise NotImplementedError(
            f"{name}: {q.shape[2]} query heads over {k.shape[2]} key heads, only multiples"
        )


def decline_page(name: str, kv: PoolLeaf, *, multiple: int, lanes: int = 1) -> None:
    """Raise NotImplementedError for pages of a size that is not supported.

    name: the kernel's name in the error.
    kv: [P, 2, K, page, H].
    multiple: the number of tokens of which a page must hold a multiple.
    lanes: the tokens of a register of scores, which a page must divide or hold a multiple of.
    """
    if kv.shape[3] % multiple:
        raise NotImplementedError(
            f"{name}: pages of {kv.shape[3]} tokens, only multiples of {multiple}"
        )
    if lanes % kv.shape[3] and kv.shape[3] % lanes:
        raise NotImplementedError(
            f"{name}: pages of {kv.shape[3]} tokens, only divisors and multiples of {lanes}"
        )


def factored(q: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply q [B, T, N, H] by scale * sqrt(H), rounded to q's dtype.

    scale: float32 [B, T]. Its other part, 1 / sqrt(H), is in `score_factor`.
    """
    own = scale * math.sqrt(q.shape[-1])
    return (q.astype(jnp.float32) * own[:, :, None, None]).astype(q.dtype)


def score_factor(head_dim: int) -> float:
    """Return log2(e) / sqrt(H), by which products of `factored` queries and keys become scores."""
    return LOG2E / math.sqrt(head_dim)


class Extent(NamedTuple):
    """The range of positions and segments in each block of tokens, int32 [B, blocks] each.

    first, last: the least and the largest position of the block's tokens, without padding.
    low, high: the least and the largest segment of its tokens, without padding.
    uniform: 1 where the block has no padding and only one segment, else 0.
    """

    first: jax.Array
    last: jax.Array
    low: jax.Array
    high: jax.Array
    uniform: Any


def extent(positions: jax.Array, segments: jax.Array, *, block: int) -> Extent:
    """Compute the range of positions and segments in each block of `block` tokens.

    positions, segments: int32 [B, n * block]. Tokens of segment 0 are padding and do not count.
    """
    positions, segments = (
        x.reshape(x.shape[0], -1, block).astype(jnp.int32) for x in (positions, segments)
    )
    real = segments != 0
    low = jnp.min(jnp.where(real, segments, _NEVER), -1)
    high = jnp.max(jnp.where(real, segments, -_NEVER), -1)
    first = jnp.min(jnp.where(real, positions, _NEVER), -1)
    last = jnp.max(jnp.where(real, positions, -_NEVER), -1)
    uniform = (jnp.all(real, -1) & (low == high)).astype(jnp.int32)
    return Extent(first, last, low, high, uniform)


def visible(q: Extent, k: Extent, *, window: jax.Array) -> jax.Array:
    """Return whether some query of one block may see some key of another.

    q, k: the extents of the block of queries and of the block of keys.

    It is False only if no query sees any key.
    """
    near = (q.last >= k.first) & (q.first - k.last < window)
    return near & (q.low <= k.high) & (k.low <= q.high)


def full(q: Extent, k: Extent, *, window: jax.Array) -> jax.Array:
    """Return whether every query of one block sees every key of another.

    q, k: the extents of the block of queries and of the block of keys.
    """
    near = (q.first >= k.last) & (q.last - k.first < window)
    return near & (q.low == k.low) & (q.uniform == 1) & (k.uniform == 1)


def pad(x: jax.Array, length: int, *, axis: int) -> jax.Array:
    """Append zeros to x along `axis`, up to `length`. In segments they mark padding."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def padded_mask(mask: Mask, *, queries: int, keys: int) -> Mask:
    """Append padding to a mask, up to `queries` query tokens and `keys` key tokens."""
    return dataclasses.replace(
        mask,
        q_positions=pad(mask.q_positions, queries, axis=1),
        q_segments=pad(mask.q_segments, queries, axis=1),
        k_positions=pad(mask.k_positions, keys, axis=1),
        k_segments=pad(mask.k_segments, keys, axis=1),
    )


def paged_mask(
    written: Int[Array, " B"], window: Int[Array, ""], *, length: int, keys: int
) -> Mask:
    """Return the mask of queries over the tokens in the pages of their rows.

    written: int32 [B], the number of tokens in each row's pages, after which its queries come.
    length, keys: the number of queries of a row, and of the slots of its pages.
    """
    positions = written[:, None] + jnp.arange(length, dtype=jnp.int32)
    slots = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (written.shape[0], keys))
    there = (slots < written[:, None]).astype(jnp.int32)
    return Mask(positions, slots, jnp.ones_like(positions), there, window)


def places(mask: Mask) -> tuple[Int[Array, "B 2 T"], Int[Array, "B 2 S"]]:
    """Stack a mask's positions and segments, int32, of queries and of keys.

    Keys that are padding have a segment that equals no query's.
    """
    segments = jnp.where(mask.k_segments == 0, _NO_SEGMENT, mask.k_segments)
    return (
        jnp.stack([mask.q_positions, mask.q_segments], 1).astype(jnp.int32),
        jnp.stack([mask.k_positions, segments], 1).astype(jnp.int32),
    )


def round_up(x: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not less than x."""
    return -(-x // multiple) * multiple
