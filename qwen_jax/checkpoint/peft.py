"""Merges LoRA adapters in PEFT's format into the leaves of a model directory, a few rows at a time.

Adapters are read and written by `qwen_jax.checkpoint.adapter_files`, whose functions have their
names here, too.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_jax.checkpoint import directory, token_ids
from qwen_jax.checkpoint.adapter_config import LAYER, SETTINGS, WHOLE
from qwen_jax.checkpoint.adapter_files import TENSORS, read, read_tensors, write
from qwen_jax.checkpoint.store import Change

__all__ = ["TENSORS", "changes", "files", "generation_config", "read", "write"]


def changes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """Return functions that merge an adapter into the leaves of a model directory, by leaf path.

    Each function takes the index of a matrix row of its leaf, and n rows [n, in] from that row on,
    and returns the merged rows, float32. Leaves that the adapter does not change are left out.
    shapes: the shape of every leaf, by path. Raises ValueError if the adapter belongs to another
    model or is not supported.
    """
    layers = len({path.split(".")[1] for path in shapes if path.startswith("layers.")})
    sizes = {path.removeprefix("layers.0."): size for path, size in shapes.items()}
    shape, tensors = read_tensors(folder, layers=layers, sizes=sizes)

    def replaced(name: str) -> Change:
        whole = tensors["whole", 0, name]
        return lambda at, rows: whole[at : at + len(rows)].astype(np.float32)

    def added(tensor: str, a: np.ndarray, b: np.ndarray) -> Change:
        b = shape.scale * b.astype(np.float32)

        def change(at: int, rows: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore", invalid="ignore"):
                merged = rows.astype(np.float32) + b[at : at + len(rows)] @ a
            if not np.isfinite(merged).all():
                raise ValueError(
                    f"{tensor} with the adapter of {folder} is not all numbers: use an earlier "
                    "checkpoint of the training, or another copy of the model"
                )
            return merged

        return change

    found = {WHOLE[name]: replaced(name) for name in shape.whole}
    for layer in range(layers):
        for module, members in shape.groups.items():
            a, b = (tensors[kind, layer, module] for kind in "ab")
            ends = np.cumsum([sizes[leaf][0] for leaf in members])[:-1]
            tensor = f"{LAYER.replace('{L}', str(layer))}{module}.weight"
            for leaf, rows in zip(members, np.split(b, ends), strict=True):
                found[f"layers.{layer}.{leaf}"] = added(tensor, a.astype(np.float32), rows)
    return found


def files(folder: Path) -> list[Path]:
    """Return the files that say what an adapter changes."""
    return [folder / SETTINGS, folder / TENSORS]


def generation_config(folder: Path, vocab_size: int) -> Path | None:
    """Return the generation_config.json that comes with an adapter; None without one.

    An adapter can turn a base model into a chat model. Raises ValueError for an id that a model of
    so many rows does not have.
    """
    found = folder / directory.GENERATION_CONFIG
    if not found.exists():
        return None
    token_ids.check_range(found, vocab_size)
    return found
