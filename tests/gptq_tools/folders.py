"""GPTQ folders as we write them, with the products of their linear layers as we compute them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from convert import from_hf, names, to_hf
from qwen_jax import checkpoint
from qwen_jax.leaves import grouped
from qwen_jax.leaves.weights import contract, named_leaves
from qwen_jax.quantise import calibration
from qwen_jax.quantise.algorithm import Scheme
from qwen_jax.quantise.run import Settings, run
from tests.support.gptq import GPTQ, folder
from tests.support.tiny import on_mesh

ROUNDING = 2.0**-24  # of a float32 operation, relative to its result


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer of a folder: its tensors by suffix, an input, and our output for it.

    bound: how far the output of a right program may be from ours, by output.
    """

    tensors: dict[str, np.ndarray]
    x: np.ndarray
    output: np.ndarray
    bound: np.ndarray


def quantised(path: Path, scheme: Scheme, *options: str) -> Path:
    """Quantise the golden model of floats, and write it as a GPTQ folder. options: of to_hf."""
    rows = calibration.of_tokens(load_file(GPTQ / "model.safetensors")["calibration.tokens"][:4])
    _command(from_hf, GPTQ / "float16", path / "floats")
    run(Settings(path / "floats", path / "model", scheme), rows, held_out=None)
    _command(to_hf, path / "model", path / "gptq", *options)
    return path / "gptq"


def converted(path: Path, **form: Any) -> Path:
    """Write a folder of integers drawn at random as the tools do, read it, and write it again."""
    folder(path / "drawn", **form)
    _command(from_hf, path / "drawn", path / "model")
    _command(to_hf, path / "model", path / "gptq")
    return path / "gptq"


def settings(written: Path) -> dict[str, Any]:
    """How a folder says that it is quantised."""
    return json.loads((written / "config.json").read_text())["quantization_config"]


def layers(written: Path) -> dict[str, Layer]:
    """The linear layers of a folder by name, with the products of the directory that it is of."""
    tensors = load_file(written / "model.safetensors")
    with on_mesh():
        decoder = checkpoint.load(written.with_name("model"), dtype="float32")
        leaves = named_leaves(decoder)
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        wanted = names.expected(shapes)
        found = {}
        for name in sorted({name.rpartition(".")[0] for name in tensors if "qweight" in name}):
            suffixes = ("qweight", "qzeros", "scales", "g_idx", "bias")
            held = {key: tensors[f"{name}.{key}"] for key in suffixes if f"{name}.{key}" in tensors}
            parts = [leaves[part.path] for part in wanted[f"{name}.weight"].parts]
            bias = np.zeros(held["scales"].shape[1], np.float32)
            if f"{name}.bias" in wanted:
                of = [leaves[part.path] for part in wanted[f"{name}.bias"].parts]
                bias = np.concatenate([np.asarray(leaf[...]) for leaf in of])
            found[name] = _layer(held, parts, bias)
    return found


def _layer(held: dict[str, np.ndarray], parts: list[Any], bias: np.ndarray) -> Layer:
    """Multiply an input by the leaves of a layer.

    A weight, an integer of at most 8 bits times a float16, is exact in float32. A sum of n terms
    is, in any order, within n roundings of the sum of their magnitudes; with that of the product
    and that of the bias, two programs are within twice n + 2 of each other.
    """
    inputs = len(held["g_idx"])
    x = np.random.default_rng(inputs).standard_normal((5, inputs), np.float32)
    one = jnp.asarray(x)[None]
    outputs = [np.asarray(contract("BTD,FD->BTF", one, weight=leaf))[0] for leaf in parts]
    weight = np.concatenate([np.asarray(grouped.plain(leaf, "float32")[...]) for leaf in parts])
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(weight.T.astype(np.float64)) + np.abs(bias)
    return Layer(
        held,
        x,
        np.concatenate(outputs, axis=1) + bias,
        2 * (inputs + 2) * ROUNDING * magnitudes,
    )


def _command(module: Any, *arguments: Path | str) -> None:
    assert module.main([str(x) for x in arguments]) == 0
