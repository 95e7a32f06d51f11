"""Reads which tensors a Hugging Face checkpoint folder has, from its index and its files' headers.

It finds every defect of a folder before anything is written.
"""

from collections.abc import Mapping
from pathlib import Path

from qwen_jax.checkpoint import store
from qwen_jax.checkpoint.safetensors_header import CODES, DTYPES, Tensor, read_header
from qwen_jax.runtime.texts import read_json

INDEX = "model.safetensors.index.json"


def read(folder: Path) -> dict[str, Tensor]:
    """Read the location of every tensor in a checkpoint folder, by name.

    Raises ValueError for missing or damaged files, and if index and files contradict each other.
    """
    tensors: dict[str, Tensor] = {}
    index = _index(folder)
    for file in _files(folder, index):
        for name, tensor in read_header(file).items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {file.name}"
                raise ValueError(
                    f"{folder}: tensor {name} is in two files, {both}: remove the one that is not "
                    "of this checkpoint, or download it again"
                )
            tensors[name] = tensor
    lacking = [
        f"{name} in {file}"
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if lacking:
        raise ValueError(
            f"{folder / INDEX} names tensors that are not there: {', '.join(lacking)}; download "
            "the index and its files again"
        )
    return tensors


def dtype_of(tensors: Mapping[str, Tensor], wanted: str | None) -> str:
    """Return the dtype to convert a checkpoint to: `wanted`, or the dtype of all these tensors.

    Raises ValueError if a tensor's dtype is not supported, or if the dtypes differ and `wanted` is
    None.
    """
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.code, []).append(name)
    floats = [CODES[dtype] for dtype in store.DTYPES]
    if unsupported := {code: names for code, names in found.items() if code not in floats}:
        some = "; ".join(
            f"{code}: {names[0]} ({len(names)})" for code, names in unsupported.items()
        )
        raise ValueError(
            f"tensors of dtype {some}: only {', '.join(store.DTYPES)} can be converted; take the "
            "checkpoint they were made from"
        )
    if wanted is None and len(found) > 1:
        counts = ", ".join(f"{len(names)} {DTYPES[code]}" for code, names in found.items())
        raise ValueError(f"tensors of different dtypes ({counts}): choose one with --dtype")
    return wanted or DTYPES[next(iter(found))]


def _index(folder: Path) -> dict[str, str]:
    """Read the file of each tensor from a folder's index; empty if it has none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path} has no weight_map: download it again, or remove it, and all *.safetensors "
            "files of the folder are read"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{path}: {name} is in {file!r}, which is no file of this folder: an index names "
                "files beside it; download it again"
            )
    return weight_map


def _files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    """Return a folder's safetensors files: those in the index, or without one all there are."""
    if index:
        files = [folder / name for name in dict.fromkeys(index.values())]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}: download it again to complete it"
            )
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if [*folder.glob("*.bin"), *folder.glob("*.bin.index.json"), *folder.glob("*.pt")]:
        raise ValueError(
            f"{folder} has its weights in PyTorch's own format (.bin), which runs code when read: "
            "take the safetensors version of the checkpoint, or save it again in PyTorch with "
            "model.save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ValueError(
        f"{folder} holds no *.safetensors files: give the folder that has the weights, or download "
        "them into it"
    )
