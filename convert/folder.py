"""Reads and writes the headers of safetensors files, which locate the bytes of each tensor.

The safetensors library maps whole files into memory, where mapped pages count as resident; its
writer takes whole files as arrays. This module handles headers only, and its callers copy the
tensors' bytes. Reading finds every defect of a checkpoint folder before anything is written.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from qwen_jax.checkpoint.store import ITEM_BYTES
from qwen_jax.runtime import paths, texts
from qwen_jax.runtime.texts import read_json

INDEX = "model.safetensors.index.json"
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of a tensor in a safetensors file.

    file: the path of the safetensors file.
    offset: the byte in it at which the tensor's values begin.
    code: the dtype as safetensors names it, such as "BF16".
    shape: the tensor's shape.
    """

    file: Path
    offset: int
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The dtype's name, such as "bfloat16"."""
        return _DTYPES[self.code]


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
    """Return the dtype to convert a checkpoint to: `asked`, or the dtype of all its tensors.

    Raises ValueError if a tensor's dtype is not supported, or if the dtypes differ and `asked` is
    None.
    """
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.code, []).append(name)
    if unsupported := {code: names for code, names in found.items() if code not in _DTYPES}:
        some = "; ".join(
            f"{code}: {names[0]} ({len(names)})" for code, names in unsupported.items()
        )
        raise ValueError(
            f"tensors of dtype {some}: only {', '.join(CODES)} can be converted; quantised "
            "checkpoints are not supported yet, take the one they were made from"
        )
    if wanted is None and len(found) > 1:
        counts = ", ".join(f"{len(names)} {_DTYPES[code]}" for code, names in found.items())
        raise ValueError(f"tensors of different dtypes ({counts}): choose one with --dtype")
    return wanted or _DTYPES[next(iter(found))]


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


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the location of every tensor in one safetensors file, in byte order, by name.

    Raises ValueError if the file is damaged.
    """
    size = paths.size(file)
    length = int.from_bytes(paths.read(file, 0, count=8), "little") if size >= 8 else 0
    if size < 8 or length > _LARGEST_HEADER:
        raise ValueError(
            f"{file} is not a safetensors file: its first 8 bytes are no length; download it again "
            "(of a Git LFS pointer: git lfs pull)"
        )
    if 8 + length > size:
        raise ValueError(f"{file} is truncated within its header: download it again")
    text = paths.read(file, 8, count=length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        header.pop("__metadata__", None)
        entries = [(*_offsets(name, entry), name, entry) for name, entry in header.items()]
        tensors, position = {}, 0
        for begin, end, name, entry in sorted(entries, key=lambda found: found[:2]):
            if begin != position:
                raise ValueError("tensors overlap or leave gaps")
            tensors[name], position = _tensor(file, 8 + length, name=name, entry=entry), end
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a safetensors file: its header is damaged ({error}); download it again"
        ) from None
    whole = 8 + length + position
    if size != whole:
        what = "is truncated" if size < whole else "has bytes that belong to no tensor"
        raise ValueError(
            f"{file} {what}: it has {size:,} bytes, its header speaks of {whole:,}; "
            "download it again"
        )
    return tensors


def _offsets(name: str, entry: object) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end, counted from the end of the safetensors header.

    name, entry: the tensor's name and its entry in the header. Raises ValueError for a damaged
    entry.
    """
    found = entry.get("data_offsets") if isinstance(entry, dict) else entry
    if not _sizes(found) or len(found) != 2 or found[0] > found[1]:
        raise ValueError(f"{name!r} has data_offsets {texts.shown(found)}, not [begin, end]")
    return found[0], found[1]


def _tensor(file: Path, base: int, *, name: str, entry: Mapping[str, Any]) -> Tensor:
    """Make the `Tensor` of a header entry whose offsets are valid.

    base: the byte of `file` at which the header ends. Raises ValueError if the entry's shape and
    dtype are damaged or do not fit its number of bytes.
    """
    shape, code, (begin, end) = entry.get("shape"), entry.get("dtype"), entry["data_offsets"]
    if not _sizes(shape) or not isinstance(code, str):
        raise ValueError(f"{name!r} has shape {texts.shown(shape)}, dtype {texts.shown(code)}")
    if code in _DTYPES and end - begin != math.prod(shape) * ITEM_BYTES[_DTYPES[code]]:
        raise ValueError(f"{name!r} has {end - begin} bytes for shape {texts.shown(shape)}")
    return Tensor(file, base + begin, code, tuple(shape))


def _sizes(value: object) -> TypeGuard[list[int]]:
    """Return whether a value from a header is a list of integers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Make the header of a safetensors file, preceded by its length in 8 bytes.

    shapes: the shape of each tensor in the file, by name, in the order of their bytes. dtype: the
    dtype of all of them.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
