"""Attention in plain XLA: the reference, with which every kernel must agree."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol, cast, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.kernels.flash import (
    Attended,
    CacheLeaf,
    KeysOrValues,
    NewPart,
    PoolLeaf,
    Quantised,
    Scale,
)
from qwen_jax.kernels.mask import Mask
from qwen_jax.leaves.weights import precision

_QUERY_BLOCK = 512  # the most query rows whose scores are held at once


class Attend(Protocol):
    """The interface of an attention function. `xla` says what its arguments and results are."""

    @overload
    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: Literal[False] = False,
    ) -> Float[Array, "B T N H"]: ...
    @overload
    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: Literal[True],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...
    @overload
    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: bool,
    ) -> Attended: ...


class Decode(Protocol):
    """The interface of a decode kernel: attention from a few tokens to a cache and to themselves.

    `workloads.decode` says what its arguments and result are.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        cache_k: CacheLeaf,
        cache_v: CacheLeaf,
        start: Int[Array, " B"],
        index: Int[Array, ""],
        window: Int[Array, ""],
        scale: Float[Array, "B T"],
    ) -> Float[Array, "B T N H"]: ...


class PagedAttend(Protocol):
    """The interface of a kernel that attends to the tokens in the pages of their rows.

    `pages.attend_pages` is its definition, of which it gets `places.table`, and the written tokens
    of rows that take part in the pass.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        kv: PoolLeaf,
        table: Int[Array, "B W"],
        written: Int[Array, " B"],
        window: Int[Array, ""],
        scale: Float[Array, "B T"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...


class WritePages(Protocol):
    """The interface of a kernel that writes into pages. `pages.scatter` is its definition."""

    def __call__(
        self,
        kv: PoolLeaf,
        new: NewPart,
        pages: Int[Array, " n"],
        slots: Int[Array, " n"] | None = None,
    ) -> PoolLeaf: ...


def as_attend(function: Callable[..., Attended]) -> Attend:
    """Return a function unchanged, but typed as `Attend`, whose result depends on `return_lse`."""
    return cast(Attend, function)


@as_attend
def xla(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Compute softmax(scale * q k^T) v over the visible keys, with scores and sums in float32.

    q: [B, T, N, H].
    k, v: [B, S, K, H], arrays of q's dtype or a wider one, or quantised leaves. N is a multiple of
        K.
    mask: decides which keys each query sees.
    scale: a float, or float32 [B, T], the factor on each query's scores.

    Returns o [B, T, N, H] in q's dtype, 0 for a query that sees no key. With return_lse: o in
    float32, and the log-sum-exp of the scores, float32 [B, T, N], -inf for a query that sees no
    key.
    """
    k, v = (x.dequantize(q.dtype) if isinstance(x, Quantised) else x for x in (k, v))
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])
    length = q.shape[1]
    if length <= _QUERY_BLOCK:
        o, lse = _block(q, k, v=v, visible=mask.visible(), scale=scale)
    else:
        blocks = -(-length // _QUERY_BLOCK)
        padding = blocks * _QUERY_BLOCK - length

        def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [blocks, B, _QUERY_BLOCK, ...]
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], blocks, _QUERY_BLOCK, *x.shape[2:]), 1, 0)

        def step(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q, scale, positions, segments = rows
            part = dataclasses.replace(mask, q_positions=positions, q_segments=segments)
            return _block(q, k, v=v, visible=part.visible(), scale=scale)

        rows = (q, scale, mask.q_positions, mask.q_segments)
        parts = jax.lax.map(jax.checkpoint(step), tuple(split(x) for x in rows))
        o, lse = (
            jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length] for x in parts
        )
    return (o, lse) if return_lse else o.astype(q.dtype)


def _block(
    q: jax.Array, k: jax.Array, *, v: jax.Array, visible: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attend from a block of queries to all keys.

    visible: bool [B, T, S], the dense mask.
    scale: float32 [B, T].

    Returns float32 o [B, T, N, H] and log-sum-exp [B, T, N].
    """
    batch, length, heads, _ = q.shape
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, H]: as the cache keeps them
    kv_heads, rows = k.shape[1], heads // k.shape[1] * length
    settings = {"precision": precision(q), "preferred_element_type": jnp.float32}

    def by_head(x: jax.Array) -> jax.Array:  # [B, T, N, X] -> [B, K, G * T, X]
        x = x.reshape(batch, length, kv_heads, -1, x.shape[-1])
        return jnp.transpose(x, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, rows, -1)

    def by_token(x: jax.Array) -> jax.Array:  # the inverse
        x = x.reshape(batch, kv_heads, -1, length, x.shape[-1])
        return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(batch, length, heads, -1)

    # Keys are the left operand, and one axis holds all rows of a head: XLA's CPU backend otherwise
    # copies the keys, or reads them at a tenth of the speed.
    scores = jnp.einsum("BKSH,BKZH->BKSZ", k, by_head(q), **settings)
    scores = jnp.swapaxes(scores, 2, 3).reshape(batch, kv_heads, -1, length, k.shape[2])
    scores = scores * scale[:, None, None, :, None]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    scores = scores.reshape(batch, kv_heads, rows, -1)
    largest = jnp.maximum(jnp.max(scores, -1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, -1, keepdims=True)
    o = jnp.einsum("BKZS,BKSH->BKZH", weights.astype(q.dtype), v, **settings)
    divisor = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, largest + jnp.log(divisor), -jnp.inf)
    return by_token(o / divisor), by_token(lse)[..., 0]
