"""The arithmetic of bounds against cases worked out by hand, and what is published against jax's
own table of chips.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen_jax import PRESETS
from qwen_jax.meshes import hardware, sharding
from tests.support.tiny import tiny_config
from train.planning import bounds, topology
from train.planning.collectives import Collective
from train.planning.topology import Link

RING = Link("ICI", bandwidth=200e9, one_way=100e9, size=8, crossing=8)
SWITCH = Link("NVLink", bandwidth=450e9, one_way=450e9, size=8)
NETWORK = Link("InfiniBand", bandwidth=400e9, one_way=50e9, size=4)


@pytest.mark.parametrize(
    ("kind", "link", "expected"),
    [
        # 8 GB gathered over 8: a device takes in 7 GB.
        ("all-gather", RING, 7 / 200),
        ("reduce-scatter", RING, 7 / 200),
        ("all-reduce", RING, 14 / 200),
        # Each device of a half sends 4 GB to the other half: 16 GB over two links of 100 GB/s.
        ("all-to-all", RING, 16 / 200),
        ("collective-permute", RING, 8 / 100),
        ("all-gather", SWITCH, 7 / 450),
        ("all-to-all", SWITCH, 7 / 450),
        ("all-reduce", NETWORK, 2 * 6 / 400),
        ("collective-permute", NETWORK, 8 / 50),
        ("collective-broadcast", SWITCH, 8 / 450),
    ],
)
def test_a_collective_takes(kind: str, link: Link, expected: float) -> None:
    one = Collective(kind, ("fsdp",), size=link.size, count=1, bytes=8 * 10**9)
    name, seconds = bounds.slowest(one, [link])
    assert name == link.name
    assert seconds == pytest.approx(expected)


def test_over_two_kinds_of_link_the_slower_counts() -> None:
    one = Collective("all-gather", ("fsdp",), size=32, count=1, bytes=32 * 10**9)
    # NVLink: 28 of 32 GB at 450 GB/s = 62 ms; InfiniBand: 24 of 32 GB at 400 GB/s = 60 ms.
    name, seconds = bounds.slowest(one, [SWITCH, NETWORK])
    assert name == "NVLink"
    assert seconds == pytest.approx(28 / 450)


def test_terms_add_up_by_link_and_axes() -> None:
    found = [
        Collective("all-gather", ("fsdp",), size=8, count=4, bytes=8 * 10**9),
        Collective("reduce-scatter", ("fsdp",), size=8, count=4, bytes=8 * 10**9),
        Collective("all-reduce", ("fsdp", "tp"), size=8, count=1, bytes=45 * 10**8),
    ]
    links = {("fsdp",): [RING], ("fsdp", "tp"): [SWITCH]}
    bound = bounds.bound(
        459e10, 459e12, moved=2765e7, bandwidth=2765e9, collectives=found, links=links
    )
    terms = {term.name: term.seconds for term in bound.terms}
    assert terms == pytest.approx(
        {"compute": 0.01, "HBM": 0.01, "ICI fsdp": 2 * 7 / 200, "NVLink fsdp,tp": 0.0175}
    )
    assert bound.limit == "ICI fsdp"
    assert bound.seconds == pytest.approx(0.07)
    assert bound.serial == pytest.approx(0.01 + 0.01 + 0.07 + 0.0175)


def test_a_faster_link_of_a_collective_has_a_term_too() -> None:
    """As InfiniBand beside NVLink, which limits a gather but not a sum here; piece by piece, so
    that only the slower one counts where nothing overlaps.
    """
    network = dataclasses.replace(NETWORK, bandwidth=430e9)
    axes = ("fsdp",)
    found = [
        Collective("all-gather", axes, size=32, count=1, bytes=32 * 10**9),
        Collective("collective-permute", axes, size=2, count=1, bytes=10**9),
    ]
    bound = bounds.bound(
        0,
        1,
        moved=0,
        bandwidth=1,
        collectives=found,
        links={axes: [SWITCH, network]},
        network="InfiniBand",
    )
    terms = {term.name: (term.seconds, term.in_step) for term in bound.terms[2:]}
    gathered, sent = (28 / 450, 24 / 430), (1 / 450, 1 / 50)
    assert terms["NVLink fsdp"] == pytest.approx((gathered[0] + sent[0], sent[0]))
    assert terms["InfiniBand fsdp"] == pytest.approx((gathered[1] + sent[1], gathered[1]))
    assert len(terms) == 2
    assert bound.serial == pytest.approx(gathered[0] + sent[1])
    assert bound.limit == "InfiniBand fsdp"
    assert bound.seconds == pytest.approx(gathered[1] + sent[1])


def test_a_network_that_carries_nothing_has_a_term() -> None:
    found = [Collective("all-gather", ("tp",), size=8, count=4, bytes=8 * 10**9)]
    bound = bounds.bound(
        1,
        1,
        moved=1,
        bandwidth=1,
        collectives=found,
        links={("tp",): [SWITCH]},
        network="InfiniBand",
    )
    assert bounds.Term("InfiniBand", 0.0) in bound.terms
    assert [topology.parse(x).network for x in ("h100:8", "h100:2x8", "h100:8*2")] == [
        "",
        "InfiniBand",
        "InfiniBand",
    ]
    assert topology.parse("v5e:4x4").network == ""
    assert topology.parse("v5e:4x4*2").network == "DCN"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen-1.8b", 9.8e9), ("qwen-7b", 44.2e9), ("qwen-14b", 82.8e9), ("qwen-72b", 434e9)],
)
def test_flops_of_a_token(name: str, expected: float) -> None:
    assert PRESETS[name].flops_per_token(2048) == pytest.approx(expected, rel=0.005)


def test_flops_of_a_token_by_hand() -> None:
    # 2 layers of 4 x 32 x 64 + 3 x 32 x 44 weights, 3 x 64 biases and 2 x 32 norms, a norm of 32,
    # a head of 68 x 32; 10 of 20 keys seen by 4 heads of 16, in two products, three times.
    weights = 2 * (4 * 32 * 64 + 3 * 32 * 44 + 3 * 64 + 2 * 32) + 32 + 68 * 32
    config = tiny_config()
    assert config.num_multiplied() == weights
    assert config.flops_per_token(20) == 6 * weights + 3 * 2 * (2 * 2 * 10 * 4 * 16)
    # With a window of 4, a token sees 4 keys but for the first ones: 4 - 4 x 4 / 40.
    windowed = tiny_config(layer_windows=[4, None])
    assert windowed.flops_per_token(20) == 6 * weights + 3 * 2 * 2 * (3.6 + 10) * 4 * 16
    assert tiny_config(tie_embeddings=True).num_multiplied() == weights


def test_bytes_of_a_cached_token() -> None:
    assert PRESETS["qwen-72b"].kv_bytes_per_token("bfloat16") == 2.5 * 2**20
    assert PRESETS["qwen-7b"].kv_bytes_per_token("int8") == 2 * 32 * 32 * (128 + 4)
    with pytest.raises(ValueError, match="int4"):
        PRESETS["qwen-7b"].kv_bytes_per_token("int4")


def test_published_figures_agree_with_those_of_jax() -> None:
    versions = {
        "v4": (pltpu.ChipVersion.TPU_V4, 2),
        "v5e": (pltpu.ChipVersion.TPU_V5E, 1),
        "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
        "v6e": (pltpu.ChipVersion.TPU_V6E, 1),
        "tpu7x": (pltpu.ChipVersion.TPU_7X, 1),
    }
    assert set(versions) == set(hardware.TPUS)
    for name, (version, cores) in versions.items():
        chip, core = hardware.TPUS[name], pltpu.get_tpu_info_for_chip(version, 1)
        assert chip.flops == pytest.approx(cores * core.bf16_ops_per_second, rel=0.01)
        # jax has 2460 GB/s for a v5p where its page says 2765.
        assert chip.bandwidth == pytest.approx(cores * core.mem_bw_bytes_per_second, rel=0.13)
        # Of a v5p, libtpu has 95.73 GiB where its page says 95.
        assert chip.usable < 1.01 * chip.hbm
    assert hardware.TPUS["v5p"].hbm == 95 * hardware.GIB


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("v5p:8x8x8", 512),
        ("v5e:16x16*2", 512),
        ("tpu7x:2x2x1", 8),
        ("h100:8x8", 64),
        ("a100:2x8*3", 48),
    ],
)
def test_a_topology(text: str, devices: int) -> None:
    parsed = topology.parse(text)
    assert parsed.devices == devices
    assert str(parsed) == text
    assert topology.parse("h100:8") == topology.parse("H100:1x8")


@pytest.mark.parametrize("name", ["7x", "v7x"])
def test_another_name_of_a_chip(name: str) -> None:
    assert str(topology.parse(f"{name}:2x2x1*2")) == "tpu7x:2x2x1*2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", "CHIP:SIZE"),
        ("v9:2x2", "chips: v4, v5e"),
        ("v5p:8x8", "3 lengths"),
        ("v5e:0x4", "at least 1"),
        ("h100:1x2x8", "hosts x GPUs"),
        ("v5e:4x4*0", "at least 1"),
        ("v5e:32x32", r"16x16 at most; take several, as 16x16\*2"),
    ],
)
def test_a_topology_that_is_not(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.parse(text)


def mesh_of(places: Any, shape: tuple[int, ...], slices: int = 1) -> Any:
    """A mesh of data, fsdp, context, tp over devices at these places, as far as links go."""
    devices = [
        SimpleNamespace(coords=list(place), core_on_chip=0, slice_index=number)
        for number in range(slices)
        for place in places
    ]
    array = np.array(devices, object).reshape(shape[0], 1, *shape[1:])
    return SimpleNamespace(devices=array, axis_names=sharding.AXES)


def torus(*lengths: int) -> list[tuple[int, ...]]:
    grid = [*np.ndindex(*lengths)]
    return [tuple(place) + (0,) * (3 - len(lengths)) for place in grid]


def links(text: str, mesh: Any, *axes: str) -> list[Link]:
    return topology.links(topology.parse(text), mesh, axes=axes)


def test_links_of_a_torus() -> None:
    # 8 x 8 x 8 on a v5p: the last dimension is tp, the others fsdp; each link 100 GB/s.
    mesh = mesh_of(torus(8, 8, 8), (1, 64, 1, 8))
    assert links("v5p:8x8x8", mesh, "tp") == [Link("ICI", 200e9, 100e9, 8, 8)]
    assert links("v5p:8x8x8", mesh, "fsdp") == [Link("ICI", 400e9, 100e9, 64, 16)]
    assert links("v5p:8x8x8", mesh, "fsdp", "tp") == [Link("ICI", 600e9, 100e9, 512, 24)]
    assert links("v5p:8x8x8", mesh, "data") == []


def test_without_wrap_around_a_line_has_half() -> None:
    mesh = mesh_of(torus(4, 4), (1, 4, 1, 4))
    assert links("v5e:4x4", mesh, "tp") == [Link("ICI", 50e9, 50e9, 4, 4)]
    half = mesh_of(torus(16, 16), (1, 32, 1, 8))  # tp: 8 of 16 in a row
    assert links("v5e:16x16", half, "tp") == [Link("ICI", 50e9, 50e9, 8, 8)]
    # fsdp: a ring of 16, and every eighth chip of the other, whose links 8 groups share.
    (path,) = links("v5e:16x16", half, "fsdp")
    assert path.bandwidth == pytest.approx(100e9 + 100e9 / 8)


def test_links_between_slices_and_hosts() -> None:
    mesh = mesh_of(torus(4, 4), (2, 4, 1, 4), slices=2)
    assert links("v5e:4x4*2", mesh, "data") == [Link("DCN", 3.125e9, 3.125e9, 2)]
    over = links("v5e:4x4*2", mesh, "data", "tp")
    assert over == [Link("ICI", 50e9, 50e9, 4, 4), Link("DCN", 12.5e9, 3.125e9, 2)]
    gpus = mesh_of([(0, host, gpu) for host in range(4) for gpu in range(8)], (1, 8, 1, 4))
    assert links("h100:4x8", gpus, "tp") == [Link("NVLink", 450e9, 450e9, 4)]
    # fsdp: 2 GPUs of each host, with a port each.
    assert links("h100:4x8", gpus, "fsdp") == [
        Link("NVLink", 450e9, 450e9, 2),
        Link("InfiniBand", 100e9, 50e9, 4),
    ]


def test_two_cores_of_a_chip_share_its_links() -> None:
    places = [place for place in torus(4, 4, 4) for _ in range(2)]
    mesh = mesh_of(places, (1, 32, 1, 4))
    for i, device in enumerate(mesh.devices.reshape(-1)):
        device.core_on_chip = i % 2
    assert links("tpu7x:4x4x4", mesh, "tp") == [
        Link("on chip", 600e9, 600e9, 2),
        Link("ICI", 100e9, 100e9, 2, 2),
    ]
    apart = mesh_of(places, (1, 64, 1, 2))  # fsdp: one core of each chip
    for device in apart.devices[..., 1].reshape(-1):
        device.core_on_chip = 1
    (path,) = links("tpu7x:4x4x4", apart, "fsdp")
    assert path.bandwidth == pytest.approx(3 * 2 * 100e9 / 2)


def test_the_description_of_a_gpu_has_its_memory() -> None:
    small = dataclasses.replace(hardware.GPUS["h100"], hbm=40e9)
    assert "device_memory_size: 40000000000" in small.config
    assert "major: 9" in small.config
