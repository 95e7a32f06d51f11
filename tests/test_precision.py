"""bfloat16 and float16 against float32, on a wide random model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import decode, meshes, model, rope, sharding

CONFIG = dataclasses.replace(qwen_jax.PRESETS["qwen-1.8b"], num_layers=4, vocab_size=8192)


@pytest.fixture(scope="module")
def wide() -> model.Decoder:
    with jax.set_mesh(meshes.make()):
        return jax.jit(lambda key: model.create(CONFIG, key, jnp.float32))(jax.random.key(0))


def log_probabilities(decoder: model.Decoder, tokens: np.ndarray) -> np.ndarray:
    with jax.set_mesh(meshes.make()):
        start = sharding.place(np.zeros(len(tokens), np.int32), "B")
        places, segments = decode.positions(start, 0, tokens.shape[1])
        frequencies = rope.from_config(CONFIG).frequencies(np.ones(len(tokens)))
        x = decoder.embed(sharding.place(tokens, "BT"))
        output = decoder(x, places, segments, sharding.place(frequencies, "BH"))
        return np.asarray(jax.nn.log_softmax(decoder.logits(output.last)), np.float64)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-3), ("float16", 1e-5)])
def test_mean_kl_to_float32(wide: model.Decoder, dtype: str, bound: float) -> None:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 48))
    exact = log_probabilities(wide, tokens)
    narrow = jax.tree.map(lambda x: x.astype(dtype), wide)
    rounded = log_probabilities(narrow, tokens)
    kl = np.sum(np.exp(exact) * (exact - rounded), axis=-1).mean()
    assert 0 < kl < bound
