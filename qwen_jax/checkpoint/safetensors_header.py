"""Reads and writes the headers of safetensors files, which locate the bytes of each tensor.

The safetensors library maps whole files into memory, where mapped pages count as resident; its
writer takes whole files as arrays. This module handles headers only, and its callers copy the
tensors' bytes.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from qwen_jax.checkpoint.store import ITEM_BYTES
from qwen_jax.runtime import paths, texts

# Integers are words of GPTQ files, which call them signed and mean their bits.
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint32": "I32"}
DTYPES = {code: dtype for dtype, code in CODES.items()}
_ITEM_BYTES = {code: ITEM_BYTES[dtype] for code, dtype in DTYPES.items()} | {"F64": 8}
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
        return DTYPES[self.code]


def read_metadata(file: Path) -> dict[str, str]:
    """Read the notes in the header of a safetensors file, such as the tool that wrote it.

    Raises ValueError if the header is damaged.
    """
    found = _read(file)[0].get("__metadata__", {})
    items = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in items if isinstance(value, str)}


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the location of every tensor in one safetensors file, in byte order, by name.

    Raises ValueError if the file is damaged.
    """
    header, begins = _read(file)
    try:
        header.pop("__metadata__", None)
        entries = [(*_offsets(name, entry), name, entry) for name, entry in header.items()]
        tensors, position = {}, 0
        for begin, end, name, entry in sorted(entries, key=lambda found: found[:2]):
            if begin != position:
                raise ValueError("tensors overlap or leave gaps")
            tensors[name], position = _tensor(file, begins, name=name, entry=entry), end
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from None
    size, whole = paths.size(file), begins + position
    if size != whole:
        what = "is truncated" if size < whole else "has bytes that belong to no tensor"
        raise ValueError(
            f"{file} {what}: it has {size:,} bytes, its header speaks of {whole:,}; "
            "download it again"
        )
    return tensors


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, and the byte at which it ends.

    Raises ValueError if it is no JSON object.
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
    try:
        header = json.loads(paths.read(file, 8, count=length))
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from None
    return header, 8 + length


def _damaged(file: Path, error: Exception) -> ValueError:
    """Return the error for a damaged header."""
    return ValueError(
        f"{file} is not a safetensors file: its header is damaged ({error}); download it again"
    )


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
    if code in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[code]:
        raise ValueError(f"{name!r} has {end - begin} bytes for shape {texts.shown(shape)}")
    return Tensor(file, base + begin, code, tuple(shape))


def _sizes(value: object) -> TypeGuard[list[int]]:
    """Return whether a value from a header is a list of integers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def header(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    metadata: Mapping[str, str],
) -> bytes:
    """Make the header of a safetensors file, preceded by its length in 8 bytes.

    shapes: the shape of each tensor in the file, by name, in the order of their bytes.
    dtypes: the dtype of each, by name.
    metadata: notes, beside the format pt that transformers asks for.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtypes[name]]
        entries[name] = {
            "dtype": CODES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
