"""The original's figures in tests/golden: arrays and scalars."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """The arrays, by name."""
    return load_file(GOLDEN / "model.safetensors")


@functools.cache
def scalars() -> dict[str, Any]:
    """The scalars and settings, by name."""
    return json.loads((GOLDEN / "model.json").read_text())


def overrides(flags: str) -> dict[str, bool]:
    """The config overrides for the flags in a figure's name: "plain", "ntk", "logn", "ntk_logn"."""
    return {"use_dynamic_ntk": "ntk" in flags, "use_logn_attn": "logn" in flags}


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in standard deviations of the original's logits."""
    return float(np.abs(np.asarray(ours) - theirs).max() / theirs.std())
