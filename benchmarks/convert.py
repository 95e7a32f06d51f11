"""Convert a checkpoint folder to a model directory and back, and compare with copying the folder.

    python benchmarks/convert.py SRC [--work DIR]

Prints a row of a Markdown table: the wall time of `cp -r`, and for each direction the wall time,
its ratio to cp, the rate, and the peak resident memory of the process (ru_maxrss, the kernel's
VmHWM). The page cache is dropped before each run if that is permitted. Needs room for two copies of
SRC.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DROP = Path("/proc/sys/vm/drop_caches")


def cold() -> bool:
    """Write back and drop the page cache; False if that is not permitted."""
    subprocess.run(["sync"], check=True)
    try:
        DROP.write_text("3\n", encoding="utf-8")
    except OSError:
        return False
    return True


def timed(*command: str | Path) -> tuple[float, float]:
    """Run a command, from a cold cache where possible: (seconds, peak resident GB)."""
    cold()
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("src", metavar="SRC", type=Path)
    parser.add_argument("--work", metavar="DIR", type=Path, help="default: beside SRC")
    args = parser.parse_args()
    src = args.src.resolve()
    total = sum(file.stat().st_size for file in src.iterdir())
    with tempfile.TemporaryDirectory(dir=(args.work or src.parent).resolve()) as work:
        copied, model, back = (Path(work, name) for name in ("cp", "model", "back"))
        cp, _ = timed("cp", "-r", src, copied)
        shutil.rmtree(copied)
        there = timed(sys.executable, "convert/from_hf.py", src, model)
        again = timed(sys.executable, "convert/to_hf.py", model, back)
    cache = "dropped" if cold() else "warm"
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"Python {platform.python_version()}, page cache {cache} before each run")
    print(
        "| checkpoint | size | cp | from_hf | x cp | rate | peak memory "
        "| to_hf | x cp | rate | peak memory |\n|" + " --- |" * 11
    )
    cells = [src.name, f"{total / 1e9:.2f} GB", f"{cp:.1f} s"]
    for seconds, peak in (there, again):
        rate = f"{total / seconds / 1e9:.2f} GB/s"
        cells += [f"{seconds:.1f} s", f"{seconds / cp:.2f}", rate, f"{peak:.2f} GB"]
    print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
