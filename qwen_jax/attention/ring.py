"""Ring attention: keys and values travel around the devices that share a sequence.

It is Ring Attention (arXiv 2310.01889) over any function of `attention.IMPLEMENTATIONS`: queries
stay on their device, each part of the keys gives an output and a log-sum-exp, and these merge into
one softmax. No device holds another's keys for longer than a step. It runs within `jax.shard_map`.

Positions and segments travel with the keys, so causality, windows, packing and LogN need no special
rule, and tokens may be in any order. `meshes.moves.zigzag` is an order that balances causal work:
device i of n holds pieces i and 2n - 1 - i of 2n.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen_jax.attention.reference import Attend
from qwen_jax.kernels.flash import Attended, KeysOrValues, Scale
from qwen_jax.kernels.mask import Mask
from qwen_jax.meshes import sharding


def ring_attention(
    implementation: Attend,
    q: Float[Array, "B T N H"],
    *,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
    takes_known: bool = False,
) -> Attended:
    """Attend from this device's queries to the keys of all devices of `context`.

    implementation: attends to the keys of one device, as a function of `IMPLEMENTATIONS` does.
    takes_known: whether it has the option `known` (`flash.attend_through`).

    Other arguments and the results are those of `attention.xla`, each this device's part.
    """
    out: Any = _ring(implementation, takes_known, q, k, v, mask, scale)
    return out if return_lse else out[0].astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    implementation: Attend,
    takes_known: bool,
    q: jax.Array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Compute o and its log-sum-exp in float32, passing keys and values around the ring once."""
    keys = (k, v, mask.k_positions, mask.k_segments)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        o, lse, keys = carry
        following = _pass_on(keys)  # travels while this part is computed
        part = implementation(*_arguments(q, keys, mask=mask, scale=scale), return_lse=True)
        return (*merge([(o, lse), part]), following), None

    o = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    (o, lse, _), _ = jax.lax.scan(step, (o, lse, keys), length=jax.lax.axis_size(sharding.CONTEXT))
    return o, lse


def _forward(
    implementation: Attend,
    takes_known: bool,
    q: jax.Array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: jax.Array,
) -> tuple[Any, Any]:
    """Compute `_ring`, and what its gradients need."""
    out: Any = _ring(implementation, takes_known, q, k, v, mask, scale)
    return out, (q, k, v, mask, scale, *out)


def _backward(implementation: Attend, takes_known: bool, saved: Any, cotangents: Any) -> Any:
    """Compute the gradients, passing keys, values and their gradients around the ring."""
    q, k, v, mask, scale, o, lse = saved
    do, dlse = cotangents
    keys = (k, v, mask.k_positions, mask.k_segments)

    # A kernel that takes the merged o and lse need not recompute those of each part.
    options = {"known": (o, lse)} if takes_known else {}

    def step(carry: Any, _: None) -> tuple[Any, None]:
        dq, dscale, dk, dv, keys = carry
        following = _pass_on(keys)

        def part(q: Any, k: Any, v: Any, scale: Any) -> Any:
            arguments = _arguments(q, (k, v, *keys[2:]), mask=mask, scale=scale)
            return implementation(*arguments, return_lse=True, **options)

        (own, own_lse), gradient = jax.vjp(part, q, *keys[:2], scale)
        if options:
            gradients = gradient((do, dlse))
        else:
            # o = sum of share * own, share = exp(own_lse - lse), and lse is their log-sum-exp.
            share = jnp.where(own_lse > -jnp.inf, jnp.exp(own_lse - lse), 0)
            inner = jnp.sum(do * (own - o), -1)
            gradients = gradient((share[..., None] * do, share * (inner + dlse)))
        dq, dk, dv, dscale = (
            old + new.astype(jnp.float32)
            for old, new in zip((dq, dk, dv, dscale), gradients, strict=True)
        )
        return (dq, dscale, *_pass_on((dk, dv)), following), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, scale, k, v)]
    length = jax.lax.axis_size(sharding.CONTEXT)
    (dq, dscale, dk, dv, _), _ = jax.lax.scan(step, (*zeros, keys), length=length)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), none, dscale


_ring.defvjp(_forward, _backward)


def _arguments(
    q: jax.Array, keys: tuple[Any, ...], *, mask: Mask, scale: jax.Array
) -> tuple[Any, ...]:
    """Return an implementation's arguments for the keys that have arrived from another device.

    keys: the tuple (k, v, key positions, key segments) that travels around the ring.
    """
    k, v, positions, segments = keys
    return q, k, v, dataclasses.replace(mask, k_positions=positions, k_segments=segments), scale


def _pass_on(x: Any) -> Any:
    """Send arrays to the next device of the ring, and return those of the previous one."""
    size = jax.lax.axis_size(sharding.CONTEXT)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, sharding.CONTEXT, ring), x)


def merge(
    parts: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Merge attention over several sets of keys into one softmax over all of them.

    parts: float32 o [B, T, N, H] and log-sum-exp [B, T, N] for each set, as with return_lse.

    Returns o and the log-sum-exp in the same form.
    """
    lse = jnp.stack([lse for _, lse in parts])  # [parts, B, T, N]
    largest = jnp.maximum(jnp.max(lse, 0), jnp.finfo(jnp.float32).min)
    shares = jnp.exp(lse - largest)
    total = jnp.sum(shares, 0)
    divisor = jnp.where(total > 0, total, 1)
    o = sum(share[..., None] * o for share, (o, _) in zip(shares / divisor, parts, strict=True))
    return jnp.asarray(o), jnp.where(total > 0, largest + jnp.log(divisor), -jnp.inf)
