"""Measures the error of an attention implementation against the XLA reference in float32."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.attention import reference, registry, ring, workloads
from qwen_jax.attention.reference import Attend, as_attend
from qwen_jax.attention.workloads import Case
from qwen_jax.kernels.flash import CacheLeaf, Quantised
from qwen_jax.kernels.mask import Mask

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


def error(case: Case, name: str, *, in_parts: bool = False) -> float:
    """Return an implementation's largest error, relative to the XLA reference's largest value.

    It compares the outputs, or for a backward case the gradients, of a small call with a window and
    grouped heads and, except for decoding, packing, padding and LogN. The reference computes in
    float32. A result that is not finite has an infinite error.

    case: the call's task, dtype, head dim and cache; its shape is replaced by a small one.
    name: the implementation's name in the registry.
    in_parts: also compare the same call in two parts of its keys, merged by their log-sum-exp, as
        chunked prompts and ring attention use it.
    """
    small, ways = _small(case), _ways(case, name, in_parts=in_parts)
    wanted = len(ways) * _wanted(small)
    got = [x for attend in ways for x in _results(small, attend, dtype=case.dtype)]
    pairs = [(jnp.asarray(x, jnp.float32), y) for x, y in zip(got, wanted, strict=True)]
    worst = [jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)) for x, y in pairs]
    return max(float(x) if jnp.isfinite(x) else math.inf for x in worst)


def check(case: Case, name: str) -> None:
    """Check that an implementation supports the calls that `error` makes, without running them.

    It traces the calls. Raises NotImplementedError if the implementation declines one.
    """
    small = _small(case)
    arrays = jax.eval_shape(lambda: _arguments(small, workloads.drawn, leaf=workloads.leaf))
    for attend in _ways(case, name, in_parts=True):
        jax.eval_shape(_call(small, attend), *arrays)


def _small(case: Case) -> Case:
    """Return the case in the small shape in which kernels are compared with the reference."""
    features, length = case.task != "decode", min(case.length, 4096) - 19
    shape = {"batch": 2, "length": length, "heads": 4, "kv_heads": 2}
    return dataclasses.replace(case, features=features, **shape)


def _ways(case: Case, name: str, *, in_parts: bool) -> list[Callable[..., jax.Array]]:
    """Return the functions to compare with the XLA reference.

    They are the implementation `name` itself and, with in_parts, the same one on two parts of the
    keys.
    """
    attend = registry.get(name)
    if in_parts and case.task != "decode":
        return [attend, functools.partial(_in_parts, attend)]
    return [attend]


@functools.lru_cache(maxsize=1)
def _wanted(case: Case) -> list[jax.Array]:
    """Return the XLA reference's outputs or gradients of a case, computed in float32."""
    return _results(case, reference.xla, dtype="float32")


def _in_parts(
    attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: jax.Array
) -> jax.Array:
    """Attend to the first third of the keys and to the rest, and merge both by log-sum-exp."""
    parts = []
    for cut in (slice(0, k.shape[1] // 3), slice(k.shape[1] // 3, None)):
        positions, segments = mask.k_positions[:, cut], mask.k_segments[:, cut]
        part = dataclasses.replace(mask, k_positions=positions, k_segments=segments)
        parts.append(attend(q, k[:, cut], v[:, cut], part, scale, return_lse=True))
    return ring.merge(parts)[0].astype(q.dtype)


def _with_all(mask: Mask) -> Mask:
    """Add a window shorter than the sequences, and padding, to a mask.

    The padding is on the left of the last sequence of the batch, and on the right of the others.
    """
    length = mask.q_segments.shape[1]
    index, count = jnp.arange(length), length // 8 + 3
    real = jnp.broadcast_to(index < length - count, mask.q_segments.shape)
    segments = jnp.where(real.at[-1].set(index >= count), mask.q_segments, 0)
    window = jnp.int32(length // 7)  # a sequence has a quarter of the length
    return dataclasses.replace(mask, q_segments=segments, k_segments=segments, window=window)


def _results(case: Case, attend: Callable[..., jax.Array], *, dtype: str) -> list[jax.Array]:
    """Make a case's call by `attend` with operands of `dtype`. Returns outputs or gradients."""

    def cast(x: CacheLeaf) -> CacheLeaf:
        x = x.dequantize(dtype) if isinstance(x, Quantised) and dtype != case.dtype else x
        return x if isinstance(x, Quantised) else x.astype(dtype)

    arrays = [cast(x) for x in _arguments(case, workloads.normal, leaf=workloads.leaf)]
    return _call(case, attend)(*arrays)


def _arguments(case: Case, normal: Callable[..., Any], *, leaf: Callable[..., Any]) -> list[Any]:
    """Make the random operands of the function that `_call` returns for a case.

    normal, leaf: functions of `workloads` that draw an array [B, T, heads, H] and a cache leaf.
    """
    if case.task == "decode":
        token = dataclasses.replace(case, length=1)
        own = [normal(token, n, i) for i, n in enumerate((case.heads, 2, 2))]
        return [*own, leaf(case, 0), leaf(case, 1)]
    return [normal(case, n, i) for i, n in enumerate((case.heads, 2, 2, case.heads))]


def _call(case: Case, attend: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """Return a function that makes a case's call by `attend` and returns outputs or gradients.

    Its arguments are q, k, v and the gradient of o or, for decoding, q, k, v, cached keys and
    cached values.
    """
    if case.task == "decode":
        start = jnp.array([case.length // 3, case.length // 2], jnp.int32)
        index, window = jnp.int32(case.length + 5), jnp.int32(case.length // 2 + 7)
        scale = workloads.scale_of(dataclasses.replace(case, length=1))
        step = jax.jit(functools.partial(workloads.decode, as_attend(attend)))
        return lambda *arrays: [step(*arrays, start, index, window, scale)]
    mask, scale = _with_all(workloads.mask_of(case)), workloads.scale_of(case)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> list[jax.Array]:
        if case.task == "forward":
            return [attend(q, k, v, mask, scale)]
        return list(jax.vjp(lambda q, k, v: attend(q, k, v, mask, scale), q, k, v)[1](do))

    return run


def forget() -> None:
    """Free the operands and the reference's results that are kept for further comparisons.

    Programs that still exist keep their own.
    """
    workloads.normal.cache_clear()
    workloads.leaves.cache_clear()
    _wanted.cache_clear()
