"""How a GPTQ checkpoint becomes leaves: which tensors are copied, and which arrays are computed.

The values of zeros, groups and biases are read first, before anything is written, and what cannot
be kept is refused. No layer is ever a copy in floats.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped, UInt32

from convert import copying, gptq
from convert.copying import Made
from convert.gptq import Linear
from convert.gptq_config import Settings
from convert.names import Expected
from qwen_jax.checkpoint import directory
from qwen_jax.checkpoint.safetensors_header import Tensor
from qwen_jax.checkpoint.store import MatrixRows
from qwen_jax.runtime import command, paths

Tensors = Mapping[str, Tensor]
_NO_NUMBER = np.uint16(0x7C00)  # the bits of float16 that are all set in NaN and infinity alone


class Array(NamedTuple):
    """An array of a quantised leaf in a model directory: its shape, its dtype, its axis letters."""

    shape: tuple[int, ...]
    dtype: str
    letters: str


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The quantised linear layers of a checkpoint, as arrays of a model directory.

    wanted: the tensors of the checkpoint, by name; their `parts` are the arrays that are copied.
    made: functions that compute the other arrays, by path.
    arrays: all arrays of quantised leaves, by path.
    kinds: the kind of each quantised leaf, by path.
    facts: what the way back needs, for the manifest.
    """

    wanted: dict[str, Expected]
    made: dict[str, Made]
    arrays: dict[str, Array]
    kinds: dict[str, str]
    facts: dict[str, object]


class Values(NamedTuple):
    """What the tensors of a linear layer say, beside its codes and scales.

    zeros: "v1" or "v2", how qzeros holds zeros.
    symmetric: whether every zero is 2^(bits - 1), so that none is stored.
    order: the inputs sorted by group, int32 [in]; None where input i is of group i // group_size.
    """

    zeros: str
    symmetric: bool
    order: Int32[np.ndarray, " inputs"] | None


def tensors_of(
    wanted: Mapping[str, Expected], linears: list[Linear], *, found: Collection[str]
) -> dict[str, Expected]:
    """Return the tensors that a quantised checkpoint must contain, by name.

    wanted: the tensors of the same checkpoint in floats, by name.
    linears: its quantised layers.
    found: the names of its tensors: some tools write a bias for every linear layer, zeros where the
        model has none.
    """
    by_weight = {f"{linear.name}.weight": linear for linear in linears}
    result: dict[str, Expected] = {}
    for name, tensor in wanted.items():
        if name not in by_weight:
            result[name] = tensor
            continue
        linear = by_weight[name]
        result |= {key: Expected(shape, ()) for key, shape in linear.shapes().items()}
        if (bias := f"{linear.name}.bias") not in wanted and bias in found:
            result[bias] = Expected((linear.outputs,), ())
    return result


def read(
    linears: list[Linear],
    tensors: Tensors,
    *,
    settings: Settings,
    wanted: Mapping[str, Expected],
    metadata: Mapping[str, str],
) -> dict[str, Values]:
    """Return what qzeros and g_idx say, by layer. They, scales and extra biases are checked.

    linears, wanted: the quantised layers, and the result of `tensors_of`.
    tensors: the location of each tensor in the checkpoint, by name.
    metadata: the notes in the headers of its files.

    Raises ValueError that names the tensor. Warns of zeros that AutoGPTQ has spoiled.
    """
    found: dict[str, Values] = {}
    suspect = not settings.symmetric and "auto_gptq_version" in metadata
    spoiled: list[str] = []
    for linear in linears:
        _check_dtypes(linear, tensors)
        _check_scales(linear, tensors[f"{linear.name}.scales"])
        bias = wanted.get(f"{linear.name}.bias")
        if bias is not None and not bias.parts and _bytes(tensors[f"{linear.name}.bias"]).any():
            raise ValueError(
                f"{linear.name}.bias is not 0, and this model has no bias there: the checkpoint is "
                "of another architecture"
            )
        order = gptq.order_of(_words(tensors[f"{linear.name}.g_idx"]).view(np.int32), linear)
        words = _words(tensors[f"{linear.name}.qzeros"])
        zeros = settings.zeros or "v1"
        if settings.symmetric:
            zeros = _symmetric(words, linear)
        elif suspect and zeros == "v1" and gptq.has_corrupt_zeros(words, bits=linear.bits):
            spoiled.append(linear.name)
        found[linear.name] = Values(zeros, settings.symmetric, order)
    if spoiled:
        command.say(
            f"warning: zeros of {directory.some(spoiled)} look as AutoGPTQ leaves them where one "
            "is 0, which overwrites its neighbours: such layers are wrong, in every program; "
            "quantise the model again, symmetrically or with GPTQModel"
        )
    conventions = {values.zeros for values in found.values()}
    if len(conventions) > 1:
        raise ValueError(
            "some layers have zeros in the convention of GPTQ v1, others of v2: the files are not "
            "of one checkpoint; download it again"
        )
    return found


def _symmetric(words: UInt32[np.ndarray, "groups W"], linear: Linear) -> str:
    """Return the convention of a symmetric layer's zeros; ValueError if they are not symmetric."""
    zeros = gptq.convention_of(words, bits=linear.bits)
    if zeros is None:
        seen = ", ".join(f"{word:#010x}" for word in np.unique(words)[:3])
        raise ValueError(
            f"{linear.name}.qzeros has {seen}, and sym is true: every zero must then be the middle "
            "of its range; put the config.json there that came with these weights"
        )
    return zeros


def _check_dtypes(linear: Linear, tensors: Tensors) -> None:
    """Raise ValueError if a tensor of a quantised layer has another dtype than GPTQ gives it."""
    wanted = {"qweight": "I32", "qzeros": "I32", "g_idx": "I32", "scales": "F16"}
    for suffix, code in wanted.items():
        name = f"{linear.name}.{suffix}"
        if tensors[name].code != code:
            raise ValueError(f"{name} is {tensors[name].code}: only {code} can be read")


def _check_scales(linear: Linear, tensor: Tensor) -> None:
    """Raise ValueError if a scale of a layer is NaN or infinite, as then every output is."""
    scales = _bytes(tensor).view(np.uint16).reshape(tensor.shape)
    wrong = np.argwhere((scales & _NO_NUMBER) == _NO_NUMBER)
    if len(wrong):
        group, output = map(int, wrong[0])
        value = scales.view(np.float16)[group, output]
        raise ValueError(
            f"{linear.name}.scales is {value} for group {group} of output {output}: the file is "
            "damaged, or the layer was spoiled when it was quantised; download it again, or "
            "quantise the model again"
        )


def _bytes(tensor: Tensor) -> Shaped[np.ndarray, " bytes"]:
    """Read the bytes of a small tensor, as they are."""
    count = int(np.prod(tensor.shape)) * copying.numpy_dtype(tensor.dtype).itemsize
    return np.frombuffer(paths.read(tensor.file, tensor.offset, count=count), np.uint8)


def _words(tensor: Tensor) -> UInt32[np.ndarray, "..."]:
    """Read a tensor of words."""
    return _bytes(tensor).view(np.uint32).reshape(tensor.shape)


def kept(
    linears: list[Linear],
    values: Mapping[str, Values],
    *,
    tensors: Tensors,
    wanted: Mapping[str, Expected],
    letters: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Quantised:
    """Return the arrays of a directory that keeps the integers of a checkpoint.

    linears, wanted: the quantised layers, and the result of `tensors_of`.
    values: from `read`.
    tensors: the location of each tensor, by name.
    letters: the axis letters of each leaf, outputs first, by path.
    metadata: the notes in the headers of its files.
    """
    facts = _facts(linears, values, wanted=wanted, metadata=metadata)
    result = Quantised(dict(wanted), {}, {}, {}, facts)
    for linear in linears:
        found, here = values[linear.name], result
        raw = {gptq.SCALES} if found.order is not None else {gptq.SCALES, gptq.CODES}
        for field in raw:
            tensor = linear.expected(field)
            here.wanted[f"{linear.name}.{gptq.TENSOR[field]}"] = tensor
        for path, at in linear.columns().items():
            inward = letters[path][::-1]
            outputs, words = at.stop - at.start, linear.shapes()[f"{linear.name}.qweight"][0]
            here.kinds[path] = f"grouped{linear.bits}"
            codes = Array((words, outputs), "uint32", inward)
            here.arrays[f"{path}.{gptq.CODES}"] = codes
            grid = (linear.groups, outputs)
            here.arrays[f"{path}.{gptq.SCALES}"] = Array(grid, "float16", inward)
            if not found.symmetric:
                name = f"{path}.{gptq.ZEROS}"
                here.arrays[name] = Array(grid, "uint8", inward)
                here.made[name] = functools.partial(
                    _zeros, tensors[f"{linear.name}.qzeros"], linear.bits, found.zeros, at
                )
            if found.order is not None:
                name = f"{path}.{gptq.ORDER}"
                here.arrays[name] = Array((linear.inputs,), "int32", "I")
                here.made[name] = functools.partial(_rows, found.order)
                here.made[f"{path}.{gptq.CODES}"] = functools.partial(
                    _sorted_codes, tensors[f"{linear.name}.qweight"], found.order, linear, at
                )
    return result


def dequantised(
    linears: list[Linear],
    values: Mapping[str, Values],
    *,
    tensors: Tensors,
    wanted: Mapping[str, Expected],
) -> Quantised:
    """Return the arrays of a directory of floats, computed from the integers of a checkpoint.

    The arguments are as in `kept`.
    """
    result = Quantised(dict(wanted), {}, {}, {}, {})
    for linear in linears:
        for path, at in linear.columns().items():
            result.made[path] = functools.partial(_floats, linear, values[linear.name], tensors, at)
    return result


def _facts(
    linears: list[Linear],
    values: Mapping[str, Values],
    *,
    wanted: Mapping[str, Expected],
    metadata: Mapping[str, str],
) -> dict[str, object]:
    """Return what the way back needs beside the arrays.

    `zeros` is the convention of qzeros, `biases` the leaves of layers with a bias of zeros,
    `metadata` the notes in the files' headers.
    """
    extra = [x for x in linears if (bias := wanted.get(f"{x.name}.bias")) and not bias.parts]
    return {
        "zeros": next(iter(values.values())).zeros,
        "biases": [path for linear in extra for path in linear.columns()],
        "metadata": dict(metadata),
    }


def _zeros(
    tensor: Tensor, bits: int, convention: str, at: slice, first: int, count: int
) -> MatrixRows:
    """Compute rows of the zeros of a leaf, which has the columns `at` of its linear layer."""
    zeros = gptq.zeros_of(_words(tensor), bits=bits, convention=convention)
    return zeros[first : first + count, at]


def _rows(array: Shaped[np.ndarray, "..."], first: int, count: int) -> MatrixRows:
    """Return rows of an array."""
    return array[first : first + count]


def _sorted_codes(
    tensor: Tensor,
    order: Int32[np.ndarray, " inputs"],
    linear: Linear,
    at: slice,
    first: int,
    count: int,
) -> MatrixRows:
    """Compute rows of the codes of a leaf, sorted by group: words `first` to `first + count`."""
    per_word = gptq.WORD // linear.bits
    rows = order[first * per_word : (first + count) * per_word]
    return gptq.sorted_codes(_columns(tensor, at), rows, bits=linear.bits)


def _floats(
    linear: Linear, values: Values, tensors: Tensors, at: slice, first: int, count: int
) -> MatrixRows:
    """Compute rows of the weight of a leaf, float32 [count, in], outputs first."""
    from qwen_jax.leaves import grouped

    at = slice(at.start + first, at.start + first + count)
    middle: np.ndarray | int = 2 ** (linear.bits - 1)
    groups = np.arange(linear.inputs) // linear.group_size
    if values.order is not None:
        groups = gptq.g_idx_of(values.order, linear)
    if not values.symmetric:
        words = _words(tensors[f"{linear.name}.qzeros"])
        zeros = gptq.zeros_of(words, bits=linear.bits, convention=values.zeros)
        middle = zeros[groups, at].astype(np.float32)
    scales = _bytes(tensors[f"{linear.name}.scales"]).view(np.float16)
    scales = scales.reshape(linear.groups, linear.outputs)[:, at].astype(np.float32)
    codes = grouped.unpack(_columns(tensors[f"{linear.name}.qweight"], at), linear.bits)
    return ((codes.astype(np.float32) - middle) * scales[groups]).T


def _columns(tensor: Tensor, at: slice) -> UInt32[np.ndarray, "W columns"]:
    """Read some columns of a matrix of words."""
    rows, stride = tensor.shape
    with paths.reader(tensor.file) as source:
        return copying.read_rows(
            source,
            tensor.offset + at.start * 4,
            count=rows,
            columns=(at.stop - at.start,),
            dtype="uint32",
            stride=stride,
        )
