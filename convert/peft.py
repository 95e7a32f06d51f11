"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Module names are the original's (`names.py`), so PEFT puts such adapters on its PyTorch model, and
we put on ours what PEFT has trained.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert import names
from qwen_jax import directory, lora, processes, sharding
from qwen_jax.config import read_json
from qwen_jax.lora import Adapters
from qwen_jax.model import Decoder
from qwen_jax.weights import Weight, map_leaves, named_leaves

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LAYER = "transformer.h.{L}."
_WHOLE = {"transformer.wte": "embedding", "lm_head": "head"}  # modules that can come along whole
# Fields of adapter_config.json that change nothing here. PEFT always writes megatron_core and
# qalora_group_size, and heeds them with megatron_config and use_qalora only.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora"}
# What the others may be, beside empty: False, None, [] and {}. Adapters that began in another way
# than these ("pissa", "olora") go on weights that PEFT has changed.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an adapter is without its values. groups: leaves of a block that share an A, by the
    original's module. scale: of what is added. whole: modules that come along whole.
    """

    groups: dict[str, tuple[str, ...]]
    rank: int
    scale: float
    whole: tuple[str, ...] = ()


def modules() -> dict[str, tuple[str, ...]]:
    """The linear modules of a layer, "attn.c_attn" for instance, and their leaves in a block."""
    found = {}
    for tensor, leaves in names.TABLE.items():
        module = tensor.removeprefix(_LAYER).removesuffix(".weight")
        if tensor.startswith(_LAYER) and "." in module and tensor.endswith(".weight"):
            found[module] = tuple(leaf.removeprefix("layers.{L}.") for leaf in leaves)
    return found


def targets(wanted: Sequence[str] | str, layers: int) -> dict[str, tuple[str, ...]]:
    """The modules that get adapters, as PEFT chooses: those whose path ends in one of the names, or
    that a pattern matches whole. Raises ValueError for a name without a module, for one that is not
    chosen in every layer, and for what is no pattern.
    """
    names_wanted = [wanted] if isinstance(wanted, str) else wanted

    def chosen(path: str, name: str) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(name, path) is not None
        return path == name or path.endswith(f".{name}")

    found, used = {}, set()
    for module, leaves in modules().items():
        paths = [_LAYER.replace("{L}", str(layer)) + module for layer in range(layers)]
        try:
            by_layer = [{n for n in names_wanted if chosen(path, n)} for path in paths]
        except re.error as error:
            raise ValueError(f"target_modules {wanted!r}: no pattern: {error}") from None
        if all(by_layer):
            found[module] = leaves
        elif any(by_layer):
            raise ValueError(
                f"target_modules {', '.join(names_wanted)}: chooses {module} in some layers only, "
                "and adapters go on a module in every layer"
            )
        used |= set().union(*by_layer)
    if nothing := [name for name in names_wanted if name not in used]:
        every = ", ".join(sorted({m.rpartition(".")[2] for m in modules()}))
        raise ValueError(f"no module is called {', '.join(nothing)}: there are {every}")
    return found


def write(folder: Path, adapters: Adapters, **settings: Any) -> None:
    """Adapters as PEFT writes them; every process calls this, one writes. settings: what else is
    to be said, such as base_model_name_or_path.
    """
    shape = _shape(adapters)
    fetched = {name: sharding.fetch(leaf[...]) for name, leaf in named_leaves(adapters).items()}
    layers = next(iter(adapters.a.values())).shape[0]
    tensors = {}
    for name, (kind, layer, module) in _tensors(shape, layers).items():
        if kind == "a":
            tensors[name] = fetched[f"a.{module}"][layer]
        elif kind == "b":
            parts = [fetched[f"b.{leaf}"][layer] for leaf in shape.groups[module]]
            tensors[name] = np.concatenate(parts)
        else:
            tensors[name] = fetched[_WHOLE[module]]
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
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / TENSORS), {"format": "pt"})
        directory.write_json(folder / SETTINGS, said)
    processes.barrier()


def _shape(adapters: Adapters) -> Shape:
    whole = tuple(m for m, name in _WHOLE.items() if getattr(adapters, name) is not None)
    rank = next(iter(adapters.a.values())).shape[1]
    return Shape(dict(adapters.groups), rank, adapters.scale, whole)


def read_shape(folder: Path, layers: int) -> Shape:
    """What adapter_config.json says. Raises ValueError that names every field that would change
    what is computed and is not supported here.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(f"{folder} is no adapter: it has no {SETTINGS}")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {settings.get('peft_type')!r}, only LORA is supported")
    refused = {
        name: value
        for name, value in settings.items()
        if name not in _INERT | _READ and value not in _ALLOWED.get(name, ()) and not _empty(value)
    }
    if refused:
        said = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(refused.items()))
        raise ValueError(f"{file}: not supported: {said}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{file}: r {rank!r}: a whole number, at least 1")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"{file}: lora_alpha {alpha!r}: a number above 0")
    known = {module.rpartition(".")[2]: module for module in _WHOLE}
    wanted, saved = settings.get("target_modules") or [], settings.get("modules_to_save") or []
    for name, value in (("target_modules", wanted), ("modules_to_save", saved)):
        pattern = isinstance(value, str) and name == "target_modules"
        if not pattern and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise ValueError(f"{file}: {name} {value!r}: a list of names")
    if not wanted:
        raise ValueError(f"{file} names no target_modules")
    stabilised = settings.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise ValueError(f"{file}: use_rslora {stabilised!r}: true or false")
    if unknown := sorted({name.rpartition(".")[2] for name in saved} - set(known)):
        raise ValueError(f"{file}: modules_to_save {', '.join(unknown)}: only wte and lm_head can")
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    whole = tuple(known[name.rpartition(".")[2]] for name in saved)
    return Shape(targets(wanted, layers), rank, scale, whole)


def _empty(value: Any) -> bool:
    """Not of 0, which is a number like any other: layers_to_transform=0 is a layer."""
    return value is None or value is False or value in ([], {})


def read(folder: Path, decoder: Decoder) -> Adapters:
    """Adapters in PEFT's format for a stacked decoder, float32 on the mesh in force.

    Raises ValueError where they are for another model, or not supported.
    """
    shape = read_shape(folder, decoder.config.num_layers)
    if decoder.head is None and "lm_head" in shape.whole:
        raise ValueError(f"{folder}: modules_to_save lm_head: this model's embedding is its head")
    sizes = {name: tuple(leaf.shape[1:]) for name, leaf in named_leaves(decoder.layers).items()}
    sizes |= {name: tuple(decoder.output.shape) for name in _WHOLE.values()}
    layers = range(decoder.config.num_layers)
    tensors = _read(folder, shape, len(layers), sizes)

    def values(path: str) -> np.ndarray:
        kind, _, name = path.partition(".")
        if kind in _WHOLE.values():
            (module,) = [m for m, whole in _WHOLE.items() if whole == kind]
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
        array = values(path).astype(np.float32)
        placed = sharding.place(array, leaf.letters, decoder.config.sizes)
        return Weight(placed, letters=leaf.letters)

    def empty(decoder: Decoder) -> Adapters:
        alpha, key = shape.scale * shape.rank, jax.random.key(0)
        return lora.create(decoder, shape.groups, shape.rank, alpha, key, bool(shape.whole))

    like = jax.eval_shape(empty, decoder)
    absent = {name: None for module, name in _WHOLE.items() if module not in shape.whole}
    return map_leaves(put, like.replace(**absent))


def changes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Callable[[int, np.ndarray], np.ndarray]]:
    """What merging makes of the leaves of a model directory, by path: (number of the first row,
    rows [n, in]) -> rows, float32. Leaves that stay are not there. shapes: of all leaves.

    Raises ValueError as `read` does.
    """
    layers = len({path.split(".")[1] for path in shapes if path.startswith("layers.")})
    shape, first = read_shape(folder, layers), "layers.0."
    sizes = {path.removeprefix(first): size for path, size in shapes.items()}
    if lacking := [name for name in shape.whole if _WHOLE[name] not in sizes]:
        raise ValueError(f"{folder} is not of this model: it has {lacking[0]}")
    tensors = _read(folder, shape, layers, sizes)

    def replaced(name: str) -> Any:
        whole = tensors["whole", 0, name]
        return lambda at, rows: whole[at : at + len(rows)].astype(np.float32)

    def added(a: np.ndarray, b: np.ndarray) -> Any:
        b = shape.scale * b.astype(np.float32)
        return lambda at, rows: rows.astype(np.float32) + b[at : at + len(rows)] @ a

    found = {_WHOLE[name]: replaced(name) for name in shape.whole}
    for layer in range(layers):
        for module, members in shape.groups.items():
            a, b = (tensors[kind, layer, module] for kind in "ab")
            ends = np.cumsum([sizes[leaf][0] for leaf in members])[:-1]
            for leaf, rows in zip(members, np.split(b, ends), strict=True):
                found[f"layers.{layer}.{leaf}"] = added(a.astype(np.float32), rows)
    return found


def _tensors(shape: Shape, layers: int) -> dict[str, tuple[str, int, str]]:
    """Each tensor of an adapter: ("a", layer, module), ("b", layer, module), or ("whole", 0,
    module).
    """
    found = {}
    for layer in range(layers):
        for module in shape.groups:
            path = f"{_PREFIX}{_LAYER.replace('{L}', str(layer))}{module}"
            found[f"{path}.lora_A.weight"] = ("a", layer, module)
            found[f"{path}.lora_B.weight"] = ("b", layer, module)
    found |= {f"{_PREFIX}{module}.weight": ("whole", 0, module) for module in shape.whole}
    return found


def _read(
    folder: Path, shape: Shape, layers: int, sizes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int, str], np.ndarray]:
    """The tensors of an adapter, checked. sizes: of the leaves that they go on."""
    file = folder / TENSORS
    if not file.is_file():
        raise ValueError(f"{folder} has no {TENSORS}")
    wanted = _tensors(shape, layers)
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error
    problems = [f"no {name}" for name in wanted if name not in found]
    problems += [f"{name} is not known" for name in found if name not in wanted]
    for name, (kind, _, module) in wanted.items():
        size = _size(shape, sizes, kind, module)
        if name in found and found[name].shape != size:
            problems.append(f"{name} is {list(found[name].shape)} instead of {list(size)}")
    if problems:
        raise ValueError(f"{file} is not of this model: {directory.some(problems)}")
    if spoiled := [name for name, x in found.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{file}: not all are numbers: {directory.some(spoiled)}")
    return {wanted[name]: tensor for name, tensor in found.items()}


def _size(
    shape: Shape, sizes: Mapping[str, tuple[int, ...]], kind: str, module: str
) -> tuple[int, ...]:
    if kind == "whole":
        return sizes[_WHOLE[module]]
    leaves = [sizes[leaf] for leaf in shape.groups[module]]
    return (shape.rank, leaves[0][1]) if kind == "a" else (sum(x[0] for x in leaves), shape.rank)
