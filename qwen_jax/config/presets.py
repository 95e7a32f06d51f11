"""The published model sizes, with the values of their checkpoints' own config.json."""

from typing import Any

from qwen_jax.config import Config


def _published(**sizes: Any) -> Config:
    """Make the Config of a published model.

    sizes: fields of `Config`, which add to or replace the values that the published models share.
    """
    return Config(
        **{
            "num_kv_heads": sizes["num_heads"],
            "head_dim": 128,
            "norm_eps": 1e-6,
            "rope_base": 10000,
            "seq_length": 8192,
            "dynamic_ntk": True,
            "logn": True,
            "qkv_bias": True,
            "qk_norm": False,
            "tie_embeddings": False,
            "initializer_range": 0.02,
            **sizes,
        }
    )


PRESETS: dict[str, Config] = {
    "qwen-1.8b": _published(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        intermediate_size=5504,
        max_position_embeddings=8192,
    ),
    "qwen-7b": _published(
        vocab_size=151936,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        intermediate_size=11008,
        max_position_embeddings=32768,
    ),
    "qwen-14b": _published(
        vocab_size=152064,
        hidden_size=5120,
        num_layers=40,
        num_heads=40,
        intermediate_size=13696,
        seq_length=2048,
        max_position_embeddings=8192,
    ),
    "qwen-72b": _published(
        vocab_size=152064,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        intermediate_size=24576,
        max_position_embeddings=8192,
        rope_base=1000000,
        dynamic_ntk=False,
        logn=False,
    ),
}
