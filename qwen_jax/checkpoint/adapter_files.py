"""Reads and writes LoRA adapters in PEFT's format.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. Module names are
those of the original PyTorch model (`tensor_names.py`), so PEFT can load our adapters and we can
load its.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from qwen_jax.checkpoint import directory
from qwen_jax.checkpoint.adapter_config import (
    LAYER,
    MERGED_IN_PEFT,
    SETTINGS,
    WHOLE,
    AdapterShape,
    read_shape,
)
from qwen_jax.checkpoint.safetensors_header import Tensor, read_header
from qwen_jax.leaves.weights import Weight, map_leaves, named_leaves
from qwen_jax.meshes import moves
from qwen_jax.model import Decoder, lora
from qwen_jax.model.lora import Adapters
from qwen_jax.runtime import lock, paths, processes, values

TENSORS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"  # the file that PEFT wrote before 0.7
_PREFIX = "base_model.model."
_FLOATS = {
    code: np.dtype(kind)
    for code, kind in {
        "F32": np.float32,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F64": np.float64,
    }.items()
}
_INNER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$|\.(modules_to_save\.[^.]+|original_module)\.")
_EMBEDDING, _HEAD = WHOLE


def write(folder: Path, adapters: Adapters, **settings: object) -> None:
    """Write adapters in PEFT's format. Every process must call this; process 0 writes the files.

    settings: more fields of adapter_config.json, such as base_model_name_or_path.
    """
    shape = _shape(adapters)
    fetched = {name: moves.fetch(leaf[...]) for name, leaf in named_leaves(adapters).items()}
    layers = next(iter(adapters.a.values())).shape[0]
    tensors = {}
    for name, (kind, layer, module) in _tensors(shape, layers).items():
        if kind == "a":
            tensors[name] = fetched[f"a.{module}"][layer]
        elif kind == "b":
            parts = [fetched[f"b.{leaf}"][layer] for leaf in shape.groups[module]]
            tensors[name] = np.concatenate(parts)
        else:
            tensors[name] = fetched[WHOLE[module]]
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": shape.rank,
        "lora_alpha": shape.scale * shape.rank,
        "target_modules": sorted(shape.groups),
        "modules_to_save": [module.rpartition(".")[2] for module in shape.whole] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **settings,
    }
    if processes.index() == 0:
        with lock.alone(folder):
            with paths.draft(folder / TENSORS) as draft:
                save_file(tensors, str(draft), {"format": "pt"})
            directory.write_json(folder / SETTINGS, said)
    processes.barrier()


def _shape(adapters: Adapters) -> AdapterShape:
    """Return the structure of adapters in memory."""
    whole = tuple(m for m, name in WHOLE.items() if getattr(adapters, name) is not None)
    rank = next(iter(adapters.a.values())).shape[1]
    return AdapterShape(dict(adapters.groups), rank=rank, scale=adapters.scale, whole=whole)


def read(folder: Path, decoder: Decoder, *, whole: bool = True) -> Adapters:
    """Read adapters in PEFT's format for a decoder, as float32 on the current mesh.

    folder: the adapter, as PEFT's save_pretrained wrote it, or RUN/adapter of a training run.
    decoder: the decoder that they are for, or its shapes; with stacked or with separate layers.
    whole: whether the adapter may hold an embedding or a head of its own (modules_to_save).

    Raises ValueError if the adapters belong to another model or are not supported.
    """
    layers = range(decoder.config.num_layers)
    sizes = {name: shape for name, (_, shape) in lora.weights_of_block(decoder).items()}
    sizes["embedding"] = tuple(decoder.embedding.shape)
    if decoder.head is not None:
        sizes["head"] = sizes["embedding"]  # [V, D], of whatever kind of leaf
    shape, tensors = read_tensors(folder, layers=len(layers), sizes=sizes)
    if shape.whole and not whole:
        raise ValueError(
            f"{folder}: modules_to_save {', '.join(m.rpartition('.')[2] for m in shape.whole)}: "
            "several adapters on one model share its embedding and head: load this one alone "
            f"(adapter=DIR, or --adapter DIR of generate), or {MERGED_IN_PEFT}"
        )

    def found(path: str) -> np.ndarray:
        kind, _, name = path.partition(".")
        if kind in WHOLE.values():
            (module,) = [m for m, leaf in WHOLE.items() if leaf == kind]
            return tensors["whole", 0, module]
        if kind == "a":
            return np.stack([tensors["a", i, name] for i in layers])
        (module,) = [m for m, leaves in shape.groups.items() if name in leaves]
        members = shape.groups[module]
        ends = np.cumsum([sizes[leaf][0] for leaf in members])
        at = members.index(name)
        rows = slice(ends[at] - sizes[name][0], ends[at])
        return np.stack([tensors["b", i, module][rows] for i in layers])

    def put(path: str, leaf: Weight) -> Weight:
        array = found(path).astype(np.float32)
        placed = moves.place(array, leaf.letters, lengths=decoder.config.sizes)
        return Weight(placed, letters=leaf.letters)

    def empty(decoder: Decoder) -> Adapters:
        alpha, key = shape.scale * shape.rank, jax.random.key(0)
        return lora.create(
            decoder,
            shape.groups,
            rank=shape.rank,
            alpha=alpha,
            key=key,
            embeddings=bool(shape.whole),
        )

    like = jax.eval_shape(empty, decoder)
    absent = {name: None for module, name in WHOLE.items() if module not in shape.whole}
    return map_leaves(put, like.replace(**absent))


def _tensors(shape: AdapterShape, layers: int) -> dict[str, tuple[str, int, str]]:
    """Map the name of each tensor in an adapter file to its key in `read_tensors`."""
    found = {}
    for layer in range(layers):
        for module in shape.groups:
            path = f"{_PREFIX}{LAYER.replace('{L}', str(layer))}{module}"
            found[f"{path}.lora_A.weight"] = ("a", layer, module)
            found[f"{path}.lora_B.weight"] = ("b", layer, module)
    found |= {f"{_PREFIX}{module}.weight": ("whole", 0, module) for module in shape.whole}
    return found


def read_tensors(
    folder: Path, *, layers: int, sizes: Mapping[str, tuple[int, ...]]
) -> tuple[AdapterShape, dict[tuple[str, int, str], np.ndarray]]:
    """Read and check an adapter; return its structure, and its tensors by key.

    Keys are ("a", layer, module) for the A of a module, ("b", layer, module) for its B, and
    ("whole", 0, module) for a module saved whole. The structure includes an embedding and a head
    that PEFT added unrequested.

    layers: the number of layers of the model.
    sizes: the shape of each leaf of a block, of "embedding" and, unless it is tied, of "head".

    Raises ValueError if the adapter belongs to another model or is not supported.
    """
    shape, file = read_shape(folder, layers), folder / TENSORS
    if not file.is_file():
        raise ValueError(_without_tensors(folder))
    entries = read_header(file)
    _check_entries(file, entries)
    found = {name: _narrow(_values(entry)) for name, entry in entries.items()}
    shape, found = _with_embeddings(file, shape, found=found, sizes=sizes)
    wanted = _tensors(shape, layers)
    problems = [f"no {name}" for name in wanted if name not in found]
    problems += [f"{name} is not known" for name in found if name not in wanted]
    for name, (kind, _, module) in wanted.items():
        size = _size(shape, sizes, kind=kind, module=module)
        if name in found and found[name].shape != size:
            problems.append(f"{name} is {list(found[name].shape)} instead of {list(size)}")
    if problems:
        raise ValueError(
            f"{file} is not of this model: {directory.some(problems)}; give the model that it was "
            "trained on"
        )
    by_place = {wanted[name]: tensor for name, tensor in found.items()}
    _check_numbers(file, shape, wanted=wanted, found=by_place)
    return shape, by_place


def _check_numbers(
    file: Path,
    shape: AdapterShape,
    *,
    wanted: Mapping[str, tuple[str, int, str]],
    found: Mapping[tuple[str, int, str], np.ndarray],
) -> None:
    """Raise ValueError if values of an adapter, or products scale B A, are not finite in float32.

    wanted: the key in `found` of each tensor, by its name in the adapter file.
    """
    if spoiled := [name for name, x in wanted.items() if not np.isfinite(found[x]).all()]:
        raise ValueError(
            f"{file}: not all are numbers: {directory.some(spoiled)}; use an earlier checkpoint of "
            "the training"
        )
    for name, (kind, layer, module) in wanted.items():
        if kind != "b":
            continue
        most = _most_added(shape.scale, found["a", layer, module], b=found["b", layer, module])
        if most > values.FLOAT32:
            raise ValueError(
                f"{file}: {name} with its lora_A and the scale {shape.scale:.3g} of lora_alpha "
                f"adds up to {most:.3g}, for which float32 has no room: use an earlier checkpoint "
                "of the training, or the lora_alpha that it was trained with"
            )


def _values(entry: Tensor) -> np.ndarray:
    """Read the values of a tensor, from a disk or from `gs://`, where safetensors cannot read."""
    dtype = _FLOATS[entry.code]
    data = paths.read(entry.file, entry.offset, count=math.prod(entry.shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(entry.shape)


def _narrow(tensor: np.ndarray) -> np.ndarray:
    """Cast arrays wider than float32 to float32; values out of its range become infinite."""
    if tensor.dtype.itemsize <= 4:
        return tensor
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


def _most_added(
    scale: float, a: Float[np.ndarray, "R in"], *, b: Float[np.ndarray, "out R"]
) -> float:
    """Return a number that no element of |scale b a| exceeds, nor any partial result of it."""
    largest = [np.abs(x.astype(np.float64)).max(axis) for x, axis in ((a, 1), (b, 0))]
    return float(np.maximum(largest[0], 1) @ largest[1]) * max(scale, 1)


def _check_entries(file: Path, entries: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that are not floats, or that are named as in a state_dict()."""
    if strange := [f"{name} is {x.code}" for name, x in entries.items() if x.code not in _FLOATS]:
        raise ValueError(
            f"{file}: adapters are of {', '.join(_FLOATS)}: {directory.some(strange)}; save the "
            "adapter again as floats"
        )
    if inner := [name for name in entries if _INNER.search(name)]:
        raise ValueError(
            f"{file}: {directory.some(inner)}: such are the names within PEFT, of a state_dict(): "
            "save the adapter with its save_pretrained(FOLDER)"
        )


def _without_tensors(folder: Path) -> str:
    """Compose the message for a folder that has no adapter_model.safetensors."""
    if (folder / _PICKLED).is_file():
        return (
            f"{folder} has its tensors in PyTorch's own format ({_PICKLED}), which runs code when "
            "read: save the adapter again with PEFT, save_pretrained(FOLDER, "
            "safe_serialization=True), or, in a PyTorch environment: safetensors.torch.save_file("
            f'torch.load("{_PICKLED}", weights_only=True), "{TENSORS}")'
        )
    return f"{folder} has no {TENSORS}: download or copy the adapter again to complete it"


def _with_embeddings(
    file: Path,
    shape: AdapterShape,
    *,
    found: dict[str, np.ndarray],
    sizes: Mapping[str, tuple[int, ...]],
) -> tuple[AdapterShape, dict[str, np.ndarray]]:
    """Add an embedding and a head that PEFT saved unrequested to the structure of an adapter.

    PEFT does so when the vocabulary of the base model was resized. found: the adapter's tensors by
    name; the head's is dropped if this model ties it. sizes: the shape of "embedding" and, if not
    tied, "head". Raises ValueError if the vocabulary has another size than this model's, or if a
    tied head differs from its embedding.
    """
    stored = {f"{_PREFIX}{module}.weight": module for module in WHOLE}
    stored = {name: module for name, module in stored.items() if name in found}
    for name, module in stored.items():
        rows, size = found[name].shape[0], sizes.get(WHOLE[module], sizes["embedding"])
        if found[name].shape != size and found[name].shape[1:] == size[1:]:
            raise ValueError(
                f"{file}: the vocabulary of the base was resized to {rows}: {name} has {rows} rows "
                f"and this model {size[0]}; in PyTorch, resize_token_embeddings({rows}) of the "
                "base and save_pretrained(FOLDER, safe_serialization=True), convert FOLDER with "
                "`python convert/from_hf.py`, and put the adapter on that"
            )
    whole = {*shape.whole, *stored.values()}
    if _HEAD in whole and "head" not in sizes:
        head, embedding = (found.get(f"{_PREFIX}{m}.weight") for m in (_HEAD, _EMBEDDING))
        if head is None or embedding is None or not np.array_equal(head, embedding):
            raise ValueError(
                f"{file}: lm_head: this model's embedding is its head, and the adapter's are not "
                "one: train with ensure_weight_tying, or on a base whose head is its own"
            )
        whole.discard(_HEAD)
        found = {name: x for name, x in found.items() if stored.get(name) != _HEAD}
    return dataclasses.replace(shape, whole=tuple(m for m in WHOLE if m in whole)), found


def _size(
    shape: AdapterShape, sizes: Mapping[str, tuple[int, ...]], *, kind: str, module: str
) -> tuple[int, ...]:
    """Return the shape of a tensor in an adapter file: of an "a", a "b" or a "whole" module."""
    if kind == "whole":
        return sizes[WHOLE[module]]
    leaves = [sizes[leaf] for leaf in shape.groups[module]]
    return (shape.rank, leaves[0][1]) if kind == "a" else (sum(x[0] for x in leaves), shape.rank)
