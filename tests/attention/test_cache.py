import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.attention import FULL, cache
from qwen_jax.attention.cache import Cache, LayerCache
from qwen_jax.decoding.decode import positions
from qwen_jax.leaves.int8 import Int8, quantize
from qwen_jax.meshes.moves import place
from tests.support.tiny import (
    cached_logits,
    frequencies,
    full_logits,
    on_mesh,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

KINDS = [None, *cache.DTYPES]


@pytest.fixture(autouse=True)
def mesh():
    with on_mesh():
        yield


def empty(
    kind: str | None,
    start: list[int],
    capacity: int,
    dtype: Any = jnp.float32,
    **changes: Any,
) -> Cache:
    rows = place(np.int32(start), "B")
    return cache.empty(tiny_config(**changes), rows, capacity=capacity, dtype=dtype, kind=kind)


@jax.jit
def there_and_back(x: jax.Array) -> tuple[tuple[Int8, jax.Array], ...]:
    """Quantised and read back: symmetric, then asymmetric."""
    leaves = quantize(x, symmetric=True), quantize(x, symmetric=False)
    return tuple((leaf, leaf.dequantize(jnp.float32)) for leaf in leaves)


@settings(max_examples=60)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.sampled_from([0.0, 1.0, 300.0, -1e5]),
    st.sampled_from([1.0, 1e-6, 1e20]),
)
def test_error_is_at_most_half_a_step(row, offset, factor):
    x = (np.float32([row]) + np.float32(offset)) * np.float32(factor)
    largest = np.abs(x).max()
    (symmetric, near), (asymmetric, nearer) = there_and_back(x)
    assert symmetric.values.dtype == asymmetric.values.dtype == jnp.int8
    assert symmetric.zero is None and asymmetric.zero is not None
    # float32 rounds the result itself, and the large zero point of an asymmetric row.
    rounding = 4 * np.finfo(np.float32).eps * largest
    assert np.abs(near - x).max() <= symmetric.scale.max() / 2 + rounding
    assert np.abs(nearer - x).max() <= asymmetric.scale.max() / 2 + rounding
    np.testing.assert_allclose(symmetric.scale, [largest / 127], rtol=1e-5, atol=1e-37)
    step = (np.float64(x.max()) - np.float64(x.min())) / 255
    np.testing.assert_allclose(asymmetric.scale, [step], rtol=1e-5, atol=1e-37)


def test_a_scale_for_each_token_and_head():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 16)).astype(np.float32)
    x *= 10.0 ** np.arange(24).reshape(2, 3, 4, 1) / 1e12
    for leaf, back in there_and_back(x):
        assert leaf.values.shape == x.shape and leaf.scale.shape == (2, 3, 4)
        assert leaf.scale.dtype == jnp.float32
        relative = np.abs(back - x).max(-1) / np.abs(x).max(-1)
        assert relative.max() < 1 / 250


def test_the_ends_of_the_range_are_used():
    x = jnp.float32([[-2.0, 0.0, 1.0, 2.0]])
    symmetric, asymmetric = (leaf for leaf, _ in there_and_back(x))
    assert symmetric.values.tolist() == [[-127, 0, 64, 127]]
    assert asymmetric.values.tolist()[0][::3] == [-128, 127]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.75, 1e-30, 65504.0])
def test_constant_rows(value):
    x = jnp.full((2, 16), value, jnp.float32)
    for leaf, back in there_and_back(x):
        assert all(np.isfinite(part).all() for part in jax.tree.leaves(leaf))
        assert (leaf.scale > 0).all(), "0 / 0 as an int8 is anything"
        np.testing.assert_allclose(back, x, rtol=1e-6)


def test_dequantize_in_the_dtype_asked_for():
    x = jnp.float32([[1.0, -0.3, 0.7, 0.1]])
    for symmetric in (True, False):
        leaf = quantize(x.astype(jnp.bfloat16), symmetric)
        assert leaf.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.dequantize(jnp.float32), x, atol=0.01)


def test_memory():
    """Bytes for a token and KV head of H = 16: 64 as float32, 32 as bf16, 16 + scale (+ zero)."""
    per_token = {None: 16 * 4, "int8": 16 + 4, "int8_asymmetric": 16 + 8}
    for kind, size in per_token.items():
        held = empty(kind, [0, 0, 0], 40)
        arrays = jax.tree.leaves(held.layers)
        assert sum(leaf.nbytes for leaf in arrays) == 2 * 2 * 3 * 4 * 40 * size
        assert held.capacity == 40 and held.fresh and int(held.index) == 0
        assert len(held.layers) == tiny_config().num_layers
    # A CPU would rewrite the whole of a bfloat16 array at every write.
    half = jax.tree.leaves(empty(None, [0], 8, jnp.bfloat16).layers)
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.float32)}
    assert {leaf.shape for leaf in half} == {(1, 4, 8, 16)}


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="cache_dtype 'int4': allowed are int8, int8_asymmetric"):
        empty("int4", [0], 8)


@pytest.mark.parametrize("kind", KINDS)
def test_written_at_the_index_modulo_the_capacity(kind):
    """Passes of several lengths; what was not written to stays."""
    rng = np.random.default_rng(0)
    held = empty(kind, [0, 0], 8)
    expected = np.zeros((2, 8, 4, 16), np.float32)
    extend = jax.jit(LayerCache.extend)
    for length in (4, 2, 1, 1, 2, 2, 4, 1):
        new = [rng.standard_normal((2, length, 4, 16)).astype(np.float32) for _ in "kv"]
        before = held.layers[1]
        layer = extend(held.layers[0], *(place(x, "BTKH") for x in new), index=held.index)
        slot = int(held.index) % 8
        expected[:, slot : slot + length] = new[0]
        held = held.advanced((layer, before), length)
        keys, values = layer.read()
        if kind is not None:
            keys, values = keys.dequantize(jnp.float32), values.dequantize(jnp.float32)
        assert keys.shape == values.shape == (2, 8, 4, 16)
        tolerance = 0 if kind is None else 0.02
        np.testing.assert_allclose(keys, expected, atol=tolerance)
        np.testing.assert_allclose(values[:, slot : slot + length], new[1], atol=tolerance)
        np.testing.assert_array_equal(jax.tree.leaves(before)[0], 0)
    assert int(held.index) == 17 and not held.fresh


@pytest.mark.parametrize("window", [FULL, 3])
def test_ring_against_a_simulation(window):
    """Rows that began at different indices and are replaced by later ones, past the capacity."""
    capacity, start = 8, np.array([0, 3, 5])
    held = empty(None, [0, 0, 0], capacity)
    slots: list[list[tuple[int, int] | None]] = [[None] * capacity for _ in start]
    index, request = 0, np.zeros(3, int)
    look = jax.jit(
        lambda held, places, segments, window: dataclasses.replace(
            held.past_mask(places, segments), window=window
        ).visible()
    )
    for length in (4, 2, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 1, 1):
        for row in range(3):  # a full row's place is taken by a prompt that ends at the index
            if index + length - start[row] > capacity:
                start[row] = index - row
                request[row] += 1
                for i in range(start[row], index):
                    slots[row][i % capacity] = (request[row], i - start[row])
        begun = place(start.astype(np.int32), "B")
        held = dataclasses.replace(held, start=begun, index=jnp.int32(index))
        places, segments = positions(held.start, held.index, length=length)
        visible = np.asarray(look(held, places, segments, jnp.int32(window)))
        for row, t, slot in np.ndindex(*visible.shape):
            query = index + t - start[row]
            held_token = slots[row][slot]
            expected = query >= 0 and held_token is not None
            if expected:
                owner, position = held_token
                expected = owner == request[row] and position >= 0 and query - position < window
            assert visible[row, t, slot] == expected, (index, row, t, slot)
        for row in range(3):
            for i in range(index, index + length):
                slots[row][i % capacity] = (request[row], i - start[row])
        index += length
    assert index > 2 * capacity


def test_positions_of_padding_are_segment_zero():
    places, segments = positions(place(np.int32([0, 2, 5]), "B"), jnp.int32(1), length=3)
    np.testing.assert_array_equal(places, [[1, 2, 3], [-1, 0, 1], [-4, -3, -2]])
    np.testing.assert_array_equal(segments, [[1, 1, 1], [0, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("kind", cache.DTYPES)
def test_a_pass_never_reads_its_own_keys_from_int8(kind):
    decoder = tiny_decoder(tiny_config())
    tokens = tiny_tokens(2, 12)
    exact = full_logits(decoder, tokens)
    parts = cached_logits(decoder, tokens, [6, 6], kind=kind)
    np.testing.assert_allclose(parts[:, :6], exact[:, :6], atol=1e-5 * exact.std())
    error = np.abs(parts - exact)[:, 6:].mean() / exact.std()
    assert 1e-4 < error < 0.02  # rounded, and only a little


def test_a_cpu_holds_what_the_dtype_would_have_held():
    """In float32, as it rewrites bfloat16 arrays whole; what it holds are numbers of bfloat16."""
    decoder = tiny_decoder(tiny_config(num_layers=1), jnp.bfloat16)
    held = empty(None, [0], 8, jnp.bfloat16, num_layers=1)
    assert jax.tree.leaves(held.layers)[0].dtype == jnp.float32
    tokens = place(tiny_tokens(1, 4), "BT")
    places, segments = positions(held.start, held.index, length=4)
    rates = frequencies(decoder.config, 1, 1.0)
    written = decoder(
        decoder.embed(tokens), places, segments=segments, frequencies=rates, cache=held
    ).cache
    for leaf in jax.tree.leaves(written.layers):
        assert np.any(leaf)
        np.testing.assert_array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_long_cache_is_attended_to_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """The last piece overlaps the one before it, and later ones are not written yet."""
    monkeypatch.setattr(cache, "_PIECE", 8)
    monkeypatch.setattr(cache.registry, "FEW", 0)
    pieces = []
    read = LayerCache.piece

    def piece(layer: LayerCache, first: jax.Array, length: int) -> LayerCache:
        pieces.append(length)
        return read(layer, first, length)

    monkeypatch.setattr(LayerCache, "piece", piece)
    decoder, tokens = tiny_decoder(tiny_config(num_layers=1)), tiny_tokens(1, 10)
    exact = full_logits(decoder, tokens)
    parts = cached_logits(decoder, tokens, [5, 4, 1])  # of 13 slots, the last pass after 9
    assert set(pieces) == {8}
    np.testing.assert_allclose(parts, exact, atol=1e-5 * exact.std())
