"""Maps tensor names of a Hugging Face checkpoint to leaves of the decoder.

A leaf has its output axes first, as weights in PyTorch do, so every leaf is a contiguous range of
one tensor's bytes and nothing is ever transposed. This module knows no file format.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping

from qwen_jax.checkpoint import directory
from qwen_jax.checkpoint.tensor_names import TABLE

Table = Mapping[str, tuple[str, ...]]

# The leaves of `TABLE` under the names of Qwen2, whose tensors hold one leaf each. Qwen2 has biases
# where Qwen has them: on q, k and v, and not on o.
QWEN2: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("embedding",),
    "model.layers.{L}.input_layernorm.weight": ("layers.{L}.attn_norm",),
    "model.layers.{L}.self_attn.q_proj.weight": ("layers.{L}.attn.q",),
    "model.layers.{L}.self_attn.q_proj.bias": ("layers.{L}.attn.q_bias",),
    "model.layers.{L}.self_attn.k_proj.weight": ("layers.{L}.attn.k",),
    "model.layers.{L}.self_attn.k_proj.bias": ("layers.{L}.attn.k_bias",),
    "model.layers.{L}.self_attn.v_proj.weight": ("layers.{L}.attn.v",),
    "model.layers.{L}.self_attn.v_proj.bias": ("layers.{L}.attn.v_bias",),
    "model.layers.{L}.self_attn.o_proj.weight": ("layers.{L}.attn.o",),
    "model.layers.{L}.post_attention_layernorm.weight": ("layers.{L}.ffn_norm",),
    "model.layers.{L}.mlp.gate_proj.weight": ("layers.{L}.ffn.gate",),
    "model.layers.{L}.mlp.up_proj.weight": ("layers.{L}.ffn.up",),
    "model.layers.{L}.mlp.down_proj.weight": ("layers.{L}.ffn.down",),
    "model.norm.weight": ("final_norm",),
    "lm_head.weight": ("head",),
}

# Buffers that some exports carry; the model computes them from its config.
INERT = re.compile(
    r"transformer\.rotary_emb\.inv_freq|transformer\.logn_tensor"
    r"|transformer\.h\.\d+\.attn\.(rotary_emb\.inv_freq|logn_tensor|bias|masked_bias)"
)
_LAYER = re.compile(r"transformer\.h\.(\d{1,9})\.")


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """The part of a tensor that holds one leaf.

    path: the leaf's path in the decoder.
    shape: the leaf's shape.
    start: the index of the leaf's first element (not byte) in the flattened tensor.
    stride: the elements from one row of the leaf to the next, where it has only some columns of the
        tensor; None where its rows follow one another.
    """

    path: str
    shape: tuple[int, ...]
    start: int
    stride: int | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that a checkpoint must contain: its shape, and `parts`, the leaves in it."""

    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]


def expected(leaves: Mapping[str, tuple[int, ...]], table: Table = TABLE) -> dict[str, Expected]:
    """Return the tensors that a checkpoint of a decoder must contain, by name.

    leaves: the shape of each leaf of the decoder, by path.
    table: the leaves of each tensor; `TABLE` or `QWEN2`, whose order is that of the result.

    Tensors without leaves are left out: a decoder that ties its head to the embedding has no head,
    so its checkpoint needs no `lm_head.weight`. Raises ValueError for leaves that the table lacks.
    """
    depth = 1 + max((int(p.split(".")[1]) for p in leaves if p.startswith("layers.")), default=-1)
    tensors = {}
    for name, paths in _spelled_out(table, depth):
        if all(path in leaves for path in paths):
            tensors[name] = _stacked(paths, leaves)
    named = {part.path for tensor in tensors.values() for part in tensor.parts}
    if nameless := [path for path in leaves if path not in named]:
        raise ValueError(
            f"no tensor of this format holds {', '.join(nameless)}: only a model of the original's "
            "architecture can be converted"
        )
    return tensors


def _spelled_out(table: Table, depth: int) -> list[tuple[str, tuple[str, ...]]]:
    """Return the entries of a table with {L} replaced by the index of each of `depth` layers."""
    rows = list(table.items())
    inside = [i for i, (name, _) in enumerate(rows) if "{L}" in name]
    first, last = inside[0], inside[-1] + 1
    layers = [
        (name.replace("{L}", str(layer)), tuple(p.replace("{L}", str(layer)) for p in paths))
        for layer in range(depth)
        for name, paths in rows[first:last]
    ]
    return [*rows[:first], *layers, *rows[last:]]


def _stacked(paths: tuple[str, ...], leaves: Mapping[str, tuple[int, ...]]) -> Expected:
    """Return the tensor that holds these leaves, one behind the other."""
    parts, start = [], 0
    for path in paths:
        parts.append(TensorPart(path, leaves[path], start))
        start += math.prod(leaves[path])
    rows = sum(leaves[path][0] for path in paths)
    return Expected((rows, *leaves[paths[0]][1:]), tuple(parts))


def check_depth(found: Iterable[str], depth: int) -> None:
    """Raise ValueError if the tensors are of more or fewer layers than config.json says.

    found: the names of the tensors. depth: the number of layers in config.json. If no tensor is of
    a layer, nothing is raised, because `check` then lists the missing tensors.
    """
    numbers = [int(match[1]) for name in found if (match := _LAYER.match(name))]
    if numbers and max(numbers) + 1 != depth:
        raise ValueError(
            f"config.json says num_hidden_layers {depth}, the tensors are of {max(numbers) + 1} "
            "layers: put the config.json there that came with these weights, or download the "
            "tensors that are missing"
        )


def check(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Expected], *, inert: Collection[str]
) -> None:
    """Raise ValueError that lists every tensor that is missing, unknown or of the wrong shape.

    found: the shape of every tensor in the checkpoint, by name.
    wanted: the tensors that the checkpoint must contain, by name (`expected`).
    inert: the names of tensors to ignore.
    """
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"missing {_count(missing)}: {directory.some(missing)}")
    if unknown := [name for name in found if name not in wanted and name not in inert]:
        problems.append(f"unknown {_count(unknown)}: {directory.some(unknown)}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name] != tensor.shape
    ]
    if wrong:
        problems.append(f"wrong shape: {directory.some(wrong)}")
    if problems:
        raise ValueError(
            f"the tensors do not match config.json: {'; '.join(problems)}; put the config.json "
            "there that came with these weights"
        )


def _count(names: list[str]) -> str:
    """Return the number of names in words for a message: "1 tensor", "2 tensors"."""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
