"""`python benchmarks/packing.py`: seconds and memory of packing documents and examples into rows.

Lengths are drawn at random; the tokens themselves are not read, and their file is sparse. For each
number of examples, one process packs the rows and another one finds them packed.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from qwen_jax.runtime import command
from train.data.packing import Rows
from train.data.token_files import Counts, TokenCache

_MEAN = {"joined": 600, "fitted": 300, "alone": 300}  # mean tokens of a document or conversation
_ROW = 2048


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = command.Parser(description=(__doc__ or "").partition(": ")[2])
    add = result.add_argument
    add("--millions", type=float, nargs="+", default=[2, 5, 20, 50], metavar="N", help="examples")
    add("--pack", nargs="+", choices=list(_MEAN), default=["joined", "fitted"])
    add("--folder", type=Path, metavar="DIR", help="where files are written (default: temporary)")
    command.add_debug(result)
    return result


def lengths_of(count: int, pack: str) -> np.ndarray:
    """Random lengths in tokens, none longer than a row if examples stay whole."""
    found = 1 + np.random.default_rng(0).exponential(_MEAN[pack], count).astype(np.int64)
    return found if pack == "joined" else np.minimum(found, _ROW)


def made(folder: Path, pack: str) -> dict[str, float]:
    """Pack the rows of a cache, or find them packed: seconds, peak resident GB, rows, places
    used.
    """
    begin = time.perf_counter()
    rows = Rows(TokenCache(folder), _ROW, pack=pack)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("VmHWM:")[1].split()[0])
    used = rows.efficiency
    return {"seconds": seconds, "gb": kilobytes / 1e6, "rows": len(rows), "used": used}


def apart(folder: Path, pack: str) -> dict[str, float]:
    """`made` in a process of its own, so that its peak memory is that of nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(made, (folder, pack))


def prepare(folder: Path, lengths: np.ndarray) -> None:
    """Write a cache of examples of these lengths, all of whose tokens are 0."""
    ends = np.cumsum(lengths)
    ends.tofile(folder / "ends.i8")
    with open(folder / "ids.u4", "wb") as file:
        file.truncate(4 * int(ends[-1]))
    count, tokens = len(ends), int(ends[-1])
    facts = Counts(records=count, examples=count, tokens=tokens, trained=tokens)
    (folder / "counts.json").write_text(json.dumps(dataclasses.asdict(facts)))


def work(args: argparse.Namespace) -> None:
    """Measure the selected cases, and print a table."""
    machine = f"{os.cpu_count()} CPUs, numpy {np.__version__}"
    print(f"{datetime.date.today()}, {machine}, rows of {_ROW} tokens")
    print("| pack | examples, million | rows, million | places used | made, s | peak, GB | "
          "found, s | peak, GB | files, GB |\n" + "|---" * 9 + "|")  # fmt: skip
    for pack in args.pack:
        for millions in args.millions:
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                folder = Path(name)
                prepare(folder, lengths_of(int(millions * 1e6), pack))
                first, again = apart(folder, pack), apart(folder, pack)
                kept = sum(x.stat().st_size for x in folder.glob("rows-*/*")) / 1e9
                print(
                    f"| {pack} | {millions:g} | {first['rows'] / 1e6:.2f} | {first['used']:.1%} | "
                    f"{first['seconds']:.1f} | {first['gb']:.2f} | {again['seconds']:.1f} | "
                    f"{again['gb']:.2f} | {kept:.2f} |",
                    flush=True,
                )


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
