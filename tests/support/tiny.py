"""A decoder small enough for every test, and passes through it on the current mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import Config, meshes, model
from qwen_jax.attention import cache
from qwen_jax.checkpoint import adapter_config
from qwen_jax.decoding.decode import positions
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder, Output, lora, rope
from qwen_jax.model.lora import Adapters

KERNELS = ("pallas_tpu", "pallas_triton")  # attention kernels that a CPU can interpret
# For `jax.jit(compiler_options=...)` of programs that run once: gradients compile twice as fast.
QUICK = {"xla_backend_optimization_level": 0}


def tiny_config(**changes: Any) -> Config:
    """A config whose axes all divide by 4 and differ in length, except for the heads."""
    values = {
        "vocab_size": 68,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "intermediate_size": 44,
        "norm_eps": 1e-6,
        "rope_base": 10000,
        "seq_length": 16,
        "max_position_embeddings": 64,
        "dynamic_ntk": False,
        "logn": False,
        "qkv_bias": True,
        "qk_norm": False,
        "tie_embeddings": False,
        "initializer_range": 0.02,
    }
    return Config(**{**values, **changes})


def tiny_decoder(config: Config, dtype: Any = jnp.float32) -> Decoder:
    """A decoder whose weights have the scale of trained ones, so that attention is sharp.

    No bias is 0 and no norm is 1. Weights are drawn on the host from the leaf's name, so they are
    the same on every mesh.
    """

    def draw(name: str, leaf: Weight) -> jax.Array:
        noise = np.random.default_rng(list(name.encode())).standard_normal(leaf.shape)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif "bias" not in name:
            noise *= 1.5 / np.sqrt(config.hidden_size)
        return place(np.asarray(jnp.asarray(noise, dtype)), leaf.letters, lengths=config.sizes)

    return replace_leaves(model.abstract(config, dtype), draw)


def replace_leaves(tree: Any, value: Callable[[str, Weight], Any]) -> Any:
    """The same module with every leaf's array replaced by `value(path, leaf)`."""
    return map_leaves(lambda path, x: Weight(value(path, x), letters=x.letters), tree)


def small_noise(config: Config) -> Callable[[str, Weight], jax.Array]:
    """A `value` for `replace_leaves` that draws float32 noise with standard deviation 0.2.

    It depends on the leaf's name only, as in `tiny_decoder`.
    """

    def draw(name: str, leaf: Weight) -> jax.Array:
        noise = np.random.default_rng(list(name.encode())).standard_normal(leaf.shape, np.float32)
        return place(0.2 * noise, leaf.letters, lengths=config.sizes)

    return draw


# Of two adapters: the modules, the rank, alpha. Each has modules that the other lacks.
_ADAPTERS = ((["c_attn", "c_proj"], 4, 8.0), (["c_attn", "w1", "w2"], 3, 6.5))


def drawn_adapters(decoder: Decoder, number: int) -> Adapters:
    """One of two adapters for a decoder with separate layers, 0 or 1, which change much."""
    wanted, rank, alpha = _ADAPTERS[number]
    config = decoder.config
    groups = adapter_config.targets(wanted, config.num_layers)
    fresh = lora.create(decoder, groups, rank=rank, alpha=alpha, key=jax.random.key(number))

    def draw(path: str, leaf: Weight) -> jax.Array:
        rng = np.random.default_rng([number, *path.encode()])
        noise = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        return place(noise, leaf.letters, lengths=config.sizes)

    return fresh.replace(a=replace_leaves(fresh.a, draw), b=replace_leaves(fresh.b, draw))


def tiny_tokens(batch: int, length: int) -> np.ndarray:
    """Random tokens, int32 [B, T]."""
    rng = np.random.default_rng(batch + 1000 * length)
    return rng.integers(0, tiny_config().vocab_size, (batch, length), np.int32)


def frequencies(config: Config, batch: int, alpha: Any = 1.0) -> jax.Array:
    """The RoPE frequencies of each row, on the mesh. alpha: the NTK factor of each row."""
    scheme = rope.from_config(config)
    return place(scheme.frequencies(np.broadcast_to(np.float64(alpha), batch)), "BH")


def full_pass(
    decoder: Decoder,
    tokens: np.ndarray,
    places: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    alpha: Any = 1.0,
    **options: Any,
) -> Output:
    """One pass over tokens [B, T], by default from position 0 on and in one segment."""
    places = np.arange(tokens.shape[1]) + 0 * tokens if places is None else places
    segments = np.ones_like(tokens) if segments is None else segments
    return decoder(
        decoder.embed(place(tokens, "BT")),
        place(places.astype(np.int32), "BT"),
        segments=place(segments.astype(np.int32), "BT"),
        frequencies=frequencies(decoder.config, len(tokens), alpha),
        **options,
    )


def full_logits(decoder: Decoder, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """The logits of `full_pass`, float32 [B, T, V]."""
    return np.asarray(decoder.logits(full_pass(decoder, tokens, **options).last))


def cached_logits(
    decoder: Decoder,
    tokens: np.ndarray,
    chunks: list[int],
    start: np.ndarray | None = None,
    alpha: Any = 1.0,
    kind: str | None = None,
) -> np.ndarray:
    """The logits of passes over one KV cache, float32 [B, T, V].

    chunks: the number of tokens in each pass; start: the first real slot of each row.
    """
    batch = len(tokens)
    start = place(np.zeros(batch, np.int32) if start is None else start.astype(np.int32), "B")
    dtype = decoder.embedding[...].dtype
    held = cache.empty(decoder.config, start, capacity=tokens.shape[1] + 3, dtype=dtype, kind=kind)
    rates, logits, done = frequencies(decoder.config, batch, alpha), [], 0
    for length in chunks:
        part = place(tokens[:, done : done + length], "BT")
        places, segments = positions(held.start, held.index, length=length)
        output = decoder(
            decoder.embed(part), places, segments=segments, frequencies=rates, cache=held
        )
        held, done = output.cache, done + length
        logits.append(np.asarray(decoder.logits(output.last)))
    assert done == tokens.shape[1] == int(held.index)
    return np.concatenate(logits, axis=1)


def on_mesh(**sizes: int) -> Any:
    """A context with a mesh of these axis sizes; (1, 1) by default."""
    return meshes.entered(meshes.make(sizes))
