"""How the leaves of a quantised model directory become the tensors of a GPTQ checkpoint again.

What a leaf and a tensor both hold is copied; the rest is computed. All bytes are those of the
checkpoint from which the directory was made.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from convert import copying, gptq
from convert.copying import Made
from convert.gptq import Linear
from convert.names import Expected
from qwen_jax.checkpoint import directory, kinds
from qwen_jax.checkpoint.store import Change, MatrixRows, StoredLeaf

HEAD_NOTE = "note: the head has 8 bits here; lm_head.weight holds the floats they stand for"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of an exported checkpoint.

    wanted: the tensors, by name; `parts` are the leaves that are copied.
    made: functions that compute the rows of the other tensors, by name.
    dtypes: the dtype of each tensor, by name.
    linears: the quantised layers.
    floats: the names of other linear layers.
    """

    wanted: dict[str, Expected]
    made: dict[str, Made]
    dtypes: dict[str, str]
    linears: list[Linear]
    floats: list[str]


def of(
    params: Path,
    leaves: Mapping[str, StoredLeaf],
    *,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, Expected],
    dtype: str,
    convention: str,
    changes: Mapping[str, Change] | None,
) -> Tensors:
    """Return the tensors that hold the leaves of a model directory.

    params, leaves: its params/ folder, and its stored arrays by path.
    manifest: its manifest.
    wanted: the tensors of the same checkpoint in floats, by name.
    dtype: the dtype of tensors of floats.
    convention: how zeros are written (`convention`).
    changes: None keeps integers. Otherwise they become floats, and these functions merge an adapter
        into the leaves at their paths (`peft.changes`).
    """
    of_kind = kinds.of_manifest(manifest)
    extra = manifest.get(directory.QUANTISATION, {}).get("biases", ())
    result = Tensors({}, {}, {}, [], [])
    for name, tensor in wanted.items():
        found = {of_kind.get(part.path) for part in tensor.parts}
        if found & set(kinds.GROUPED):
            linear = _linear(name, tensor, of_kind=of_kind, leaves=leaves)
            read = _Stored(params, leaves, linear, convention)
            if changes is not None:
                result.wanted[name], result.dtypes[name] = Expected(tensor.shape, ()), dtype
                result.made[name] = functools.partial(read.floats, changes)
                continue
            _add(result, read)
            bias = f"{linear.name}.bias"
            if linear.leaves[0].path in extra and bias not in wanted:
                result.wanted[bias] = Expected((linear.outputs,), ())
                result.dtypes[bias] = dtype
                result.made[bias] = functools.partial(_none, linear.outputs)
            continue
        if gptq.is_linear(tensor):
            result.floats.append(name.removesuffix(".weight"))
        result.wanted[name], result.dtypes[name] = tensor, dtype
        if kinds.INT8 in found:
            part, *others = tensor.parts
            if others or part.path != "head":
                raise ValueError(
                    f"{name} is made of int8 weights, which no checkpoint holds in layers: save "
                    "the decoder as floats"
                )
            result.wanted[name] = Expected(tensor.shape, ())
            arrays = [leaves[f"{part.path}.{field}"] for field in ("values", "scale")]
            result.made[name] = functools.partial(_scaled, params, *arrays)
    return result


def _linear(
    name: str,
    tensor: Expected,
    *,
    of_kind: Mapping[str, str],
    leaves: Mapping[str, StoredLeaf],
) -> Linear:
    """Return the quantised linear layer of a tensor of floats.

    Raises ValueError if its leaves differ in bits or groups, so that one tensor cannot hold them.
    """
    forms = {
        (kinds.GROUPED[of_kind[part.path]], leaves[f"{part.path}.scales"].shape[0])
        for part in tensor.parts
        if part.path in of_kind
    }
    (bits, groups), *others = forms
    if others or any(part.path not in of_kind for part in tensor.parts):
        raise ValueError(
            f"{name}: its parts differ in bits or groups, and a checkpoint has one tensor for "
            "them: `--dequantise` writes floats"
        )
    size = tensor.shape[1] // groups
    return Linear(name.removesuffix(".weight"), tensor.parts, bits, size)


def _add(result: Tensors, read: "_Stored") -> None:
    """Add the tensors of a quantised linear layer, but its bias, to those of a checkpoint."""
    linear = read.linear
    result.linears.append(linear)
    fields = {suffix: field for field, suffix in gptq.TENSOR.items()}
    if read.ordered:
        del fields["qweight"]
    rows: dict[str, Made] = {
        "qweight": read.qweight,
        "scales": functools.partial(read.columns, gptq.SCALES),
        "qzeros": read.qzeros,
        "g_idx": read.g_idx,
    }
    for suffix, made in rows.items():
        name = f"{linear.name}.{suffix}"
        result.dtypes[name] = "float16" if suffix == "scales" else "uint32"
        if suffix in fields and len(linear.leaves) == 1:
            result.wanted[name] = linear.expected(fields[suffix])
        else:
            result.wanted[name] = Expected(linear.shapes()[name], ())
            result.made[name] = made


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Computes rows of a quantised layer's tensors from its stored leaves.

    params, leaves: the params/ folder, and its stored arrays by path.
    linear: the layer.
    zeros: "v1" or "v2", how qzeros holds zeros.
    """

    params: Path
    leaves: Mapping[str, StoredLeaf]
    linear: Linear
    zeros: str

    @property
    def ordered(self) -> bool:
        """Whether the codes are sorted by group, because inputs are of any group."""
        return f"{self.linear.leaves[0].path}.{gptq.ORDER}" in self.leaves

    def columns(self, field: str, first: int, count: int) -> MatrixRows:
        """Return rows of a field of all leaves, side by side."""
        return np.concatenate(
            [
                copying.stored_rows(
                    self.leaves[f"{part.path}.{field}"], self.params, first=first, count=count
                )
                for part in self.linear.leaves
            ],
            axis=1,
        )

    def qzeros(self, first: int, count: int) -> MatrixRows:
        """Return rows of qzeros: those of the leaves, or of symmetric ones the middle."""
        bits = self.linear.bits
        if f"{self.linear.leaves[0].path}.{gptq.ZEROS}" in self.leaves:
            zeros = self.columns(gptq.ZEROS, first, count)
        else:
            zeros = np.full((count, self.linear.outputs), 2 ** (bits - 1), np.uint8)
        return gptq.qzeros_of(zeros, bits=bits, convention=self.zeros)

    def g_idx(self, first: int, count: int) -> MatrixRows:
        """Return the groups of some inputs, as words."""
        groups = gptq.g_idx_of(self._order() if self.ordered else None, self.linear)
        return groups[first : first + count].view(np.uint32)

    def qweight(self, first: int, count: int) -> MatrixRows:
        """Return rows of qweight, whose inputs are in their own order."""
        if not self.ordered:
            return self.columns(gptq.CODES, first, count)
        back = np.argsort(self._order()).astype(np.int32)
        per_word = gptq.WORD // self.linear.bits
        words = self.columns(gptq.CODES, 0, self.linear.inputs // per_word)
        rows = back[first * per_word : (first + count) * per_word]
        return gptq.sorted_codes(words, rows, bits=self.linear.bits)

    def floats(self, changes: Mapping[str, Change], first: int, count: int) -> MatrixRows:
        """Return rows of the weight as floats, outputs first, an adapter merged into them."""
        found = []
        for path, at in self.linear.columns().items():
            begin, end = max(first, at.start), min(first + count, at.stop)
            if begin < end:
                rows = self._floats(path, slice(begin - at.start, end - at.start))
                change = changes.get(path)
                found.append(rows if change is None else change(begin - at.start, rows))
        return np.concatenate(found)

    def _floats(self, path: str, at: slice) -> MatrixRows:
        """Return rows of a leaf as floats, float32 [rows, in]."""
        from qwen_jax.leaves import grouped

        def columns(field: str) -> MatrixRows:
            leaf = self.leaves[f"{path}.{field}"]
            whole = copying.stored_rows(leaf, self.params, first=0, count=leaf.shape[0])
            return np.ascontiguousarray(whole[:, at])

        size = self.linear.group_size
        codes = grouped.unpack(columns(gptq.CODES), self.linear.bits).astype(np.float32)
        middle: np.ndarray | int = 2 ** (self.linear.bits - 1)
        if f"{path}.{gptq.ZEROS}" in self.leaves:
            middle = np.repeat(columns(gptq.ZEROS).astype(np.float32), size, axis=0)
        scales = np.repeat(columns(gptq.SCALES).astype(np.float32), size, axis=0)
        weight = (codes - middle) * scales
        if self.ordered:
            weight[self._order()] = weight.copy()
        return weight.T

    def _order(self) -> Int32[np.ndarray, " inputs"]:
        """Read the inputs sorted by group."""
        leaf = self.leaves[f"{self.linear.leaves[0].path}.{gptq.ORDER}"]
        return copying.stored_rows(leaf, self.params, first=0, count=self.linear.inputs)


def _none(outputs: int, first: int, count: int) -> MatrixRows:
    """Return elements of a bias of zeros."""
    return np.zeros(outputs, np.float32)[first : first + count]


def _scaled(
    params: Path, values: StoredLeaf, scale: StoredLeaf, first: int, count: int
) -> MatrixRows:
    """Return rows of an int8 weight as floats."""
    rows, scales = (
        copying.stored_rows(leaf, params, first=first, count=count).astype(np.float32)
        for leaf in (values, scale)
    )
    return rows * scales[:, None]
