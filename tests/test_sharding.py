"""Mesh axes, partitionings by letter, errors that name the mesh to use, and weights gathered."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax import PRESETS, sharding
from tests.tiny import QUICK, cached_logits, full_logits, on_mesh, tiny_config, tiny_decoder
from tests.tiny import tiny_tokens as tokens_of

LENGTHS = {"V": 64, "D": 32, "N": 8, "K": 4, "F": 48, "B": 8, "T": 32}
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
    assert sharding.spec("UD", {"K": 2}, {"tp": 4}) == P(None, None)
    assert sharding.spec("UD", {"K": 4}, {"tp": 4}) == P("tp", None)
    assert sharding.spec("QD", {"K": 2}, {"tp": 4}) == P("tp", None), "queries are split"
    assert sharding.spec("BKSH", {"K": 1}, {"tp": 4}) == P(None, None, None, None)


def test_entries_of_a_partitioning():
    assert sharding.entries(None) == () and sharding.entries("tp") == ("tp",)
    assert sharding.entries(("data", "fsdp")) == ("data", "fsdp")


# Meshes as text


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=4,tp=2", {"fsdp": 4, "tp": 2}),
        (" tp = 2 , data=3 ", {"tp": 2, "data": 3}),
        ("fsdp_outer=2,fsdp=2,context=2", {"fsdp_outer": 2, "fsdp": 2, "context": 2}),
        ("", {}),
        (None, {}),
    ],
)
def test_a_mesh_is_written_as_text(text, sizes):
    expected = dict.fromkeys(sharding.AXES, 1) | sizes
    assert sharding.parse_mesh(text) == expected
    assert sharding.parse_mesh(sharding.describe(expected)) == expected


def test_describe():
    assert sharding.describe({"tp": 2, "data": 1, "fsdp": 4}) == "fsdp=4,tp=2"
    assert sharding.describe({}) == "fsdp=1"


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=", "fsdp=0", "fsdp=-2", "fsdp=2.0", "model=2", "tp=2,tp=2", "=2", "4"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="write it as fsdp=4,tp=2") as error:
        sharding.parse_mesh(text)
    assert repr(text) in str(error.value) and "context" in str(error.value)


# Meshes of devices


def test_make_mesh():
    mesh = sharding.make_mesh({"fsdp": 2, "tp": 3})
    assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {"fsdp": 2, "tp": 3}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[:6]]
    assert sharding.make_mesh().size == 1
    with pytest.raises(ValueError, match="mesh fsdp=8,tp=2 needs 16 devices, there are 8"):
        sharding.make_mesh({"fsdp": 8, "tp": 2})


def test_the_mesh_in_force():
    assert sharding.current_mesh().size == 1
    with on_mesh(tp=2) as mesh:
        assert sharding.current_mesh() == mesh
        with on_mesh(fsdp=4) as inner:
            assert sharding.current_mesh() == inner
        assert sharding.current_mesh() == mesh
    for axes, kind in ((("x",), AxisType.Explicit), (("tp",), AxisType.Auto)):
        other = jax.make_mesh((2,), axes, (kind,))
        with jax.set_mesh(other), pytest.raises(ValueError, match="explicit axes out of data, "):
            sharding.current_mesh()


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh and `in_planes` ask of a TPU."""

    id: int
    coords: tuple[int, ...]
    process_index: int = 0
    platform: str = "tpu"
    slice_index: int = 0
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def torus(*shape: int) -> np.ndarray:
    """Devices in the order in which their last coordinate changes fastest."""
    places = itertools.product(*map(range, shape))
    return np.array([FakeDevice(i, place) for i, place in enumerate(places)])


def mesh_of(devices: np.ndarray, fsdp: int, tp: int = 1, outer: int = 1) -> Mesh:
    shape = (1, outer, fsdp, 1, tp)
    return Mesh(devices.reshape(shape), sharding.AXES, axis_types=(AxisType.Explicit,) * 5)


def test_data_goes_over_slices():
    places = list(itertools.product(range(4), range(4), [0]))
    slices = [
        [FakeDevice(100 * s + i, at, slice_index=s) for i, at in enumerate(places)]
        for s in range(2)
    ]
    devices = [device for both in zip(*slices, strict=True) for device in both]  # in any order
    assert sharding.count_slices(devices) == 2
    assert sharding.count_slices(jax.devices()) == 1
    mesh = sharding.make_mesh({"data": 4, "fsdp": 4, "tp": 2}, devices)
    for i, copy in enumerate(mesh.devices):
        assert {device.slice_index for device in copy.flat} == {i // 2}
    assert sharding.make_mesh({"fsdp": 16}, slices[0]).shape["fsdp"] == 16
    with pytest.raises(ValueError, match="fsdp=32: data must be a multiple of the 2 slices"):
        sharding.make_mesh({"fsdp": 32}, devices)
    sizes = PRESETS["qwen-7b"].sizes
    assert sharding.describe(sharding.default(sizes, 32, True, slices=2)) == "data=2,fsdp=16"
    assert sharding.describe(sharding.default(sizes, 32, slices=2)) == "data=2,tp=16"
    # Rows that two slices cannot share stay on one.
    one = sharding.default(sizes | {"B": 3}, 32, slices=2)
    assert math.prod(one.values()) <= 16


def test_fsdp_over_a_3d_torus_falls_into_planes():
    mesh = sharding.in_planes(mesh_of(torus(4, 2, 2), fsdp=16))
    assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {"fsdp_outer": 4, "fsdp": 4}
    for i, plane in enumerate(mesh.devices.reshape(4, 4)):
        assert {device.coords[0] for device in plane} == {i}
        assert len({device.coords for device in plane}) == 4
    # Weights are split over both, rows as well; the order of devices has not changed.
    assert sharding.spec("FD", mesh=mesh) == P(None, ("fsdp_outer", "fsdp"))
    assert [d.id for d in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize(
    "mesh",
    [
        mesh_of(torus(4, 4, 1), fsdp=16),
        mesh_of(torus(4, 4), fsdp=16),
        mesh_of(torus(4, 2, 2), fsdp=4, tp=4),  # fsdp itself lies along one dimension
        mesh_of(torus(4, 2, 2), fsdp=4, outer=4),
        mesh_of(np.random.default_rng(0).permutation(torus(2, 2, 2)), fsdp=8),
    ],
    ids=["flat in 3-D", "2-D", "tp in the planes", "split already", "in disorder"],
)
def test_other_fsdp_is_left_as_it_is(mesh):
    assert sharding.in_planes(mesh) is mesh


def test_devices_without_coordinates_are_left_as_they_are():
    assert sharding.make_mesh({"fsdp": 8}).shape["fsdp_outer"] == 1


# What divides


@pytest.mark.parametrize(
    ("changes", "mesh", "problem", "nearest"),
    [
        ({"N": 6, "K": 6}, "tp=4", "query heads N = 6 does not divide over tp=4", "fsdp=2,tp=2"),
        (
            {"K": 6, "N": 24},
            "tp=4",
            "key/value heads K = 6 does not divide over tp=4",
            "fsdp=2,tp=2",
        ),
        ({"F": 42}, "tp=4", "feed-forward width F = 42 does not divide over tp=4", "fsdp=2,tp=2"),
        ({"V": 66}, "fsdp=2,tp=4", "vocabulary V = 66 does not divide over tp=4", "fsdp=4,tp=2"),
        ({"D": 36}, "fsdp=8", "model width D = 36 does not divide over fsdp=8", "fsdp=4,tp=2"),
        ({"B": 6}, "fsdp=4", "batch B = 6 does not divide over fsdp=4", "fsdp=2,tp=2"),
        (
            {"B": 2},
            "data=2,fsdp=2",
            "batch B = 2 does not divide over data=2 x fsdp=2",
            "fsdp=2,tp=2",
        ),
        ({"T": 20}, "context=4", "length T = 20 does not divide over context=4", "context=2,tp=2"),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_mesh(changes, mesh, problem, nearest):
    lengths = {**LENGTHS, **changes}
    sizes = sharding.parse_mesh(mesh)
    with pytest.raises(ValueError) as error:
        sharding.check(lengths, sizes)
    message = str(error.value)
    assert message.startswith(f"mesh {mesh}: {problem}") and "\n" not in message
    found = re.search(r"; the nearest mesh that works is (\S+)$", message)
    assert found, message
    advised = sharding.parse_mesh(found.group(1))
    sharding.check(lengths, advised)
    # Nothing nearer works: of as many devices, and fewest doublings away.
    assert math.prod(advised.values()) == math.prod(sizes.values())
    assert found.group(1) == nearest
    distance = apart(advised, sizes)
    for other in sharding.meshes(math.prod(sizes.values())):
        if apart(other, sizes) < distance:
            with pytest.raises(ValueError):
                sharding.check(lengths, other)


def apart(one: dict[str, int], other: dict[str, int]) -> float:
    return sum(abs(math.log2(one[a] / other[a])) for a in sharding.AXES)


def test_a_residual_split_by_tokens_is_checked():
    sharding.check({"T": 8}, {"context": 2, "tp": 4}, sequence_parallel=True)
    sharding.check({"T": 6}, {"tp": 4})
    with pytest.raises(ValueError, match=r"length T = 6 does not divide over tp=4; the nearest"):
        sharding.check({"T": 6}, {"tp": 4}, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"T = 12 .*over context=2 x tp=4 \(in two pieces each\)"):
        sharding.check({"T": 12}, {"context": 2, "tp": 4}, sequence_parallel=True)


def test_fewer_devices_where_no_mesh_of_as_many_works():
    lengths = {"V": 6, "D": 6, "N": 6, "K": 6, "F": 6, "B": 6, "T": 7}
    with pytest.raises(ValueError, match="nearest mesh that works is ") as error:
        sharding.check(lengths, {"fsdp": 5})
    advised = sharding.parse_mesh(str(error.value).rpartition(" ")[2])
    assert math.prod(advised.values()) == 4 and advised["fsdp"] == 2


def test_a_length_takes_two_pieces_a_device():
    sharding.check({**LENGTHS, "T": 16}, {"context": 8})
    with pytest.raises(ValueError, match=r"T = 24 .* context=8 \(in two pieces each\)"):
        sharding.check({**LENGTHS, "T": 24}, {"context": 8})
    sharding.check({**LENGTHS, "T": 7}, {"fsdp": 8})


def test_what_divides_passes():
    for sizes in ({"fsdp": 8}, {"tp": 8}, {"fsdp": 2, "tp": 4}, ALL, {}):
        sharding.check(LENGTHS, sizes)
    sharding.check({"N": 8}, {"fsdp": 7}), "axes that are not given are not checked"


def test_every_mesh_of_a_number_of_devices_once():
    found = [tuple(mesh.values()) for mesh in sharding.meshes(12)]
    everything = itertools.product(range(1, 13), repeat=len(sharding.AXES))
    assert sorted(found) == sorted(x for x in everything if math.prod(x) == 12)


@pytest.mark.parametrize(
    ("changes", "devices", "training", "expected"),
    [
        ({}, 8, False, {"tp": 8}),
        ({}, 8, True, {"fsdp": 8}),
        ({"N": 2, "K": 2}, 8, False, {"fsdp": 4, "tp": 2}),
        ({"D": 4}, 8, True, {"data": 2, "fsdp": 4}),
        ({"D": 4, "B": 4}, 8, True, {"fsdp": 4, "tp": 2}),
        ({"N": 6, "K": 6, "D": 6, "F": 6, "V": 6, "B": 6}, 7, False, {"tp": 6}),
        ({}, 1, True, {}),
    ],
)
def test_the_mesh_when_none_is_asked_for(changes, devices, training, expected):
    sizes = sharding.default({**LENGTHS, **changes}, devices, training)
    assert {axis: size for axis, size in sizes.items() if size > 1} == expected
    sharding.check({**LENGTHS, **changes}, sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_divide_evenly(name):
    config = PRESETS[name]
    for tp in (1, 2, 4, 8, 16, 32, 64):
        sizes = config.sizes
        assert sizes["V"] in (151936, 152064) and sizes["V"] % tp == 0, "no padding of the table"
        if sizes["N"] % tp == 0:
            sharding.check(sizes, {"tp": tp})
            for fsdp in (2, 16, 256):
                sharding.check(sizes, {"fsdp": fsdp, "tp": tp})
        else:
            with pytest.raises(ValueError, match=f"query heads N = {sizes['N']} "):
                sharding.check(sizes, {"tp": tp})


# Arrays


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tp": 2}, {"data": 2, "context": 2, "tp": 2}])
def test_place_and_fetch_are_inverse(sizes):
    rng = np.random.default_rng(0)
    value = rng.standard_normal((8, 16)).astype(np.float32)
    with on_mesh(**sizes) as mesh:
        for letters in ("BT", "FD", "DH"):
            placed = sharding.place(value, letters)
            assert placed.sharding == sharding.named(letters, mesh)
            np.testing.assert_array_equal(sharding.fetch(placed), value)


def test_arrays_handed_over_go_into_any_function():
    with on_mesh(fsdp=2):
        inside = sharding.place(np.ones((4, 2), np.float32), "BT")
        assert sharding.handed_over(inside) is inside
    outside = sharding.handed_over(inside)
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
    """A number from every kind of leaf."""
    y = jnp.einsum("BTD,FD->BTF", x * w["D"], w["FD"]) * w["Q"]
    y = jnp.einsum("BTF,DF->BTD", y, w["DF"], out_sharding=sharding.spec("BTD"))
    return jnp.sum(jnp.tanh(y)) * jnp.sum(w["H"])


@pytest.mark.parametrize("sizes", MESHES, ids=sharding.describe)
def test_unshard_gathers_weights_and_scatters_gradients(sizes):
    rng = np.random.default_rng(1)
    shapes = {"FD": (8, 16), "DF": (16, 8), "D": (16,), "H": (4,), "Q": (8,)}
    leaves = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    x = rng.standard_normal((8, 8, 16), np.float32)

    def whole(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        w = sharding.unshard(w)
        for name, leaf in w.items():
            partition = jax.typeof(leaf).sharding.spec.partitions
            axes = {axis for entry in partition for axis in sharding.entries(entry)}
            assert axes == ({"tp"} if "tp" in sizes and name in ("FD", "DF", "Q") else set())
        return products(w, x)

    def graded(function, mesh):
        with on_mesh(**mesh):
            placed = {name: sharding.place(leaf, name) for name, leaf in leaves.items()}
            grad = jax.jit(jax.value_and_grad(function), compiler_options=QUICK)
            value, gradients = grad(placed, sharding.place(x, "BTD"))
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
        w = sharding.place(np.ones((8, 16), np.float32), "FD")
        assert sharding.unshard(w).dtype == jnp.float32
        made = jax.make_jaxpr(lambda w: sharding.unshard(w, jnp.bfloat16))(w)
    names = [equation.primitive.name for equation in made.eqns]
    assert names.index("convert_element_type") < names.index("reshard")


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
        leaf = sharding.place(np.zeros(shape, np.float32), letters)
        found = []
        jax.jit(lambda x: found.append(sharding.leading_axis(x)))(leaf)
    assert found == [axis]


def test_heads_are_repeated_for_the_devices_of_their_queries():
    k = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    for tp, held in ((1, 2), (2, 2), (4, 4), (8, 8)):
        with on_mesh(tp=tp):
            assert sharding.held_heads(2) == held and sharding.held_heads(16) == 16
            spread = sharding.spread_heads(sharding.place(k, "BTKH", {"K": 2}))
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
