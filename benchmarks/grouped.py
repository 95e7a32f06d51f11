"""Times products with 4- and 8-bit weights on the local device, in turn, beside float weights.

    python benchmarks/grouped.py [--shapes '7b-*' ...] [--rows 1 8] [--bits 4 8] [--markdown FILE]

There is one line for each form of a product: microseconds for one weight; its speed relative to
`floats`, a product with the same weight in x's dtype, dequantised beforehand; the GB/s at which the
weight is read, as it is stored for that form, and their share of a large copy (bytes read and
written), which is timed in the same run. `by_floats` dequantises the whole weight at every call.

Every form multiplies by several weights in turn, so that they come from memory and not from a
cache. All medians are over rounds in which everything takes its turn. A form whose results are
wrong is named and left out. Nothing else should run on the device.
"""

import argparse
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import section
from qwen_jax import PRESETS
from qwen_jax.attention import timing
from qwen_jax.kernels import choice, grouped_hopper, grouped_tpu, grouped_triton, grouped_xla
from qwen_jax.leaves import grouped
from qwen_jax.runtime import caches, command

GROUP = 128


def by_floats(
    x: jax.Array, codes: jax.Array, *, scales: jax.Array, zeros: jax.Array | None, bits: int
) -> jax.Array:
    """Multiply rows by a weight of which floats are made first."""
    return jnp.dot(x, grouped.floats(codes, scales, zeros, bits=bits, dtype=x.dtype))


# By name, and the platforms for which each is meant.
FORMS: dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]] = {
    grouped_tpu.NAME: (grouped_tpu.tpu_product, ("tpu",)),
    grouped_hopper.NAME: (grouped_hopper.hopper_product, ("gpu",)),
    grouped_triton.NAME: (grouped_triton.triton_product, ("gpu",)),
    "one_row": (grouped_xla.one_row, ("gpu", "tpu", "cpu")),
    "by_groups": (grouped_xla.by_groups, ("gpu", "tpu", "cpu")),
    "by_floats": (by_floats, ("gpu", "tpu", "cpu")),
}
COLUMNS = ("shape", "form", "us", "to floats", "rate", "share of a copy")
_BYTES = {"cpu": 2**27, "gpu": 2**30, "tpu": 2**30}  # of the weights, beyond any cache
_TOLERANCE = 0.01  # of the largest result, where rows and the weight may be bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """A product of some rows with a weight of symmetric integers in groups of 128 inputs."""

    rows: int
    inputs: int
    outputs: int
    bits: int
    dtype: str

    def bytes(self) -> int:
        """The bytes of a weight: its integers, and scales in float16."""
        return self.inputs * self.outputs * self.bits // 8 + self.inputs // GROUP * self.outputs * 2

    def float_bytes(self) -> int:
        """The bytes of the same weight in x's dtype."""
        return self.inputs * self.outputs * jnp.dtype(self.dtype).itemsize

    def weights(self) -> int:
        """The number of weights that are multiplied by in turn."""
        return min(max(2, _BYTES[choice.device().platform] // self.bytes()), 16)


def shapes() -> dict[str, tuple[int, int]]:
    """Inputs and outputs by name; `tiny` is for trying out this program."""
    result = {"tiny": (256, 384)}
    for name in PRESETS:
        if name in ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b"):
            width, inner = PRESETS[name].hidden_size, PRESETS[name].intermediate_size
            size = name.removeprefix("qwen-")
            result |= {f"{size}-q": (width, width), f"{size}-up": (width, inner)}
            result |= {f"{size}-down": (inner, width)}
    return result


class Row(NamedTuple):
    """The cells of a line, under COLUMNS."""

    shape: str
    form: str
    microseconds: str
    ratio: str
    rate: str
    share: str


def drawn(case: Case) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Draw x, and the words and scales of each weight."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((case.rows, case.inputs)), case.dtype)
    words = (case.inputs * case.bits // 32, case.outputs)
    scales = random.uniform(0.5, 1.5, (case.inputs // GROUP, case.outputs)) / 64
    held = []
    for _ in range(case.weights()):
        codes = random.integers(0, 2**32, words, np.uint32)
        held.append((jnp.asarray(codes), jnp.asarray(scales, jnp.float16)))
    return x, held


def programs(shape: str, case: Case) -> dict[str, timing.TimedCall]:
    """What is timed at a shape: every form that is right, and float weights."""
    x, held = drawn(case)
    wide = functools.partial(grouped.floats, bits=case.bits, dtype=case.dtype)
    floats = [wide(codes, scales) for codes, scales in held]
    wanted = np.asarray(jnp.dot(x, floats[0], preferred_element_type=jnp.float32), np.float64)
    made = {"floats": timing.compiled(lambda x, all: [jnp.dot(x, w) for w in all], x, floats)}
    for name, (form, platforms) in FORMS.items():
        if choice.device().platform not in platforms:
            continue
        product = functools.partial(form, zeros=None, bits=case.bits)
        try:
            call = timing.compiled(
                lambda x, all, product=product: [product(x, w, scales=s) for w, s in all], x, held
            )
            found = np.asarray(call()[0], np.float64)
        except Exception as error:  # compilers and allocators fail in ways of their own
            command.say(f"{shape}: not {name}: {' '.join(str(error).split())[:200]}")
            continue
        if np.abs(found - wanted).max() > _TOLERANCE * np.abs(wanted).max():
            command.say(f"{shape}: {name} is WRONG; left out")
            continue
        made[name] = call
    return made


def rows(shape: str, case: Case, made: dict[str, Any], rounds: int) -> list[Row]:
    """Time the programs of a shape together with a copy."""
    limit, amount = timing.copy()
    seconds = timing.medians({**made, "limit": limit}, rounds)
    peak = amount / seconds.pop("limit")
    seconds = {name: x / case.weights() for name, x in seconds.items()}
    result = []
    for name, x in sorted(seconds.items(), key=lambda item: item[1]):
        rate = (case.float_bytes() if name == "floats" else case.bytes()) / x
        cells = f"{1e6 * x:.4g}", f"{seconds['floats'] / x:.2f}", f"{rate / 1e9:.4g} GB/s"
        result.append(Row(shape, name, *cells, f"{100 * rate / peak:.0f} %"))
    result.append(Row(shape, "a copy", "", "", f"{peak / 1e9:.4g} GB/s", "100 %"))
    return result


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add = result.add_argument
    add("--shapes", nargs="+", metavar="PATTERN", default=["7b-*"], help="default: 7b-*")
    add("--rows", nargs="+", type=command.positive, metavar="N", default=[1, 8], help="default 1 8")
    add("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    add("--dtype", choices=list(grouped_xla.PIECES), help="default: bfloat16, on a CPU float32")
    add("--rounds", type=command.positive, metavar="N", default=15, help="default: 15")
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Time the selected shapes, and print a table."""
    known = shapes()
    for pattern in args.shapes:
        if not fnmatch.filter(known, pattern):
            raise command.UsageError(f"--shapes {pattern}: no such shape, only {', '.join(known)}")
    chosen = {k: x for k, x in known.items() if any(fnmatch.fnmatch(k, p) for p in args.shapes)}
    dtype = args.dtype or ("float32" if choice.device().platform == "cpu" else "bfloat16")
    caches.use_compilation_cache()
    print(f"{'  '.join(COLUMNS)}\n{choice.device().device_kind}, jax {jax.__version__}", flush=True)
    lines = []
    for name, sizes in chosen.items():
        for bits in args.bits:
            for number in args.rows:
                case = Case(number, *sizes, bits, dtype)
                shape = f"{name}-int{bits}-b{number}"
                new = rows(shape, case, programs(shape, case), args.rounds)
                lines += new
                for row in new:
                    print(f"{row[0]:18} {row[1]:16} {row[2]:>9} {row[3]:>6} ", *row[4:], flush=True)
                title = section.title("grouped.py", argv)
                section.write(args.markdown, title, COLUMNS, lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
