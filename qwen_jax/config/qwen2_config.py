"""Writes an architecture as the config.json of Qwen2, the format of the next generation.

Qwen2 has neither dynamic NTK nor LogN, and one window width: what it cannot express is refused by
name, or told by `lost`. The file has the spelling of transformers 4, which version 5 reads too.
"""

from typing import Any

from qwen_jax.config.architecture import Config

# The field of Config for each key that has the same meaning.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
}


def write(config: Config) -> dict[str, Any]:
    """Return the contents of a Qwen2 config.json, without the dtype and token ids.

    Raises ValueError that names what Qwen2 cannot express.
    """
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            f"kv_channels is {config.head_dim}: a head of Qwen2 has hidden_size / "
            f"num_attention_heads = {config.hidden_size / config.num_heads:g} channels, so this "
            "model has no Qwen2 spelling"
        )
    if config.qk_norm or not config.qkv_bias:
        raise ValueError("QK-norm and bias-free QKV have no Qwen2 spelling")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        # The first with Qwen2. Without a version, 4.57 warns of a fault in other tokenizers.
        "transformers_version": "4.37.0",
        **{key: getattr(config, field) for key, field in KEYS.items()},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **_context(config),
        **_windows(config),
    }


def lost(config: Config) -> str | None:
    """Describe in one line what a model loses as Qwen2; None if nothing is lost."""
    longest, was = _context(config)["max_position_embeddings"], config.max_position_embeddings
    now = f"max_position_embeddings is {longest}"
    now += f", and was {was}" if longest < was else ""
    absent = {"dynamic NTK": config.dynamic_ntk, "LogN": config.logn}
    if missing := " and no ".join(name for name, used in absent.items() if used):
        return (
            f"Qwen2 has no {missing}: nothing is lost up to {config.seq_length} tokens "
            f"(seq_length); {now}"
        )
    return f"{now}: programs take no longer texts" if longest < was else None


def _context(config: Config) -> dict[str, Any]:
    """Return max_position_embeddings, with rope_scaling or another rope_theta if the model scales.

    Engines multiply max_position_embeddings by the factor of linear scaling, and by no other.
    Raises ValueError for a scheme that Qwen2 lacks.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {"max_position_embeddings": config.seq_length}
    trained = scaling.original_max_position_embeddings or config.seq_length
    extended = int(trained * scaling.factor)
    if scaling.type == "linear":
        entry = {"rope_type": "linear", "factor": scaling.factor}
        return {"max_position_embeddings": trained, "rope_scaling": entry}
    if scaling.type == "yarn":
        entry = scaling.to_hf()
        entry = {"rope_type": entry.pop("type"), **entry}
        return {"max_position_embeddings": extended, "rope_scaling": entry}
    if scaling.type == "ntk":  # NTK-aware scaling is another base, for every length
        base = config.rope_base * scaling.factor ** (config.head_dim / (config.head_dim - 2))
        return {"max_position_embeddings": extended, "rope_theta": base}
    raise ValueError(
        f"rope_scaling of type {scaling.type} has no Qwen2 spelling: Qwen2 has linear and yarn, "
        "which ramps over the index of the pair"
    )


def _windows(config: Config) -> dict[str, Any]:
    """Return the keys of sliding windows, which Qwen2 has in its last layers, in one width.

    Raises ValueError if the model's windows are others.
    """
    windows = config.windows
    first = next((i for i, width in enumerate(windows) if width is not None), None)
    if first is None:
        return {"use_sliding_window": False}
    if len(set(windows[first:])) > 1:
        raise ValueError(
            f"layer_windows {list(windows)} has no Qwen2 spelling: Qwen2 has one width, in every "
            "layer from one on"
        )
    return {
        "use_sliding_window": True,
        "sliding_window": windows[first],
        "max_window_layers": first,
    }
