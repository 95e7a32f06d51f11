"""The registry of attention implementations by name, and the choice that "auto" makes among them.

Kernels agree with the XLA reference, and raise NotImplementedError for calls that they do not
support. An implementation runs on one device's heads and sequences; `on_shards` applies it to
global arrays.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from qwen_jax.attention import ring
from qwen_jax.attention.reference import Attend, xla
from qwen_jax.kernels import (
    choice,
    decode_tpu,
    decode_triton,
    flash_hopper,
    flash_tpu,
    flash_triton,
    others,
)
from qwen_jax.kernels.flash import CacheLeaf, KeysOrValues, Quantised
from qwen_jax.kernels.mask import Mask
from qwen_jax.meshes import sharding

FEW = 16  # the most query tokens that a decode kernel takes


def on_shards(attend: Attend) -> Attend:
    """Make an attention implementation take and return global arrays.

    Each device runs its own heads and sequences. Tokens that are split over `context` are attended
    to by ring attention. Where no mesh axis is explicit (no mesh in force, or inside `shard_map`),
    the implementation runs unchanged; only there it takes keyword arguments of its own, and
    elsewhere they raise TypeError.
    """

    @functools.wraps(attend)
    def run(
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
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

        @jax.shard_map(out_specs=out, check_vma=False)  # a kernel's type says no mesh axes
        def local(
            q: jax.Array, k: KeysOrValues, v: KeysOrValues, mask: Mask, scale: jax.Array
        ) -> Any:
            if shared:
                return ring.ring_attention(
                    attend, q, k=k, v=v, mask=mask, scale=scale, return_lse=return_lse
                )
            return attend(q, k, v, mask, scale, return_lse=return_lse)

        return local(q, k, v, mask, jnp.asarray(scale, jnp.float32))

    return run


pallas_tpu = on_shards(flash_tpu.tpu_attention)
pallas_triton = on_shards(flash_triton.triton_attention)
pallas_hopper = on_shards(flash_hopper.hopper_attention)

# name -> attend(q, k, v, mask, scale, return_lse=False)
IMPLEMENTATIONS: dict[str, Attend] = {
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
# against a cache. Implementations without one attend to cache and new tokens apart, and merge.
DECODERS: dict[Attend, Callable[..., Any]] = {
    pallas_tpu: decode_tpu.tpu_decode,
    pallas_triton: decode_triton.triton_decode,
    pallas_hopper: decode_triton.triton_decode,
}


# The choices of `prove.resolve` in this process: (device kind, purpose, dtype, head dim) -> name.
# A purpose is "forward", "gradients" (forward and backward) or the result of `cached`.
RESOLVED: dict[tuple[str, str, str, int], str] = {}


def get(name: str) -> Attend:
    """Return the attention function of a name. "auto" takes the choice of `prove.resolve`.

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
    """An attention function for inference, with implementations for prompts and for decoding.

    forward: the name of the implementation for prompts.
    decode: the name of the implementation that attends from a few tokens to a cache (see
        `decoder`).

    A kernel that was tested forward only is not differentiated: gradients come from the XLA
    reference, and so do calls with at most `FEW` query tokens without a decode kernel.
    """

    forward: str
    decode: str

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: jax.Array,
        return_lse: bool = False,
    ) -> Any:
        if q.shape[1] <= FEW or self.forward == "xla":
            return xla(q, k, v, mask, scale, return_lse)
        return _forward_alone(self.forward, return_lse, q, k, v, mask, jnp.asarray(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward_alone(
    name: str,
    return_lse: bool,
    q: jax.Array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: jax.Array,
) -> Any:
    """Attend by the implementation `name`, with the gradients of the XLA reference."""
    return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse)


def _with_reference(
    name: str,
    return_lse: bool,
    q: jax.Array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: jax.Array,
) -> Any:
    """The forward pass of `_forward_alone` under differentiation: run the XLA reference instead."""
    return jax.vjp(lambda q, k, v, scale: xla(q, k, v, mask, scale, return_lse), q, k, v, scale)


def _reference_gradients(name: str, return_lse: bool, pull: Any, cotangents: Any) -> Any:
    """The backward pass of `_forward_alone`: the XLA reference's gradients."""
    dq, dk, dv, dscale = pull(cotangents)
    return dq, dk, dv, None, dscale


_forward_alone.defvjp(_with_reference, _reference_gradients)


def auto(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: jax.Array,
    return_lse: bool = False,
) -> Any:
    """Attend by the choice of `prove.resolve` for this device, dtype and head dim.

    Without a choice it is the XLA reference, as no kernel can be tested while a program is traced.
    Arguments and results are those of `attention.xla`.
    """
    dtype, dim = q.dtype.name, q.shape[-1]
    if (name := resolved("gradients", dtype, head_dim=dim)) is not None:
        return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse)
    name = resolved("forward", dtype, head_dim=dim)
    if name is None and choice.device().platform != "cpu":
        say(
            f"attention: xla ({dtype}, head dim {dim}): no kernel was proved in this process; "
            "qwen_jax.attention.prove.resolve does that, before a program is traced"
        )
    return Chosen(name or "xla", "xla")(q, k, v, mask, scale, return_lse)


def resolved(purpose: str, dtype: str, *, head_dim: int) -> str | None:
    """Return the implementation that `prove.resolve` chose for this device, or None.

    purpose: "forward", "gradients" or a result of `cached`.
    dtype: the dtype of the queries.
    """
    return RESOLVED.get((choice.device().device_kind, purpose, dtype, head_dim))


def cached(leaf: CacheLeaf) -> str:
    """Return the purpose in `RESOLVED` of a decode kernel, such as "decode" or "decode int8".

    leaf: the cached keys, an array or `Int8`.
    """
    if not isinstance(leaf, Quantised):
        return "decode"
    return "decode int8" if leaf.zero is None else "decode int8_asymmetric"


def decoder(
    implementation: Attend, q: Float[Array, "B T N H"], *, keys: CacheLeaf
) -> Callable[..., Any] | None:
    """Return the kernel by which an implementation attends from a few tokens to a cache, or None.

    implementation: an attention function, from `get` or `prove.resolve`.
    q: the queries. The result is None for more than `FEW` tokens T.
    keys: the cached keys [B, K, S, H], an array or `Int8`.
    """
    if q.shape[1] > FEW:
        return None
    if isinstance(implementation, Chosen):
        implementation = IMPLEMENTATIONS[implementation.decode]
    elif implementation is auto:
        name = resolved(cached(keys), q.dtype.name, head_dim=q.shape[-1])
        implementation = IMPLEMENTATIONS[name or "xla"]
    return DECODERS.get(implementation)


@functools.cache
def say(line: str, level: int = logging.INFO) -> None:
    """Log a line to the logger "qwen_jax", once per process."""
    logging.getLogger("qwen_jax").log(level, line)
