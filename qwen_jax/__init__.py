"""qwen_jax: Qwen language models in JAX, for TPUs, CUDA GPUs and CPUs.

Public names are imported on first use, so that `import qwen_jax` starts no JAX backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qwen_jax.runtime.version import VERSION

if TYPE_CHECKING:
    from qwen_jax import attention, chat
    from qwen_jax.chat.tokenizer import TextStream, Tokenizer
    from qwen_jax.config import Config
    from qwen_jax.config.presets import PRESETS
    from qwen_jax.decoding.sampling import Greedy, Nucleus
    from qwen_jax.generate.from_directory import load
    from qwen_jax.generate.language_model import LanguageModel
    from qwen_jax.runtime.processes import initialize

__version__ = VERSION

_HOME = {
    "Config": "config",
    "PRESETS": "config.presets",
    "Greedy": "decoding.sampling",
    "LanguageModel": "generate.language_model",
    "Nucleus": "decoding.sampling",
    "TextStream": "chat.tokenizer",
    "Tokenizer": "chat.tokenizer",
    "initialize": "runtime.processes",
    "load": "generate.from_directory",
}

__all__ = [
    "PRESETS",
    "Config",
    "Greedy",
    "LanguageModel",
    "Nucleus",
    "TextStream",
    "Tokenizer",
    "attention",
    "chat",
    "initialize",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
