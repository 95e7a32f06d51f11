"""The plan of an export to a Hugging Face checkpoint folder, and the JSON files that it writes."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import folder, names
from qwen_jax.checkpoint import directory, store
from qwen_jax.runtime import paths
from qwen_jax.runtime.texts import read_json

if TYPE_CHECKING:
    from convert.copying import Change


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The plan of an export to a Hugging Face checkpoint folder, whose input has been checked.

    source, target: the model directory to read, and the folder to write.
    wanted: the tensors to write, by name.
    leaves: the stored leaves that hold their values, by path.
    shards: for each safetensors file, the names of its tensors in order.
    dtype: the dtype of all tensors.
    facts: values that identify the export, so that only the same command resumes it.
    changes: functions that merge an adapter into leaves, by leaf path (`peft.changes`).
    settings: the adapter's generation_config.json, or None.
    """

    source: Path
    target: Path
    wanted: dict[str, names.Expected]
    leaves: dict[str, store.StoredLeaf]
    shards: dict[str, list[str]]
    dtype: str
    facts: dict[str, Any]
    changes: "dict[str, Change]"
    settings: Path | None

    @property
    def params(self) -> Path:
        """The folder of the source's arrays."""
        return self.source / directory.PARAMS


def split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Distribute tensors, in order, over files of at most `limit` bytes, or of one larger tensor.

    sizes: the bytes of each tensor, by name. Returns the tensors' names by file name.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def write_config(plan: ExportPlan) -> None:
    """Write config.json, in which the dtype is corrected if the tensors have another one.

    Also writes the adapter's generation_config.json, if there is one, because an adapter can turn a
    base model into a chat model.
    """
    if plan.settings is not None:
        paths.copy(plan.settings, plan.target / directory.GENERATION_CONFIG)
    source, copied = plan.source / directory.CONFIG, plan.target / directory.CONFIG
    values = read_json(source)
    stale = [k for k in ("torch_dtype", "dtype") if values.get(k, plan.dtype) != plan.dtype]
    if stale:
        directory.write_json(copied, values | dict.fromkeys(stale, plan.dtype))
    else:
        paths.copy(source, copied)


def write_index(plan: ExportPlan) -> None:
    """Write the index, which names the file of each tensor."""
    sizes = [math.prod(tensor.shape) for tensor in plan.wanted.values()]
    index = {
        "metadata": {"total_size": sum(sizes) * folder.ITEM_BYTES[plan.dtype]},
        "weight_map": {name: file for file, held in plan.shards.items() for name in held},
    }
    directory.write_json(plan.target / folder.INDEX, index)
