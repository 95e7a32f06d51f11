"""Chooses the dtype and the attention implementation for the devices of this machine."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import attention as attention_registry
from qwen_jax import checkpoint, meshes
from qwen_jax.attention import Attend, prove
from qwen_jax.attention import cache as kv
from qwen_jax.config import Config
from qwen_jax.decoding import decode
from qwen_jax.meshes import sharding
from qwen_jax.runtime import values


def check_names(dtype: str | None, attention: str, *, cache_dtype: str | None) -> None:
    """Raise ValueError if one of these arguments of `load` is not a known name. No file is read."""
    values.choice("dtype", dtype, allowed=checkpoint.DTYPES, or_none=True)
    values.choice("cache_dtype", cache_dtype, allowed=kv.DTYPES, or_none=True)
    attention_registry.get(attention)


def attention_for(
    name: str, config: Config, *, dtype: str, length: int, cache_dtype: str | None, mesh: Mesh
) -> Attend:
    """Return the attention function that a model uses, for chunks of a prompt and for decoding.

    name: a name of `attention.IMPLEMENTATIONS`, such as "auto".
    dtype: the dtype of the weights.
    length: the number of slots in the KV cache, so the most tokens of a sequence.
    cache_dtype: "int8" or "int8_asymmetric" for an 8-bit KV cache, None for `dtype`.

    The function is traced for one token, so that attention which cannot run this model raises
    NotImplementedError before the weights are read.
    """
    chunk = min(length, decode.buckets()[-1])
    attend = prove.resolve(
        name,
        [
            *prove.passes(config, dtype, rows=1, length=chunk, mesh=mesh),
            *prove.decoding(config, dtype, rows=1, slots=length, cache=cache_dtype, mesh=mesh),
        ],
    )
    rows = math.prod(sharding.axis_sizes(mesh)[axis] for axis in sharding.BATCH)

    def abstract(letters: str, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(letters, mesh))

    q = abstract("BTNH", dtype, rows, 1, config.num_heads, config.head_dim)
    k = abstract("BTKH", dtype, rows, 1, config.num_kv_heads, config.head_dim)
    ids, scale = abstract("BT", jnp.int32, rows, 1), abstract("BT", jnp.float32, rows, 1)
    mask = attention_registry.Mask(ids, ids, ids, ids, abstract("", jnp.int32))
    with meshes.entered(mesh):
        jax.eval_shape(attention_registry.on_shards(attend), q, k, k, mask, scale)
    return attend


def default_dtype() -> str:
    """Return float32 on CPU, float16 on GPUs of compute capability below 8, else bfloat16."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "float32"
    old = device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8
    return "float16" if old else "bfloat16"
