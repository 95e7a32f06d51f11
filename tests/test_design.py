"""docs/design.md: its table of modules names each one, in the order of imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen_jax", "convert", "train")


def rows() -> Iterator[tuple[int, str]]:
    """(number of the row, file) of the table, `kernels/` as its files that have no row."""
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("\n## ")[1]
    lines = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [re.findall(r"`([^`]+)`", cell) for cell in lines]
    files = [[x if x.startswith(PACKAGES) else f"qwen_jax/{x}" for x in row] for row in named]
    for number, row in enumerate(files):
        for file in row:
            if file.endswith("/"):
                inside = {str(path.relative_to(ROOT)) for path in (ROOT / file).glob("*.py")}
                yield from ((number, path) for path in inside - {x for y in files for x in y})
            else:
                yield number, file


def imported(file: str) -> Iterator[str]:
    """The files of this project that a file imports when it is imported itself."""
    nodes: list[ast.AST] = [ast.parse((ROOT / file).read_text(encoding="utf-8"))]
    for node in nodes:
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing and not isinstance(node, ast.FunctionDef):
            nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom) and node.module:
            path = node.module.replace(".", "/")
            for found in (f"{path}.py", *(f"{path}/{name.name}.py" for name in node.names)):
                if (ROOT / found).exists():
                    yield found


def test_the_table_of_modules_names_each_and_imports_run_upwards() -> None:
    found = list(rows())
    place = {file: number for number, file in found}
    assert len(place) == len(found)
    there = {
        str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    }
    assert set(place) | {f for f in there if f.endswith("__init__.py")} == there
    for file, number in place.items():
        for other in imported(file):
            assert place[other] <= number, f"{file} imports {other}, which is below it"
