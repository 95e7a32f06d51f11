"""What a model is: its architecture in numbers, the published sizes, and settings of RoPE variants.

`Config` is made of a Hugging Face config.json and goes back into one. Nothing here needs jax.
"""

from qwen_jax.config.architecture import Config
from qwen_jax.config.rope_scaling import RopeScaling

__all__ = ["Config", "RopeScaling"]
