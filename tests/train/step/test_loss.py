"""The loss and its gradients: the original's figures, and what a batch means."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import names
from qwen_jax import checkpoint, model
from qwen_jax.attention import IMPLEMENTATIONS, xla
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder
from tests.support.golden_figures import arrays, overrides
from tests.support.tiny import QUICK, full_logits, on_mesh, tiny_config, tiny_decoder, tiny_tokens
from train.data import batches
from train.data.batch import IGNORED, Batch
from train.step import loss as losses

PREFIX = "train.grad."


def graded(decoder: Decoder, batch: Batch, attend: Any = xla, **options: Any) -> tuple[Any, Any]:
    """Metrics, and the gradients of a stacked decoder."""

    def of(decoder: Decoder, batch: Batch) -> Any:
        return losses.loss(decoder, batch, attend=attend, dtype=jnp.float32, **options)

    grad = jax.jit(jax.grad(of, has_aux=True), compiler_options=QUICK)
    stacked = jax.jit(model.stack, compiler_options=QUICK)(decoder)
    gradients, metrics = grad(stacked, batches.place(batch))
    weights = named_leaves(stacked)
    for name, leaf in named_leaves(gradients).items():
        partition = weights[name][...].sharding
        assert leaf[...].sharding.is_equivalent_to(partition, leaf.ndim), name
    return metrics, gradients


def as_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The leaves of a stacked decoder as the original names and stacks them."""
    unstacked = jax.jit(model.unstack, compiler_options=QUICK)(decoder)
    leaves = {name: np.asarray(leaf[...]) for name, leaf in named_leaves(unstacked).items()}
    tensors = names.expected({name: leaf.shape for name, leaf in leaves.items()})
    return {
        name: np.concatenate([leaves[part.path] for part in tensor.parts])
        for name, tensor in tensors.items()
    }


def golden_batch(case: str, repeats: int = 1) -> Batch:
    """Rows repeated change neither the mean nor its gradients."""
    found = (arrays()[f"{case}.{what}"] for what in ("tokens", "labels"))
    return batches.batch_of(*(np.tile(x, (repeats, 1)) for x in found))


def test_what_is_no_batch_is_refused() -> None:
    good = np.ones((2, 4), np.int32)
    for tokens, labels, message in (
        (good[0], good[0], "both are"),
        (good, good[:, 1:], "both are"),
        (good - 2, good, "tokens are whole numbers from 0"),
        (good, good * 1.5, "labels are whole numbers from 0"),
        (good, good - 6, "labels .* -100 where ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(batches.batch_of)(tokens, labels)  # without the tests' check of axes
    with (
        on_mesh(fsdp=4),
        pytest.raises(ValueError, match="batch B = 2 is not divisible by fsdp=4"),
    ):
        batches.place(batches.batch_of(good, good))


@pytest.mark.parametrize("where", ["tokens", "targets"])
def test_ids_beyond_the_vocabulary_show(where: str) -> None:
    config = tiny_config()
    batch = batches.batch_of(np.ones((2, 8), np.int32), np.ones((2, 8), np.int32))
    ids = getattr(batch, where).copy()
    ids[1, 3] = config.vocab_size
    with on_mesh(fsdp=2):
        metrics, gradients = graded(
            tiny_decoder(config), dataclasses.replace(batch, **{where: ids})
        )
    assert np.isnan(metrics.loss)
    assert all(np.isnan(leaf[...]).any() for leaf in named_leaves(gradients).values())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"fsdp": 4, "tp": 2}, {}),
        ({"fsdp": 2, "tp": 2}, {"sequence_parallel": True}),
        ({"context": 2}, {}),
        ({"context": 4}, {}),  # 40 tokens do not divide over 8
        ({"data": 2, "fsdp": 2, "context": 2}, {}),
    ],
    ids=str,
)
def test_the_originals_loss_and_gradients(golden_dir: Path, sizes: Any, options: Any) -> None:
    rows = int(np.prod([sizes.get(axis, 1) for axis in sharding.BATCH]))
    with on_mesh(**sizes):
        decoder = checkpoint.load(golden_dir, dtype="float32")
        batch = golden_batch("train", max(rows // 2, 1))
        metrics, gradients = graded(decoder, batch, **options)
        tensors = as_tensors(gradients)
    np.testing.assert_allclose(metrics.loss, arrays()["train.loss"][0], rtol=1e-5)
    wanted = {k.removeprefix(PREFIX): g for k, g in arrays().items() if k.startswith(PREFIX)}
    assert tensors.keys() == wanted.keys() and len(wanted) == 27
    for name, gradient in wanted.items():
        most = np.abs(gradient).max()
        np.testing.assert_allclose(tensors[name], gradient, rtol=0, atol=1e-4 * most, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "sizes", "padding"),
    [
        ("plain", {}, 0),
        ("ntk_logn", {}, 0),
        ("ntk_logn", {"fsdp": 2, "tp": 2}, 0),
        ("ntk_logn", {"fsdp": 2, "context": 4}, 2),  # 94 tokens divide over no context
    ],
    ids=str,
)
def test_nothing_scales_with_the_length_in_training(
    golden_dir: Path, flags: str, sizes: Any, padding: int
) -> None:
    """94 tokens where 64 is the trained length, as the original has them in training."""
    batch = golden_batch("trainlong")
    batch = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, padding))), batch)
    config = checkpoint.load_config(golden_dir).with_overrides(overrides(flags))
    with on_mesh(**sizes):
        decoder = checkpoint.load(golden_dir, config, "float32")
        value, _ = jax.jit(
            lambda d, b: losses.loss(d, b, attend=xla, dtype=jnp.float32), compiler_options=QUICK
        )(decoder, batches.place(batch))
        assert decoder.config.logn == ("logn" in flags)
    np.testing.assert_allclose(value, arrays()["trainlong.loss"][0], rtol=1e-5)


# What a batch means


def test_a_batch_of_labels() -> None:
    tokens, labels = np.array([[5, 6, 7, 8]]), np.array([[5, IGNORED, 7, 8]])
    batch = batches.batch_of(tokens, labels)
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0]])
    np.testing.assert_array_equal(batch.targets, [[0, 7, 8, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.segments, 1)
    assert {x.dtype.name for x in jax.tree.leaves(batch)} == {"int32", "float32"}
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 8]])


def value_of(batch: Batch) -> losses.Metrics:
    decoder = tiny_decoder(tiny_config())
    of = jax.jit(
        lambda d, b: losses.loss(d, b, attend=xla, dtype=jnp.float32)[1], compiler_options=QUICK
    )
    return of(decoder, batches.place(batch))


def test_loss_and_accuracy_are_means_over_weights() -> None:
    tokens = tiny_tokens(2, 12)
    weights = np.random.default_rng(0).uniform(0, 2, (2, 12)).astype(np.float32)
    weights[0, :5] = 0
    with on_mesh():
        decoder = tiny_decoder(tiny_config())
        logits = full_logits(decoder, tokens).astype(np.float64)
        batch = batches.batch_of(tokens, tokens)
        batch = batch.replace(weights=weights, targets=batch.targets.copy())
        best = logits.argmax(-1)
        batch.targets[:, ::2] = best[:, ::2]  # half of them right
        metrics = value_of(batch)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics.loss, (nll * weights).sum() / weights.sum(), rtol=1e-5)
    right = (best == batch.targets) * weights
    assert 0.3 < right.sum() / weights.sum() < 0.8
    np.testing.assert_allclose(metrics.accuracy, right.sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics.targets, weights.sum(), rtol=1e-5)


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    tokens = tiny_tokens(2, 12)
    with on_mesh():
        metrics = value_of(batches.batch_of(tokens, np.full_like(tokens, IGNORED)))
    assert [float(x) for x in (metrics.loss, metrics.accuracy, metrics.targets)] == [0, 0, 0]


def test_packed_documents_are_what_they_are_alone() -> None:
    """Their losses weighed by their targets; padding has no part."""
    documents = [tiny_tokens(1, n) for n in (12, 9, 5)]
    padding = np.full((1, 6), 3)  # of any tokens
    with on_mesh():
        alone = [value_of(batches.batch_of(x, x)) for x in documents]
        parts = [batches.batch_of(x, x) for x in (*documents, padding)]
        parts = [part.replace(segments=part.segments + i) for i, part in enumerate(parts)]
        none = np.zeros(padding.shape, np.int32)
        parts[-1] = parts[-1].replace(segments=none, weights=none.astype(np.float32))
        together = value_of(jax.tree.map(lambda *x: np.concatenate(x, 1), *parts))
    total = sum(float(m.targets) for m in alone)
    assert float(together.targets) == total == 11 + 8 + 4
    mean = sum(float(m.loss) * float(m.targets) for m in alone) / total
    np.testing.assert_allclose(together.loss, mean, rtol=1e-5)


def test_through_a_kernel() -> None:
    """In a ring, with a window of one layer."""
    config = tiny_config(head_dim=32, num_kv_heads=2, layer_windows=(5, None))
    batch = batches.batch_of(tiny_tokens(4, 16), tiny_tokens(4, 16))
    with on_mesh():
        expected, exact = graded(tiny_decoder(config), batch)
    with on_mesh(fsdp=2, context=2):
        metrics, gradients = graded(tiny_decoder(config), batch, IMPLEMENTATIONS["pallas_tpu"])
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=2e-5)
    got = named_leaves(gradients)
    for path, leaf in named_leaves(exact).items():
        wanted = np.asarray(leaf[...])
        atol = 5e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(got[path][...], wanted, rtol=0, atol=atol, err_msg=path)
