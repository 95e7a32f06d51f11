"""Times prefill and decoding of the published sizes with random weights, against device limits.

    python benchmarks/decoding.py                                   # 1.8B and 7B
    python benchmarks/decoding.py --model qwen-7b --batch 1 --cache bfloat16 --attention xla
    python benchmarks/decoding.py --model qwen-7b --weights float int4 int8 --batch 1 8

There is one line for each model, kind of weights, cache, number of rows and attention
implementation; int4 and int8 are the layers' matrices as a GPTQ checkpoint has them. A decode step
reads every weight but the embedding once, and the filled part of the cache. These bytes divided by
the time of a step, relative to the bandwidth of a large copy (bytes read and written) timed in turn
with it, are `of copy`: the share of what the device's memory allows. `prefill` relates the FLOPs
that the model needs (causal attention counts as half) to a large matrix product. All figures are
medians over rounds in which everything takes its turn. Nothing else should run on the device.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import section
from qwen_jax import meshes, model
from qwen_jax.attention import cache as kv
from qwen_jax.attention import timing
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.config import Config
from qwen_jax.config.presets import PRESETS
from qwen_jax.generate import integer_products
from qwen_jax.generate.backend import attention_for
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.kernels import choice
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.model import Decoder
from qwen_jax.runtime import caches, command, progress
from train.planning import stored_weights

COLUMNS = (
    "model", "weights", "cache", "rows", "attention", "prefill tokens/s", "of product",
    "ms of a step", "tokens/s", "GB/s", "of copy",
)  # fmt: skip
CACHES = {"bfloat16": None, "int8": "int8"}  # the command's name -> cache_dtype


class Row(NamedTuple):
    """The cells of a line, under COLUMNS."""

    model: str
    weights: str
    cache: str
    rows: str
    attention: str
    prefill: str
    of_product: str
    step: str
    rate: str
    bandwidth: str
    of_copy: str


def shape(size: str, layers: int | None, vocab: int | None) -> Config:
    """A published size, with the given number of layers and rows of the vocabulary."""
    config = PRESETS[size]
    return dataclasses.replace(
        config,
        num_layers=layers or config.num_layers,
        vocab_size=vocab or config.vocab_size,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("weights", "kernel"))
def random_decoder(
    config: Config, dtype: str, *, weights: str = "float", kernel: str | None = None
) -> Decoder:
    """A decoder with random weights.

    weights: how its layers' matrices are stored, of FORMS; kernel: of integers.
    """
    key = jax.random.key(0)
    plain = model.create(config, key, dtype=dtype)
    if weights == "float":
        return plain
    stored: dict[str, Any] = {}
    form = stored_weights.decoder(config, dtype, form=weights, kernel=kernel)
    map_leaves(lambda path, leaf: stored.setdefault(path, leaf), form)

    def drawn(array: jax.ShapeDtypeStruct) -> jax.Array:
        if array.dtype == jnp.uint32:
            return jax.random.bits(key, array.shape, jnp.uint32)
        scales = jnp.full(array.shape, 0.002, jnp.float16)
        return jax.lax.bitcast_convert_type(scales, array.dtype)  # some kernels take their bits

    def one(path: str, leaf: Weight) -> Any:
        found = stored[path]
        return jax.tree.map(drawn, found) if isinstance(found, Grouped) else leaf

    return map_leaves(one, plain)


def made(decoder: Decoder, name: str, cache: str, length: int) -> LanguageModel:
    """A LanguageModel around random weights, without a tokenizer.

    name: of the attention implementation; cache: a key of CACHES; length: the most tokens per row.
    """
    mesh, dtype = meshes.current(), decoder.embedding[...].dtype.name
    return LanguageModel(
        config=decoder.config,
        tokenizer=None,
        generation_config=GenerationConfig.from_hf({}),
        max_length=length,
        decoder=decoder,
        mesh=mesh,
        attend=attention_for(
            name, decoder.config, dtype=dtype, length=length, cache_dtype=CACHES[cache], mesh=mesh
        ),
        cache_dtype=CACHES[cache],
    )


def step_bytes(language_model: LanguageModel, rows: int, tokens: float) -> float:
    """The bytes that a decode step reads: weights without the embedding, `tokens` of each row's
    cache.
    """
    decoder = language_model.decoder
    weights = sum(x.nbytes for x in jax.tree.leaves(decoder)) - decoder.embedding[...].nbytes
    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    make = functools.partial(
        kv.empty,
        decoder.config,
        capacity=256,
        dtype=decoder.embedding[...].dtype,
        kind=language_model.cache_dtype,
    )
    held = jax.eval_shape(make, start)
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held.layers)) / 256
    return weights + rows * tokens * one


def timed(language_model: LanguageModel, prompt: np.ndarray, new: int) -> tuple[float, float]:
    """The seconds to the first token, and the seconds per decode step. new: tokens to generate."""
    started = time.perf_counter()
    parts = language_model.stream(prompt, max_new_tokens=new, at_once=32)
    next(parts)
    first = time.perf_counter()
    count = sum(part.shape[1] for part in parts)
    return first - started, (time.perf_counter() - first) / count


def row(decoder: Decoder, case: tuple[str, str, str, int, str], args: argparse.Namespace) -> Row:
    """Time one cell of the table. case: (model, weights, cache, rows, attention)."""
    size, weights, cache, rows, name = case
    config, length = decoder.config, args.prompt
    language_model = made(decoder, name, cache, length + args.new)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length))
    copy, copied = timing.copy()
    product, flops = timing.product(str(decoder.embedding[...].dtype))
    timed(language_model, drawn, args.new)  # compiles
    turns = []
    for _ in range(args.rounds):
        times = timing.medians({"copy": copy, "product": product}, 1)
        turns.append((*timed(language_model, drawn, args.new), times["copy"], times["product"]))
    first, step, copying, multiplying = (statistics.median(x) for x in zip(*turns, strict=True))
    needed = step_bytes(language_model, rows, length + args.new / 2)
    work = rows * length * config.flops_per_token(length) / 3  # the forward pass only
    return Row(
        f"{size}, {config.num_layers} layers",
        weights,
        cache,
        str(rows),
        name,
        f"{rows * length / first:.4g}",
        f"{100 * work / first * multiplying / flops:.0f} %",
        f"{1e3 * step:.4g}",
        f"{rows / step:.4g}",
        f"{needed / step / 1e9:.4g}",
        f"{100 * needed / step * copying / copied:.0f} %",
    )


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add, count = result.add_argument, {"type": command.positive, "metavar": "N"}
    models = ["qwen-1.8b", "qwen-7b"]
    add("--model", nargs="+", choices=list(PRESETS), default=models, help="default: 1.8B and 7B")
    add(
        "--weights",
        nargs="+",
        choices=stored_weights.FORMS,
        default=["float"],
        help="default: float",
    )
    add("--batch", nargs="+", default=[1, 8, 64], help="rows (default: 1 8 64)", **count)
    add("--cache", nargs="+", choices=list(CACHES), default=list(CACHES), help="default: both")
    add("--attention", nargs="+", metavar="NAME", default=["auto"], help="default: auto")
    add("--prompt", default=512, help="tokens of a prompt (default: %(default)s)", **count)
    add("--new", default=129, help="new tokens of a row (default: %(default)s)", **count)
    add("--layers", help="default: all", **count)
    add("--vocab", help="rows of the vocabulary (default: the model's)", **count)
    add("--rounds", default=3, help="default: %(default)s", **count)
    add("--minutes", help="begin no new line after that long", **count)
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Time the selected cases, and print a table."""
    caches.use_compilation_cache()
    started, rows = time.monotonic(), []
    dtype = "float32" if choice.device().platform == "cpu" else "bfloat16"
    print(f"{'  '.join(COLUMNS)}\n{choice.device().device_kind}, jax {jax.__version__}", flush=True)
    cells = [(c, b, a) for c in args.cache for b in args.batch for a in args.attention]
    models = [(size, weights) for size in args.model for weights in args.weights]
    bar = progress.bar(total=len(models) * len(cells), unit="line", smoothing=0)
    with meshes.entered(meshes.make()), bar:
        for size, weights in models:
            bits = stored_weights.BITS.get(weights)
            kernel = None if bits is None else integer_products.settled(bits, dtype)
            made_as = {"weights": weights, "kernel": kernel}
            decoder = random_decoder(shape(size, args.layers, args.vocab), dtype, **made_as)
            for cache, batch, name in cells:
                bar.update()
                line = f"{size}, {weights} weights, {cache} cache, {batch} rows, {name}"
                if args.minutes and time.monotonic() - started > 60 * args.minutes:
                    command.say(f"{line}: left out, {args.minutes} minutes are over")
                    continue
                try:
                    rows.append(row(decoder, (size, weights, cache, batch, name), args))
                except Exception as error:  # compilers and allocators fail in ways of their own
                    command.say(f"{line}: {' '.join(str(error).split())[:200]}")
                    continue
                print("  ".join(rows[-1]), flush=True)
                section.write(args.markdown, section.title("decoding.py", argv), COLUMNS, rows)
            del decoder
            gc.collect()
    if not rows:
        raise ValueError("no line could be measured: see the reasons above")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
