"""Reads a first-generation Qwen config.json in its Hugging Face spelling, key by key.

A key is part of the architecture (`KEYS`, `OURS`, or under another name `_ALIASES`), must have the
one value that this code computes (`_FIXED`), sets a generation option (`_GENERATION`), has no
effect (`_INERT`), or is refused by name. This module knows the names of the fields of `Config`, but
not the class.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from qwen_jax.config.rope_scaling import RopeScaling
from qwen_jax.runtime import texts, values

# The field of Config for each Hugging Face key.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "kv_channels": "head_dim",
    "intermediate_size": "intermediate_size",
    "layer_norm_epsilon": "norm_eps",
    "rotary_emb_base": "rope_base",
    "seq_length": "seq_length",
    "max_position_embeddings": "max_position_embeddings",
    "use_dynamic_ntk": "dynamic_ntk",
    "use_logn_attn": "logn",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
}
REAL = ("norm_eps", "rope_base", "initializer_range")  # the fields that are real numbers
# Keys that Qwen's format lacks, written to a config.json only if they are set.
OURS = ("layer_windows", "rope_scaling")
# Other spellings of the same keys: from August 2023, and from later versions of transformers.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
    "rope_theta": "rotary_emb_base",
}
# Keys that would change the mathematics, with the values that describe what this code computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen",),
    "no_bias": (True,),
    "rotary_pct": (1.0,),
    "scale_attn_weights": (True,),
    "pos_emb": ("rotary",),
    "activation": ("swiglu",),
    "apply_residual_connection_post_layernorm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
# Keys that do not change what the model computes: the class that loads it, kernel choices
# and dtypes (which affect rounding only: `load` takes a dtype, and softmax is always in float32
# here), dropout (off outside training), how the weights are stored (the manifest of a model
# directory says it), and bookkeeping of transformers and other libraries.
# use_cache_kernel has a meaning only together with use_cache_quantization.
_INERT = frozenset(
    (
        "architectures",
        "auto_map",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "params_dtype",
        "onnx_safe",
        "tokenizer_type",
        "tokenizer_class",
        "bf16",
        "fp16",
        "fp32",
        "use_cache",
        "use_flash_attn",
        "use_cache_kernel",
        "softmax_in_fp32",
        "attn_dropout_prob",
        "emb_dropout_prob",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "bias_dropout_fusion",
        "quantization_config",
        "bos_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "gradient_checkpointing",
        "model_max_length",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "cross_attention_hidden_size",  # for encoder-decoder models, as are the next four
        "decoder_start_token_id",
        "is_decoder",
        "sep_token_id",
        "tie_encoder_decoder",
        "finetuning_task",
        "tf_legacy_loss",
        "trust_remote_code",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "output_scores",
        "return_dict_in_generate",
    )
)
# Generation options in old files: they apply if there is no generation_config.json.
_GENERATION = frozenset(
    (
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "pad_token_id",
        "remove_invalid_values",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    )
)
# Keys that would change answers and are ignored, with what to do instead.
_NOT_DONE = {
    "prefix": "write it into the prompt",
    "task_specific_params": "give the settings of the task as arguments",
    "use_cache_quantization": "for a cache of 8 bits, give cache_dtype int8_asymmetric",
}


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the contents of a config.json, in either spelling, to the fields of `Config`.

    Raises ValueError that names every missing key, and every key or value that is unknown and may
    change the mathematics.
    """
    given = _without_windows(_canonical(hf))
    for key, allowed in _FIXED.items():
        off = given.get(key) is None and not any(allowed)  # null is false to the original
        if key in given and given[key] not in allowed and not off:
            raise ValueError(
                f"{key} is {texts.shown(given[key])}: only "
                f"{' or '.join(map(repr, allowed))} can be computed"
            )
    known = {*KEYS, *OURS, *_FIXED, *_INERT, *_GENERATION, *_NOT_DONE}
    unknown = sorted(key for key, value in given.items() if key not in known and value is not None)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is not known and may change what the model computes; remove it "
            "if it does not"
        )
    # The format's own defaults for absent keys; they differ between its two spellings.
    later = hf.get("n_embd") is None
    absent = {
        "use_dynamic_ntk": later,
        "use_logn_attn": later,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    if missing := sorted(key for key in KEYS if key not in given and key not in absent):
        raise ValueError(f"it lacks {', '.join(missing)}")
    fields = _fields({**absent, **given})
    return {**fields, "num_kv_heads": fields["num_heads"], "qkv_bias": True, "qk_norm": False}


def read_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Convert overrides, by their config.json keys, to fields of `Config`.

    Raises ValueError for a key that is not part of the architecture.
    """
    overrides = _canonical(overrides)
    if unknown := sorted(set(overrides) - set(KEYS) - set(OURS)):
        raise ValueError(
            f"unknown config override {', '.join(unknown)}: allowed are "
            f"{', '.join(sorted([*KEYS, *OURS]))}"
        )
    return _fields(overrides)


def generation(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation options, such as top_p, that an old config.json contains.

    An eos or pad token id beyond the vocabulary is left out: it is a default of the library that
    wrote the file.
    """
    padded = hf.get("padded_vocab_size")  # then vocab_size is the number of real tokens
    rows = hf.get("vocab_size") if padded is None else padded
    found = {key: value for key, value in hf.items() if key in _GENERATION}
    return {
        key: value
        for key, value in found.items()
        if not (key in ("eos_token_id", "pad_token_id") and _beyond(value, rows))
    }


def _beyond(value: Any, rows: Any) -> bool:
    """Return whether a token id, or any id of a list, is outside a vocabulary of `rows` entries."""
    ids = value if isinstance(value, list) else [value]
    numbers = all(isinstance(x, int) for x in (*ids, rows))
    return numbers and not all(0 <= x < rows for x in ids)


def warn(hf: Mapping[str, Any], file: Any) -> None:
    """Warn in one line of the keys of a config.json that this code ignores (`_NOT_DONE`)."""
    asked = [
        f"{key}={texts.shown(hf[key])} ({instead})"
        for key, instead in _NOT_DONE.items()
        if hf.get(key)
    ]
    if asked:
        warnings.warn(f"{file} has entries that are ignored: {'; '.join(asked)}", stacklevel=3)


def spelled(field: str) -> str:
    """Return the name of a field of `Config` for messages: its config.json key and its own."""
    key = next((key for key, name in KEYS.items() if name == field), field)
    return field if key == field else f"{key} ({field})"


def _canonical(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json with each key in its current spelling.

    Raises ValueError if two spellings of one key disagree. If there is a `padded_vocab_size`, then
    `vocab_size` is the number of real tokens, not of embedding rows, and is left out.
    """
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in hf.items():
        name = _ALIASES.get(key, key)
        if key == "vocab_size" and hf.get("padded_vocab_size") is not None:
            continue
        if key != name and value is None:
            continue
        if name in given and given[name] != value:
            both = f"{texts.shown(given[name])}, {texts.shown(value)}"
            raise ValueError(f"keys {origin[name]} and {key} disagree: {both}")
        given[name], origin[name] = value, key
    return given


def _without_windows(given: Mapping[str, Any]) -> dict[str, Any]:
    """Drop keys of later model generations that only say that no layer has a window."""
    says_none: set[str] = set()
    if given.get("use_sliding_window") is False:  # the other two then have no effect
        says_none |= {"use_sliding_window", "sliding_window", "max_window_layers"}
    kinds = given.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        says_none |= {"layer_types"}
    return {key: value for key, value in given.items() if key not in says_none}


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the architecture's keys that are given in a config.json to fields of `Config`."""
    fields = {field: given[key] for key, field in KEYS.items() if key in given}
    for field in set(fields) - set(REAL):
        fields[field] = values.from_file(fields[field])
    if "intermediate_size" in fields:
        name = "intermediate_size"
        doubled = values.whole(f"{name} is", fields[name], least=1, most=values.INT32)
        if doubled % 2:
            raise ValueError(f"{name} is {doubled}: must be even (twice the FFN width)")
        fields[name] = doubled // 2
    if "layer_windows" in given:
        windows = given["layer_windows"]
        if not isinstance(windows, list | tuple | None):
            shown = texts.shown(windows)
            raise ValueError(f"layer_windows {shown}: must be a list of widths, null = full")
        fields["layer_windows"] = windows
        if windows is not None:
            fields["layer_windows"] = tuple(map(values.from_file, windows))
    if "rope_scaling" in given:
        fields["rope_scaling"] = RopeScaling.from_hf(given["rope_scaling"])
    return fields
