"""The architecture of a checkpoint: `Config`, the published sizes, and the Hugging Face spelling.

A Config holds what a checkpoint decides and nothing else: no mesh, no storage dtype, no kernel, no
batch. It is frozen and hashable, so it can be a static argument of `jax.jit`. Keys of a
config.json that do not change the mathematics stay in that file, which a model directory keeps as
it was (`checkpoint.py`); here they are only recognised.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax import paths, texts


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A RoPE scaling variant other than the original's dynamic NTK; formulas in `rope.py`.

    "yarn" has its ramp over the pair index, as Hugging Face, vLLM and checkpoints that were trained
    with it; "yarn_paper" has the paper's, over the number of turns.
    """

    type: str
    factor: float
    original_max_position_embeddings: int | None = None  # both kinds of YaRN need it
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True  # the ramp of yarn begins and ends at whole pairs
    mscale: float | None = None  # of yarn, if both are there and no attention_factor
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.type not in _ROPE_TYPES:
            raise ValueError(
                f"rope_scaling type {self.type!r}: allowed are {', '.join(_ROPE_TYPES)}"
            )
        if not _is_number(self.factor) or self.factor < 1:
            raise ValueError(f"rope_scaling factor {self.factor!r}: must be a number of at least 1")
        trained = self.original_max_position_embeddings
        if trained is None and self.type in _YARN:
            raise ValueError(
                f"rope_scaling of type {self.type} needs original_max_position_embeddings"
            )
        if trained is not None and (type(trained) is not int or trained <= 0):
            raise ValueError(
                f"rope_scaling original_max_position_embeddings {trained!r}: must be a positive "
                "whole number"
            )
        betas = (self.beta_fast, self.beta_slow)
        if not all(map(_is_number, betas)) or not self.beta_fast > self.beta_slow > 0:
            raise ValueError("rope_scaling needs beta_fast > beta_slow > 0")
        factor = self.attention_factor
        if factor is not None and (not _is_number(factor) or factor <= 0):
            raise ValueError(f"rope_scaling attention_factor {factor!r}: must be positive")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling truncate {self.truncate!r}: must be true or false")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0):
                raise ValueError(f"rope_scaling {name} {value!r}: must be a number of at least 0")
        if self.type != "yarn" and (self.mscale, self.mscale_all_dim, self.truncate) != _UNSET:
            raise ValueError(
                f"rope_scaling of type {self.type} has no truncate, mscale or mscale_all_dim: "
                "leave them out, or take type yarn"
            )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` entry of a config.json, without what does not apply."""
        names = ["type", "factor", "original_max_position_embeddings"]
        names += ["beta_fast", "beta_slow", "attention_factor"] if self.type in _YARN else []
        names += [] if self.truncate else ["truncate"]
        names += ["mscale", "mscale_all_dim"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


_YARN = ("yarn", "yarn_paper")
_ROPE_TYPES = ("linear", "ntk", *_YARN)
_UNSET = (None, None, True)


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture; the letter of each size is the legend of `model.py`.

    `intermediate_size` is the real FFN width F (a Qwen config.json states twice that). `seq_length`
    is the length the model was trained at: the threshold of dynamic NTK and LogN.
    `layer_windows[l]` is the number of last tokens layer l sees, itself included; None is all.
    """

    vocab_size: int  # V, rows of the embedding, padded rows included
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    intermediate_size: int  # F
    norm_eps: float
    rope_base: float
    seq_length: int
    max_position_embeddings: int
    dynamic_ntk: bool
    logn: bool
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    initializer_range: float
    layer_windows: tuple[int | None, ...] | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} is {value!r}: must be a positive whole number")
        for name in ("norm_eps", "rope_base", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ValueError(f"{name} is {value!r}: must be a positive number")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of {self.num_kv_heads}")
        if self.head_dim % 2 or self.head_dim < 4:
            raise ValueError(f"head_dim {self.head_dim}: must be even, and at least 4")
        if self.rope_scaling is not None and self.dynamic_ntk:
            raise ValueError("rope_scaling and use_dynamic_ntk are two schemes: turn one off")
        if self.logn and self.seq_length < 2:
            raise ValueError(
                "use_logn_attn needs a seq_length of at least 2: it divides by its log"
            )
        if self.layer_windows is not None:
            if len(self.layer_windows) != self.num_layers:
                raise ValueError(
                    f"layer_windows has {len(self.layer_windows)} entries for "
                    f"{self.num_layers} layers"
                )
            if any(w is not None and (type(w) is not int or w <= 0) for w in self.layer_windows):
                raise ValueError("layer_windows holds positive whole numbers or null (= full)")

    @property
    def sizes(self) -> dict[str, int]:
        """The lengths of the axes of weights, by the letters of `model.py`."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "Q": self.num_heads * self.head_dim,
            "U": self.num_kv_heads * self.head_dim,
            "F": self.intermediate_size,
        }

    def num_params(self) -> int:
        """The number of weights, padded vocabulary rows included."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        bias = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        layer = attention + bias + norms + 3 * self.hidden_size * self.intermediate_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size

    def flops_per_token(self, length: int) -> float:
        """FLOPs that the model needs for a token of a training step, at that sequence length.

        6 for each weight that is multiplied with, and causal attention: a token's scores and
        weighted values, forward and twice that backward. Recomputation does not count; a forward
        pass alone is a third.
        """
        keys = sum(self.mean_keys(length, window) for window in self.windows)
        return 6 * self.num_multiplied() + 12 * self.num_heads * self.head_dim * keys

    def num_multiplied(self) -> int:
        """The number of weights that a token is multiplied with: the table is looked up."""
        table = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        return self.num_params() - table

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None for all tokens."""
        return self.layer_windows or (None,) * self.num_layers

    @staticmethod
    def mean_keys(length: int, window: int | None) -> float:
        """Keys that a token sees, over a sequence: half of them, the diagonal's half left out."""
        seen = length if window is None else min(window, length)
        return seen - seen * seen / (2 * length)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of the KV cache for a token: of a float dtype, or "int8" or "int8_asymmetric"."""
        if dtype not in _CACHE_BYTES:
            raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(_CACHE_BYTES)}")
        each, scales = _CACHE_BYTES[dtype]
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * each + 4 * scales)

    @property
    def in_training(self) -> "Config":
        """This architecture as the original trains it: nothing scales with the length."""
        return dataclasses.replace(self, dynamic_ntk=False, logn=False)

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Config":
        """This architecture with some values replaced, by their Hugging Face names.

        Raises ValueError for a name that is not part of the architecture.
        """
        if not isinstance(overrides, Mapping) or not all(isinstance(x, str) for x in overrides):
            got = texts.described(overrides)
            raise ValueError(f"config overrides must be values by their names, got {got}")
        overrides = _canonical(overrides)
        unknown = sorted(set(overrides) - set(_KEYS) - set(_OURS))
        if unknown:
            raise ValueError(
                f"unknown config override {', '.join(unknown)}: allowed are "
                f"{', '.join(sorted([*_KEYS, *_OURS]))}"
            )
        fields = _fields(overrides)
        if self.num_kv_heads == self.num_heads and "num_heads" in fields:
            fields["num_kv_heads"] = fields["num_heads"]
        return dataclasses.replace(self, **fields)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Read a first-generation Qwen config.json, in its current or its August-2023 spelling.

        Raises ValueError that names every missing key, and every key or value that this code does
        not know and that may change the mathematics.
        """
        values = _canonical(hf)
        for key, allowed in _FIXED.items():
            off = values.get(key) is None and not any(allowed)  # null is false to the original
            if key in values and values[key] not in allowed and not off:
                raise ValueError(
                    f"config key {key} is {values[key]!r}: only "
                    f"{' or '.join(map(repr, allowed))} can be computed"
                )
        known = {*_KEYS, *_OURS, *_FIXED, *_INERT}
        unknown = sorted(k for k, v in values.items() if k not in known and v is not None)
        if unknown:
            raise ValueError(
                f"config key {', '.join(unknown)} is not known and may change what the model "
                "computes; remove it from config.json if it does not"
            )
        # What the format itself means by an absent key: its two spellings differ in the flags.
        absent = {
            "use_dynamic_ntk": "n_embd" not in hf,
            "use_logn_attn": "n_embd" not in hf,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        }
        missing = sorted(key for key in _KEYS if key not in values and key not in absent)
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        fields = _fields({**absent, **values})
        fields["num_kv_heads"] = fields["num_heads"]
        return cls(**fields, qkv_bias=True, qk_norm=False)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that `from_hf` reads back as this Config.

        Raises ValueError where Qwen's format has no word for the value.
        """
        if self.num_kv_heads != self.num_heads or self.qk_norm or not self.qkv_bias:
            raise ValueError("grouped KV heads, QK-norm and bias-free QKV have no Qwen-1 spelling")
        values = {key: getattr(self, field) for key, field in _KEYS.items()}
        values["intermediate_size"] = 2 * self.intermediate_size
        if self.layer_windows is not None:
            values["layer_windows"] = list(self.layer_windows)
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_hf()
        return {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", **values}


# Bytes of a value in the KV cache, and float32 numbers that go with a token and head.
_CACHE_BYTES = {
    "float32": (4, 0),
    "bfloat16": (2, 0),
    "float16": (2, 0),
    "int8": (1, 1),
    "int8_asymmetric": (1, 2),
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "seq_length",
    "max_position_embeddings",
)
_FLAGS = ("dynamic_ntk", "logn", "qkv_bias", "qk_norm", "tie_embeddings")

# Hugging Face key -> field.
_KEYS = {
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
# Keys of ours, written to a config.json only when they are set.
_OURS = ("layer_windows", "rope_scaling")
# Other spellings of the same keys: August 2023, and later duplicates.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
    "rope_theta": "rotary_emb_base",
}
# Keys that would change the mathematics: the values that mean what this code computes.
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
# Keys without influence on what the model computes: which class loads it, which kernel or dtype
# the original picks, dropout (off outside training), bookkeeping of the transformers library and of
# others, and how to sample, which old files say here and ours only in generation_config.json.
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
        "use_cache_quantization",
        "use_cache_kernel",
        "softmax_in_fp32",
        "attn_dropout_prob",
        "emb_dropout_prob",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "bias_dropout_fusion",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
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
        "task_specific_params",
        "name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "cross_attention_hidden_size",  # of an encoder and decoder, as the next four
        "decoder_start_token_id",
        "is_decoder",
        "sep_token_id",
        "tie_encoder_decoder",
        "finetuning_task",
        "prefix",
        "tf_legacy_loss",
        "trust_remote_code",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
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
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    )
)


def _canonical(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys in the current spelling; two spellings of one key must agree.

    `vocab_size` beside `padded_vocab_size` is the number of real tokens, not of rows.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in hf.items():
        name = _ALIASES.get(key, key)
        if key == "vocab_size" and "padded_vocab_size" in hf:
            continue
        if name in values and values[name] != value:
            raise ValueError(
                f"config keys {origin[name]} and {key} disagree: {values[name]}, {value}"
            )
        values[name], origin[name] = value, key
    return values


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Config` for the keys among `values` that are part of the architecture."""
    fields = {field: values[key] for key, field in _KEYS.items() if key in values}
    doubled = fields.get("intermediate_size", 0)
    if not isinstance(doubled, int) or doubled % 2:
        raise ValueError(f"intermediate_size {doubled!r}: must be even (twice the FFN width)")
    if "intermediate_size" in fields:
        fields["intermediate_size"] = doubled // 2
    if "layer_windows" in values:
        windows = values["layer_windows"]
        if not isinstance(windows, list | tuple | None):
            raise ValueError(f"layer_windows {windows!r}: must be a list of widths, null = full")
        fields["layer_windows"] = None if windows is None else tuple(windows)
    if "rope_scaling" in values:
        fields["rope_scaling"] = _rope_scaling(values["rope_scaling"])
    return fields


def _rope_scaling(entry: Any) -> RopeScaling | None:
    if entry is None or isinstance(entry, RopeScaling):
        return entry
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    if not isinstance(entry, Mapping) or set(entry) - known - {"rope_type"}:
        raise ValueError(f"rope_scaling {entry!r}: its keys are {', '.join(sorted(known))}")
    entry = {key: value for key, value in entry.items() if value is not None}
    if "rope_type" in entry:  # the later spelling of type
        later = entry.pop("rope_type")
        if entry.setdefault("type", later) != later:
            raise ValueError(
                f"rope_scaling type {entry['type']!r} and rope_type {later!r} disagree"
            )
    if not entry or entry == {"type": "default"}:  # as later generations say that there is none
        return None
    if not {"type", "factor"} <= set(entry):
        raise ValueError(f"rope_scaling {entry!r} lacks type or factor")
    return RopeScaling(**entry)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a UTF-8 file; ValueError that names the file when it is not one."""
    data = paths.parse(path).read_bytes()
    try:
        value = json.loads(texts.decode(data))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
