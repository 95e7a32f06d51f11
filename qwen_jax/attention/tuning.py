"""Times attention on this machine's device, and writes the results into `measured.json`.

It is the command `python -m qwen_jax.kernels.tune`.

Block sizes under test replace the measured ones that a kernel looks up, so that a line of the table
means what was timed. A kernel whose results differ from the XLA reference's is reported and not
entered. In a last run the fastest block sizes of each kernel take turns with all other
implementations, and its medians are written.
"""

import argparse
import contextlib
import datetime
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from qwen_jax.attention import agreement, block_grids, workloads
from qwen_jax.attention.timing import TimedCall
from qwen_jax.attention.workloads import Case
from qwen_jax.kernels import choice
from qwen_jax.kernels.choice import Line
from qwen_jax.runtime import caches, command, lock, paths, progress

_EXAMPLES = """\
`auto` chooses by the package's table of times, to which this command adds lines, and by its own
tests of each kernel, whose results stay on the machine. With nothing else running on the device:

  python -m qwen_jax.kernels.tune
      every implementation, all tasks, head dim 128 in bfloat16, at three lengths
  python -m qwen_jax.kernels.tune --head-dim 64 --dtype float16
      another shape: `auto` reads the lines of a model's own head dim and dtype, nearest in length
  python -m qwen_jax.kernels.tune --task decode --kernel xla pallas_triton --out /tmp/lines.json
      some of it, into a file of one's own
  python -m qwen_jax.kernels.tune --show
      results of `auto`'s tests on this machine, and the table's lines for this device
  python -m qwen_jax.kernels.tune --forget
      delete these results, so that it tests each kernel again

Lines of the same device, kernel, task, head dim, dtype and length are replaced, others are kept.
`auto` compares the lines of a task with each other, so time all kernels with the same options.
"""
_TOKENS = 16384  # tokens in a batch, where the length allows more than one row
_FINALISTS = 3  # how many block sizes of a kernel take part in the last run


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    result = command.Parser(
        prog="python -m qwen_jax.kernels.tune",
        description="Time the implementations of attention on this device, and write the results "
        "into the table\nby which `--attention auto` chooses among them.",
        epilog=_EXAMPLES,
    )
    _case_options(result.add_argument_group("what is timed"))
    result.add_argument(
        "--out",
        type=command.path,
        metavar="FILE",
        help="JSON file for the results, which are added to its lines (default: the package's own "
        "table)",
    )
    kept = result.add_mutually_exclusive_group()
    kept.add_argument(
        "--show",
        action="store_true",
        help="time nothing; print what auto's tests found here, and the lines of this device",
    )
    kept.add_argument(
        "--forget",
        action="store_true",
        help="time nothing; delete what auto's tests found here, so that they are repeated",
    )
    command.add_debug(result)
    return result


def _case_options(group: argparse._ArgumentGroup) -> None:
    add, tasks = group.add_argument, ("forward", "backward", "decode")
    add(
        "--kernel",
        nargs="+",
        metavar="NAME",
        help=f"time only these: {command.ATTENTION.removeprefix('auto, ')} (default: all)",
    )
    add(
        "--task",
        nargs="+",
        choices=tasks,
        default=list(tasks),
        metavar="NAME",
        help="passes to time: forward, backward, decode (default: forward backward decode)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of queries, keys and values (default: bfloat16)",
    )
    add(
        "--length",
        nargs="+",
        type=command.positive,
        default=[2048, 8192, 32768],
        metavar="N",
        help="tokens per row; of decode, slots of the cache (default: 2048 8192 32768)",
    )
    for name, default, what in (
        ("--head-dim", 128, "width of a head"),
        ("--heads", 32, "query heads, and as many key heads"),
        ("--rounds", 9, "times that each finalist is timed, in turns, at the end"),
    ):
        told = f"{what} (default: %(default)s)"
        add(name, type=command.positive, default=default, metavar="N", help=told)
    add(
        "--batch",
        type=command.positive,
        metavar="N",
        help="rows (default: as many as make 16384 tokens; 8 for decode)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return command.run(parser(), _work, argv=argv)


def _work(args: argparse.Namespace) -> None:
    for alone in ("show", "forget"):
        if getattr(args, alone):
            others = [name for name in args.given if name not in (alone, "debug")]
            command.refuse(
                args, others, why=f"has no effect with --{alone}, which times nothing: leave it out"
            )
    if args.show:
        print(shown())
        return
    if args.forget:
        from qwen_jax.attention import verdicts

        print(f"forgot {verdicts.forget()} verdicts in {verdicts.folder()}")
        return
    from qwen_jax.attention import registry

    unknown = sorted(set(args.kernel or ()) - set(registry.IMPLEMENTATIONS))
    if unknown:
        known = ", ".join(registry.IMPLEMENTATIONS)
        raise command.UsageError(f"--kernel {unknown[0]}: choose from {known}")
    out = choice.TABLE if args.out is None else args.out
    if paths.is_remote(out):
        raise command.UsageError(f"--out {out}: must be a file on a disk")
    if choice.device().platform == "cpu":
        if out.resolve() == choice.TABLE.resolve():
            raise command.UsageError(
                "on a CPU kernels run interpreted, and their times mean nothing: "
                "to try this command, name another file with --out"
            )
        command.say("on a CPU kernels run interpreted: these times are no measurements of them")
    if paths.is_place(out):  # otherwise the folder is made
        command.check_writable("--out", out)
    caches.use_compilation_cache()
    names = args.kernel or workloads.available(registry.IMPLEMENTATIONS)
    cases = [case for task in args.task for case in _cases(args, task)]
    total = sum(block_grids.steps(name, case.task) for name in names for case in cases)

    with progress.bar(total=total, unit="program", smoothing=0) as bar:
        for case in cases:
            bar.set_description(f"{case.task} {case.stored} {case.length}")
            lines = _tuned(case, names, rounds=args.rounds, bar=bar)
            agreement.forget()
            write(out, lines)  # after each case: an interrupted run keeps what it has
            for line in lines:
                bar.write(_text(line), file=sys.stderr)
    command.say(f"wrote {out}")


def shown() -> str:
    """Format this machine's stored verdicts, and the lines of `measured.json` for its device."""
    from qwen_jax.attention import verdicts

    device = choice.device().device_kind
    if found := verdicts.kept():
        parts = [f"found out by auto, kept in {verdicts.folder()}:", verdicts.table(found)]
    else:
        parts = [
            f"auto has found out nothing yet (it would be in {verdicts.folder()}): on a TPU or GPU "
            "it proves each kernel where one is first used, as python -m qwen_jax.generate --ckpt "
            "DIR --bench does"
        ]
    lines = [line for line in choice.measured() if line["device"] == device]
    if lines:
        parts.append(f"\nmeasured on {device}, in {choice.TABLE}:")
        parts += [f"  {_what(line)} {_text(line)}" for line in lines]
    else:
        parts.append(
            f"\nno lines for {device} in {choice.TABLE}: "
            "python -m qwen_jax.kernels.tune, on that device, makes them"
        )
    return "\n".join(parts)


def _what(line: Line) -> str:
    """Format the call that a line of `measured.json` is for."""
    return f"{line['task']:8} {line['dtype']:8} {line['head_dim']:4} {line['length']:6}"


def _cases(args: argparse.Namespace, task: str) -> list[Case]:
    """Return the attention calls (`workloads.Case`) that the command times for a task."""
    shape = {"heads": args.heads, "head_dim": args.head_dim, "dtype": args.dtype}
    if task == "decode":
        caches = (None, "int8")
        sizes = [(args.batch or 8, n, c) for n in args.length for c in caches]
        return [Case(task, b, n, cache=c, **shape) for b, n, c in sizes]
    return [Case(task, args.batch or max(1, _TOKENS // n), n, **shape) for n in args.length]


def _tuned(case: Case, names: list[str], *, rounds: int, bar: tqdm) -> list[Line]:
    """Time a call with all implementations `names`. Returns a line for each one that is right."""
    from qwen_jax.attention import timing

    entrants: dict[str, tuple[str, dict[str, int], TimedCall]] = {}
    for name in names:
        for blocks, program in _finalists(case, name, bar=bar):
            entrants[f"{name} {blocks}"] = name, blocks, program
    times = timing.medians({key: x[2] for key, x in entrants.items()}, rounds)
    best: dict[str, Line] = {}
    for key, seconds in sorted(times.items(), key=lambda x: x[1]):
        name, blocks, _ = entrants[key]
        best.setdefault(name, _line(case, name, blocks=blocks, seconds=seconds / case.layers()))
    return list(best.values())


def _finalists(case: Case, name: str, *, bar: tqdm) -> list[tuple[dict[str, int], TimedCall]]:
    """Return a kernel's fastest block sizes ({}: its own choice), each with its program."""
    from qwen_jax.attention import timing

    tried: dict[str, tuple[float, dict[str, int], TimedCall]] = {}

    def attempt(blocks: dict[str, int]) -> None:
        bar.update()
        try:
            with trying(case, name, blocks=blocks):
                program = workloads.program(case, name)
                seconds = timing.medians({name: program}, 3)[name]
                slowest = max((x[0] for x in tried.values()), default=math.inf)
                if len(tried) == _FINALISTS and seconds >= slowest:
                    return
                wrong = agreement.error(case, name)
        except Exception as error:  # a compiler refuses blocks in ways of its own
            reason = " ".join(str(error).split())[:200]
            bar.write(f"{name} {blocks or ''}: {reason}", file=sys.stderr)
            return
        if not wrong <= agreement.TOLERANCE[case.dtype]:
            bar.write(f"{name} {blocks or ''}: WRONG, by {wrong:.1e}", file=sys.stderr)
            return
        tried[str(blocks)] = seconds, blocks, program
        for key in sorted(tried, key=lambda x: tried[x][0])[_FINALISTS:]:
            del tried[key]  # and its program's memory

    attempt({})
    before: dict[str, int] = {}
    for grid in block_grids.sweeps(name, case.task):
        for blocks in grid:
            attempt(before | blocks)
        if not tried:
            return []
        before = min(tried.values(), key=lambda x: x[0])[1]
    return [(blocks, program) for _, blocks, program in tried.values()]


@contextlib.contextmanager
def trying(case: Case, name: str, *, blocks: dict[str, int]) -> Iterator[None]:
    """Make a kernel use these block sizes within a `with` statement; {} lets it choose."""
    measured = choice.measured
    lines = [_line(case, name, blocks=blocks, seconds=math.inf)] if blocks else []
    choice.measured = lambda: lines
    try:
        yield
    finally:
        choice.measured = measured


def _line(case: Case, name: str, *, blocks: dict[str, int], seconds: float) -> Line:
    """Make a line of `measured.json` from a kernel's block sizes and its seconds per call."""
    import jax

    line: Line = {
        "device": choice.device().device_kind,
        "kernel": name,
        "task": case.task,
        "head_dim": case.head_dim,
        "dtype": case.stored,
        "length": case.length,
        "blocks": blocks,
        "milliseconds": _rounded(seconds * 1e3),
        "batch": case.batch,
        "heads": case.heads,
        "jax": jax.__version__,
        "date": str(datetime.date.today()),
    }
    if case.task == "decode":
        line["gbytes_per_second"] = _rounded(case.bytes() / seconds / 1e9)
    else:
        line["tflops"] = _rounded(case.flops() / seconds / 1e12)
    return line


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def _text(line: Line) -> str:
    """Format the result in a line of `measured.json`."""
    rate = line.get("tflops", line.get("gbytes_per_second"))
    unit = "TFLOP/s" if "tflops" in line else "GB/s"
    return f"{line['kernel']:14} {line['milliseconds']:10.4f} ms {rate:8} {unit} {line['blocks']}"


def write(path: Path, lines: Sequence[Line]) -> None:
    """Merge lines into the sorted table in `path`. They replace lines with equal `choice.KEYS`.

    A lock file makes programs that write at the same time keep each other's lines.
    """

    def key(line: Line) -> tuple[str | int, ...]:
        return tuple(line[x] for x in choice.KEYS)

    with lock.alone(path, path.with_name(f"{path.name}.lock"), wait=True):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            kept = []
        table = {key(line): line for line in [*kept, *lines]}
        rows = ",\n".join(f"  {json.dumps(table[x])}" for x in sorted(table))
        paths.write(path, (f"[\n{rows}\n]\n" if table else "[]\n").encode())


if __name__ == "__main__":
    sys.exit(main())
