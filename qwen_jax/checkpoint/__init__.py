"""Model directories: loaded, saved, described, and found to be whole or not.

`load` and `save` carry a decoder from and to the mesh in force. Importing this room starts no jax.
"""

from qwen_jax.checkpoint.directory import (
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    PARAMS,
    UNFINISHED,
    CheckpointError,
    check_shapes,
    verify_whole,
    write_json,
    write_manifest,
)
from qwen_jax.checkpoint.saving import (
    DTYPES,
    abstract_leaves,
    finish,
    load,
    load_config,
    load_generation_config,
    load_tokenizer,
    save,
)

__all__ = [
    "CONFIG",
    "DTYPES",
    "GENERATION_CONFIG",
    "MANIFEST",
    "PARAMS",
    "UNFINISHED",
    "CheckpointError",
    "abstract_leaves",
    "check_shapes",
    "finish",
    "load",
    "load_config",
    "load_generation_config",
    "load_tokenizer",
    "save",
    "verify_whole",
    "write_json",
    "write_manifest",
]
