"""The tensors of a quantised linear layer in a GPTQ checkpoint, and the arrays of its leaves.

A linear layer has qweight (packed codes), qzeros (packed zeros), scales, g_idx (the group of each
input) and often a bias. Codes and scales are columns of the leaves' own arrays, byte for byte;
zeros, and the order of inputs under act-order, are computed from the tensors, and back.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8, UInt32

from convert.names import Expected, TensorPart

WORD = 32  # the bits of a word
CODES, SCALES, ZEROS, ORDER = "codes", "scales", "zeros", "order"  # the fields of a leaf
# The tensor whose columns are a field of the leaves.
TENSOR = {CODES: "qweight", SCALES: "scales"}


class Form(NamedTuple):
    """How a layer is quantised: the bits of a code, and the inputs of a group, -1 for all."""

    bits: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Linear:
    """A quantised linear layer of a checkpoint.

    name: its name, such as "transformer.h.0.mlp.w1".
    leaves: its leaves, one behind the other along the outputs, as parts of the weight [out, in].
    bits: the bits of a code.
    group_size: the number of inputs in a group.
    """

    name: str
    leaves: tuple[TensorPart, ...]
    bits: int
    group_size: int

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return self.leaves[0].shape[1]

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return sum(leaf.shape[0] for leaf in self.leaves)

    @property
    def groups(self) -> int:
        """The number of groups of inputs."""
        return self.inputs // self.group_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor but the bias, by name."""
        per_word = WORD // self.bits
        return {
            f"{self.name}.qweight": (self.inputs // per_word, self.outputs),
            f"{self.name}.qzeros": (self.groups, self.outputs // per_word),
            f"{self.name}.scales": (self.groups, self.outputs),
            f"{self.name}.g_idx": (self.inputs,),
        }

    def columns(self) -> dict[str, slice]:
        """Return the columns of qweight and scales that each leaf has, by the leaf's path."""
        found, start = {}, 0
        for leaf in self.leaves:
            found[leaf.path] = slice(start, start + leaf.shape[0])
            start += leaf.shape[0]
        return found

    def expected(self, field: str) -> Expected:
        """Return qweight or scales as a tensor whose columns are the leaves' codes or scales."""
        rows, outputs = shape = self.shapes()[f"{self.name}.{TENSOR[field]}"]
        stride = outputs if len(self.leaves) > 1 else None
        parts = [
            TensorPart(f"{path}.{field}", (rows, at.stop - at.start), at.start, stride)
            for path, at in self.columns().items()
        ]
        return Expected(shape, tuple(parts))


def is_linear(tensor: Expected) -> bool:
    """Return whether a tensor of floats is a matrix of a layer, which GPTQ can quantise."""
    return tensor.parts[0].path.startswith("layers.") and len(tensor.shape) == 2


def linears(wanted: Mapping[str, Expected], form_of: Callable[[str], Form | None]) -> list[Linear]:
    """Return the linear layers of a checkpoint that are quantised.

    wanted: the tensors of the same checkpoint in floats, by name.
    form_of: says how a layer is quantised, by its name; None: not at all.

    Raises ValueError for sizes that words or groups do not divide.
    """
    found = []
    for name, tensor in wanted.items():
        form = form_of(name.removesuffix(".weight")) if is_linear(tensor) else None
        if form is None:
            continue
        outputs, inputs = tensor.shape
        size = inputs if form.group_size == -1 else form.group_size
        linear = Linear(name.removesuffix(".weight"), tensor.parts, form.bits, size)
        per_word = WORD // form.bits
        if inputs % size or inputs % per_word or outputs % per_word:
            raise ValueError(
                f"{linear.name} has {inputs} inputs and {outputs} outputs, which groups of {size} "
                f"and words of {per_word} do not divide"
            )
        found.append(linear)
    return found


def order_of(
    g_idx: Int32[np.ndarray, " inputs"], linear: Linear
) -> Int32[np.ndarray, "..."] | None:
    """Return the inputs sorted by group, from the group of each; None if they are sorted already.

    Raises ValueError for a group that does not exist, and for groups of unequal sizes.
    """
    plain = np.arange(linear.inputs, dtype=np.int32) // linear.group_size
    if np.array_equal(g_idx, plain):
        return None
    name, last = f"{linear.name}.g_idx", linear.groups - 1
    wrong = np.flatnonzero((g_idx < 0) | (g_idx > last))
    if wrong.size:
        raise ValueError(
            f"{name}: input {wrong[0]} is of group {g_idx[wrong[0]]}, and groups are 0 to {last}: "
            "download it again"
        )
    counts = np.bincount(g_idx, minlength=linear.groups)
    if np.any(counts != linear.group_size):
        group = int(np.argmax(counts != linear.group_size))
        raise ValueError(
            f"{name}: group {group} has {counts[group]} inputs instead of {linear.group_size}, "
            "which cannot be read: quantise the model again"
        )
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def g_idx_of(order: Int32[np.ndarray, " inputs"] | None, linear: Linear) -> np.ndarray:
    """Return the group of each input, int32 [in]: the way back from `order_of`."""
    plain = np.arange(linear.inputs, dtype=np.int32) // linear.group_size
    if order is None:
        return plain
    found = np.empty_like(plain)
    found[order] = plain
    return found


def zeros_of(
    qzeros: UInt32[np.ndarray, "groups W"], *, bits: int, convention: str
) -> UInt8[np.ndarray, "groups out"]:
    """Unpack zeros, uint8 [groups, out], from the words of qzeros.

    convention: "v2" words hold the zeros; "v1" words are those less 1 in every field. The
        subtraction was of whole words, with borrows, so 1 is added to whole words before unpacking.
    """
    words = qzeros + ones(bits) if convention == "v1" else qzeros
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    fields = (words[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)


def qzeros_of(
    zeros: UInt8[np.ndarray, "groups out"], *, bits: int, convention: str
) -> UInt32[np.ndarray, "groups W"]:
    """Pack zeros into the words of qzeros: the way back from `zeros_of`."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    fields = zeros.reshape(len(zeros), -1, WORD // bits).astype(np.uint32)
    words = np.bitwise_or.reduce(fields << shifts, axis=2)
    return words - ones(bits) if convention == "v1" else words


def ones(bits: int) -> np.uint32:
    """Return the word whose every field is 1."""
    return np.uint32(sum(1 << shift for shift in range(0, WORD, bits)))


def convention_of(qzeros: UInt32[np.ndarray, "groups W"], *, bits: int) -> str | None:
    """Return which convention makes the zeros of a symmetric layer 2^(bits - 1); None for neither.

    What the settings say is not trusted, as there are files whose settings say v1 and whose words
    are v2.
    """
    middle = ones(bits) * np.uint32(2 ** (bits - 1))
    for convention, word in (("v2", middle), ("v1", middle - ones(bits))):
        if np.all(qzeros == word):
            return convention
    return None


def has_corrupt_zeros(qzeros: UInt32[np.ndarray, "groups W"], *, bits: int) -> bool:
    """Return whether words look as AutoGPTQ leaves them where an asymmetric zero is 0.

    It stores -1 there, whose bits overwrite all fields above it, so the word ends in ones for two
    fields or more. (Ones in the last field alone are right.)
    """
    top = np.uint32((2 ** (2 * bits) - 1) << (WORD - 2 * bits))
    return bool(np.any((qzeros & top) == top))


def sorted_codes(
    words: UInt32[np.ndarray, "W out"], rows: Int32[np.ndarray, " n"], *, bits: int
) -> UInt32[np.ndarray, "n_words out"]:
    """Pack the codes of some inputs, in the order given, into words.

    words: the packed codes of all inputs. rows: the inputs, as many as fill whole words.
    """
    per_word = WORD // bits
    found = np.zeros((len(rows) // per_word, words.shape[1]), np.uint32)
    for place in range(per_word):
        taken = rows[place::per_word]
        codes = words[taken // per_word]
        codes >>= (taken % per_word * bits).astype(np.uint32)[:, None]
        codes &= np.uint32(2**bits - 1)
        codes <<= np.uint32(place * bits)
        found |= codes
    return found
