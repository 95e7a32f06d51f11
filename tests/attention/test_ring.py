"""Ring attention against attention over the whole sequence on one device."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import attention
from qwen_jax.attention import FULL, IMPLEMENTATIONS, Mask
from qwen_jax.meshes import moves
from qwen_jax.model import rope
from tests.model.test_model import LONG
from tests.support.tiny import (
    KERNELS,
    QUICK,
    frequencies,
    on_mesh,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

B, T, N, H = 2, 32, 4, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """documents: the lengths of those of a row, the rest is padding; one row is without padding."""

    window: int = FULL
    documents: tuple[int, ...] = (T,)
    kv_heads: int = N
    logn: bool = False

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """positions and segments, int32 [B, T]; the second row is one document."""
        positions, segments = np.zeros((2, B, T), np.int32)
        positions[1], segments[1] = np.arange(T), 1
        first = 0
        for number, length in enumerate(self.documents):
            own = slice(first, first + length)
            positions[0, own], segments[0, own] = np.arange(length), number + 1
            first += length
        return positions, segments


CASES = {
    "causal": Case(),
    "window": Case(window=7),
    "window of one": Case(window=1),
    "packed": Case(documents=(5, 14, 13)),
    "padded": Case(documents=(19,)),
    "only padding": Case(documents=()),
    "packed, padded, window": Case(documents=(12, 9), window=6),
    "grouped heads": Case(kv_heads=2),
    "scale of each query": Case(logn=True),
    "all": Case(window=10, documents=(17, 11), kv_heads=1, logn=True),
}


def arrays(case: Case, heads: int = N, dim: int = H) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    positions, segments = case.places()
    drawn = {"q": heads, "k": case.kv_heads, "v": case.kv_heads, "do": heads}
    scale = np.full((B, T), dim**-0.5, np.float32)
    if case.logn:
        scale *= np.maximum(np.log(positions + 1) / np.log(8), 1).astype(np.float32)
    return {
        **{name: rng.standard_normal((B, T, n, dim), np.float32) for name, n in drawn.items()},
        "dlse": rng.standard_normal((B, T, heads), np.float32),
        "positions": positions,
        "segments": segments,
        "scale": scale,
    }


def pieces(devices: int) -> np.ndarray:
    """Where each token of a zigzag comes from: the definition, on the host."""
    halves = np.arange(T).reshape(2 * devices, -1)
    return np.concatenate([halves[[i, -1 - i]].ravel() for i in range(devices)])


LETTERS = {"q": "BTNH", "k": "BTKH", "v": "BTKH", "do": "BTNH", "dlse": "BTN"}


def results(attend: Any, x: dict[str, np.ndarray], window: int, **sizes: int) -> dict[str, Any]:
    """o, lse and the gradients of both in q, k, v and scale."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        places, segments = x["positions"], x["segments"]
        mask = Mask(places, places, segments, segments, jnp.int32(window))

        def loss(q: Any, k: Any, v: Any, scale: Any) -> Any:
            o, lse = attention.on_shards(attend)(q, k, v, mask, scale, return_lse=True)
            seen = jnp.where(lse > -jnp.inf, lse, 0)
            return jnp.sum(o * x["do"]) + jnp.sum(seen * x["dlse"]), (o, lse)

        inputs = x["q"], x["k"], x["v"], x["scale"]
        gradients, (o, lse) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*inputs)
        names = ("o", "lse", "dq", "dk", "dv", "dscale")
        return dict(zip(names, (o, lse, *gradients), strict=True))

    with on_mesh(**sizes):
        placed = {name: moves.place(a, LETTERS.get(name, "BT")) for name, a in x.items()}
        got = run(placed)
        for name, leaf in {"o": "q", "dk": "k", "dv": "v"}.items():
            assert got[name].sharding.is_equivalent_to(placed[leaf].sharding, 4)
    return {name: np.asarray(a) for name, a in got.items()}


@functools.cache
def whole(name: str, dim: int = H) -> dict[str, np.ndarray]:
    """By the reference on one device."""
    return results(attention.xla, arrays(CASES[name], dim=dim), CASES[name].window)


def assert_same(got: dict[str, Any], expected: dict[str, Any], bound: float = 2e-5) -> None:
    for name, wanted in expected.items():
        unseen = np.isneginf(wanted)
        np.testing.assert_array_equal(np.isneginf(got[name]), unseen, err_msg=name)
        got_seen, seen = (np.where(unseen, 0, a) for a in (got[name], wanted))
        most = max(np.abs(seen).max(), 1)
        np.testing.assert_allclose(got_seen, seen, rtol=0, atol=bound * most, err_msg=name)


def in_order(x: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    return {name: a[:, order] for name, a in x.items()}


def ringed(name: str, attend: Any, order: np.ndarray, dim: int = H, **sizes: int) -> Any:
    """The results for tokens laid out in this order, in the order of the sequence again."""
    case = CASES[name]
    x = in_order(arrays(case, dim=dim), order)
    return in_order(results(attend, x, case.window, **sizes), np.argsort(order))


@pytest.mark.parametrize("name", CASES)
def test_a_ring_of_four_in_zigzag(name):
    assert_same(ringed(name, attention.xla, pieces(4), context=4), whole(name))


@pytest.mark.parametrize("name", ["causal", "packed, padded, window", "all"])
@pytest.mark.parametrize("devices", [2, 8])
def test_rings_of_other_sizes(devices, name):
    assert_same(ringed(name, attention.xla, pieces(devices), context=devices), whole(name))


@pytest.mark.parametrize("name", ["causal", "all"])
def test_tokens_may_be_in_any_order(name):
    for order in (np.arange(T), np.random.default_rng(0).permutation(T)):
        assert_same(ringed(name, attention.xla, order, context=4), whole(name))


def test_a_ring_beside_other_axes():
    name = "grouped heads"
    got = ringed(name, attention.xla, pieces(2), fsdp=2, context=2, tp=2)
    assert_same(got, whole(name))


@pytest.mark.parametrize("kernel", KERNELS)
def test_through_the_kernels(kernel):
    attend = IMPLEMENTATIONS[kernel]
    assert_same(ringed("all", attend, pieces(2), dim=32, context=2), whole("all", 32))


def test_a_kernel_is_given_what_is_known():
    """The whole ring's o and log-sum-exp, which save it work in the backward pass."""
    for implementation in IMPLEMENTATIONS.values():
        made = attention.Implementation.of(implementation)
        assert made.takes_known == ("known" in inspect.signature(made.attend).parameters)

    def attend(*arguments: Any, known: Any = None, **options: Any) -> Any:
        given.append(known is not None)
        return attention.xla(*arguments, **options)

    given: list[bool] = []
    ring = attention.Implementation("ring", attend, takes_known=True)
    ringed("causal", ring, pieces(2), context=2)
    assert any(given)


def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient():
    got = ringed("only padding", attention.xla, pieces(4), context=4)
    for name, array in got.items():
        assert np.isfinite(array).all() or name == "lse"
        np.testing.assert_array_equal(array[0], -np.inf if name == "lse" else 0, err_msg=name)


def test_without_the_log_sum_exp_the_dtype_is_that_of_the_query():
    x = arrays(CASES["causal"])
    with on_mesh(context=2):
        places = moves.place(x["positions"], "BT")
        mask = Mask(places, places, places + 1, places + 1, jnp.int32(FULL))
        q, k, v = (moves.place(x[a], "BTNH").astype(jnp.bfloat16) for a in "qkv")
        scale = moves.place(x["scale"], "BT")
        assert attention.on_shards(attention.xla)(q, k, v, mask, scale).dtype == jnp.bfloat16


# The order of tokens


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_zigzag(devices):
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    with on_mesh(context=devices):
        got = moves.zigzag(moves.place(tokens, "BT"))
        np.testing.assert_array_equal(got, tokens[:, pieces(devices)])
        for i, shard in enumerate(sorted(got.addressable_shards, key=lambda s: s.device.id)):
            piece = T // devices // 2
            own = [*range(i * piece, (i + 1) * piece), *range(T - (i + 1) * piece, T - i * piece)]
            np.testing.assert_array_equal(np.asarray(shard.data)[0], own)


def test_zigzag_without_a_ring_is_the_sequence():
    with on_mesh(fsdp=2):
        x = moves.place(np.zeros((B, 3), np.int32), "BT")
        assert moves.zigzag(x) is x


def test_zigzag_of_what_does_not_divide():
    with on_mesh(context=4):
        x = moves.place(np.zeros((B, 12), np.int32), "BT")
        with pytest.raises(ValueError, match="length T = 12 does not divide into two pieces"):
            moves.zigzag(x)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_zigzag_shares_causal_work_equally(devices):
    """Visible pairs of each device and step; in the plain order the last device has most."""

    def pairs(order: np.ndarray) -> np.ndarray:
        owners = order.reshape(devices, -1)
        table = owners[:, None, :, None] >= owners[None, :, None, :]
        counted = table.sum((2, 3))  # [of queries, of keys]
        steps = [np.roll(counted[i], -i - 1)[::-1] for i in range(devices)]  # own keys first
        return np.array(steps)

    zigzag, plain = pairs(pieces(devices)), pairs(np.arange(T))
    assert (zigzag == zigzag[0]).all(), "at each step, all devices do the same"
    # Only the step over a device's own keys has a diagonal: half a piece's triangle a token more.
    assert (zigzag[:, 1:] == zigzag[0, 1]).all()
    assert zigzag[0, 0] - zigzag[0, 1] == T // devices // 2
    assert plain.sum(1).max() > 1.4 * plain.sum(1).mean() > 1.4 * plain.sum(1).min()
    assert zigzag.sum() == plain.sum() == T * (T + 1) // 2


# The decoder


def logits(name: str, order: np.ndarray, **sizes: int) -> np.ndarray:
    """float32 [B, T, V] in the order of the sequence: 32 tokens, trained on 16, packed."""
    tokens = tiny_tokens(B, T)
    places, segments = Case(documents=(21, 7)).places()
    config = tiny_config(**LONG[name])
    alpha = float(rope.from_config(config).alpha(np.array(T)))
    with on_mesh(**sizes):
        decoder = tiny_decoder(config)
        x, places, segments = (moves.place(a, "BT") for a in (tokens, places, segments))
        if "context" in sizes:
            x, places, segments = map(moves.zigzag, (x, places, segments))
        rates = frequencies(config, B, alpha)
        last = decoder(decoder.embed(x), places, segments=segments, frequencies=rates).last
        return np.asarray(decoder.logits(last))[:, np.argsort(order)]


@pytest.mark.parametrize("name", LONG)
def test_the_decoder_over_a_ring_is_one_device(name):
    expected = logits(name, np.arange(T))
    got = logits(name, pieces(4), context=4)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * expected.std())
