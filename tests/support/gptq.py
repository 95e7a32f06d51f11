"""Checkpoint folders of GPTQ for tests: drawn at random in every form that the tools write."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.golden_figures import GOLDEN

GPTQ = GOLDEN / "gptq"
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Pack codes along an axis into int32 words, the first in the lowest bits, one at a time."""
    codes = np.moveaxis(codes.astype(np.int64), axis, 0)
    per_word = 32 // bits
    packed = np.zeros((len(codes) // per_word, *codes.shape[1:]), np.int64)
    for number, row in enumerate(codes):
        packed[number // per_word] += row << (bits * (number % per_word))
    return np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), 0, axis))


def linear(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int,
    group: int,
    sym: bool = True,
    act: bool = False,
    v2: bool = False,
    lowest: int = 0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw the tensors of a layer of `shape` = (in, out); also the weight [out, in] in float64.

    lowest: the lowest zero of a layer that is not symmetric.
    """
    inputs, outputs = shape
    groups = inputs // group
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = np.full((groups, outputs), 2 ** (bits - 1))
    if not sym:
        zeros = rng.integers(lowest, 2**bits, (groups, outputs))
    scales = rng.uniform(0.002, 0.01, (groups, outputs)).astype(np.float16)
    g_idx = np.arange(inputs) // group
    if act:
        g_idx = rng.permutation(g_idx)
    qzeros = words(zeros, bits, axis=1)
    if not v2:
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        qzeros = (qzeros.view(np.uint32) - ones).view(np.int32)
    weight = (codes - zeros[g_idx]) * scales.astype(np.float64)[g_idx]
    tensors = {
        "qweight": words(codes, bits, axis=0),
        "qzeros": qzeros,
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, weight.T


def folder(
    path: Path, *, biases: bool = True, metadata: dict[str, str] | None = None, **form: Any
) -> dict[str, np.ndarray]:
    """Write the golden folder of 4 bits with layers drawn at random; return their weights.

    biases: whether every linear layer has a bias. metadata: of the file. form: the options of
    `linear`.
    """
    shutil.copytree(GPTQ / "int4", path)
    tensors = load_file(path / "model.safetensors")
    rng = np.random.default_rng(len(str(form)))
    weights = {}
    for layer in range(3):
        for module in LINEARS:
            name = f"transformer.h.{layer}.{module}"
            rows, outputs = tensors[f"{name}.qweight"].shape
            drawn, weights[name] = linear(rng, (rows * 8, outputs), **form)
            tensors |= {f"{name}.{suffix}": array for suffix, array in drawn.items()}
            if not biases and module != "attn.c_attn":
                del tensors[f"{name}.bias"]
    save_file(tensors, path / "model.safetensors", metadata or {"format": "pt"})
    said = {
        "bits": form["bits"],
        "group_size": form["group"],
        "sym": form.get("sym", True),
        "desc_act": form.get("act", False),
    }
    if form.get("v2"):
        said["checkpoint_format"] = "gptq_v2"
    settings(path, **said)
    return weights


def settings(path: Path, **changes: Any) -> None:
    """Change how a folder says that it is quantised, in both places."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    file = path / "quantize_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
