"""Model directories: loading, saving, inspecting them, and checking that they are complete.

`load` and `save` move a decoder to and from the current mesh. Importing this package does not
import jax.
"""

from qwen_jax.checkpoint.directory import CheckpointError, verify_whole
from qwen_jax.checkpoint.loading import (
    abstract,
    abstract_leaves,
    load,
    load_config,
    load_generation_config,
    load_kinds,
    load_tokenizer,
)
from qwen_jax.checkpoint.saving import finish, save
from qwen_jax.checkpoint.store import DTYPES

__all__ = [
    "DTYPES",
    "CheckpointError",
    "abstract",
    "abstract_leaves",
    "finish",
    "load",
    "load_config",
    "load_generation_config",
    "load_kinds",
    "load_tokenizer",
    "save",
    "verify_whole",
]
