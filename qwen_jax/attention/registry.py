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
from qwen_jax.attention.implementation import FEW, Implementation
from qwen_jax.attention.reference import Attend, Decode, PagedAttend, WritePages, as_attend, xla
from qwen_jax.kernels import (
    choice,
    decode_tpu,
    decode_triton,
    flash_hopper,
    flash_tpu,
    flash_triton,
    others,
    write_tpu,
)
from qwen_jax.kernels.flash import Attended, CacheLeaf, KeysOrValues, PoolLeaf, Quantised, Scale
from qwen_jax.kernels.mask import Mask
from qwen_jax.meshes import sharding


def on_shards(attend: Callable[..., Attended], *, takes_known: bool = False) -> Attend:
    """Make an attention implementation take and return global arrays.

    takes_known: whether the implementation has the option `known`, as an `Implementation` says it
        of itself.

    Each device runs its own heads and sequences. Tokens that are split over `context` are attended
    to by ring attention. Where no mesh axis is explicit (no mesh in force, or inside `shard_map`),
    the implementation runs unchanged; only there it takes keyword arguments of its own, and
    elsewhere they raise TypeError.
    """
    takes_known = takes_known or Implementation.of(as_attend(attend)).takes_known

    @as_attend
    @functools.wraps(attend)
    def run(
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: bool = False,
        **local_options: Any,
    ) -> Attended:
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
                    as_attend(attend),
                    q,
                    k=k,
                    v=v,
                    mask=mask,
                    scale=scale,
                    return_lse=return_lse,
                    takes_known=takes_known,
                )
            return attend(q, k, v, mask, scale, return_lse=return_lse)

        return local(q, k, v, mask, jnp.asarray(scale, jnp.float32))

    return run


def _kernel(
    name: str,
    attend: Callable[..., Attended],
    decode: Decode,
    paged_decode: PagedAttend,
    paged_prefill: PagedAttend,
    write: WritePages | None = None,
) -> Implementation:
    """Return one of our kernels, all of which take `known`, as an implementation."""
    attend = on_shards(attend, takes_known=True)
    return Implementation(name, attend, decode, True, paged_decode, paged_prefill, write)


pallas_tpu = _kernel(
    flash_tpu.NAME,
    flash_tpu.tpu_attention,
    decode_tpu.tpu_decode,
    decode_tpu.tpu_paged_decode,
    flash_tpu.tpu_paged_prefill,
    write_tpu.tpu_write,
)
_TRITON_CACHE = (
    decode_triton.triton_decode,
    decode_triton.triton_paged_decode,
    flash_triton.triton_paged_prefill,
)
pallas_triton = _kernel(flash_triton.NAME, flash_triton.triton_attention, *_TRITON_CACHE)
pallas_hopper = _kernel(flash_hopper.NAME, flash_hopper.hopper_attention, *_TRITON_CACHE)

# name -> attend(q, k, v, mask, scale, return_lse=False): an `Implementation`, or a plain function
IMPLEMENTATIONS: dict[str, Attend] = {"xla": xla} | {
    x.name: x
    for x in (
        pallas_tpu,
        pallas_triton,
        pallas_hopper,
        Implementation("dot_product", on_shards(others.dot_product)),
        Implementation("splash", on_shards(others.splash)),
        Implementation("flash", on_shards(others.tpu_flash)),
        Implementation("tokamax", on_shards(others.tokamax)),
    )
}


# The choices of `prove.resolve` in this process: (device kind, purpose, dtype, head dim) -> name.
_RESOLVED: dict[tuple[str, str, str, int], str] = {}


def remember(purpose: str, dtype: str, *, head_dim: int, name: str) -> None:
    """Make `auto` take the implementation `name` on this device from now on.

    purpose: "forward", "gradients" (forward and backward) or a task of
        `implementation.CACHED`, with the cache's
        dtype after it if it is quantised, such as "decode int8".
    dtype, head_dim: of the queries.
    """
    _RESOLVED[choice.device().device_kind, purpose, dtype, head_dim] = name


def _remembered(purpose: str, q: Float[Array, "B T N H"]) -> str | None:
    """Return the name that `remember` was given for such queries on this device, or None."""
    return _RESOLVED.get((choice.device().device_kind, purpose, q.dtype.name, q.shape[-1]))


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


def inference(forward: str, decode: str) -> Implementation:
    """Return attention for inference, by one implementation for prompts and one for decoding.

    forward: the name of the implementation for prompts. It was tested forward only, so gradients
        come from the XLA reference, and so do calls with at most `FEW` query tokens.
    decode: the name of the implementation whose decode kernel is used.
    """
    attend = xla if forward == "xla" else as_attend(_ForwardOnly(forward))
    kernel = Implementation.of(IMPLEMENTATIONS[decode]).decode
    return Implementation(f"{forward}, decoding {decode}", attend, kernel)


@dataclasses.dataclass(frozen=True)
class _ForwardOnly:
    """The implementation `name` for prompts, and the XLA reference for all else."""

    name: str

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: KeysOrValues,
        v: KeysOrValues,
        mask: Mask,
        scale: Scale,
        return_lse: bool = False,
    ) -> Attended:
        if q.shape[1] <= FEW:
            return xla(q, k, v, mask, scale, return_lse)
        return _forward_alone(self.name, return_lse, q, k, v, mask, jnp.asarray(scale))


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


def _resolved(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Attend by the choice of `prove.resolve` for this device, dtype and head dim.

    Without a choice it is the XLA reference, as no kernel can be tested while a program is traced.
    """
    if (name := _remembered("gradients", q)) is not None:
        return IMPLEMENTATIONS[name](q, k, v, mask, scale, return_lse)
    name = _remembered("forward", q)
    if name is None and choice.device().platform != "cpu":
        log_once(
            f"attention: xla ({q.dtype.name}, head dim {q.shape[-1]}): no kernel was proved in "
            "this process; qwen_jax.attention.prove.resolve does that, before a program is traced"
        )
    return inference(name or "xla", "xla")(q, k, v, mask, scale, return_lse)


class _Auto(Implementation):
    """The implementation "auto", whose decode kernel is the choice of `prove.resolve`, too."""

    def decode_kernel(self, q: Float[Array, "B T N H"], *, keys: CacheLeaf) -> Decode | None:
        """Return the kernel that was chosen for such queries and such a cache, or None."""
        return _chosen("decode", q, keys).decode_kernel(q, keys=keys)

    def paged_kernel(self, q: Float[Array, "B T N H"], *, kv: PoolLeaf) -> PagedAttend | None:
        """Return the kernel that was chosen for such queries and such pages, or None."""
        task = "paged decode" if q.shape[1] <= FEW else "paged prefill"
        return _chosen(task, q, kv).paged_kernel(q, kv=kv)

    def write_kernel(self, q: Float[Array, "B T N H"], *, kv: PoolLeaf) -> WritePages | None:
        """Return the kernel that was chosen to write into such pages, or None."""
        return _chosen("write", q, kv).write_kernel(q, kv=kv)


def _chosen(task: str, q: jax.Array, cached: CacheLeaf | PoolLeaf) -> Implementation:
    """Return the implementation that `remember` was given for a task and such a cache."""
    purpose = task
    if isinstance(cached, Quantised):
        purpose += " int8" if cached.zero is None else " int8_asymmetric"
    return Implementation.of(IMPLEMENTATIONS[_remembered(purpose, q) or "xla"])


auto = _Auto("auto", as_attend(_resolved))


@functools.cache
def log_once(line: str, level: int = logging.INFO) -> None:
    """Log a line to the logger "qwen_jax", once per process."""
    logging.getLogger("qwen_jax").log(level, line)
