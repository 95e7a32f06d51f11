"""The look-up and the log-probabilities over a split vocabulary, against the whole table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import meshes
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import vocabulary
from tests.support.tiny import QUICK, on_mesh
from train.planning import collectives

B, T, D = 8, 8, 16
ROWS = 600  # not a multiple of a chunk: a device of tp=2 has 300 = 2 x 128 + 44
MESHES = [
    {},
    {"fsdp": 4},
    {"tp": 2},
    {"data": 2, "tp": 2},
    {"context": 4},
    {"fsdp": 2, "tp": 4},
    {"fsdp_outer": 2, "fsdp": 2, "context": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"fsdp": 2, "context": 2, "tp": 2},
]
WITH_TP = [sizes for sizes in MESHES if "tp" in sizes]


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """x, head, targets, and what the gradients are of: weights of each token's scores."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((B, T, D), np.float32)
    head = rng.standard_normal((ROWS, D), np.float32)
    targets = rng.integers(0, ROWS, (B, T), np.int32)
    targets.flat[:2] = 0, ROWS - 1  # the first row and the last
    return x, head, targets, [rng.standard_normal((B, T), np.float32) for _ in range(2)]


def by_definition(x: Any, head: Any, targets: Any) -> vocabulary.TokenScores:
    """From all logits, in float32."""
    logits = jnp.einsum("btd,vd->btv", x, head, precision="highest")
    logit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return vocabulary.TokenScores(logit, jax.nn.logsumexp(logits, -1), jnp.max(logits, -1))


def weighted(scores: Any, x: Any, head: Any, targets: Any, shares: Any) -> Any:
    """Both gradients, and that of neither is that of the other."""
    found = scores(x, head, targets=targets)
    return jnp.sum(shares[0] * found.logit) + jnp.sum(shares[1] * found.lse), found


def graded(function: Any) -> Any:
    grad = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    return jax.jit(grad, compiler_options=QUICK)


@functools.cache
def expected() -> Any:
    return graded(functools.partial(weighted, by_definition))(*arrays())


@pytest.fixture
def chunks_of_128(monkeypatch):
    """As small as they get: several, and a last one that is not full."""
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 1)


def sharded(sizes: dict[str, int], dtype: Any = jnp.float32, parted: bool = False) -> Any:
    x, head, targets, shares = arrays()

    def of(x: Any, head: Any, targets: Any, shares: Any) -> Any:
        x = x.astype(dtype)
        x = moves.sequence_parallel(x) if parted else x
        return weighted(vocabulary.token_scores, x, head, targets, shares)

    with on_mesh(**sizes):
        placed = moves.place(x, "BTD"), moves.place(head, "VD")
        rest = moves.place(targets, "BT"), [moves.place(s, "BT") for s in shares]
        result = graded(of)(*placed, *rest)
        for gradient, value in zip(result[1], placed, strict=True):
            assert gradient.sharding.is_equivalent_to(value.sharding, value.ndim)
    return result


def assert_near(got: Any, wanted: Any, bound: float) -> None:
    """Within `bound` of the largest."""
    (_, scores), gradients = got
    (_, exact), exact_gradients = wanted
    for name, one, other in zip(scores._fields, scores, exact, strict=True):
        assert one.dtype == jnp.float32 and one.shape == (B, T)
        most = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * most, err_msg=name)
    for one, other in zip(gradients, exact_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * np.abs(other).max())


@pytest.mark.parametrize("sizes", MESHES, ids=meshes.describe)
def test_scores_are_those_of_all_logits(sizes, chunks_of_128):
    with on_mesh(**sizes):
        head = moves.place(arrays()[1], "VD")
        plan = vocabulary._Layout.of(moves.place(arrays()[0], "BTD"), head)
        held = ROWS // sizes.get("tp", 1)
        assert plan.size == 128 and held % 128 and held > 128
    assert_near(sharded(sizes), expected(), 2e-5)


@pytest.mark.parametrize("sizes", WITH_TP, ids=meshes.describe)
def test_tokens_that_are_split_over_tp_too(sizes, chunks_of_128):
    assert_near(sharded(sizes, parted=True), expected(), 2e-5)


@pytest.mark.parametrize("size", [128, 256, 10**6])
def test_chunks_of_any_size(size, monkeypatch):
    """300 rows in three, in two, and whole."""
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * B // 2 * T * size)
    assert_near(sharded({"fsdp": 2, "tp": 2}), expected(), 2e-5)


def test_rows_that_are_not_there_have_no_part(chunks_of_128):
    """All logits are far below 0, as which padded rows would otherwise count."""
    x = np.ones((2, 2, D), np.float32)
    head = np.full((300, D), -10, np.float32)
    with on_mesh():
        placed = moves.place(x, "BTD"), moves.place(head, "VD")
        scores = vocabulary.token_scores(
            *placed, targets=moves.place(np.zeros((2, 2), np.int32), "BT")
        )
    np.testing.assert_allclose(scores.largest, -10 * D)
    np.testing.assert_allclose(scores.logit - scores.lse, -np.log(300), rtol=1e-4)


def test_logits_of_hundreds_overflow_nothing(chunks_of_128):
    x, head, targets, _ = arrays()
    with on_mesh(tp=2):
        placed = moves.place(100 * x, "BTD"), moves.place(head, "VD")
        scores = vocabulary.token_scores(*placed, targets=moves.place(targets, "BT"))
    wanted = by_definition(100 * x, head, targets)
    assert np.abs(wanted.largest).max() > 500
    np.testing.assert_allclose(scores.lse, wanted.lse, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tp": 2}], ids=meshes.describe)
def test_bfloat16(sizes, chunks_of_128):
    """x and the head are rounded once, to 8 bits, their products not at all; gradients are sums in
    float32 of products with a rounded factor, rounded at the end: three roundings of 2**-9 each.
    """
    x, head, targets, shares = arrays()
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, head)]
    exact = graded(functools.partial(weighted, by_definition))(*rounded, targets, shares)
    got = sharded(sizes, jnp.bfloat16)
    for one, other in zip(got[0][1], exact[0][1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)
    assert_near(got, exact, 3 * 2**-9)
    assert np.abs(got[1][1] - exact[1][1]).max() > 1e-4, "the gradients are not float32's"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [m for m in MESHES if m.get("tp") != 4], ids=meshes.describe)
def test_look_up(sizes, dtype, monkeypatch):
    monkeypatch.setattr(vocabulary, "_SCATTERED", 5)  # several chunks, the last not full
    rng = np.random.default_rng(6)
    table = rng.standard_normal((ROWS, D), np.float32)
    tokens = rng.integers(0, ROWS, (B, T), np.int32)
    tokens[:, :3] = 7  # a frequent token, and rows of every device
    tokens[0, 3:5] = 0, ROWS - 1
    wanted = rng.standard_normal((B, T, D), np.float32)
    with on_mesh(**sizes):
        placed = moves.place(table, "VD")
        rest = moves.place(tokens, "BT"), moves.place(wanted, "BTD")

        def loss(table: Any, tokens: Any, wanted: Any) -> Any:
            x = vocabulary.look_up(table, tokens, dtype=dtype)
            return jnp.sum(x.astype(jnp.float32) * wanted), x

        grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
        gradient, x = grad(placed, *rest)
        assert gradient.sharding.is_equivalent_to(placed.sharding, 2)
        assert x.sharding.is_equivalent_to(sharding.named("BTD", meshes.current()), 3)
    assert x.dtype == dtype and gradient.dtype == np.float32
    np.testing.assert_array_equal(x, jnp.asarray(table[tokens], dtype))
    exact = np.zeros(table.shape)
    rounded = np.asarray(jnp.asarray(wanted, dtype), np.float64)
    np.add.at(exact, tokens.reshape(-1), rounded.reshape(-1, D))
    # Rows of a frequent token are added up in float32, whatever the dtype of the result.
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2}], ids=meshes.describe)
def test_a_frequent_token_of_a_bfloat16_table(sizes):
    """Gradients add up in float32: in bfloat16, 256 ones and another are 256."""
    with on_mesh(**sizes):
        table = moves.place(np.zeros((4, 8), jnp.bfloat16), "VD")
        tokens = moves.place(np.zeros((4, 256), np.int32), "BT")
        grad = jax.jit(jax.grad(lambda t, ids: jnp.sum(vocabulary.look_up(t, ids, dtype=t.dtype))))
        gradient = grad(table, tokens)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32)[0], 1024)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2}, {"tp": 2}], ids=meshes.describe)
def test_the_logits_are_nowhere_whole(sizes, monkeypatch):
    """Temporaries of the compiled gradient: those of a chunk, not of the vocabulary."""
    rows, batch, length = 4096, 8, 64
    held = batch * length * rows * 4 // int(np.prod(list(sizes.values()) or [1]))
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", held // 16)

    def temporaries(scores: Any) -> int:
        def loss(x: Any, head: Any, targets: Any) -> Any:
            found = scores(x, head, targets=targets)
            return jnp.sum(found.lse - found.logit)

        with on_mesh(**sizes) as mesh:
            shapes = [((batch, length, D), jnp.float32), ((rows, D), jnp.float32)]
            shapes.append(((batch, length), jnp.int32))
            abstract = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(letters, mesh))
                for (shape, dtype), letters in zip(shapes, ("BTD", "VD", "BT"), strict=True)
            ]
            grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            return grad.lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(vocabulary.token_scores) < held / 3
    if not sizes:
        assert temporaries(by_definition) > held, "this is how it shows"


def test_no_collective_is_the_size_of_the_table():
    """Rows are gathered a chunk at a time, forward and backward, as often as there are chunks."""
    rows = 2048
    with on_mesh(fsdp=8) as mesh:
        x = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=sharding.named("BTD", mesh))
        head = jax.ShapeDtypeStruct((rows, D), jnp.float32, sharding=sharding.named("VD", mesh))
        targets = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding.named("BT", mesh))

        def loss(x: Any, head: Any, targets: Any) -> Any:
            return vocabulary.token_scores(x, head, targets=targets).lse.sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocabulary, "LOGITS_BYTES", 4 * T * 256)
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, head, targets).compile()
    found = list(collectives.each(compiled, mesh))
    gathers = [c for c in found if c.kind == "all-gather"]
    assert sorted(c.count for c in gathers) == [8, 8]
    assert all(c.bytes == rows * D * 4 for c in gathers)
    assert max(c.bytes // c.count for c in found) == 256 * D * 4
