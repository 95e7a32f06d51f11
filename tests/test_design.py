"""docs/design.md names every room with its arrows, and no file outgrows its reader."""

import functools
import importlib
import re
import tomllib

from tests.tools import rooms

LONGEST = 350  # lines of a file, kernels excepted


def test_the_table_of_rooms_is_of_these_files() -> None:
    """Lines are written by `python -m tests.tools.rooms` and may be some commits old."""
    page = rooms.PAGE.read_text(encoding="utf-8")
    kept = page.partition(rooms.BEGIN)[2].partition(rooms.END)[0]

    def without_lines(text: str) -> list[str]:
        return [re.sub(r"\| \d+ \| \d+ \|", "|", row) for row in text.strip().splitlines()]

    assert without_lines(kept) == without_lines(rooms.table(rooms.rooms()))


def test_rooms_are_ordered_as_the_contracts_say() -> None:
    """What `make lint` holds is about the rooms that the table shows, in the same order."""
    settings = tomllib.loads((rooms.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = {x["containers"][0]: x["layers"] for x in settings["tool"]["importlinter"]["contracts"]
              if "containers" in x}  # fmt: skip
    for package, found in layers.items():
        names = [room.removeprefix(f"{package}/") for room in rooms.ROOMS if "/" in room]
        names = [name for name in names if (rooms.ROOT / package / name).is_dir()]
        assert [x for x in reversed(found) if x in names] == names


def test_files_are_no_longer_than_a_sitting() -> None:
    long = {}
    for room in rooms.ROOMS:
        for file in rooms.files_of(room) if not room.endswith("kernels") else []:
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > LONGEST:
                long[str(file.relative_to(rooms.ROOT))] = lines
    assert not long


def test_functions_that_tests_name_in_texts_exist() -> None:
    """As "module:name", where a run in another process is to be stopped."""
    texts = [file.read_text(encoding="utf-8") for file in (rooms.ROOT / "tests").rglob("*.py")]
    named = set(re.findall(r'"((?:convert|qwen_jax|train)[\w.]*:[\w.]+)"', "".join(texts)))
    assert named
    for module, _, name in (text.partition(":") for text in named):
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
