"""Attention: which keys a query sees, the XLA reference, and the registry of implementations.

The reference is the definition; kernels in `kernels/` must agree with it, and decline what they
cannot do with NotImplementedError. Nothing here knows of RoPE, layers or caches: positions,
segments and a scale for each query say everything.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qwen_jax.attention import ring
from qwen_jax.kernels import (
    choice,
    decode_tpu,
    decode_triton,
    flash_hopper,
    flash_tpu,
    flash_triton,
    others,
)
from qwen_jax.leaves.weights import precision
from qwen_jax.meshes import sharding

FULL = 2**30  # a window that no length reaches
_QUERY_BLOCK = 512  # query rows whose scores the reference holds at once
FEW = 16  # query tokens that a decode kernel takes at most


@struct.dataclass
class Mask:
    """A key counts iff its segment equals the query's and is not 0 (padding, an empty slot), it is
    not after the query, and fewer than `window` tokens before it (itself included).

    Positions and segments are int32 [B, T] for queries, [B, S] for keys; window is an int32 scalar.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array
    window: jax.Array

    def visible(self) -> jax.Array:
        """bool [B, T, S]."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        same = self.q_segments[:, :, None] == self.k_segments[:, None, :]
        real = self.k_segments[:, None, :] != 0
        return same & real & (distance >= 0) & (distance < self.window)


def xla(
    q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array, return_lse: bool = False
) -> Any:
    """softmax(scale * q k^T) v over the visible keys, in float32 where it matters.

    q [B, T, N, H]; k, v [B, S, K, H], arrays of q's dtype or a wider one, or quantised leaves, N a
    multiple of K; scale: a float or float32 [B, T]. Returns o [B, T, N, H] of q's dtype, zeros for
    a query that sees nothing. With return_lse: o in float32 and the log-sum-exp of the scores,
    float32 [B, T, N], -inf for a query that sees nothing.
    """
    k, v = (x.dequantize(q.dtype) if hasattr(x, "dequantize") else x for x in (k, v))
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])
    length = q.shape[1]
    if length <= _QUERY_BLOCK:
        o, lse = _block(q, k, v, mask.visible(), scale)
    else:
        blocks = -(-length // _QUERY_BLOCK)
        padding = blocks * _QUERY_BLOCK - length

        def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [blocks, B, _QUERY_BLOCK, ...]
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], blocks, _QUERY_BLOCK, *x.shape[2:]), 1, 0)

        def step(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q, scale, positions, segments = rows
            part = dataclasses.replace(mask, q_positions=positions, q_segments=segments)
            return _block(q, k, v, part.visible(), scale)

        rows = (q, scale, mask.q_positions, mask.q_segments)
        parts = jax.lax.map(jax.checkpoint(step), tuple(split(x) for x in rows))
        o, lse = (
            jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length] for x in parts
        )
    return (o, lse) if return_lse else o.astype(q.dtype)


def _block(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
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


def on_shards(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation run on each device's heads and rows; takes and returns global arrays.
    Tokens that are split over `context` are attended to by a ring.

    Where no mesh axis is explicit (none in force, or inside `shard_map`) it is run as it is.
    """

    @functools.wraps(attend)
    def run(
        q: jax.Array,
        k: Any,
        v: Any,
        mask: Mask,
        scale: jax.Array,
        return_lse: bool = False,
        **local_options: Any,
    ) -> Any:
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return attend(q, k, v, mask, scale, return_lse=return_lse, **local_options)
        if local_options:
            raise TypeError(f"{', '.join(local_options)}: only for calls of one device's arrays")
        rows = jax.typeof(q).sharding.spec
        out = (rows, P(*rows[:3])) if return_lse else rows
        shared = sharding.CONTEXT in sharding.entries(rows[1])

        @jax.shard_map(out_specs=out, check_vma=False)  # kernels say nothing of mesh axes
        def local(q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array) -> Any:
            if shared:
                return ring.attend(attend, q, k, v, mask, scale, return_lse)
            return attend(q, k, v, mask, scale, return_lse=return_lse)

        return local(q, k, v, mask, jnp.asarray(scale, jnp.float32))

    return run


pallas_tpu = on_shards(flash_tpu.attend)
pallas_triton = on_shards(flash_triton.attend)
pallas_hopper = on_shards(flash_hopper.attend)

# name -> attend(q, k, v, mask, scale, return_lse=False)
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "xla": xla,
    flash_tpu.NAME: pallas_tpu,
    flash_triton.NAME: pallas_triton,
    flash_hopper.NAME: pallas_hopper,
    "dot_product": on_shards(others.dot_product),
    "splash": on_shards(others.splash),
    "flash": on_shards(others.tpu_flash),
    "tokamax": on_shards(others.tokamax),
}
# attend -> decode(q, k, v, cache_k, cache_v, start, index, window, scale), for a few queries
# against a cache; the others attend to the cache and to the new tokens, and merge.
DECODERS: dict[Callable[..., Any], Callable[..., Any]] = {
    pallas_tpu: decode_tpu.attend,
    pallas_triton: decode_triton.attend,
    pallas_hopper: decode_triton.attend,
}


# What `prove.resolve` has decided in this process: (device kind, what a call is for, dtype, head
# dim) -> name. A call is for "forward", "gradients" (forward and backward) or `cached(leaves)`.
RESOLVED: dict[tuple[str, str, str, int], str] = {}


def get(name: str) -> Callable[..., Any]:
    """The implementation of that name; "auto" is the one that `prove.resolve` has decided on.

    Raises ValueError for a name that is not in the registry.
    """
    if name == "auto":
        return auto
    if not isinstance(name, str) or name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"attention {name!r} is not known: choose one of {known}")
    return IMPLEMENTATIONS[name]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An implementation for inference: `forward` by that name, for a prompt; `decode` by that name,
    for a few tokens against a cache (see `decoder`).

    A kernel that was proved forward alone is not differentiated: gradients are the reference's, and
    so is a call of a few tokens without a decode kernel.
    """

    forward: str
    decode: str

    def __call__(
        self, q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array, return_lse: bool = False
    ) -> Any:
        if q.shape[1] <= FEW or self.forward == "xla":
            return xla(q, k, v, mask, scale, return_lse)
        return _forward_alone(self.forward, return_lse, q, k, v, mask, jnp.asarray(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward_alone(
    name: str, return_lse: bool, q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array
) -> Any:
    return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse)


def _with_reference(
    name: str, return_lse: bool, q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array
) -> Any:
    return jax.vjp(lambda q, k, v, scale: xla(q, k, v, mask, scale, return_lse), q, k, v, scale)


def _reference_gradients(name: str, return_lse: bool, pull: Any, cotangents: Any) -> Any:
    dq, dk, dv, dscale = pull(cotangents)
    return dq, dk, dv, None, dscale


_forward_alone.defvjp(_with_reference, _reference_gradients)


def auto(
    q: jax.Array, k: Any, v: Any, mask: Mask, scale: jax.Array, return_lse: bool = False
) -> Any:
    """What `prove.resolve` has decided on in this process, for this device, dtype and head dim;
    where it has decided nothing, the reference. Nothing can be proved here, within a trace.
    """
    dtype, dim = q.dtype.name, q.shape[-1]
    if (name := resolved("gradients", dtype, dim)) is not None:
        return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse)
    name = resolved("forward", dtype, dim)
    if name is None and choice.device().platform != "cpu":
        say(
            f"attention: xla ({dtype}, head dim {dim}): no kernel was proved in this process; "
            "qwen_jax.prove.resolve does that, before a program is traced"
        )
    return Chosen(name or "xla", "xla")(q, k, v, mask, scale, return_lse)


def resolved(purpose: str, dtype: str, head_dim: int) -> str | None:
    """The implementation that `RESOLVED` has for the device that is compiled for."""
    return RESOLVED.get((choice.device().device_kind, purpose, dtype, head_dim))


def cached(leaf: Any) -> str:
    """What a decode kernel is for, as `RESOLVED` has it: the kind of leaf that holds the keys."""
    if not hasattr(leaf, "values"):
        return "decode"
    return "decode int8" if leaf.zero is None else "decode int8_asymmetric"


def decoder(implementation: Callable[..., Any], q: jax.Array, keys: Any) -> Any:
    """The decode kernel that goes with an implementation, for queries q against cached keys
    [B, K, S, H]; None where there is none, or more queries than such a kernel is for.
    """
    if q.shape[1] > FEW:
        return None
    if isinstance(implementation, Chosen):
        implementation = IMPLEMENTATIONS[implementation.decode]
    elif implementation is auto:
        name = resolved(cached(keys), q.dtype.name, q.shape[-1])
        implementation = IMPLEMENTATIONS[name or "xla"]
    return DECODERS.get(implementation)


@functools.cache
def say(line: str, level: int = logging.INFO) -> None:
    """Log a line, once."""
    logging.getLogger("qwen_jax").log(level, line)
