"""Measures perplexity: reads documents, cuts them into rows, and sums their cross-entropies.

Every row length uses the same tokens. Knows no table and no plot (`figures.py`).
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax import attention, checkpoint, meshes
from qwen_jax.attention import Attend, prove
from qwen_jax.config import Config
from qwen_jax.generate import backend, integers
from qwen_jax.meshes import options, sharding
from qwen_jax.model import Decoder, rope
from qwen_jax.runtime import caches, progress, records
from train import data, step
from train.data import batches
from train.data.batch import IGNORED, Batch
from train.measuring import figures
from train.measuring.modes import setting_of
from train.step import loss

_AT_A_TIME = 4096  # tokens that are measured together, where no row is longer


def run(
    args: argparse.Namespace,
    lengths: Sequence[int],
    *,
    modes: Sequence[str],
    windows: Sequence[int | None] | None,
    picture: Path | None,
) -> None:
    """Measure and report the perplexity of each mode at each row length.

    args: the command line of `train/perplexity.py`.
    lengths: the numbers of tokens per row, all divisors of the largest.
    modes: the context extensions (`modes.setting_of`).
    windows: the window of each layer in modes with "window", or None for the default.
    picture: the file to draw the plot into, or None.

    Raises ValueError if the data has no document of the largest length.
    """
    attention.get(args.attention)
    sizes = options.mesh_sizes(args.mesh)
    options.virtual_cpu_devices(sizes)
    caches.use_compilation_cache(args.compilation_cache)
    config = checkpoint.load_config(args.ckpt)
    settings = {mode: setting_of(config, mode, windows=windows) for mode in modes}
    for length in lengths:
        meshes.check({**config.sizes, "T": length}, sizes)
    longest = max(lengths)
    ids = read_ids(args, longest)
    dtype = args.dtype or backend.default_dtype()
    report = figures.reported(args, len(ids), picture=picture)
    with report as tell, meshes.entered(meshes.make(sizes)):
        keep = integers.for_passes(args.ckpt, dtype)
        decoder = jax.jit(step.stacked)(checkpoint.load(args.ckpt, dtype=dtype, keep=keep))
        rows = rows_at_once(longest, len(ids) // longest)
        attend = prove.resolve(
            args.attention, prove.passes(config, dtype, rows=rows, length=longest)
        )
        for mode, setting in settings.items():
            for length in lengths:
                begin = time.perf_counter()
                value = perplexity(
                    decoder, setting, ids=ids, attend=attend, dtype=dtype, length=length
                )
                tell(mode, length, value, time.perf_counter() - begin)


def perplexity(
    decoder: Decoder,
    config: Config,
    *,
    ids: Int[np.ndarray, " N"],
    attend: Attend,
    dtype: DTypeLike,
    length: int,
) -> float:
    """Return exp of the mean cross-entropy of all tokens but the first of each row.

    decoder: a decoder with stacked layers, on the current mesh.
    config: the config to compute with, which may extend the context otherwise than the decoder's.
    ids: int32 [N], the tokens, which are cut into rows.
    attend: the implementation of attention.
    dtype: the dtype to compute in.
    length: the number of tokens per row.

    Rows are measured in batches of `rows_at_once`; rows that fill up the last one do not count.
    """
    scheme = rope.from_config(config)
    rates = scheme.frequencies(scheme.alpha(np.array([length])))
    total = _total(config, attend, dtype=dtype)
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    size, entropy, done = rows_at_once(length, len(rows)), 0.0, 0
    with progress.bar(desc=f"{length} tokens", total=len(rows), unit="row", leave=False) as bar:
        for part in (rows[at : at + size] for at in range(0, len(rows), size)):
            filling = ((0, size - len(part)), (0, 0))
            labels = np.pad(part, filling, constant_values=IGNORED)
            batch = batches.place(batches.batch_of(np.pad(part, filling), labels))
            entropy += float(total(decoder, batch, rates))
            done += len(part) * (length - 1)
            bar.set_postfix(perplexity=f"{loss.perplexity(entropy / done):.4g}", refresh=False)
            bar.update(len(part))
    return loss.perplexity(entropy / done)


def rows_at_once(length: int, count: int) -> int:
    """Return how many of `count` rows to measure together, on the current mesh or on one device.

    They have about 4096 tokens together, in equally many rows (at least one) on each device that
    rows are split over.
    """
    sizes = sharding.axis_sizes()
    parts = math.prod(sizes[axis] for axis in sharding.BATCH)
    return max(1, min(_AT_A_TIME // length // parts, -(-count // parts))) * parts


@functools.cache
def _total(
    config: Config, attend: Attend, *, dtype: DTypeLike
) -> Callable[[Decoder, Batch, Float[np.ndarray, "1 half"]], Float[Array, ""]]:
    """Build a jitted function that sums the cross-entropies of a batch's targets.

    Its arguments are a decoder, a batch, and RoPE frequencies, float32 [1, H/2].
    """

    @jax.jit
    def total(decoder: Decoder, batch: Batch, rates: Float[Array, "1 half"]) -> Float[Array, ""]:
        decoder = decoder.replace(config=config)
        found, weights = loss.scores(
            decoder, batch, frequencies=rates, attend=attend, dtype=jnp.dtype(dtype)
        )
        return jnp.sum(weights * (found.lse - found.logit))

    return total


def read_ids(args: argparse.Namespace, longest: int) -> Int[np.ndarray, " N"]:
    """Return ids, int32 [N], of documents of at least `longest` tokens, cut to multiples of it.

    args: `ckpt`, `data`, `field` and `tokens` of the command line. Raises ValueError for a record
    that is no document, and if no document is long enough.
    """
    tokenizer = checkpoint.load_tokenizer(args.ckpt)
    if tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer: put its qwen.tiktoken there")
    kept, document, most = list[int](), list[int](), 0
    for record in (record for file in records.files(args.data) for record in records.read(file)):
        if record.problem:
            raise ValueError(f"{record.where}: {record.problem}")
        try:
            document += data.text_example(tokenizer, record.value, field=args.field, ends=False)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        # A document that is longer than all that is wanted is not read to its end.
        whole, most = len(document) // longest * longest, max(most, len(document))
        enough = len(kept) + whole >= args.tokens
        if record.ends or enough:
            kept, document = kept + document[:whole], []
        if enough:
            break
    kept += document[: len(document) // longest * longest]
    if not kept:
        raise ValueError(
            f"no document has {longest} tokens, the longest has {most}: give longer ones, or "
            "shorter --lengths"
        )
    return np.array(kept[: args.tokens // longest * longest], np.int32)
