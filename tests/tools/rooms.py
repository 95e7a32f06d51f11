"""The table of rooms in docs/design.md: `python -m tests.tools.rooms` makes it from the files.

What a room holds is the first sentence of its `__init__.py`. Its arrows are the rooms that it
imports from, wherever in a file the import stands; `make lint` holds their order.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/design.md"
BEGIN, END = "<!-- rooms: python -m tests.tools.rooms -->", "<!-- end of rooms -->"
# From the bottom to the top, as in pyproject.toml.
QWEN_JAX = "runtime config meshes kernels leaves attention chat model decoding checkpoint generate"
ROOMS = (
    *(f"qwen_jax/{name}" for name in QWEN_JAX.split()),
    "qwen_jax",
    "convert",
    *(f"train/{name}" for name in ("data", "step", "run", "planning")),
    "train",
)


class Room(NamedTuple):
    """arrows: the rooms that it imports from. lines: of code, its docstrings and comments too."""

    name: str
    holds: str
    files: int
    lines: int
    arrows: list[str]


def files_of(room: str) -> list[Path]:
    """The modules of a room that lie in no room within it."""
    return sorted((ROOT / room).glob("*.py"))


def room_of(module: str) -> str:
    """The room that a module, `qwen_jax.model.rope` for instance, lies in."""
    path = module.replace(".", "/")
    return max((room for room in ROOMS if f"{path}/".startswith(f"{room}/")), key=len)


def imported(file: Path) -> Iterator[str]:
    """The modules of this project that a file imports, when it is loaded or later."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if full.split(".")[0] in ("qwen_jax", "convert", "train"):
                    yield full


def holds(room: str) -> str:
    """What the `__init__.py` of a room says in its first sentence."""
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    return " ".join((text or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def rooms() -> list[Room]:
    found = []
    for room in ROOMS:
        files = files_of(room)
        arrows = {room_of(module) for file in files for module in imported(file)} - {room}
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        found.append(Room(room, holds(room), len(files), lines, sorted(arrows, key=ROOMS.index)))
    return found


def table(found: list[Room]) -> str:
    rows = ["| room | holds | files | lines | imports from |", "|---|---|---|---|---|"]
    for room in found:
        arrows = ", ".join(arrow.removeprefix("qwen_jax/") for arrow in room.arrows) or "nothing"
        rows.append(f"| `{room.name}/` | {room.holds} | {room.files} | {room.lines} | {arrows} |")
    return "\n".join(rows)


def main() -> int:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(f"error: {PAGE} has no {BEGIN} and {END}", file=sys.stderr)
        return 1
    whole = f"{before}{BEGIN}\n\n{table(rooms())}\n\n{END}{after}"
    PAGE.write_text(whole, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
