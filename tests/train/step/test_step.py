"""A training step on meshes against one device, against the original's optimizer, and options."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax import Config, checkpoint, meshes, model
from qwen_jax.attention import xla
from qwen_jax.leaves.weights import Weight, named_leaves
from qwen_jax.meshes import dropout, moves, sharding
from tests.support import compilations
from tests.support.golden_figures import arrays
from tests.support.tiny import QUICK, full_logits, on_mesh, tiny_config, tiny_decoder, tiny_tokens
from train import step
from train.data import batches
from train.data.batch import Batch
from train.step import Optimizer, State
from train.step import loss as losses
from train.step import optimizer as optimizers

# Key/value heads fewer than tp=8, and every axis divides by 8 or is fewer heads.
CONFIG = tiny_config(
    vocab_size=72,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=48,
    layer_windows=(9, None),
)
# Gradients are not clipped, so that the first moment after a step is a tenth of them; updates are
# smooth in them.
PLAIN = Optimizer(learning_rate=1e-2, b1=0.9, eps=1e-2, clip_norm=1e9)
SEQUENCE: dict[str, Any] = {"sequence_parallel": True}
# Slow where others show the same: more devices on an axis, or the same axes and more.
MESHES = [
    ({"fsdp": 8}, {}),
    pytest.param({"fsdp": 4, "tp": 2}, {}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tp": 4}, {}, marks=pytest.mark.slow),
    ({"tp": 8}, {}),
    # Not of fsdp=8: without tp there is nothing to split the tokens over.
    ({"fsdp": 4, "tp": 2}, SEQUENCE),
    pytest.param({"fsdp": 2, "tp": 4}, SEQUENCE, marks=pytest.mark.slow),
    ({"tp": 8}, SEQUENCE),
    pytest.param({"context": 2}, {}, marks=pytest.mark.slow),
    pytest.param({"context": 4}, {}, marks=pytest.mark.slow),
    ({"context": 8}, {}),
    ({"fsdp": 2, "context": 2, "tp": 2}, SEQUENCE),
    ({"data": 2, "fsdp": 2, "tp": 2}, {}),
    pytest.param({"data": 2, "fsdp": 2, "tp": 2}, SEQUENCE, marks=pytest.mark.slow),
    ({"fsdp_outer": 2, "fsdp": 2}, {}),
]


def packed_batch() -> Batch:
    """8 rows of 16 tokens: documents, padding, weights that are no whole numbers."""
    rng = np.random.default_rng(9)
    tokens = tiny_tokens(8, 16)
    batch = batches.batch_of(tokens, tokens)
    cuts = rng.integers(3, 13, 8)
    for row, cut in enumerate(cuts):
        batch.positions[row, cut:] -= batch.positions[row, cut]
        batch.segments[row, cut:] = 2 if row % 2 else 0
    batch.weights[:] = rng.uniform(0.5, 2, (8, 16)) * (batch.segments > 0)
    return batch


@dataclasses.dataclass(frozen=True)
class Taken:
    """What one step says and leaves, on the host. leaves: by "mu", "nu", "weights" and path."""

    loss: float
    accuracy: float
    norm: float
    leaves: dict[tuple[str, str], np.ndarray]


def adam(state: State) -> Any:
    """The moments within the optimizer's state."""
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    (found,) = filter(is_adam, jax.tree.leaves(state.moments, is_leaf=is_adam))
    return found


def take(sizes: dict[str, int], config: Config = CONFIG, **options: Any) -> Taken:
    """One step from the tiny decoder; every leaf of the new state lies where it belongs."""
    batch = packed_batch()
    with on_mesh(**sizes) as mesh:
        state = step.create_state(tiny_decoder(config), PLAIN)
        placed = batches.place(batch)
        options = {"dtype": jnp.float32, **options}
        lowered = step.make_step(PLAIN, xla, **options).lower(state, placed)
        state, report = lowered.compile(compiler_options=QUICK)(state, placed)
        leaves = {}
        for kind, tree in {
            "weights": state.weights,
            "mu": adam(state).mu,
            "nu": adam(state).nu,
        }.items():
            for name, leaf in named_leaves(tree).items():
                place = sharding.named(leaf.letters, mesh, lengths=config.sizes)
                assert leaf[...].sharding.is_equivalent_to(place, leaf.ndim), (kind, name)
                assert leaf.dtype == jnp.float32
                leaves[kind, name] = np.asarray(leaf[...])
        assert int(state.step) == int(adam(state).count) == 1
    metrics = report.metrics
    return Taken(float(metrics.loss), float(metrics.accuracy), float(report.gradient_norm), leaves)


@functools.cache
def one_device() -> Taken:
    return take({}, remat="none")


def assert_same(got: Taken, expected: Taken, bound: float = 2e-5) -> None:
    """Leaves within `bound` of the largest of each."""
    np.testing.assert_allclose(got.loss, expected.loss, rtol=bound)
    np.testing.assert_allclose(got.norm, expected.norm, rtol=bound)
    np.testing.assert_allclose(got.accuracy, expected.accuracy, rtol=bound)
    assert got.leaves.keys() == expected.leaves.keys()
    for key, wanted in expected.leaves.items():
        most = np.abs(wanted).max()
        assert most > 0, key
        atol = (2 if key[0] == "nu" else 1) * bound * most  # nu: squares
        np.testing.assert_allclose(got.leaves[key], wanted, rtol=0, atol=atol, err_msg=str(key))


def name_of(value: dict[str, Any]) -> str:
    """For the name of a test: a mesh, or how its tokens are split."""
    return "sequence" if value == SEQUENCE else meshes.describe(value) if value else "plain"


@pytest.mark.parametrize(("sizes", "options"), MESHES, ids=name_of)
def test_a_step_on_a_mesh_is_that_of_one_device(sizes, options):
    """Its loss, and by the moments and new weights its gradients."""
    assert_same(take(sizes, **options), one_device())


def test_the_first_moment_is_a_tenth_of_the_gradient():
    """What the tests above rest on."""
    moments = [leaf for (kind, _), leaf in one_device().leaves.items() if kind == "mu"]
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in moments))
    np.testing.assert_allclose(norm, 0.1 * one_device().norm, rtol=1e-5)


@pytest.mark.parametrize("remat", ["full", "projections"])
def test_what_is_recomputed_changes_nothing(remat):
    assert_same(take({}, remat=remat), one_device())


def test_another_architecture_on_a_mesh():
    config = dataclasses.replace(CONFIG, tie_embeddings=True, qk_norm=True)
    assert_same(take({"data": 2, "fsdp": 2, "tp": 2}, config), take({}, config))


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"fsdp": 4, "tp": 2},
        {"fsdp": 2, "tp": 4},
        {"tp": 8},
        {"fsdp_outer": 2, "fsdp": 2, "tp": 2},
    ],
    ids=meshes.describe,
)
def test_logits_on_a_mesh(sizes):
    with on_mesh():
        expected = full_logits(tiny_decoder(CONFIG), tiny_tokens(8, 16))
    with on_mesh(**sizes):
        got = full_logits(tiny_decoder(CONFIG), tiny_tokens(8, 16))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * expected.std())


@pytest.mark.parametrize("remat", step.REMAT)
def test_bfloat16(remat):
    """The loss and the gradients' norm are float32's to a few roundings; state stays float32."""
    got = take({"fsdp": 2, "context": 2, "tp": 2}, dtype=jnp.bfloat16, remat=remat, **SEQUENCE)
    np.testing.assert_allclose(got.loss, one_device().loss, rtol=0.01)
    np.testing.assert_allclose(got.norm, one_device().norm, rtol=0.03)
    assert got.loss != pytest.approx(one_device().loss, rel=1e-6), "this is not bfloat16"


def test_a_remat_that_is_not_known():
    with pytest.raises(ValueError, match="remat 'some': allowed are full, projections, none"):
        step.make_step(PLAIN, xla, remat="some")


# Options of a step


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "context": 2, "tp": 2}], ids=meshes.describe)
def test_parts_of_a_batch_add_up_to_it(sizes):
    """Their weights differ, so a mean of means would not."""
    assert_same(take(sizes, accumulate=4), one_device())


def test_z_loss():
    """It is added to what is minimised, and not to the loss that is told."""
    batch = packed_batch()
    with on_mesh():
        decoder, placed = tiny_decoder(CONFIG), batches.place(batch)
        of = functools.partial(losses.loss, decoder, placed, attend=xla, dtype=jnp.float32)
        plain, metrics = of()
        total, same = of(z_loss=0.5)
        logits = full_pass_logits(decoder, batch)
    z = jax.nn.logsumexp(logits, axis=-1)
    wanted = 0.5 * np.sum(np.square(z) * batch.weights) / batch.weights.sum()
    np.testing.assert_allclose(total - plain, wanted, rtol=1e-5)
    assert metrics.loss == same.loss == plain


def full_pass_logits(decoder, batch):
    """As the loss sees it, without RoPE scaling."""
    decoder = decoder.replace(config=decoder.config.in_training)
    return full_logits(decoder, batch.tokens, places=batch.positions, segments=batch.segments)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({"fsdp": 2, "context": 2, "tp": 2}, SEQUENCE),
        pytest.param({"fsdp": 2, "context": 4}, {}, marks=pytest.mark.slow),
    ],
)
def test_dropout_on_a_mesh(sizes, how):
    """The masks are the same on any mesh, whatever the order of tokens on it."""
    dropped = take({}, dropout=0.1)
    assert abs(dropped.loss - one_device().loss) > 1e-4
    assert_same(take(sizes, dropout=0.1, **how), dropped)


@pytest.mark.slow
def test_the_seed_of_a_run_is_that_of_its_masks():
    assert take({}, dropout=0.1, seed=1).loss != take({}, dropout=0.1).loss


def test_dropout():
    """On average the masks change nothing that they are applied to; each follows from the seed."""
    with on_mesh(fsdp=2):
        x = moves.place(np.ones((64, 64, 8), np.float32), "BTD")
        drop = dropout.Dropout(jax.random.key(0), 0.25)
        layers = [np.asarray(drop.in_layer(i).after_attention(x)) for i in range(2)]
        other = np.asarray(drop.in_layer(0).after_feed_forward(x))
        again, seed = (dropout.Dropout(jax.random.key(i), 0.25).in_layer(0) for i in (0, 1))
        np.testing.assert_array_equal(again.after_attention(x), layers[0])
        assert (seed.after_attention(x) != layers[0]).any()
    assert np.unique(layers[0]).tolist() == [0, pytest.approx(4 / 3)]
    for one, two in ((layers[0], layers[1]), (layers[0], other)):
        assert np.mean(one == two) == pytest.approx(0.75**2 + 0.25**2, abs=0.01)
    assert layers[0].mean() == pytest.approx(1, abs=0.01)


def test_every_step_has_masks_of_its_own():
    """Weights that do not move, and still another loss."""
    still = dataclasses.replace(PLAIN, learning_rate=0.0)
    with on_mesh(fsdp=2):
        run = step.make_step(still, xla, dtype=jnp.float32, dropout=0.1)
        state = step.create_state(tiny_decoder(CONFIG), still)
        state, first = run(state, batches.place(packed_batch()))
        _, second = run(state, batches.place(packed_batch()))
    assert abs(first.metrics.loss - second.metrics.loss) > 1e-4


def test_no_number_changes_nothing():
    """Neither weights nor moments, which are no longer 0 after a step."""
    batch = packed_batch()
    bad = dataclasses.replace(batch, tokens=batch.tokens + CONFIG.vocab_size)
    with on_mesh(fsdp=2):
        run = step.make_step(PLAIN, xla, dtype=jnp.float32)
        state = step.create_state(tiny_decoder(CONFIG), PLAIN)
        state, report = run(state, batches.place(batch))
        assert report.finite
        before = jax.tree.map(np.asarray, state)
        state, report = run(state, batches.place(bad))
        assert not report.finite and not np.isfinite(report.metrics.loss)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(old, new)
        _, report = run(state, batches.place(batch))
        assert report.finite


# The optimizer


def test_moments_in_bfloat16():
    """They are rounded between steps, and half as large; weights follow those of float32."""
    half = dataclasses.replace(PLAIN, moments="bfloat16")
    after = {}
    for optimizer in (PLAIN, half):
        with on_mesh(fsdp=2):
            state = step.create_state(tiny_decoder(CONFIG), optimizer)
            placed = batches.place(packed_batch())
            run = step.make_step(optimizer, xla, dtype=jnp.float32).lower(state, placed)
            run = run.compile(compiler_options=QUICK)
            for _ in range(3):
                state, report = run(state, placed)
        kinds = {leaf.dtype for leaf in jax.tree.leaves((adam(state).mu, adam(state).nu))}
        assert kinds == {jnp.dtype(optimizer.moments)}
        assert {leaf.dtype for leaf in jax.tree.leaves(state.weights)} == {jnp.dtype("float32")}
        after[optimizer.moments] = float(report.metrics.loss)
    assert after["bfloat16"] != after["float32"]
    assert after["bfloat16"] == pytest.approx(after["float32"], rel=1e-3)


def test_moments_in_bfloat16_forget():
    """A change of 0.1 % is less than bfloat16 can tell from none, and counts all the same, on
    average and alike on every mesh; what bfloat16 holds stays as it is.
    """
    x = np.full((32, 32), 1 + 2**-10, np.float32)
    draws = []
    for sizes in ({}, {"fsdp": 4, "tp": 2}):
        with on_mesh(**sizes):
            placed = moves.place(x, "FD")
            draw = np.asarray(optimizers._stochastically_rounded(placed, jax.random.key(0)))
            draws.append(draw.astype(np.float32))
    np.testing.assert_array_equal(*draws)
    assert set(draws[0].flat) == {1, 1 + 2**-7} and draws[0].mean() == pytest.approx(x[0, 0], 1e-3)
    optimizer = Optimizer(b2=0.999, moments="bfloat16")
    weights = {"w": Weight(jnp.ones((32, 32)), letters="FD")}
    nothing = jax.tree.map(jnp.zeros_like, weights)

    def one(number: Any, moments: Any) -> Any:
        return optimizer.transform(True, number).update(nothing, moments, weights)[1]

    with on_mesh():
        begin = optimizer.transform().init(weights)
        begin = jax.tree.map(lambda m: m + 1 if m.dtype == jnp.bfloat16 else m, begin)
        later = jax.jit(lambda m: jax.lax.fori_loop(0, 1000, one, m))(begin)
    (nu,) = jax.tree.leaves(adam(State(None, later, jnp.int32(0))).nu)
    assert nu.dtype == jnp.bfloat16
    assert nu.astype(jnp.float32).mean() == pytest.approx(0.999**1000, rel=0.02)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"moments": "int8"}, "moments 'int8': allowed are float32, bfloat16"),
        ({"b2": 1.0}, "b2 1: at least 0, and in float32 below 1"),
        ({"b1": 0.99999999}, "b1 0.99999999: at least 0, and in float32 below 1"),
    ],
)
def test_an_optimizer_that_means_nothing(values, problem):
    with pytest.raises(ValueError, match=problem):
        Optimizer(**values)


def test_gradients_in_a_dtype_that_is_none():
    for dtype, wanted in (("bfloat16", "float16"), ("float32", "bfloat16")):
        with pytest.raises(ValueError, match=f"gradient_dtype '{wanted}': float32, or bfloat16 wh"):
            step.make_step(PLAIN, xla, dtype=dtype, gradient_dtype=wanted)


def test_the_learning_rate_is_told():
    optimizer = dataclasses.replace(PLAIN, learning_rate=lambda step: 0.5 * (step + 1))
    with on_mesh():
        state = step.create_state(tiny_decoder(CONFIG), optimizer)
        placed = batches.place(packed_batch())
        run = step.make_step(optimizer, xla, dtype=jnp.float32).lower(state, placed)
        run = run.compile(compiler_options=QUICK)
        for wanted in (0.5, 1.0):
            state, report = run(state, placed)
            assert report.learning_rate == wanted


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tp": 2}], ids=meshes.describe)
def test_ten_steps_of_the_original(golden_dir: Path, sizes):
    """Losses, norms before the clip, and two tensors: one that decays, one that does not."""
    rates = jnp.asarray(arrays()["adamw.lrs"])
    optimizer = Optimizer(lambda count: rates[count], b1=0.9, b2=0.95, eps=1e-6)
    got, norms = [], []
    with on_mesh(**sizes):
        state = step.create_state(checkpoint.load(golden_dir, dtype="float32"), optimizer)
        given = [batches.place(batches.batch_of(x, x)) for x in arrays()["adamw.batches"]]
        run = step.make_step(optimizer, xla, dtype=jnp.float32).lower(state, given[0])
        run = run.compile(compiler_options=QUICK)
        for batch in given:
            state, report = run(state, batch)
            got.append(float(report.metrics.loss))
            norms.append(float(report.gradient_norm))
        assert int(state.step) == 10
        block = model.unstack(state.weights).layers[0]
        attention = [np.asarray(w[...]) for w in (block.attn.q, block.attn.k, block.attn.v)]
        final_norm = np.asarray(state.weights.final_norm[...])
    np.testing.assert_allclose(got, arrays()["adamw.losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, arrays()["adamw.grad_norms"], rtol=1e-4)
    # Where a gradient is near 0, noise of 1e-6 of it becomes some hundredths of an update, and
    # ten updates have moved a weight by 0.017 at most.
    for ours, name in ((np.concatenate(attention), "c_attn0"), (final_norm, "ln_f")):
        wanted = arrays()[f"adamw.final.{name}"]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4, err_msg=name)
        assert np.abs(ours - wanted).mean() < 1e-6


def test_what_decays():
    """Matrices, the embedding and the head among them; norms and biases do not."""
    config = dataclasses.replace(CONFIG, qk_norm=True)
    with on_mesh():
        decoder = jax.eval_shape(model.stack, model.abstract(config, jnp.float32))
    marked = named_leaves(optimizers._is_matrix(decoder))
    matrices = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"}
    wanted = {"embedding", "head", *(f"layers.{name}" for name in matrices)}
    assert {name for name, leaf in marked.items() if leaf.get_value() is True} == wanted
    assert all(leaf.get_value() in (True, False) for leaf in marked.values())


def test_abstract_state_is_that_of_a_real_one():
    with on_mesh(fsdp=2, tp=4) as mesh:
        real = step.create_state(tiny_decoder(CONFIG), PLAIN)
        batch = batches.place(packed_batch())
    for one, other in (
        (step.abstract_state(CONFIG, PLAIN, mesh=mesh), real),
        (step.abstract_batch(8, 16, mesh=mesh), batch),
    ):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for shape, leaf in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
            assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_beginning_again_compiles_nothing():
    with on_mesh():
        decoder = tiny_decoder(CONFIG)
        first, second = (jax.tree.map(jnp.copy, decoder) for _ in range(2))
        step.create_state(decoder, PLAIN), step.state_of(first, PLAIN)
        with compilations.counted() as programs:
            again = dataclasses.replace(PLAIN)
            step.create_state(decoder, again), step.state_of(second, again)
    assert programs == []
