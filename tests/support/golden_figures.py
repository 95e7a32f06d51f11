"""The original's figures, for tests: arrays and scalars of tests/golden."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "model.safetensors")


@functools.cache
def scalars() -> dict[str, Any]:
    return json.loads((GOLDEN / "model.json").read_text())


def overrides(flags: str) -> dict[str, bool]:
    """Config overrides for flags as the figures name them: "plain", "ntk", "logn", "ntk+logn"."""
    return {"use_dynamic_ntk": "ntk" in flags, "use_logn_attn": "logn" in flags}


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in standard deviations of the original's logits."""
    return float(np.abs(np.asarray(ours) - theirs).max() / theirs.std())
