"""The context extensions ("modes") that a measurement compares. Loads no jax."""

import dataclasses
from collections.abc import Sequence

from qwen_jax.config import Config

MODES = ("plain", "ntk", "ntk+logn", "ntk+logn+window")
OWN = "own"  # as config.json says: the only mode with rope_scaling, such as YaRN


def setting_of(config: Config, mode: str, *, windows: Sequence[int | None] | None) -> Config:
    """Return the config with which a mode computes; all modes use the same weights.

    windows: the window of each layer in a mode with "window"; None: `seq_length` tokens in the
        lower half of the layers.

    Raises ValueError unless there is one window per layer.
    """
    if mode == OWN:
        return config
    parts = mode.split("+")
    if windows is None:
        half = config.num_layers // 2
        windows = [config.seq_length] * half + [None] * (config.num_layers - half)
    return dataclasses.replace(
        config,
        dynamic_ntk="ntk" in parts,
        logn="logn" in parts,
        rope_scaling=None,
        layer_windows=tuple(windows) if "window" in parts else None,
    )
