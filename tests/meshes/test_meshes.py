"""Meshes as text and of devices, errors that name the mesh to use, and the one that is chosen."""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax import PRESETS, meshes
from qwen_jax.meshes import sharding
from tests.support.tiny import on_mesh

LENGTHS = {"V": 64, "D": 32, "N": 8, "K": 4, "F": 48, "B": 8, "T": 32}
ALL = {"data": 2, "fsdp_outer": 2, "fsdp": 2, "context": 2, "tp": 2}


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
    assert meshes.parse(text) == expected
    assert meshes.parse(meshes.describe(expected)) == expected


def test_describe():
    assert meshes.describe({"tp": 2, "data": 1, "fsdp": 4}) == "fsdp=4,tp=2"
    assert meshes.describe({}) == "fsdp=1"


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=", "fsdp=0", "fsdp=-2", "fsdp=2.0", "model=2", "tp=2,tp=2", "=2", "4"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="write it as fsdp=4,tp=2") as error:
        meshes.parse(text)
    assert repr(text) in str(error.value) and "context" in str(error.value)


# Meshes of devices


def test_a_mesh_of_the_first_devices():
    mesh = meshes.make({"fsdp": 2, "tp": 3})
    assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {"fsdp": 2, "tp": 3}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[:6]]
    assert meshes.make().size == 1
    with pytest.raises(ValueError, match="mesh fsdp=8,tp=2 needs 16 devices, there are 8"):
        meshes.make({"fsdp": 8, "tp": 2})


@pytest.mark.parametrize(
    "sizes", [{"tensor": 4}, {"tp": 0}, {"tp": "2"}, {"tp": True}, {"tp": 1.0}, "fsdp=1", [2]]
)
def test_sizes_of_a_mesh_that_are_none(sizes):
    with pytest.raises(ValueError, match=r"^mesh.* must be sizes of at least 1 by axis, such as"):
        meshes.make(sizes)


def test_the_mesh_in_force():
    assert meshes.current().size == 1
    with on_mesh(tp=2) as mesh:
        assert meshes.current() == mesh
        with on_mesh(fsdp=4) as inner:
            assert meshes.current() == inner
        assert meshes.current() == mesh
    for axes, kind in ((("x",), AxisType.Explicit), (("tp",), AxisType.Auto)):
        other = jax.make_mesh((2,), axes, (kind,))
        with jax.set_mesh(other), pytest.raises(ValueError, match="explicit axes out of data, "):
            meshes.current()


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
    assert meshes.count_slices(devices) == 2
    assert meshes.count_slices(jax.devices()) == 1
    mesh = meshes.make({"data": 4, "fsdp": 4, "tp": 2}, devices)
    for i, copy in enumerate(mesh.devices):
        assert {device.slice_index for device in copy.flat} == {i // 2}
    assert meshes.make({"fsdp": 16}, slices[0]).shape["fsdp"] == 16
    with pytest.raises(ValueError, match="fsdp=32: data must be a multiple of the 2 slices"):
        meshes.make({"fsdp": 32}, devices)
    sizes = PRESETS["qwen-7b"].sizes
    assert meshes.describe(meshes.default(sizes, 32, training=True, slices=2)) == "data=2,fsdp=16"
    assert meshes.describe(meshes.default(sizes, 32, slices=2)) == "data=2,tp=16"
    # Rows that two slices cannot share stay on one.
    one = meshes.default(sizes | {"B": 3}, 32, slices=2)
    assert math.prod(one.values()) <= 16


def test_fsdp_over_a_3d_torus_falls_into_planes():
    mesh = meshes.in_planes(mesh_of(torus(4, 2, 2), fsdp=16))
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
    assert meshes.in_planes(mesh) is mesh


def test_devices_without_coordinates_are_left_as_they_are():
    assert meshes.make({"fsdp": 8}).shape["fsdp_outer"] == 1


# What divides


@pytest.mark.parametrize(
    ("changes", "mesh", "problem", "nearest"),
    [
        ({"N": 6, "K": 6}, "tp=4", "query heads N = 6 is not divisible by tp=4", "fsdp=2,tp=2"),
        (
            {"K": 6, "N": 24},
            "tp=4",
            "key/value heads K = 6 is not divisible by tp=4",
            "fsdp=2,tp=2",
        ),
        ({"F": 42}, "tp=4", "feed-forward width F = 42 is not divisible by tp=4", "fsdp=2,tp=2"),
        ({"V": 66}, "fsdp=2,tp=4", "vocabulary V = 66 is not divisible by tp=4", "fsdp=4,tp=2"),
        ({"D": 36}, "fsdp=8", "model width D = 36 is not divisible by fsdp=8", "fsdp=4,tp=2"),
        ({"B": 6}, "fsdp=4", "batch B = 6 is not divisible by fsdp=4", "fsdp=2,tp=2"),
        (
            {"B": 2},
            "data=2,fsdp=2",
            "batch B = 2 is not divisible by data=2 x fsdp=2",
            "fsdp=2,tp=2",
        ),
        ({"T": 20}, "context=4", "length T = 20 is not divisible by context=4", "context=2,tp=2"),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_mesh(changes, mesh, problem, nearest):
    lengths = {**LENGTHS, **changes}
    sizes = meshes.parse(mesh)
    with pytest.raises(ValueError) as error:
        meshes.check(lengths, sizes)
    message = str(error.value)
    assert message.startswith(f"mesh {mesh}: {problem}") and "\n" not in message
    found = re.search(r"; the nearest mesh that works is (\S+)$", message)
    assert found, message
    advised = meshes.parse(found.group(1))
    meshes.check(lengths, advised)
    # Nothing nearer works: of as many devices, and fewest doublings away.
    assert math.prod(advised.values()) == math.prod(sizes.values())
    assert found.group(1) == nearest
    distance = apart(advised, sizes)
    for other in meshes.of_size(math.prod(sizes.values())):
        if apart(other, sizes) < distance:
            with pytest.raises(ValueError):
                meshes.check(lengths, other)


def apart(one: dict[str, int], other: dict[str, int]) -> float:
    return sum(abs(math.log2(one[a] / other[a])) for a in sharding.AXES)


def test_a_residual_split_by_tokens_is_checked():
    meshes.check({"T": 8}, {"context": 2, "tp": 4}, sequence_parallel=True)
    meshes.check({"T": 6}, {"tp": 4})
    with pytest.raises(ValueError, match=r"length T = 6 is not divisible by tp=4; the nearest"):
        meshes.check({"T": 6}, {"tp": 4}, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"T = 12 .*by context=2 x tp=4 \(in two pieces each\)"):
        meshes.check({"T": 12}, {"context": 2, "tp": 4}, sequence_parallel=True)


@pytest.mark.parametrize(
    ("asked", "length", "sizes", "expected"),
    [
        (None, 6, {"tp": 2}, (True, "the default where tokens divide, as 6 do over tp=2")),
        (None, 8, {"context": 2, "tp": 4}, (True, "as 8 do over context=2 x tp=4")),
        (None, 6, {"tp": 4}, (False, "length T = 6 is not divisible by tp=4")),
        (None, 12, {"context": 2, "tp": 4}, (False, "T = 12 is not divisible by context=2 x tp")),
        (None, 6, {"fsdp": 4}, (False, "the mesh has no tp")),
        (False, 6, {"tp": 2}, (False, "as asked for")),
        (True, 6, {"tp": 4}, (True, "as asked for")),  # which `check` refuses
    ],
)
def test_a_residual_is_split_by_tokens_where_they_divide(asked, length, sizes, expected):
    split, why = meshes.splits_tokens(asked, length, mesh=sizes)
    assert split == expected[0] and expected[1] in why


def test_fewer_devices_where_no_mesh_of_as_many_works():
    lengths = {"V": 6, "D": 6, "N": 6, "K": 6, "F": 6, "B": 6, "T": 7}
    with pytest.raises(ValueError, match="nearest mesh that works is ") as error:
        meshes.check(lengths, {"fsdp": 5})
    advised = meshes.parse(str(error.value).rpartition(" ")[2])
    assert math.prod(advised.values()) == 4 and advised["fsdp"] == 2


def test_a_length_takes_two_pieces_a_device():
    meshes.check({**LENGTHS, "T": 16}, {"context": 8})
    with pytest.raises(ValueError, match=r"T = 24 .* context=8 \(in two pieces each\)"):
        meshes.check({**LENGTHS, "T": 24}, {"context": 8})
    meshes.check({**LENGTHS, "T": 7}, {"fsdp": 8})


def test_what_divides_passes():
    for sizes in ({"fsdp": 8}, {"tp": 8}, {"fsdp": 2, "tp": 4}, ALL, {}):
        meshes.check(LENGTHS, sizes)
    meshes.check({"N": 8}, {"fsdp": 7}), "axes that are not given are not checked"


def test_every_mesh_of_a_number_of_devices_once():
    found = [tuple(mesh.values()) for mesh in meshes.of_size(12)]
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
    sizes = meshes.default({**LENGTHS, **changes}, devices, training=training)
    assert {axis: size for axis, size in sizes.items() if size > 1} == expected
    meshes.check({**LENGTHS, **changes}, sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_divide_evenly(name):
    config = PRESETS[name]
    for tp in (1, 2, 4, 8, 16, 32, 64):
        sizes = config.sizes
        assert sizes["V"] in (151936, 152064) and sizes["V"] % tp == 0, "no padding of the table"
        if sizes["N"] % tp == 0:
            meshes.check(sizes, {"tp": tp})
            for fsdp in (2, 16, 256):
                meshes.check(sizes, {"fsdp": fsdp, "tp": tp})
        else:
            with pytest.raises(ValueError, match=f"query heads N = {sizes['N']} "):
                meshes.check(sizes, {"tp": tp})
