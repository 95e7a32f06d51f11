"""Several adapters on one model: each row of a batch has its own, whatever the others have."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.attention import cache as kv
from qwen_jax.decoding.decode import positions
from qwen_jax.leaves import int8
from qwen_jax.leaves.adapter_rows import AdapterRows
from qwen_jax.leaves.low_rank import Lora
from qwen_jax.leaves.weights import Weight, contract, map_leaves
from qwen_jax.meshes import gathering, sharding
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder, adapted, running, stack
from qwen_jax.model.adapted import GroupsByRow
from qwen_jax.model.lora import Adapters
from tests.support.tiny import (
    drawn_adapters,
    frequencies,
    on_mesh,
    replace_leaves,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

CONFIG = tiny_config(num_layers=1, num_kv_heads=2)
ROWS = np.array([0, 1, 2, 1], np.int32)


def whole(rows: np.ndarray) -> jax.Array:
    """The rows on each device."""
    return place(rows, "R")


def alone(rows: np.ndarray, row: int) -> np.ndarray:
    """The rows when no other row has an adapter."""
    return np.where(np.arange(len(rows)) == row, rows, 0)


def weight_of(eight_bits: bool, dtype: Any) -> tuple[Any, list[tuple[Any, Any]], Any]:
    """A weight [24, 32], the factors of two adapters of ranks 4 and 3, and x [4, 3, 32]."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    base = Weight(normal(24, 32), letters="FD")
    pairs = [(normal(rank, 32), normal(24, rank)) for rank in (4, 3)]
    return int8.quantize_weight(base) if eight_bits else base, pairs, normal(4, 3, 32)


def with_adapters(
    base: Any, pairs: list[tuple[Any, Any]], *, ranks: tuple[int, ...]
) -> AdapterRows:
    """A weight with these adapters."""
    a, b = zip(*pairs, strict=True)
    a = Weight(jnp.concatenate(a, 0), letters="R" + base.letters[1])
    b = Weight(jnp.concatenate(b, 1), letters=base.letters[0] + "R")
    return AdapterRows(base, a, b, rows=None, ranks=ranks)


@jax.jit
def multiplied(leaf: Any, x: jax.Array) -> jax.Array:
    return contract("BTD,FD->BTF", x, weight=leaf)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_row_has_its_own_adapter(eight_bits, dtype):
    with on_mesh():
        base, pairs, x = weight_of(eight_bits, dtype)
        leaf = with_adapters(base, pairs, ranks=(4, 3, 0))
        rows = np.array([0, 1, 2, 3], np.int32)  # the third adapter leaves this weight as it is
        crowd = np.asarray(multiplied(adapted.select(leaf, rows), x))
        for row in range(4):
            chosen = adapted.select(leaf, alone(rows, row))
            assert np.asarray(multiplied(chosen, x))[row].tobytes() == crowd[row].tobytes()
        plain = np.asarray(multiplied(base, x))
        assert crowd[[0, 3]].tobytes() == plain[[0, 3]].tobytes()
        assert np.asarray(multiplied(leaf, x)).tobytes() == plain.tobytes()
        for row, pair in zip((1, 2), pairs, strict=True):
            factors = (Weight(w, letters=n) for w, n in zip(pair, ("RD", "FR"), strict=True))
            one = Lora(base, *factors, key=None, scale=1.0, dropout=0.0)
            expected = np.asarray(multiplied(one, x), np.float32)[row]
            most = np.abs(expected).max() * float(jnp.finfo(dtype).eps)
            got = crowd[row].astype(np.float32)
            np.testing.assert_allclose(got, expected, rtol=0, atol=4 * most)
            assert np.abs(got - plain[row].astype(np.float32)).max() > 1


def test_a_base_of_minus_zero_stays_minus_zero():
    """Without an adapter, and with one that leaves this weight as it is."""
    with on_mesh():
        base = Weight(jnp.full((2, 1), -1.0), letters="FD")
        leaf = with_adapters(base, [(jnp.ones((1, 1)), jnp.ones((2, 1)))], ranks=(1, 0))
        x = jnp.zeros((2, 1, 1))
        assert np.signbit(multiplied(base, x)).all(), "the case is not what it should be"
        chosen = adapted.select(leaf, np.array([0, 2], np.int32))
        assert np.signbit(multiplied(chosen, x)).all()


def test_another_adapters_infinity_stays_its_own():
    with on_mesh():
        base, up = Weight(jnp.ones((2, 4)), letters="FD"), Weight(jnp.ones((2, 2)), letters="FR")
        a = Weight(jnp.asarray([[3e38] * 4, [1.0] * 4]), letters="RD")
        leaf = AdapterRows(base, a, up, np.array([1, 2], np.int32), ranks=(1, 1))
        y = np.asarray(multiplied(leaf, jnp.ones((2, 1, 4))))
        assert np.isinf(y[0]).all() and (y[1] == 8).all()


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"data": 2, "fsdp": 2, "tp": 2}])
@pytest.mark.parametrize("equation", ["BTD,FD->BTF", "BTF,DF->BTD"])
def test_products_on_a_mesh(sizes, equation):
    """Of weights split by outputs, and by inputs, whose sums are over devices."""
    given, letters, result = equation.replace("->", ",").split(",")
    rows, length = np.array([0, 1, 2, 1], np.int32), {"F": 24, "D": 32, "R": 7}
    drawn = np.random.default_rng(0)

    def normal(letters: str) -> Weight:
        shape = [length[letter] for letter in letters]
        return Weight(place(drawn.standard_normal(shape, np.float32), letters), letters=letters)

    def run() -> list[np.ndarray]:
        leaf = AdapterRows(
            normal(letters), normal("R" + letters[1]), normal(letters[0] + "R"), None, ranks=(4, 3)
        )
        x = place(drawn.standard_normal((4, 3, length[letters[1]]), np.float32), given)
        out = sharding.spec(result) if letters[0] == "D" else None

        @jax.jit
        def multiplied(leaf: AdapterRows, rows: jax.Array) -> jax.Array:
            leaf = gathering.unshard(adapted.select(leaf, rows))
            return contract(equation, x, weight=leaf, out=out)

        chosen = [rows, *(alone(rows, row) for row in range(4))]
        return [np.asarray(multiplied(leaf, place(each, "B"))) for each in chosen]

    with on_mesh(**sizes):
        crowd, *others = run()
    for row, other in enumerate(others):
        assert other[row].tobytes() == crowd[row].tobytes()
    drawn = np.random.default_rng(0)
    with on_mesh():
        np.testing.assert_allclose(run()[0], crowd, rtol=0, atol=1e-4)


def by_hand(decoder: Decoder, adapters: Adapters) -> Decoder:
    """The decoder with adapters added to its weights."""
    group_of = {path: group for group, members in adapters.groups for path in members}

    def one(path: str, leaf: Weight) -> jax.Array:
        _, layer, name = path.split(".", 2) if path.startswith("layers.") else ("", "0", path)
        if name not in group_of:
            return leaf[...]
        pair = adapters.b[name], adapters.a[group_of[name]]
        b, a = (np.asarray(x[...], np.float64)[int(layer)] for x in pair)
        added = adapters.scale * (b @ a)
        return place(np.float32(np.asarray(leaf[...]) + added), leaf.letters)

    return replace_leaves(decoder, one)


class Passes:
    """A chunk [4, 3] and a step [4, 1] over one cache, as the engine's passes."""

    def __init__(self) -> None:
        self.tokens = tiny_tokens(4, 4)

    def __call__(self, decoder: Decoder, groups: running.Groups) -> np.ndarray:
        start = place(np.zeros(4, np.int32), "B")
        held = kv.empty(CONFIG, start, capacity=8, dtype=decoder.embedding.dtype, kind=None)
        found = []
        for tokens in (self.tokens[:, :3], self.tokens[:, 3:]):
            places, segments = positions(held.start, held.index, length=tokens.shape[1])
            output = decoder(
                decoder.embed(place(tokens, "BT")),
                places,
                segments=segments,
                frequencies=frequencies(CONFIG, 4),
                cache=held,
                groups=groups,
            )
            held = output.cache
            found.append(np.asarray(decoder.logits(output.last)))
        return np.concatenate(found, axis=1)


def test_passes_through_groups_with_a_cache():
    """Chunks and steps: a row alone and in a crowd, without adapters, and beside one merged.

    No program is made for other rows, and no module is flattened again.
    """
    run = Passes()
    with on_mesh():
        base = tiny_decoder(CONFIG)
        adapters = [drawn_adapters(base, number) for number in range(2)]
        decoder = adapted.attach_several(base, adapters)
        groups = GroupsByRow.of(decoder)
        crowd = run(decoder, groups.select(whole(ROWS)))
        made = running.run_group._cache_size()
        for row in range(4):
            got = run(decoder, groups.select(whole(alone(ROWS, row))))
            assert got[row].tobytes() == crowd[row].tobytes()
        assert running.run_group._cache_size() == made
        ((_, before, tree),), ((_, after, same),) = (
            groups.groups.parts,
            groups.select(whole(ROWS)).parts,
        )
        others = [x is y for x, y in zip(before, after, strict=True)]
        assert same is tree and others.count(False) == 7 == len(groups.places[0])
        plain = run(decoder, groups.select(whole(0 * ROWS)))
        assert crowd[0].tobytes() == plain[0].tobytes()
        for row in (1, 2, 3):
            merged = adapted.attach_several(by_hand(base, adapters[ROWS[row] - 1]), adapters)
            expected = run(merged, GroupsByRow.of(merged).select(whole(0 * ROWS)))[row]
            most = np.abs(expected).max()
            np.testing.assert_allclose(crowd[row], expected, rtol=0, atol=5e-6 * most)
            assert np.abs(crowd[row] - plain[row]).max() > 0.1 * most


@functools.partial(jax.jit, static_argnames="chosen")
def logits(
    decoder: Decoder, rows: jax.Array, inputs: tuple[jax.Array, ...], *, chosen: bool
) -> jax.Array:
    """The logits of a pass, as a decode step makes them: rows are chosen within the program."""
    tokens, places, segments, rates = inputs
    if chosen:
        decoder = adapted.select(decoder, rows)
    x = decoder.embed(tokens)
    return decoder.logits(decoder(x, places, segments=segments, frequencies=rates).last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype", "eight_bits"),
    [
        ({"tp": 4}, jnp.float32, False),  # more than key/value heads
        ({"tp": 2}, jnp.float32, True),
        ({"tp": 2}, jnp.bfloat16, False),
        ({"fsdp": 2}, jnp.float32, False),
        ({"fsdp": 2}, jnp.bfloat16, True),
        ({"data": 2, "fsdp": 2, "tp": 2}, jnp.float32, False),
        ({"data": 2, "fsdp": 2, "tp": 2}, jnp.bfloat16, False),
        ({"data": 2, "fsdp": 2, "tp": 2}, jnp.float16, True),
    ],
)
def test_on_a_mesh(sizes, dtype, eight_bits):
    """A row alone and in a crowd, and beside the leaf of one adapter."""
    with on_mesh(**sizes):
        base = tiny_decoder(CONFIG, dtype)
        adapters = [drawn_adapters(base, number) for number in range(2)]
        if eight_bits:
            base = map_leaves(int8.of_layers, base)
        tokens = tiny_tokens(4, 3)
        places = np.arange(3, dtype=np.int32) + 0 * tokens
        inputs = (
            *(place(x, "BT") for x in (tokens, places, 1 + 0 * tokens)),
            frequencies(CONFIG, 4),
        )
        decoder = adapted.attach_several(base, adapters)

        def run(decoder: Decoder, rows: np.ndarray, chosen: bool = True) -> np.ndarray:
            return np.asarray(logits(decoder, place(rows, "B"), inputs, chosen=chosen))

        crowd = run(decoder, ROWS)
        for row in range(4):
            assert run(decoder, alone(ROWS, row))[row].tobytes() == crowd[row].tobytes()
        plain = run(base, ROWS, chosen=False)
        if not eight_bits:
            assert crowd[0].tobytes() == plain[0].tobytes()
        one = run(adapted.attach_one(base, adapters[0]), ROWS, chosen=False)
        most = np.abs(one).max()
        # Scales are multiplied into b before it is rounded, and sums have other orders.
        tolerance = 2e-6 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(crowd[[1, 3]], one[[1, 3]], rtol=0, atol=tolerance * most)
        assert np.abs(crowd[1] - plain[1]).max() > 0.1 * most


def test_what_cannot_be_attached_is_refused():
    with on_mesh():
        base = tiny_decoder(CONFIG)
        own = drawn_adapters(base, 0).replace(embedding=base.embedding)
        with pytest.raises(ValueError, match=r"adapters\[1\] has its own embedding"):
            adapted.attach_several(base, [drawn_adapters(base, 1), own])
        with pytest.raises(ValueError, match="unstack it first"):
            adapted.attach_several(stack(base), [drawn_adapters(base, 0)])
        assert adapted.attach_several(base, []).layers[0].attn.q is base.layers[0].attn.q
