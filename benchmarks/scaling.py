"""Tables of what each published model needs and can reach on each size of machine.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py [--only qwen-7b v5e:16x16]

They are the last sections of docs/scaling.md; `pod.py` makes the first ones.

For pretraining at 2k and 8k tokens, fine-tuning at 2k and decoding at 32k, this compiles the most
promising settings that `train.planning.search` finds. It prints the best one that fits, or what the
smallest one lacks. Each compilation has a process of its own, so one that dies only loses a row.
Rows are kept in `--cache` and not compiled again. Needs the `aot` extra.
"""

import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import command, paths

MODELS = ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b")
TOPOLOGIES = (
    "v5e:4x4",
    "v5e:16x16",
    "v6e:8x8",
    "v5p:4x4x8",
    "v5p:8x8x8",
    "h100:8",
    "h100:8x8",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of run to plan.

    rows: the most rows per step. A search halves them until they fit, and a step then accumulates
        several parts. Pretraining takes 4 M tokens, fine-tuning 128 rows of 2048, as in the report.
    """

    title: str
    length: int
    rows: int
    decode: bool = False


TASKS = (
    Task("Pretraining, 2048 tokens", 2048, 2048),
    Task("Pretraining, 8192 tokens", 8192, 512),
    Task("Fine-tuning, 2048 tokens", 2048, 128),
    Task("Decoding, 32768 tokens of context", 32768, 512, decode=True),
)


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="Tables of models and machines.")
    parser.add_argument("--only", nargs="*", default=[], help="models and topologies to make")
    parser.add_argument("--cache", type=Path, default=Path(".cache/scaling.jsonl"))
    parser.add_argument("--tries", type=int, default=3, help="programs compiled for a row")
    args = parser.parse_args()
    if unknown := set(args.only) - {*MODELS, *TOPOLOGIES}:
        parser.error(f"--only {min(unknown)}: choose from {', '.join((*MODELS, *TOPOLOGIES))}")
    models = [x for x in MODELS if x in args.only] or MODELS
    topologies = [x for x in TOPOLOGIES if x in args.only] or TOPOLOGIES
    print(_head())
    for task in TASKS:
        print(f"\n### {task.title}\n\n{_columns(task)}")
        for model in models:
            for topology in topologies:
                plan = _best(task, model, topology, args.tries, args.cache)
                print(_row(model, topology, plan), flush=True)


def _best(task: Task, model: str, topology: str, tries: int, cache: Path) -> Any:
    """The best setting that fits, or the one that lacks least memory; None if none was compiled."""
    options = ["--model", model, "--topology", topology, "--length", str(task.length)]
    options += ["--batch", str(task.rows), "--tries", str(tries), "--search", "--json"]
    options += ["--decode"] if task.decode else []
    wanted = [x for x in plans(options, cache) if x["task"] != "prefill"]
    return min(wanted, key=lambda x: (not x["fits"], x["over"]), default=None)


def plans(options: Sequence[str], cache: Path) -> list[Any]:
    """The output of `python train/plan.py` for these options, from the cache or a new process."""
    key = " ".join((*options, *versions().values()))
    for line in map(json.loads, _lines(cache)):
        if line["key"] == key:
            return line["plans"]
    script = Path(__file__).resolve().parent.parent / "train/plan.py"
    command = [sys.executable, str(script), *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        print(f"{' '.join(options)}: {ran.stderr.strip()[-300:]}", file=sys.stderr)
        return []
    plans = json.loads(ran.stdout)["plans"]
    cache.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "plans": plans})
    paths.write(cache, "".join(f"{x}\n" for x in (*_lines(cache), line)).encode())
    return plans


def _lines(cache: Path) -> list[str]:
    """The lines of the cache."""
    return cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []


def versions() -> dict[str, str]:
    """The versions of the compilers."""
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def _head() -> str:
    """The head of the section."""
    compilers = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""## Plans

What the search recommends, compiled, with bounds from published rates ({compilers}, {today};
`python benchmarks/scaling.py`). A bound is not a measurement: it is what no run exceeds. *MFU* has
all terms overlap, *MFU, serial* none. Memory is of a device, in GB."""


def _columns(task: Task) -> str:
    """The head of a table."""
    names = ["model", "devices", "mesh", "rows"]
    names += [] if task.decode else ["remat"]
    names += ["needed", "available", "tokens/s", "a device", "MFU", "MFU, serial", "limit"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def _row(model: str, topology: str, x: Any) -> str:
    """A line of a table. x: a plan, None if the compiler failed."""
    if x is None:
        return f"| {model} | {topology} | the compiler failed |"
    cells = [model, topology, x["mesh"], x["batch"]]
    cells += [x["remat"]] if x["remat"] else []
    cells += [f"{x['memory']['needed'] / 1e9:.1f}", f"{x['available'] / 1e9:.1f}"]
    if x["fits"]:
        overlap = x["seconds"] / x["serial_seconds"]
        rate = x["tokens_per_second"]
        cells += [f"{rate:,.0f}", f"{rate / x['devices']:,.0f}"]
        cells += [f"{x['mfu']:.1%}", f"{x['mfu'] * overlap:.1%}", x["limit"]]
    else:
        cells.append(f"does not fit: {x['over'] / 1e9:.1f} GB over")
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
