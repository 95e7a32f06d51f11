"""Times the serving engine at fixed numbers of requests at a time, against the device's memory.

    python benchmarks/concurrency.py                                # 7B, pages in bfloat16
    python benchmarks/concurrency.py --cache int8 --concurrency 64 128 --markdown out.md

All requests of a run arrive at once, and have prompts and replies of equal lengths. `steady` counts
the tokens between the last request's first token and the first request's last one, when all rows
decode and no prompt is computed. A decode step reads every weight but the embedding once, and the
filled pages of the rows; these bytes divided by the time of a step, relative to the bandwidth of a
large copy (bytes read and written), are `of copy`. Programs are compiled into an empty cache at
first (`cold`), and at the end once more from that cache (`cached`). Each line is written as soon as
it is known. Nothing else should run on the device.
"""

import argparse
import functools
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks import decoding, section, serve
from qwen_jax import meshes
from qwen_jax.attention import IMPLEMENTATIONS, timing
from qwen_jax.attention.implementation import Implementation
from qwen_jax.config.presets import PRESETS
from qwen_jax.engine import from_model
from qwen_jax.engine.engine import Engine
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.kernels import choice
from qwen_jax.runtime import caches, command

COLUMNS = ("pages", "figure", "value")
FEW = 32  # below so many requests at a time, replies have --new-few tokens
Write = Callable[[str, str], None]  # takes a figure's name and its value


def chosen(engine: Engine) -> str:
    """The implementation that was proved and chosen for each of the engine's calls."""
    own = Implementation.of(engine._steps.attend)
    found = {"attention": own.name or "xla"}
    for field in ("paged_decode", "paged_prefill", "write"):
        kernel = getattr(own, field)
        each = [n for n, x in IMPLEMENTATIONS.items() if getattr(x, field, None) == kernel]
        found[field] = "xla" if kernel is None else " or ".join(each)
    return ", ".join(f"{task}: {name}" for task, name in found.items())


def ready(model: LanguageModel, rows: int, *, state: str, write: Write) -> Engine:
    """Make an engine, and write the seconds until each program was ready.

    state: of the compilation cache, for the lines.
    """
    began, each = time.perf_counter(), []

    def report(name: str, seconds: float) -> None:
        each.append(seconds)
        write(f"ready, {state}: {name} (s)", f"{seconds:.2f}")

    engine = from_model.make(model, rows=rows, report=report)
    assert engine is not None
    seconds = time.perf_counter() - began
    write(f"ready, {state}: proofs of kernels, memory (s)", f"{seconds - sum(each):.2f}")
    write(f"ready, {state}: all (s)", f"{seconds:.2f}")
    return engine


def steady(found: Sequence[serve.Times]) -> float | None:
    """Tokens a second while all requests decode; None if there was no such time."""
    begin, end = max(x.tokens[0] for x in found), min(x.tokens[-1] for x in found)
    count = sum(begin < at <= end for x in found for at in x.tokens)
    return count / (end - begin) if end > begin else None


def at_once(
    engine: Engine, model: LanguageModel, *, count: int, args: argparse.Namespace, write: Write
) -> None:
    """Run `count` requests at a time, and write their rates. args.bandwidth: of a copy, bytes/s."""
    new = args.new if count >= FEW else min(args.new, args.new_few)
    lengths = {"prompt": f"{args.prompt},0", "new": f"{new},0", "lengths": None}
    drawn = {"seed": count, "requests": count, "rate": math.inf, "max_length": model.max_length}
    asked = serve.requests(argparse.Namespace(**lengths, **drawn), model.config.vocab_size)
    before = engine.load().preemptions
    found, seconds = serve.by_engine(engine, asked)
    name = f"{count} at a time, {args.prompt} in, {new} out"
    write(f"{name}: whole run (tok/s)", f"{sum(len(x.tokens) for x in found) / seconds:.4g}")
    rate = steady(found)
    if rate is None:
        again = engine.load().preemptions - before
        write(f"{name}: steady", f"none: they did not decode all at once; {again} preemptions")
        return
    write(f"{name}: steady (tok/s)", f"{rate:.4g}")
    needed = decoding.step_bytes(model, count, args.prompt + new / 2)
    in_step(f"{name}: steady", count / rate, needed=needed, args=args, write=write)


def in_step(
    name: str, seconds: float, *, needed: float, args: argparse.Namespace, write: Write
) -> None:
    """Write the lines of a decode step. needed: the bytes of weights and pages that it reads."""
    write(f"{name}, decode step (ms)", f"{1e3 * seconds:.4g}")
    write(f"{name}, weights and pages read (GB)", f"{needed / 1e9:.4g}")
    write(f"{name}, GB/s", f"{needed / seconds / 1e9:.4g}")
    write(f"{name}, of copy", f"{100 * needed / seconds / args.bandwidth:.0f} %")


def measure(
    engine: Engine, model: LanguageModel, *, args: argparse.Namespace, write: Write
) -> None:
    """Write all figures of an engine that is ready, then close it."""
    shape, config = engine._steps.shape, model.config
    dtype = model.decoder.embedding[...].dtype
    size = from_model.page_bytes(config, shape.size, dtype=dtype, kind=shape.cache_dtype, tp=1)
    write("attention", chosen(engine))
    write("rows, pages, tokens of a page", f"{shape.rows}, {shape.pages}, {shape.size}")
    write("memory of pages (GB)", f"{shape.pages * size / 1e9:.4g}")
    engine.start()
    try:
        for count in args.concurrency:
            if args.minutes and time.monotonic() - args.started > 60 * args.minutes:
                write(f"{count} at a time", f"left out: {args.minutes} minutes are over")
                continue
            at_once(engine, model, count=count, args=args, write=write)
    finally:
        engine.close()
    context = args.prompt + args.new // 2
    seconds = serve.step_seconds(engine, context, steps=args.steps)
    name = f"decode program, {shape.rows} rows of {context} tokens"
    needed = decoding.step_bytes(model, shape.rows, context)
    in_step(name, seconds, needed=needed, args=args, write=write)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    write("peak memory (GB)", "not known here" if peak is None else f"{peak / 1e9:.4g}")


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add, count = result.add_argument, {"type": command.positive, "metavar": "N"}
    add("--model", choices=list(PRESETS), default="qwen-7b", help="default: %(default)s")
    add("--cache", choices=list(decoding.CACHES), default="bfloat16", help="of pages")
    add("--concurrency", nargs="+", default=[1, 16, 64, 128], help="default: 1 16 64 128", **count)
    add("--attention", default="auto", metavar="NAME", help="default: auto")
    add("--prompt", default=1024, help="tokens of a prompt (default: %(default)s)", **count)
    add("--new", default=1024, help="tokens of a reply (default: %(default)s)", **count)
    few = f"tokens of a reply below {FEW} requests at a time (default: %(default)s)"
    add("--new-few", default=256, help=few, **count)
    add("--steps", default=30, help="of the decode program alone", **count)
    add("--layers", help="default: all", **count)
    add("--vocab", help="rows of the vocabulary (default: the model's)", **count)
    add("--minutes", help="begin no more requests after that long", **count)
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def loaded(args: argparse.Namespace) -> LanguageModel:
    """A model of random weights, whose attention is chosen as for a model that is read."""
    dtype = "float32" if choice.device().platform == "cpu" else "bfloat16"
    shape = decoding.shape(args.model, args.layers, args.vocab)
    decoder = decoding.random_decoder(shape, dtype)
    jax.block_until_ready(jax.tree.leaves(decoder))  # else the first program would wait for it
    length = 2 * max(args.prompt, args.new)
    return decoding.made(decoder, args.attention, args.cache, length)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure, and write each line as soon as it is known."""
    args.started = time.monotonic()
    rows: list[tuple[str, str, str]] = []

    def write(name: str, value: str) -> None:
        rows.append((args.cache, name, value))
        print("  ".join(rows[-1]), flush=True)
        section.write(args.markdown, section.title("concurrency.py", argv), COLUMNS, rows)

    with tempfile.TemporaryDirectory() as folder, meshes.entered(meshes.make()):
        caches.use_compilation_cache(folder)
        copy, copied = timing.copy()
        args.bandwidth = copied / timing.medians({"copy": copy}, 5)["copy"]
        write("copy (GB/s)", f"{args.bandwidth / 1e9:.4g}")
        del copy
        model, most = loaded(args), max(args.concurrency)
        engine = ready(model, most, state="cold", write=write)
        measure(engine, model, args=args, write=write)
        del engine  # and its pages
        gc.collect()
        jax.clear_caches()
        ready(model, most, state="cached", write=write).close()


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
