"""Mesh axes, partitionings by letter, arrays placed, weights gathered, and heads spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax import meshes
from qwen_jax.meshes import gathering, moves, sharding
from tests.support import compilations
from tests.support.tiny import QUICK, cached_logits, full_logits, on_mesh, tiny_config, tiny_decoder
from tests.support.tiny import tiny_tokens as tokens_of

ALL = {"data": 2, "fsdp_outer": 2, "fsdp": 2, "context": 2, "tp": 2}


# Partitionings


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("BTD", P(("data", "fsdp_outer", "fsdp"), "context", None)),
        ("BT", P(("data", "fsdp_outer", "fsdp"), "context")),
        ("BTV", P(("data", "fsdp_outer", "fsdp"), "context", "tp")),
        ("BTNH", P(("data", "fsdp_outer", "fsdp"), "context", "tp", None)),
        ("BKSH", P(("data", "fsdp_outer", "fsdp"), "tp", None, None)),
        ("FD", P("tp", ("context", "fsdp_outer", "fsdp"))),
        ("DQ", P(("context", "fsdp_outer", "fsdp"), "tp")),
        ("LVD", P(None, "tp", ("context", "fsdp_outer", "fsdp"))),
        ("U", P("tp")),
        ("H", P(None)),
        ("", P()),
    ],
)
def test_a_partitioning_follows_from_the_letters(letters, expected):
    assert sharding.spec(letters, mesh=ALL) == expected


def test_axes_of_size_1_appear_nowhere():
    assert sharding.spec("BTD", mesh={"fsdp": 4}) == P("fsdp", None, None)
    assert sharding.spec("FD", mesh={"tp": 2}) == P("tp", None)
    assert sharding.spec("FD", mesh={"context": 2}) == P(None, "context")
    assert sharding.spec("BTVD", mesh={}) == P(None, None, None, None)
    assert sharding.spec("FD") == P(None, None), "no mesh in force"
    with on_mesh(fsdp=2, tp=4):
        assert sharding.spec("FD") == P("tp", "fsdp")
        assert sharding.axis_sizes() == dict.fromkeys(sharding.AXES, 1) | {"fsdp": 2, "tp": 4}


def test_heads_fewer_than_tp_stay_whole():
    assert sharding.spec("UD", {"K": 2}, mesh={"tp": 4}) == P(None, None)
    assert sharding.spec("UD", {"K": 4}, mesh={"tp": 4}) == P("tp", None)
    assert sharding.spec("QD", {"K": 2}, mesh={"tp": 4}) == P("tp", None), "queries are split"
    assert sharding.spec("BKSH", {"K": 1}, mesh={"tp": 4}) == P(None, None, None, None)


def test_entries_of_a_partitioning():
    assert sharding.entries(None) == () and sharding.entries("tp") == ("tp",)
    assert sharding.entries(("data", "fsdp")) == ("data", "fsdp")


# Arrays


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tp": 2}, {"data": 2, "context": 2, "tp": 2}])
def test_place_and_fetch_are_inverse(sizes):
    rng = np.random.default_rng(0)
    value = rng.standard_normal((8, 16)).astype(np.float32)
    with on_mesh(**sizes) as mesh:
        for letters in ("BT", "FD", "DH"):
            placed = moves.place(value, letters)
            assert placed.sharding == sharding.named(letters, mesh)
            np.testing.assert_array_equal(moves.fetch(placed), value)


def test_the_program_that_fetches_from_other_processes_is_made_once():
    """Otherwise each stride of decoding compiles one where rows are split over processes."""
    value = np.arange(8, dtype=np.int32)
    with on_mesh(fsdp=2) as mesh:
        placed = moves.place(value, "B")
    moves._replicator(mesh)(placed)
    with compilations.counted() as programs:
        np.testing.assert_array_equal(moves._replicator(mesh)(placed), value)
    assert not programs


def test_arrays_handed_over_go_into_any_function():
    with on_mesh(fsdp=2):
        inside = moves.place(np.ones((4, 2), np.float32), "BT")
        assert moves.handed_over(inside) is inside
    outside = moves.handed_over(inside)
    np.testing.assert_array_equal(jnp.concatenate([outside, jnp.zeros((1, 2))])[:4], inside)


MESHES = [
    {"fsdp": 4},
    {"tp": 2},
    {"fsdp": 2, "tp": 2},
    {"context": 4},
    {"fsdp_outer": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tp": 2},
    {"fsdp_outer": 2, "fsdp": 2, "context": 2},
]


def products(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A number from every kind of leaf: a product of positive sums, in which nothing cancels, so
    that the order in which a processor adds them up shows in the last digits alone.
    """
    y = jnp.einsum("BTD,FD->BTF", x * w["D"], w["FD"]) * w["Q"]
    y = jnp.einsum("BTF,DF->BTD", y, w["DF"], out_sharding=sharding.spec("BTD"))
    return jnp.sum(jnp.square(jnp.tanh(y))) * jnp.sum(jnp.square(w["H"]))


@pytest.mark.parametrize("sizes", MESHES, ids=meshes.describe)
def test_unshard_gathers_weights_and_scatters_gradients(sizes):
    rng = np.random.default_rng(1)
    shapes = {"FD": (8, 16), "DF": (16, 8), "D": (16,), "H": (4,), "Q": (8,)}
    leaves = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    x = rng.standard_normal((8, 8, 16), np.float32)

    def whole(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        w = gathering.unshard(w)
        for name, leaf in w.items():
            partition = jax.typeof(leaf).sharding.spec.partitions
            axes = {axis for entry in partition for axis in sharding.entries(entry)}
            assert axes == ({"tp"} if "tp" in sizes and name in ("FD", "DF", "Q") else set())
        return products(w, x)

    def graded(function, mesh):
        with on_mesh(**mesh):
            placed = {name: moves.place(leaf, name) for name, leaf in leaves.items()}
            grad = jax.jit(jax.value_and_grad(function), compiler_options=QUICK)
            value, gradients = grad(placed, moves.place(x, "BTD"))
        for name, gradient in gradients.items():
            assert gradient.sharding.is_equivalent_to(placed[name].sharding, gradient.ndim), name
        return value, gradients

    value, gradients = graded(whole, sizes)
    expected, exact = graded(products, {})
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        most = np.abs(exact[name]).max()
        np.testing.assert_allclose(gradient, exact[name], rtol=0, atol=2e-5 * most, err_msg=name)


def test_unshard_casts_before_it_gathers():
    with on_mesh(fsdp=4):
        w = moves.place(np.ones((8, 16), np.float32), "FD")
        assert gathering.unshard(w).dtype == jnp.float32
        made = jax.make_jaxpr(lambda w: gathering.unshard(w, jnp.bfloat16))(w)
    (gathered,) = made.eqns
    names = [equation.primitive.name for equation in gathered.params["call_jaxpr"].eqns]
    assert names.index("convert_element_type") < names.index("reshard")
    assert made.out_avals[0].dtype == jnp.float32, "in which the gradient comes back"


# Heads fewer than tp


@pytest.mark.parametrize(
    "letters, shape, axis",
    [
        ("LFD", (3, 8, 256), 2),  # parts of 64
        ("LFD", (3, 8, 512), 1),  # of 128
        ("LDF", (3, 256, 8), 1),  # whole
        ("LD", (3, 256), 1),
    ],
)
def test_narrow_parts_come_first(letters, shape, axis):
    with on_mesh(fsdp=2, context=2):
        leaf = moves.place(np.zeros(shape, np.float32), letters)
        found = []
        jax.jit(lambda x: found.append(gathering.leading_axis(x)))(leaf)
    assert found == [axis]


def test_heads_are_repeated_for_the_devices_of_their_queries():
    k = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    for tp, held in ((1, 2), (2, 2), (4, 4), (8, 8)):
        with on_mesh(tp=tp):
            assert sharding.held_heads(2) == held and sharding.held_heads(16) == 16
            spread = moves.spread_heads(moves.place(k, "BTKH", lengths={"K": 2}))
            assert jax.typeof(spread).sharding.spec[2] == ("tp" if tp > 1 else None)
            np.testing.assert_array_equal(spread, np.repeat(k, held // 2, axis=2))


@pytest.mark.parametrize("tp", [4, 8])
def test_a_model_with_fewer_heads_than_devices(tp):
    """Logits of a whole pass, and of prefill and decoding with a cache."""
    config = tiny_config(
        vocab_size=64, num_heads=8, num_kv_heads=2, head_dim=8, intermediate_size=48
    )
    tokens = tokens_of(2, 9) % 64
    with on_mesh():
        decoder = tiny_decoder(config)
        expected = full_logits(decoder, tokens)
    with on_mesh(tp=tp):
        decoder = tiny_decoder(config)
        keys = decoder.layers[0].attn.k[...]
        assert keys.addressable_shards[0].data.size == keys.size, "each device has all"
        queries = decoder.layers[0].attn.q[...]
        assert queries.addressable_shards[0].data.size * tp == queries.size
        whole = full_logits(decoder, tokens)
        cached = cached_logits(decoder, tokens, [7, 1, 1])
    for logits in (whole, cached):
        np.testing.assert_allclose(logits, expected, atol=2e-5 * expected.std(), rtol=0)
