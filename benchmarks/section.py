"""Writes a section of docs/benchmarks.md: what was run and where, and a table of the results."""

import datetime
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import jax

from qwen_jax.kernels import choice
from qwen_jax.runtime import paths


def where(device: str | None = None) -> str:
    """The device, versions and date. device: its name, if jax's own is not to be used."""
    here = choice.device()
    return (
        f"{device or f'{here.device_kind} ({here.platform})'}, jax {jax.__version__}, jaxlib "
        f"{metadata.version('jaxlib')}, Python {sys.version.split()[0]}, {datetime.date.today()}"
    )


def title(script: str, argv: Sequence[str], device: str | None = None) -> str:
    """The line above the table. script: the file's name in benchmarks/."""
    return f"{where(device)}; `{shlex.join(['python', f'benchmarks/{script}', *argv])}`:"


def text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The section as Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row)} |".replace("*", "\\*") for row in rows]
    return "\n".join([title, "", *lines, ""])


def write(
    path: Path | None, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Write the section to a file, completely or not at all; None writes nothing.

    It is called after each line, so that an interrupted run keeps its results.
    """
    if path is not None:
        paths.write(path, text(title, columns, rows).encode())
