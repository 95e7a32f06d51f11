"""All measurements on an accelerator, unattended, in parts of at most five minutes each.

    make device                      # all parts, on the local device
    make device PART=2               # one of them
    python benchmarks/device.py --part 3 4 --out results
    python benchmarks/device.py --list          # what was measured on this code, and what was not
    python benchmarks/device.py --rehearse      # the same commands, tiny, on a CPU: seconds

    1  the original's figures and every kernel against the reference, compiled for the device
    2  block sizes and times of attention, beside every rival that is installed
    3  prefill and decoding of the 1.8B and 7B: 1, 8 and 64 rows, bfloat16 and int8 caches
    4  training steps of the 1.8B and of layers of the 7B, at 2048 and 8192 tokens
    5  serving the 7B: 1, 16, 64 and 128 requests at a time, pages in bfloat16
    6  the same with pages in int8
    7  decoding of the 7B with 4 and 8 bits beside bfloat16, and products with such weights alone

A part is a list of commands, each with a time limit. Their results go into the folder of --out (by
default $OUT, else `device/`): `device.md` (tables for docs/benchmarks.md), `device.json` (what ran,
on which code, and how it ended), `measured.json` (lines for qwen_jax/kernels/measured.json) and
`device.log`. A command that has succeeded on this code and device is not run again, if that is
recorded in the folder or in `benchmarks/device.json`, where results are kept; --again runs it all
the same. Wheels in `.wheels/`, which `benchmarks/device_wheels.sh` fills, are installed beside the
present packages. No network is used.
"""

import argparse
import dataclasses
import datetime
import glob
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen_jax.runtime import command, paths  # noqa: E402

KEPT = ROOT / "benchmarks" / "device.json"
WHEELS = ROOT / ".wheels"
# The source files that a figure depends on; the table of measured blocks is a result, not a source.
CODE = ("qwen_jax/**/*.py", "convert/*.py", "train/**/*.py", "benchmarks/*.py")
PARTS = (1, 2, 3, 4, 5, 6, 7)


@dataclasses.dataclass(frozen=True)
class Task:
    """A measurement: a command that runs in a process of its own, for at most `seconds`.

    part: the part that it belongs to.
    arguments: of Python; {out} in one stands for the folder of results, {work} for a temporary one.
    table: the file in {work} whose text goes into device.md.
    """

    name: str
    part: int
    arguments: tuple[str, ...]
    seconds: int
    table: str | None = None


def _task(name: str, part: int, seconds: int, line: str) -> Task:
    """A task from a command line, to which `--markdown` with the task's table is added."""
    table = f"{name}.md"
    if not line.startswith("-m"):
        line += f" --markdown {{work}}/{table}"
    return Task(name, part, tuple(line.split()), seconds, table)


# The limits of a part add up to less than five minutes.
TASKS = [
    _task("golden", 1, 285, "benchmarks/golden.py"),
    _task("tune", 2, 170, "-m qwen_jax.kernels.tune --length 2048 8192 --out {out}/measured.json"),
    _task("attention", 2, 115, "benchmarks/attention.py --quick --minutes 1"),
    _task("decoding-1.8b", 3, 110, "benchmarks/decoding.py --model qwen-1.8b --minutes 1"),
    _task("decoding-7b", 3, 175, "benchmarks/decoding.py --model qwen-7b --minutes 2"),
    _task(
        "training-1.8b",
        4,
        145,
        "benchmarks/train.py --model qwen-1.8b --remat projections full --rounds 5"
        " --profile {work}/trace-1.8b",
    ),
    _task(
        "training-7b",
        4,
        145,
        "benchmarks/train.py --model qwen-7b --layers 4 --remat projections full --rounds 5"
        " --profile {work}/trace-7b",
    ),
    _task("serve", 5, 290, "benchmarks/concurrency.py --cache bfloat16 --minutes 3"),
    _task("serve-int8", 6, 290, "benchmarks/concurrency.py --cache int8 --minutes 3"),
    _task(
        "decoding-int4",
        7,
        200,
        "benchmarks/decoding.py --model qwen-7b --weights float int4 int8 --batch 1 8"
        " --cache bfloat16 --minutes 2",
    ),
    _task("grouped", 7, 95, "benchmarks/grouped.py --shapes 7b-up 7b-down --rows 1 8 128"),
]
# The same commands without an accelerator, which show that everything runs, but no speed.
REHEARSAL = [
    _task(
        "golden", 1, 120, "benchmarks/golden.py --attention xla --no-kernels --only logits,?plain*"
    ),
    _task(
        "tune",
        2,
        120,
        "-m qwen_jax.kernels.tune --kernel xla --task forward --length 32 --heads 2 --head-dim 32"
        " --dtype float32 --batch 1 --rounds 1 --out {out}/measured.json",
    ),
    _task("attention", 2, 120, "benchmarks/attention.py --shapes tiny-forward-* --rounds 1"),
    _task(
        "decoding-1.8b",
        3,
        120,
        "benchmarks/decoding.py --model qwen-1.8b --layers 1 --vocab 512 --batch 1 --cache int8"
        " --prompt 16 --new 3 --rounds 1 --attention xla",
    ),
    _task(
        "training-1.8b",
        4,
        120,
        "benchmarks/train.py --hidden 32 --vocab 256 --layers 1 --length 16 --tokens 16"
        " --remat full --rounds 1",
    ),
    *(
        _task(
            name,
            part,
            120,
            f"benchmarks/concurrency.py --cache {cache} --layers 1 --vocab 512 --concurrency 1 2"
            " --prompt 16 --new 8 --steps 1",
        )
        for name, part, cache in (("serve", 5, "bfloat16"), ("serve-int8", 6, "int8"))
    ),
    _task(
        "decoding-int4",
        7,
        120,
        "benchmarks/decoding.py --model qwen-1.8b --weights float int4 --layers 1 --vocab 512"
        " --batch 1 --cache bfloat16 --prompt 16 --new 3 --rounds 1 --attention xla",
    ),
    _task("grouped", 7, 120, "benchmarks/grouped.py --shapes tiny --rows 1 --bits 4 --rounds 1"),
]


def fingerprint() -> str:
    """A digest of the source files that figures depend on."""
    digest = hashlib.sha256()
    for pattern in CODE:
        for name in sorted(glob.glob(pattern, root_dir=ROOT, recursive=True)):
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def device_kind(environment: dict[str, str]) -> dict[str, str]:
    """The device and the versions, found in a process of its own, which releases the device
    again.
    """
    program = (
        "import jax, json, sys; d = jax.devices()[0]; print(json.dumps({'device': d.device_kind,"
        " 'platform': d.platform, 'jax': jax.__version__, 'python': sys.version.split()[0]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"jax finds no device here: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(rehearse: bool, site: Path) -> dict[str, str]:
    """The environment of the commands: imports search this checkout, then the wheels, then the
    rest.
    """
    result = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    if rehearse:
        result["JAX_PLATFORMS"] = "cpu"
    return result


def install_wheels(site: Path) -> None:
    """Unpack the provided wheels, if any, into a folder that only these commands see."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(site), *wheels], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the wheels in {WHEELS.name}/ cannot be installed: {reason}")


def records(file: Path) -> list[dict[str, Any]]:
    """Read the records of a ledger; [] if there is no file. Raises ValueError that names a broken
    one.
    """
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
            raise ValueError("it is no list of objects")
        return found
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it, or repair it") from None


def done_before(task: Task, here: dict[str, str], ledgers: Iterable[dict[str, Any]]) -> Any:
    """The latest record of this task with success on this code, device and jax, or None."""
    wanted = {"task": task.name, "arguments": list(task.arguments), **here, "ended": "done"}
    found = [x for x in ledgers if all(x.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None


def run(task: Task, out: Path, work: Path, given: dict[str, str]) -> dict[str, Any]:
    """Run a task, with its output in device.log; returns its record.

    The record says how it ended, and has its table and the last lines of its output.
    """
    arguments = [x.format(out=out, work=work) for x in task.arguments]
    started = time.monotonic()
    text = f"\n== part {task.part}, {task.name}: python {' '.join(task.arguments)}\n"
    with (out / "device.log").open("a", encoding="utf-8") as log:
        log.write(text)
        log.flush()
        begun = log.tell()
        try:
            ended = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=task.seconds,
            ).returncode
            how = "done" if ended == 0 else f"exit code {ended}"
        except subprocess.TimeoutExpired:
            how = f"stopped after {task.seconds} s"
    said = (out / "device.log").read_bytes()[begun:].decode("utf-8", "replace")
    said = [line.rpartition("\r")[2].rstrip() for line in said.splitlines()]
    table = work / task.table if task.table else None
    written = table.read_text(encoding="utf-8") if table and table.exists() else ""
    return {
        "task": task.name,
        "part": task.part,
        "arguments": list(task.arguments),
        "ended": how,
        "seconds": round(time.monotonic() - started, 1),
        "date": str(datetime.date.today()),
        "table": written.replace(f" --markdown {table}", ""),
        "said": [line for line in said if line][-40:],
    }


def markdown(found: list[dict[str, Any]]) -> str:
    """All records as one page of Markdown."""
    parts = []
    for record in found:
        title = f"## Part {record['part']}: {record['task']}"
        line = f"`python {' '.join(record['arguments'])}`: {record['ended']}, {record['seconds']} s"
        where = f"{record['device']}, jax {record['jax']}, {record['date']}, code {record['code']}"
        said = "\n".join(record["said"])
        body = record["table"] or f"```\n{said}\n```"
        parts.append(f"{title}\n\n{where}\n\n{line}\n\n{body}\n")
    return "\n".join(parts)


def write(out: Path, found: list[dict[str, Any]]) -> None:
    """Write both files of results. Called after every task, so that an interrupted run keeps its
    results.
    """
    for name, text in (
        ("device.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
        ("device.md", markdown(found)),
    ):
        paths.write(out / name, text.encode())


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(
        prog="python benchmarks/device.py",
        description=summary,
        epilog=detail,
    )
    add = result.add_argument
    add("--part", nargs="+", type=int, choices=PARTS, default=list(PARTS), help="default: all")
    folder = os.environ.get("OUT", "device")
    add("--out", type=Path, default=Path(folder), metavar="DIR", help="default: $OUT, else device/")
    add("--list", action="store_true", help="say what is measured on this code, and run nothing")
    add("--again", action="store_true", help="run also what was measured on this code already")
    add("--rehearse", action="store_true", help="tiny sizes on a CPU: does everything run?")
    command.add_debug(result)
    return result


def work(args: argparse.Namespace) -> None:
    """Run the selected tasks that are not measured yet. Raises ValueError if one fails."""
    if args.list:
        command.refuse(args, ("again",), why="has no effect with --list, which runs nothing")
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        given = environment(args.rehearse, temporary / "site")
        args.out.mkdir(parents=True, exist_ok=True)
        found = records(args.out / "device.json")
        known = [*records(KEPT), *found]
        if not (args.list or args.rehearse):
            install_wheels(temporary / "site")
        here = {**device_kind(given), "code": fingerprint()}
        if here["platform"] == "cpu" and not args.rehearse:
            raise ValueError("there is no accelerator here: --rehearse tries the commands on a CPU")
        print(f"{here['device']}, jax {here['jax']}, code {here['code']}", flush=True)
        tasks = [x for x in (REHEARSAL if args.rehearse else TASKS) if x.part in args.part]
        before = {task.name: done_before(task, here, known) for task in tasks}
        for task in tasks:
            record = before[task.name]
            state = f"measured {record['date']}, {record['seconds']} s" if record else "to do"
            print(f"part {task.part}  {task.name:16} {state}", flush=True)
        failed = []
        for task in tasks:
            if args.list or (before[task.name] and not args.again):
                continue
            print(f"part {task.part}  {task.name}: at most {task.seconds} s ...", flush=True)
            record = here | run(task, args.out.resolve(), temporary, given)
            own = {"task": task.name, **here}
            found = [x for x in found if any(x.get(key) != own[key] for key in own)]
            found.append(record)
            write(args.out, found)
            print(record["table"] or "\n".join(record["said"][-5:]), flush=True)
            print(f"part {task.part}  {task.name}: {record['ended']}, {record['seconds']} s")
            if record["ended"] != "done":
                failed.append(task.name)
    if failed:
        raise ValueError(f"{', '.join(failed)}: see {args.out / 'device.log'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
