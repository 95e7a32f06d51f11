"""Compares the local device's results with the original's, through every attention it has.

    python benchmarks/golden.py [--attention NAME ...] [--markdown FILE]

There are two kinds of lines. The first compare the tiny checkpoint in `tests/golden` with the
original's own figures: full passes with and without dynamic NTK and LogN, greedy decoding over the
cache in float and in int8, left-padded rows, and bfloat16. The second compare each fused kernel
(forward, backward and decoding) with the reference in float32: packed sequences, a window, LogN,
padding and grouped heads. Everything is compiled for the device, and nothing is interpreted. The
exit code is 1 if anything differs by more than its bound.
"""

import argparse
import fnmatch
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

import qwen_jax
from benchmarks import section
from convert import from_hf
from qwen_jax import attention
from qwen_jax.attention import agreement, workloads
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.kernels import choice
from qwen_jax.runtime import caches, command, progress
from tests.support.golden_figures import GOLDEN, arrays, overrides, scalars, worst

COLUMNS = ("what", "attention", "difference", "bound", "")
LOGITS = 2e-4  # standard deviations of the original's logits; its own float32 noise reaches 5e-5
# Mean KL divergence in nats of bfloat16 distributions from the original's; on a CPU up to 9e-4.
DIVERGENCE = 3e-3
HEAD_DIMS = (64, 128)


class Row(NamedTuple):
    """The cells of a line, under COLUMNS."""

    what: str
    attention: str
    difference: str
    bound: str
    verdict: str


Check = tuple[str, str, float, Callable[[], float]]  # what, attention, bound, the difference


def model_checks(path: Path, name: str) -> Iterator[Check]:
    """Checks of the original's figures with one attention implementation."""

    def load(flags: str, dtype: str = "float32", cache: str | None = None) -> LanguageModel:
        given = overrides(flags)
        return qwen_jax.load(path, dtype, given, attention=name, cache_dtype=cache)

    def full(flags: str) -> float:
        logits = load(flags).logits(arrays()["long200.tokens"])
        return worst(np.asarray(logits[:, -24:]), arrays()[f"long200.{flags}"])

    def wrong_tokens(case: str, flags: str, wanted: str, cache_dtype: str | None) -> float:
        prompt, tokens = arrays()[f"{case}.prompt"], arrays()[f"{case}.{wanted}"]
        mask = arrays().get(f"{case}.mask")
        made = load(flags, cache=cache_dtype).generate(prompt, mask, max_new_tokens=tokens.shape[1])
        return float(np.mean(made != tokens))

    def divergence() -> float:
        wanted = jax.nn.log_softmax(arrays()["plain.logits"])
        got = jax.nn.log_softmax(load("plain", "bfloat16").logits(arrays()["plain.tokens"]))
        return float(np.mean(np.sum(np.exp(wanted) * (wanted - got), axis=-1)))

    for flags in ("plain", "ntk", "logn", "ntk_logn"):
        yield f"logits, {flags}, 200 tokens", name, LOGITS, functools.partial(full, flags)
    cross = scalars()["decode.cross.flags"]
    for case, flags, wanted, cache in (
        ("decode.cross", cross, "tokens", None),
        ("batchlong", "ntk", "tokens", None),
        ("kvint8", "plain", "float_tokens", "int8"),
    ):
        what = f"share of other tokens, {case}{', int8 cache' if cache else ''}"
        yield what, name, 0.0, functools.partial(wrong_tokens, case, flags, wanted, cache)
    yield "KL divergence, bfloat16", name, DIVERGENCE, divergence


def kernel_checks(name: str, length: int) -> Iterator[Check]:
    """Checks of a kernel against the reference (`agreement.error`). length: tokens per row."""
    for dtype in ("bfloat16", "float32"):
        for dim in HEAD_DIMS:
            for task in workloads.TASKS:
                for cache in (None, "int8") if task == "decode" else (None,):
                    case = workloads.Case(task, 2, length, 4, dim, dtype, cache=cache)
                    what = f"{task}, {dtype}{', int8 cache' if cache else ''}, head dim {dim}"
                    error = functools.partial(agreement.error, case, name)
                    yield what, name, agreement.TOLERANCE[dtype], error


def measured(check: Check) -> Row | None:
    """Run a check, and return its line; None if the implementation does not support the case."""
    what, name, bound, difference = check
    try:
        found = difference()
    except NotImplementedError as error:
        command.say(f"{name} declines {what}: {error}")
        return None
    except Exception as error:  # compilers and allocators fail in ways of their own
        reason = " ".join(str(error).split())[:200]
        return Row(what, name, "failed", f"{bound:g}", f"WRONG: {reason}")
    return Row(what, name, f"{found:.1e}", f"{bound:g}", "" if found <= bound else "WRONG")


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add = result.add_argument
    add("--attention", nargs="+", metavar="NAME", help="default: all that run on this device")
    add("--length", type=command.positive, default=1024, help="of kernels (default: %(default)s)")
    add("--no-kernels", action="store_true", help="the checkpoint's figures alone")
    add("--only", default="*", metavar="PATTERN", help="checks by their names, as 'logits*'")
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Run the selected checks, and print a table. Raises ValueError if one differs."""
    if args.no_kernels:
        command.refuse(args, ("length",), why="applies to kernels: drop it, or --no-kernels")
    caches.use_compilation_cache()
    names = args.attention or workloads.available(attention.IMPLEMENTATIONS)
    for name in names:
        attention.get(name)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "golden")
        if from_hf.main([str(GOLDEN / "checkpoint"), str(path)]):
            raise ValueError("the checkpoint in tests/golden could not be converted")
        checks = [check for name in names for check in model_checks(path, name)]
        if not args.no_kernels:
            checks += [
                x for name in names if name != "xla" for x in kernel_checks(name, args.length)
            ]
        checks = [check for check in checks if fnmatch.fnmatch(check[0], args.only)]
        print(f"{choice.device().device_kind}, jax {jax.__version__}", flush=True)
        for check in progress.bar(checks, unit="check", smoothing=0):
            row = measured(check)
            if row is not None:
                rows.append(row)
                print("  ".join(row), flush=True)
                section.write(args.markdown, section.title("golden.py", argv), COLUMNS, rows)
    wrong = [row for row in rows if row.verdict]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checks agree")
    if wrong or not rows:
        names_of = ", ".join(dict.fromkeys(f"{row.attention}: {row.what}" for row in wrong))
        raise ValueError(f"{len(wrong)} of {len(rows)} checks differ: {names_of or 'none ran'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
