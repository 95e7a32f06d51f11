"""`Config`, the architecture of a model; `hf_config.py` reads it from a Hugging Face config.json.

A Config holds the values that a checkpoint determines and nothing else: no mesh, no storage dtype,
no kernel, no batch. It is frozen and hashable, so it can be a static argument of `jax.jit`. Keys of
a config.json that do not change the mathematics are recognised but not stored; a model directory
keeps the original config.json with them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import hf_config
from qwen_jax.config.rope_scaling import RopeScaling
from qwen_jax.runtime import texts, values

_MOST_LAYERS = 10_000  # bounds loops over layers, whatever a damaged file says


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture of a model: its sizes, and the options that change the mathematics.

    vocab_size: V, the rows of the embedding matrix, padding included.
    hidden_size, num_layers: D and L.
    num_heads, num_kv_heads: N query heads and K key/value heads.
    head_dim: H, the size of a head.
    intermediate_size: the actual FFN width F (a Qwen config.json states twice that).
    norm_eps: the epsilon of RMSNorm.
    rope_base: the base of the RoPE frequencies.
    seq_length: the length the model was trained at, beyond which dynamic NTK and LogN have an
        effect.
    max_position_embeddings: the number of tokens that the model is meant for.
    dynamic_ntk, logn: whether RoPE frequencies adapt to the prompt's length, and whether queries
        beyond `seq_length` are scaled.
    qkv_bias, qk_norm: whether the QKV projection has biases, and whether queries and keys are
        normed.
    tie_embeddings: whether the embedding matrix is also the output head.
    initializer_range: the standard deviation of fresh weights.
    layer_windows: for each layer, the number of last tokens that a token attends to, itself
        included; None is all tokens.
    rope_scaling: another way to extend the context than dynamic NTK, or None.
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
            most = _MOST_LAYERS if name == "num_layers" else values.INT32
            number = values.whole(
                f"{hf_config.spelled(name)} is", getattr(self, name), least=1, most=most
            )
            object.__setattr__(self, name, number)
        for name in hf_config.REAL:
            said = f"{hf_config.spelled(name)} is"
            real = values.number(said, getattr(self, name), least=values.TINY, most=values.FLOAT32)
            object.__setattr__(self, name, real)
        for name in _FLAGS:
            flag = values.flag(f"{hf_config.spelled(name)} is", getattr(self, name))
            object.__setattr__(self, name, flag)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 4:
            said = f"{hf_config.spelled('head_dim')} is {self.head_dim}"
            raise ValueError(f"{said}: must be even, and at least 4")
        if self.rope_scaling is not None and self.dynamic_ntk:
            raise ValueError(
                "rope_scaling and use_dynamic_ntk are two schemes: "
                "leave out rope_scaling, or set use_dynamic_ntk to false"
            )
        yarn = self.rope_scaling is not None and self.rope_scaling.type == "yarn"
        if yarn and self.rope_base <= 1:
            raise ValueError(
                f"{hf_config.spelled('rope_base')} is {self.rope_base}: must be above 1 with "
                "rope_scaling of type yarn, which divides by its logarithm"
            )
        if self.logn and self.seq_length < 2:
            raise ValueError(
                "use_logn_attn needs a seq_length of at least 2: it divides by its log"
            )
        if self.layer_windows is not None:
            if len(self.layer_windows) != self.num_layers:
                raise ValueError(
                    f"layer_windows has {len(self.layer_windows)} entries for "
                    f"{self.num_layers} layers: give a width for each, null for all tokens"
                )
            windows = tuple(
                None
                if width is None
                else values.whole("a width of layer_windows is", width, least=1, most=values.INT32)
                for width in self.layer_windows
            )
            object.__setattr__(self, "layer_windows", windows)

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis of weights by its letter; `Q` is N*H and `U` is K*H."""
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
        """Return the number of parameters, padded vocabulary rows included."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        bias = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        layer = attention + bias + norms + 3 * self.hidden_size * self.intermediate_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs per token of a training step on sequences of `length` tokens.

        These are 6 per weight that a token is multiplied with, plus causal attention: scores and
        weighted values in the forward pass, and twice as much in the backward pass. Recomputation
        is not counted. A forward pass alone takes a third.
        """
        keys = sum(self.mean_keys(length, window) for window in self.windows)
        return 6 * self.num_multiplied() + 12 * self.num_heads * self.head_dim * keys

    def num_multiplied(self) -> int:
        """Return the number of weights that each token is multiplied with.

        An untied input embedding is not counted, because it is only looked up.
        """
        table = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        return self.num_params() - table

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each layer in tokens; None where it is all tokens."""
        return self.layer_windows or (None,) * self.num_layers

    @staticmethod
    def mean_keys(length: int, window: int | None) -> float:
        """Return the mean number of keys that a token attends to in `length` causal tokens.

        window: the attention window in tokens; None for all tokens.

        The diagonal's half key is neglected: without a window the result is `length / 2`.
        """
        seen = length if window is None else min(window, length)
        return seen - seen * seen / (2 * length)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Return the bytes of KV cache that one token takes over all layers.

        dtype: the cache's dtype: a float dtype, "int8" or "int8_asymmetric".
        """
        if dtype not in _CACHE_BYTES:
            raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(_CACHE_BYTES)}")
        each, scales = _CACHE_BYTES[dtype]
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * each + 4 * scales)

    @property
    def in_training(self) -> "Config":
        """This architecture without dynamic NTK and LogN, as Qwen's original code trains it."""
        return dataclasses.replace(self, dynamic_ntk=False, logn=False)

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Config":
        """Return this architecture with some values replaced.

        overrides: the new values by their Hugging Face names, such as {"use_dynamic_ntk": False}.

        Raises ValueError for a name that is not part of the architecture.
        """
        fields = hf_config.read_overrides(values.mapping("config overrides", overrides))
        if self.num_kv_heads == self.num_heads and "num_heads" in fields:
            fields["num_kv_heads"] = fields["num_heads"]
        return dataclasses.replace(self, **fields)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], file: str | Path = "config.json") -> "Config":
        """Read the contents of a first-generation Qwen config.json, in either of its spellings.

        hf: the contents, with keys in the current or the August 2023 spelling.
        file: the name of the file, for messages.

        Raises ValueError that names the file and every missing key, or a key or value that is
        unknown and may change the mathematics. Warns in one line of keys that would change answers
        and are ignored.
        """
        hf = values.mapping("hf (values of a config.json; Config.read takes a path)", hf)
        with values.named(file):
            config = cls(**hf_config.read(hf))
        hf_config.warn(hf, file)
        return config

    @classmethod
    def read(cls, path: str | Path) -> "Config":
        """Read the architecture from a config.json file.

        Raises ValueError that names the file and every missing, unknown or invalid key.
        """
        return cls.from_hf(texts.read_json(path), path)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that `from_hf` reads back as this Config.

        Raises ValueError if the first-generation Qwen format cannot express the architecture.
        """
        if self.num_kv_heads != self.num_heads or self.qk_norm or not self.qkv_bias:
            raise ValueError("grouped KV heads, QK-norm and bias-free QKV have no Qwen-1 spelling")
        written = {key: getattr(self, field) for key, field in hf_config.KEYS.items()}
        written["intermediate_size"] = 2 * self.intermediate_size
        if self.layer_windows is not None:
            written["layer_windows"] = list(self.layer_windows)
        if self.rope_scaling is not None:
            written["rope_scaling"] = self.rope_scaling.to_hf()
        return {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", **written}


# By KV cache dtype: bytes of a value, and float32 scales and offsets per token and head.
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
