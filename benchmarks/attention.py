"""Times every attention implementation on the local device, in turn, at the models' shapes.

    python benchmarks/attention.py [--quick] [--shapes '7b-*' ...] [--markdown FILE]

There is one line for each implementation and shape: milliseconds per layer; TFLOP/s (causal pairs
count as half, recomputation is not counted) and their share of a large matrix product, or for
decoding the GB/s at which the cache is read and their share of a large copy (bytes read and
written); the speed relative to the best rival, which is the best implementation not by this project
(`pallas_*`); and the cost of LogN, a window and packing: the time per visible pair with all three,
relative to plain causal attention.

`NAME*` is another implementation at its best, without this project's mask: plain causal attention
with its own mask, or a cache in its own layout. Product and copy are timed in the same run, and all
medians are over rounds in which everything takes its turn. An implementation that differs from the
reference is named and left out. Nothing else should run on the device.
"""

import argparse
import dataclasses
import fnmatch
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks import section
from qwen_jax import attention
from qwen_jax.attention import agreement, timing, workloads
from qwen_jax.attention.timing import TimedCall
from qwen_jax.attention.workloads import Case
from qwen_jax.kernels import choice, others
from qwen_jax.runtime import caches, command, progress

HEADS = {"1.8b": 16, "7b": 32, "14b": 40, "72b": 64}
LENGTHS = {512: 64, 2048: 16, 8192: 4, 32768: 1}  # tokens per row -> rows
CACHES = {32768: (1,), 8192: (8,), 2048: (1, 64)}  # slots per row -> rows
QUICK = ("7b-*-b16-t2048", "7b-*-b4-t8192", "7b-decode-*-s32768*", "7b-decode-b64-*")
COLUMNS = ("shape", "implementation", "ms", "rate", "share", "to best rival", "LogN etc.")


def shapes(dtype: str) -> dict[str, Case]:
    """The shapes by name; `tiny` ones are for trying out this program."""
    result = {}

    def add(size: str, task: str, batch: int, length: int, cache: str | None = None) -> None:
        heads, dim = (2, 32) if size == "tiny" else (HEADS[size], 128)
        letter = "s" if task == "decode" else "t"
        name = f"{size}-{task}-b{batch}-{letter}{length}" + (f"-{cache}" if cache else "")
        result[name] = Case(task, batch, length, heads, dim, dtype, cache=cache)

    for size in HEADS:
        for length, batch in LENGTHS.items():
            add(size, "forward", batch, length)
            add(size, "backward", batch, length)
        for length, batches in CACHES.items():
            for batch in batches:
                add(size, "decode", batch, length)
                add(size, "decode", batch, length, "int8")
    add("tiny", "forward", 2, 64)
    add("tiny", "backward", 2, 64)
    add("tiny", "decode", 2, 64, "int8")
    return result


class Row(NamedTuple):
    """The cells of a line, under COLUMNS."""

    shape: str
    implementation: str
    milliseconds: str
    rate: str
    share: str
    ratio: str
    features: str


@functools.cache
def right(case: Case, name: str) -> bool:
    """Whether an implementation agrees with the reference; prints a line if it does not."""
    worst = agreement.error(case, name)
    if not worst <= agreement.TOLERANCE[case.dtype]:
        command.say(f"{name}, {case.task}: WRONG, by {worst:.1e}; left out")
    return worst <= agreement.TOLERANCE[case.dtype]


def programs(shape: str, case: Case, names: list[str], interpreted: bool) -> dict[str, Any]:
    """What is timed at a shape: every implementation, kernels with LogN etc. too, and rivals."""
    made: dict[str, TimedCall] = {}

    def attempt(label: str, make: Callable[[], TimedCall]) -> None:
        try:
            made[label] = make()
        except Exception as error:  # compilers and allocators fail in ways of their own
            command.say(f"{shape}: not {label}: {' '.join(str(error).split())[:200]}")

    def checked(case: Case, name: str) -> TimedCall:
        if not right(dataclasses.replace(case, batch=1, length=min(case.length, 1024)), name):
            raise ValueError("its results are wrong")
        return workloads.program(case, name)

    for name in names:
        attempt(name, lambda name=name: checked(case, name))
        if name.startswith("pallas") and name in made and case.task != "decode":
            full = dataclasses.replace(case, features=True)
            attempt(f"{name}+", lambda name=name, full=full: workloads.program(full, name))
    own = others.CACHED if case.task == "decode" else others.CAUSAL
    for name in workloads.available(own, interpreted):
        attempt(f"{name}*", lambda name=name: rival(case, name))
    return made


def rival(case: Case, name: str) -> TimedCall:
    """Compile a program that makes a call by another library in the form that suits it best.

    name: a key of `others.CAUSAL` or, for decoding, of `others.CACHED`.

    Raises NotImplementedError for a call with `features` or with a quantised cache.
    """
    if case.features:
        raise NotImplementedError(f"{name}: LogN, windows and packing at once")
    if case.task != "decode":
        return workloads.whole_program(case, others.CAUSAL[name])
    if case.cache:
        raise NotImplementedError(f"{name}: a cache of {case.cache}")
    layout, attend = others.CACHED[name]
    layers = [tuple(map(layout, workloads.leaves(case, i))) for i in range(case.layers())]

    def step(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        index: jax.Array,
        *_: jax.Array,
    ) -> jax.Array:
        return attend(q, keys, values, index - start)

    return workloads.decode_program(case, step, layers=layers)


def rows(shape: str, case: Case, made: dict[str, Any], rounds: int) -> list[Row]:
    """Time the programs of a shape together with their upper limit, a copy or a product."""
    limit, amount = timing.copy() if case.task == "decode" else timing.product(case.dtype)
    seconds = timing.medians({**made, "limit": limit}, rounds)
    peak = amount / seconds.pop("limit")
    seconds = {name: x / case.layers() for name, x in seconds.items()}
    rivals = [x for name, x in seconds.items() if not name.startswith("pallas")]
    work, unit, scale = (
        (case.bytes(), "GB/s", 1e9) if case.task == "decode" else (case.flops(), "TFLOP/s", 1e12)
    )
    result = []
    for name, x in sorted(seconds.items(), key=lambda item: item[1]):
        if name.endswith("+"):
            continue
        cost = seconds.get(f"{name}+")
        if cost is not None:
            cost *= case.pairs() / dataclasses.replace(case, features=True).pairs() / x
        result.append(
            Row(
                shape,
                name,
                f"{1e3 * x:.4g}",
                f"{work / x / scale:.4g} {unit}",
                f"{100 * work / x / peak:.0f} %",
                f"{min(rivals) / x:.2f}" if rivals else "",
                "" if cost is None else f"{cost:.2f}",
            )
        )
    what = "a copy" if case.task == "decode" else "a product"
    result.append(Row(shape, what, "", f"{peak / scale:.4g} {unit}", "100 %", "", ""))
    return result


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add = result.add_argument
    add("--shapes", nargs="+", metavar="PATTERN", help="default: all but tiny; --list shows them")
    add("--list", action="store_true", help="print the names of shapes and implementations")
    add("--quick", action="store_true", help="a few shapes of the 7B, fewer rounds, 7 minutes")
    add("--only", nargs="+", metavar="NAME", help="of the registry, beside all NAME*")
    add("--dtype", choices=list(agreement.TOLERANCE), help="default: bfloat16, on a CPU float32")
    add("--rounds", type=command.positive, metavar="N", help="default: 15, --quick 7")
    add("--minutes", type=command.positive, metavar="N", help="begin no new shape after that long")
    add("--interpreted", action="store_true", help="on a CPU run kernels too, interpreted")
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def chosen(args: argparse.Namespace, known: dict[str, Case]) -> dict[str, Case]:
    """The shapes that the arguments select."""
    patterns = args.shapes or (QUICK if args.quick else [f"{size}-*" for size in HEADS])
    patterns = ["tiny-*" if x == "tiny" else x for x in patterns]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise command.UsageError(f"--shapes {pattern}: no such shape; --list shows them")
    return {k: x for k, x in known.items() if any(fnmatch.fnmatch(k, p) for p in patterns)}


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Time the selected shapes, and print a table."""
    if args.list:
        others = [name for name in args.given if name != "list"]
        command.refuse(args, others, why="has no effect with --list, which times nothing")
    on_cpu = choice.device().platform == "cpu"
    if not on_cpu:
        command.refuse(args, ("interpreted",), why="applies to a CPU: here kernels are compiled")
    known = shapes(args.dtype or ("float32" if on_cpu else "bfloat16"))
    names = workloads.available(attention.IMPLEMENTATIONS, args.interpreted)
    if args.list:
        print("\n".join(known), "\n".join(attention.IMPLEMENTATIONS), sep="\n\n")
        return
    if args.only:
        names = args.only
        for name in names:
            attention.get(name)
    cases = chosen(args, known)
    rounds = args.rounds or (7 if args.quick else 15)
    limit = 60 * (args.minutes or (7 if args.quick else 10**6))
    caches.use_compilation_cache()
    started, lines = time.monotonic(), []
    print(f"{'  '.join(COLUMNS)}\n{choice.device().device_kind}, jax {jax.__version__}", flush=True)
    for shape, case in progress.bar(cases.items(), unit="shape", smoothing=0):
        if time.monotonic() - started > limit:
            command.say(f"{shape}: left out, {limit // 60} minutes are over")
            continue
        new = rows(shape, case, programs(shape, case, names, args.interpreted), rounds)
        agreement.forget()
        lines += new
        for row in new:
            print(f"{row[0]:26} {row[1]:16} {row[2]:>9} {row[3]:>15} ", *row[4:], flush=True)
        section.write(args.markdown, section.title("attention.py", argv), COLUMNS, lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
