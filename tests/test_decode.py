"""The decode program: what it allocates, and that chunks, capacities and rules hold."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import decode, meshes, rope
from qwen_jax.sampling import Greedy


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(golden_dir, dtype="float32")


def compiled(model: qwen_jax.LanguageModel, new: int, cache_dtype: str | None):
    """The decode program after a prompt of 10, with a cache for `new` more; and the state."""
    with meshes.entered(model.mesh):
        frequencies = rope.from_config(model.config).frequencies(np.ones(1))
        rules = decode.make_rules(np.ones(model.config.vocab_size, bool), (), 0)
        state = decode.prefill(
            model.decoder,
            np.ones((1, 10), np.int32),
            np.array([10]),
            frequencies,
            np.zeros(1),
            rules,
            Greedy(),
            new,
            model.attend,
            cache_dtype,
        )
        arguments = (model.decoder, state, Greedy(), rules, jnp.int32(8), model.attend)
        return decode._decode.lower(*arguments).compile(), state


def test_the_cache_is_donated_and_not_copied(model: qwen_jax.LanguageModel) -> None:
    """Temporary memory does not grow with the cache, by even one of its leaves."""
    short, _ = compiled(model, 200, None)
    long, state = compiled(model, 8000, None)
    leaf = state.cache.layers[0].k.nbytes
    grown = long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes
    assert leaf > 2e6 and grown < leaf / 4


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int8_asymmetric"])
def test_the_cache_is_updated_in_place(
    model: qwen_jax.LanguageModel, cache_dtype: str | None
) -> None:
    program, state = compiled(model, 4000, cache_dtype)
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert program.memory_analysis().alias_size_in_bytes >= cache
    if cache_dtype:
        whole = sum(x.nbytes for x in jax.tree.leaves(compiled(model, 4000, None)[1].cache))
        assert cache < whole * {"int8": 36, "int8_asymmetric": 40}[cache_dtype] / 128 + 1024


def test_plan() -> None:
    for length in (1, 31, 32, 33, 511, 512, 513, 2000):
        chunks, capacity = decode.plan(length, 10)
        assert all(chunk in decode.buckets() for chunk in chunks)
        assert sum(chunks) - chunks[0] < length <= sum(chunks)
        assert sum(chunks) + 10 <= capacity <= max(256, 1.25 * (sum(chunks) + 10) + 256)


def test_rules_pad_stops_on_the_left() -> None:
    rules = decode.make_rules(np.ones(9, bool), [(1,), (2, 3, 4)], 7)
    assert rules.stops.tolist() == [[-1, -1, 1], [2, 3, 4]] and rules.pad == 7
    assert decode.make_rules(np.ones(9, bool), [], 0).stops.shape == (0, 1)
