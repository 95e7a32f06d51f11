"""Which matrices of a model are rounded, in which order, and how each is."""

import dataclasses
import fnmatch
from collections.abc import Mapping

from qwen_jax.leaves.grouped import BITS, WORD
from qwen_jax.quantise.algorithm import Scheme

# The matrices of a block in the order in which they are rounded. Those of a stage have the same
# inputs, and inputs of later stages are computed with the earlier ones rounded.
STAGES = (("attn.q", "attn.k", "attn.v"), ("attn.o",), ("ffn.up", "ffn.gate"), ("ffn.down",))
NAMES = tuple(name for stage in STAGES for name in stage)
FLOAT = 16  # the "bits" of a matrix that is not rounded

Shapes = Mapping[str, tuple[int, ...]]


def by_path(shapes: Shapes, scheme: Scheme, *, bits_of: Mapping[str, int]) -> dict[str, Scheme]:
    """Return the scheme of each matrix that is rounded, by path, in the order of the blocks.

    shapes: the shape [outputs, inputs] of each weight of a model, by path.
    scheme: that of matrices that no pattern names.
    bits_of: 4, 8 or 16 (floats, as they are) by a pattern of paths, such as "layers.*.ffn.down". Of
        several patterns that a path matches, the last one holds.

    Raises ValueError for a pattern without a matrix, other bits, and for sizes that groups or words
    do not divide.
    """
    for pattern, bits in bits_of.items():
        if bits not in (*BITS, FLOAT):
            raise ValueError(f"bits of {pattern!r}: {bits} must be 4, 8 or {FLOAT}")
    found: dict[str, Scheme] = {}
    matched: set[str] = set()
    layers = {path.split(".")[1] for path in shapes if path.startswith("layers.")}
    for number in sorted(map(int, layers)):
        for name in NAMES:
            path, bits = f"layers.{number}.{name}", scheme.bits
            for pattern, wanted in bits_of.items():
                if fnmatch.fnmatchcase(path, pattern):
                    bits = wanted
                    matched.add(pattern)
            if bits == FLOAT:
                continue
            found[path] = dataclasses.replace(scheme, bits=bits)
            _check(path, shapes[path], scheme=found[path])
    for pattern in bits_of:
        if pattern not in matched:
            raise ValueError(
                f"{pattern!r} names no matrix: they are layers.N and {', '.join(NAMES)}"
            )
    if not found:
        raise ValueError("no matrix is left to be rounded: leave out a pattern of 16 bits")
    return found


def _check(path: str, shape: tuple[int, ...], *, scheme: Scheme) -> None:
    """Raise ValueError if groups or words of codes do not divide a matrix."""
    outputs, inputs = shape
    per_word = WORD // scheme.bits
    try:
        size = scheme.inputs_of_group(inputs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if size % per_word:
        raise ValueError(
            f"group_size {scheme.group_size}: a word holds {per_word} codes of {scheme.bits} bits, "
            f"and groups must be multiples of that"
        )
    if inputs % per_word or outputs % per_word:
        raise ValueError(
            f"{path} has {inputs} inputs and {outputs} outputs, which words of {per_word} codes do "
            "not divide"
        )
