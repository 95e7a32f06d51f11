"""The architecture of a model: its sizes and options, the published models, RoPE scaling.

`Config` is read from a Hugging Face config.json and written to one. Nothing here needs jax.
"""

from qwen_jax.config.architecture import Config
from qwen_jax.config.rope_scaling import RopeScaling

__all__ = ["Config", "RopeScaling"]
