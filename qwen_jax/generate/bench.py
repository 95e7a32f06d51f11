"""Benchmark of a loaded model: prefill and decode rates, and the share of memory bandwidth used.

A decode step reads the filled cache and, once, every weight except the embedding table. The share
is the bytes read per second over the bandwidth of float32 matrix-vector products in the same run.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import meshes
from qwen_jax.attention import cache as kv
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.meshes import sharding

PROMPT, NEW, ROUNDS = 128, 32, 5  # prompt tokens, new tokens, timed rounds


def run(model: LanguageModel, new: int, *, ids: Sequence[int] | None = None) -> dict[str, Any]:
    """Time prefill, decoding and a matrix-vector product in turn, and return medians over rounds.

    new: the number of tokens to generate, at least 2.
    ids: the token ids of the prompt; None for `PROMPT` random tokens.

    Rates are in tokens/s, sizes in bytes, bandwidths in GB/s.
    """
    drawn = np.random.default_rng(0).integers(0, int(0.9 * model.config.vocab_size), PROMPT)
    prompt = np.asarray([drawn if ids is None else ids])
    length = prompt.shape[1]
    started = time.perf_counter()
    next(model.stream(prompt, max_new_tokens=new))
    cold = time.perf_counter() - started
    with meshes.entered(model.mesh):
        matvec = _matvec()
    prefill, decode, bandwidth = [], [], []
    for timed in [False] + [True] * ROUNDS:
        started = time.perf_counter()
        parts = model.stream(prompt, max_new_tokens=new, at_once=8)
        next(parts)
        first = time.perf_counter()
        made = sum(part.shape[1] for part in parts)
        ended = time.perf_counter()
        rate = matvec()
        if timed:
            prefill.append(length / (first - started))
            decode.append(made / (ended - first))
            bandwidth.append(rate)
    step = sum(x.nbytes for x in jax.tree.leaves(model.decoder))
    if model.decoder.head is not None:
        step -= model.decoder.embedding[...].nbytes
    step += (length + new // 2) * _cache_bytes(model)
    median = statistics.median
    achieved = [step * rate / 1e9 for rate in decode]
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(model.decoder.embedding[...].dtype),
        "prompt_tokens": length,
        "new_tokens": new,
        "seconds_to_first_token_cold": round(cold, 3),
        "prefill_tokens_per_second": round(median(prefill), 2),
        "decode_tokens_per_second": round(median(decode), 3),
        "bytes_per_step": step,
        "decode_gb_per_second": round(median(achieved), 2),
        "matvec_gb_per_second": round(median(bandwidth), 2),
        "share_of_bandwidth": round(
            median(a / b for a, b in zip(achieved, bandwidth, strict=True)), 3
        ),
    }


def _cache_bytes(model: LanguageModel) -> int:
    """Return the bytes of KV cache that one token of one sequence takes."""
    dtype = model.decoder.embedding[...].dtype
    rows = math.prod(sharding.axis_sizes(model.mesh)[axis] for axis in sharding.BATCH)
    with meshes.entered(model.mesh):
        start = jax.ShapeDtypeStruct((rows,), jnp.int32)
        cache = jax.eval_shape(
            lambda start: kv.empty(
                model.config, start, capacity=256, dtype=dtype, kind=model.cache_dtype
            ),
            start,
        )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)) // (256 * rows)


def text(result: dict[str, Any]) -> str:
    """Format the results of `run` for a terminal."""
    return (
        f"{result['device']}, jax {result['jax']}, {result['dtype']}\n"
        f"prefill  {result['prefill_tokens_per_second']:10.1f} tokens/s "
        f"({result['prompt_tokens']} tokens; the first one ever took "
        f"{result['seconds_to_first_token_cold']:.1f} s, compilation included)\n"
        f"decode   {result['decode_tokens_per_second']:10.2f} tokens/s "
        f"({result['decode_gb_per_second']:.1f} GB/s read)\n"
        f"memory   {result['matvec_gb_per_second']:10.1f} GB/s in float32 matrix-vector products; "
        f"decoding reaches {100 * result['share_of_bandwidth']:.0f} % of it"
    )


def _matvec(rows: int = 8192, columns: int = 4096, *, count: int = 4) -> Callable[[], float]:
    """Return a function that measures memory bandwidth in GB/s by matrix-vector products.

    rows, columns: the size of each float32 matrix.
    count: the number of matrices, which together are too large for any cache (0.5 GB by default).
    """
    matrices = [jnp.full((rows, columns), 1e-3, jnp.float32) for _ in range(count)]
    x = jnp.ones((1, columns), jnp.float32)

    def measure() -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(_products(x, matrices))
            times.append(time.perf_counter() - started)
        return sum(m.nbytes for m in matrices) / statistics.median(times) / 1e9

    return measure


@jax.jit
def _products(x: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
    return [jnp.einsum("bi,oi->bo", x, matrix) for matrix in matrices]
