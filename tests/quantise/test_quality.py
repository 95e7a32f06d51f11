"""Predictions of two models, compared token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.leaves.weights import Weight
from qwen_jax.quantise import quality
from tests.support.tiny import on_mesh


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("tokens_at_once", [4, 12])
def test_scores_are_those_of_the_formulas(
    tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in three."""
    monkeypatch.setattr(quality, "_BYTES", tokens_at_once * 2 * 20 * 4)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 2, 12, 8)).astype(np.float32)
    heads = rng.standard_normal((2, 20, 8)).astype(np.float32)
    tokens = rng.integers(0, 20, (2, 12), np.int32)
    targets = rng.random((2, 12)) < 0.7
    targets[:, -1] = False
    quality.scores.clear_cache()
    with on_mesh():
        found = quality.scores(
            *map(jnp.asarray, hidden),
            float_head=Weight(jnp.asarray(heads[0]), letters="VD"),
            head=Weight(jnp.asarray(heads[1]), letters="VD"),
            tokens=jnp.asarray(tokens),
            targets=jnp.asarray(targets),
        )
    quality.scores.clear_cache()
    p, q = (log_softmax(x @ head.T) for x, head in zip(hidden, heads, strict=True))
    at = np.roll(tokens, -1, axis=1)[..., None]
    for name, each in (("before", p), ("after", q)):
        expected = -np.take_along_axis(each, at, -1)[..., 0][targets].sum()
        assert float(getattr(found, name)) == pytest.approx(expected, rel=1e-4)
    kl = (np.exp(p) * (p - q)).sum(-1)[targets].sum()
    assert float(found.kl) == pytest.approx(kl, rel=1e-4)
    assert int(found.targets) == np.count_nonzero(targets)
