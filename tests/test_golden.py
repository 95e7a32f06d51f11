"""The decoder against figures of the original: logits, hidden states, greedy tokens, int8 cache."""

from pathlib import Path

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax import meshes
from qwen_jax.attention import cache
from qwen_jax.decoding import decode
from qwen_jax.meshes import moves
from qwen_jax.model import rope
from tests.support.golden_figures import arrays, overrides, scalars, worst
from tests.support.tiny import KERNELS

# The original's own float32 noise reaches 5e-5 of a standard deviation of its logits.
TOLERANCE = 2e-4
LENGTHS = (64, 65, 100, 128, 129, 200)


def load(path: Path, flags: str = "plain", **settings) -> qwen_jax.LanguageModel:
    return qwen_jax.load(path, dtype="float32", overrides=overrides(flags), **settings)


def test_full_pass(golden_dir: Path) -> None:
    model = load(golden_dir)
    logits = model.logits(arrays()["plain.tokens"])
    assert logits.dtype == np.float32
    assert worst(logits, arrays()["plain.logits"]) < TOLERANCE


def test_hidden_states(golden_dir: Path) -> None:
    model = load(golden_dir)
    tokens = arrays()["plain.tokens"]
    with meshes.entered(model.mesh):
        start = moves.place(np.zeros(len(tokens), np.int32), "B")
        places, segments = decode.positions(start, 0, length=tokens.shape[1])
        frequencies = np.stack([rope.from_config(model.config).frequencies()] * 2)
        embeddings = model.decoder.embed(moves.place(tokens, "BT"))
        states = model.decoder(
            embeddings,
            places,
            segments=segments,
            frequencies=moves.place(frequencies, "BH"),
            hidden_states=True,
        ).hidden_states
    assert len(states) == model.config.num_layers + 1
    for i, state in enumerate(states):
        assert worst(state, arrays()[f"plain.hidden.{i}"]) < TOLERANCE


@pytest.mark.parametrize("flags", ["plain", "ntk", "logn", "ntk_logn"])
@pytest.mark.parametrize("length", LENGTHS)
def test_long_full_pass(golden_dir: Path, length: int, flags: str) -> None:
    logits = load(golden_dir, flags).logits(arrays()[f"long{length}.tokens"])
    assert worst(logits[:, -24:], arrays()[f"long{length}.{flags}"]) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_ntk_alpha(golden_dir: Path, length: int) -> None:
    scheme = rope.from_config(load(golden_dir, "ntk").config)
    assert scheme.alpha(np.array([length])) == [scalars()[f"long{length}.alpha"]]


def decoded(model: qwen_jax.LanguageModel, case: str, mask: np.ndarray | None = None) -> None:
    """Greedy tokens identical; and the logits of every step over the cache."""
    prompt, tokens = arrays()[f"{case}.prompt"], arrays()[f"{case}.tokens"]
    made = model.generate(prompt, mask, max_new_tokens=tokens.shape[1])
    np.testing.assert_array_equal(made, tokens)
    logits = step_logits(model, prompt, tokens, mask)
    assert worst(logits, arrays()[f"{case}.logits"]) < TOLERANCE


@pytest.mark.parametrize("case", ["short", "cross", "long", "crossplain"])
def test_decode(golden_dir: Path, case: str) -> None:
    decoded(load(golden_dir, scalars()[f"decode.{case}.flags"]), f"decode.{case}")


@pytest.mark.parametrize(("case", "flags"), [("batch", "plain"), ("batchlong", "ntk")])
def test_left_padded_batch(golden_dir: Path, case: str, flags: str) -> None:
    decoded(load(golden_dir, flags), case, arrays()[f"{case}.mask"])


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_through_the_kernels(golden_dir: Path, name: str) -> None:
    """A long full pass and left-padded rows over two devices; decoding across the NTK boundary."""
    with meshes.entered(meshes.make({"tp": 2})):
        model = load(golden_dir, "ntk_logn", attention=name)
        logits = model.logits(arrays()["long200.tokens"])
        assert worst(logits[:, -24:], arrays()["long200.ntk_logn"]) < TOLERANCE
        decoded(load(golden_dir, "ntk", attention=name), "batchlong", arrays()["batchlong.mask"])
    flags = scalars()["decode.cross.flags"]
    decoded(load(golden_dir, flags, attention=name), "decode.cross")


@pytest.mark.parametrize("cache_dtype", ["int8", "int8_asymmetric"])
@pytest.mark.parametrize("name", KERNELS)
def test_int8_cache_in_the_kernels(golden_dir: Path, name: str, cache_dtype: str) -> None:
    """What the reference computes from the same cache, dequantised."""
    case = "decode.cross"
    prompt, tokens = arrays()[f"{case}.prompt"], arrays()[f"{case}.tokens"]
    settings = {"flags": scalars()[f"{case}.flags"], "cache_dtype": cache_dtype}
    expected, actual = (
        step_logits(load(golden_dir, attention=each, **settings), prompt, tokens)
        for each in ("xla", name)
    )
    assert worst(actual, expected) < TOLERANCE


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"tp": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2}, marks=pytest.mark.slow),
        {"fsdp": 4, "tp": 2},  # both
    ],
)
def test_on_a_mesh(golden_dir: Path, sizes: dict[str, int]) -> None:
    """A batch of three rows on meshes that three does not divide over."""
    with jax.set_mesh(meshes.make(sizes)):
        model = load(golden_dir, "ntk")
    decoded(model, "batchlong", arrays()["batchlong.mask"])


@pytest.mark.parametrize("cache_dtype", ["int8", "int8_asymmetric"])
def test_int8_cache_is_nearer_than_the_originals(golden_dir: Path, cache_dtype: str) -> None:
    """Mean |difference| of the logits to those of a float cache, along the float run's tokens."""
    prompt, tokens = arrays()["kvint8.prompt"], arrays()["kvint8.float_tokens"]
    exact = arrays()["kvint8.float_logits"]
    same = int(np.argmax(arrays()["kvint8.tokens"] != tokens)) or tokens.shape[1]
    ours = step_logits(load(golden_dir, cache_dtype=cache_dtype), prompt, tokens)
    original = arrays()["kvint8.logits"]
    # The original's steps compare while it has chosen the same tokens as the float run.
    errors = [np.abs(x[:, : same + 1] - exact[:, : same + 1]).mean() for x in (ours, original)]
    assert 0 < errors[0] < errors[1]
    made = load(golden_dir, cache_dtype=cache_dtype).generate(prompt, max_new_tokens=16)
    np.testing.assert_array_equal(made, tokens)


def step_logits(
    model: qwen_jax.LanguageModel,
    prompt: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [B, n, V]: the logits that chose each of `tokens`, one pass each over the cache."""
    batch, width = prompt.shape
    lengths = np.full(batch, width) if mask is None else mask.sum(axis=1)
    steps = [prompt, *np.split(tokens[:, :-1], tokens.shape[1] - 1, axis=1)]
    repeat = -(-batch // model.mesh.shape["fsdp"]) * model.mesh.shape["fsdp"]
    scheme = rope.from_config(model.config)
    frequencies = scheme.frequencies(scheme.alpha(lengths))  # fixed by the prompt
    chosen = []

    def whole(rows: np.ndarray) -> np.ndarray:
        return np.resize(rows, (repeat, *rows.shape[1:]))

    with meshes.entered(model.mesh):
        start = moves.place(whole((width - lengths).astype(np.int32)), "B")
        rates = moves.place(whole(frequencies), "BH")
        state = cache.empty(
            model.config, start, capacity=256, dtype=np.float32, kind=model.cache_dtype
        )
        for step in steps:
            places, segments = decode.positions(start, state.index, length=step.shape[1])
            x = model.decoder.embed(moves.place(whole(step), "BT"))
            output = model.decoder(x, places, segments=segments, frequencies=rates, cache=state)
            state = output.cache
            chosen.append(np.asarray(model.decoder.logits(output.last))[:batch, -1:])
    return np.concatenate(chosen, axis=1)
