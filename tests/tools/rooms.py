"""Writes the table of rooms in docs/design.md: `python -m tests.tools.rooms`.

A room is a package. The table has the first sentence of its `__init__.py`, and the rooms that it
imports from, wherever in a file the import is. `make lint` checks their order.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/design.md"
# Names of commands that lie in a higher room.
DOORS = ("qwen_jax/chat/__main__.py", "qwen_jax/kernels/tune.py")
BEGIN, END = "<!-- rooms: python -m tests.tools.rooms -->", "<!-- end of rooms -->"
# From the lowest to the highest, as in pyproject.toml.
QWEN_JAX = (
    "runtime config meshes kernels leaves attention chat model decoding checkpoint generate "
    "quantise engine terminal serve"
)
ROOMS = (
    *(f"qwen_jax/{name}" for name in QWEN_JAX.split()),
    "qwen_jax",
    "convert",
    *(f"train/{name}" for name in ("data", "step", "run", "planning", "measuring")),
    "train",
)


class Room(NamedTuple):
    """A line of the table.

    holds: the first sentence of the room's docstring.
    lines: with docstrings and comments.
    arrows: the rooms that it imports from.
    """

    name: str
    holds: str
    files: int
    lines: int
    arrows: list[str]


def files_of(room: str) -> list[Path]:
    """The modules of a room, without those of rooms inside it."""
    return sorted((ROOT / room).glob("*.py"))


def room_of(module: str) -> str:
    """The room of a module, such as `qwen_jax.model.rope`."""
    path = module.replace(".", "/")
    return max((room for room in ROOMS if f"{path}/".startswith(f"{room}/")), key=len)


def imported(file: Path) -> Iterator[str]:
    """The modules of this project that a file imports, at its start or later."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if full.split(".")[0] in ("qwen_jax", "convert", "train"):
                    yield full


def holds(room: str) -> str:
    """The first sentence of a room's `__init__.py`."""
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    return " ".join((text or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def rooms() -> list[Room]:
    """All rooms, from the lowest to the highest."""
    found = []
    for room in ROOMS:
        files = files_of(room)
        doors = {ROOT / door for door in DOORS}
        modules = {x for file in files if file not in doors for x in imported(file)}
        arrows = {room_of(module) for module in modules} - {room}
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        found.append(Room(room, holds(room), len(files), lines, sorted(arrows, key=ROOMS.index)))
    return found


def table(found: list[Room]) -> str:
    """The table in Markdown."""
    rows = ["| room | holds | files | lines | imports from |", "|---|---|---|---|---|"]
    for room in found:
        arrows = ", ".join(arrow.removeprefix("qwen_jax/") for arrow in room.arrows) or "nothing"
        rows.append(f"| `{room.name}/` | {room.holds} | {room.files} | {room.lines} | {arrows} |")
    return "\n".join(rows)


def main() -> int:
    """Rewrite the table, and return an exit code."""
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
