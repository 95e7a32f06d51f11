"""Collectives read from programs: texts as CPU, GPU and TPU write them, and compiled programs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.planning import collectives, hlo
from train.planning.collectives import Collective

SIZES = {"fsdp": 4, "tp": 2}

PROGRAMS = Path(__file__).parents[3] / "tests/programs"
# A loop as a TPU program has it: no trip count; a gather that two fusions overlap; a scatter that
# is an all-reduce and a slice; a second loop of three passes inside.
TPU = (PROGRAMS / "tpu.txt").read_text()
GPU = (PROGRAMS / "gpu.txt").read_text()


def rows(found: list[Collective]) -> set[tuple[Any, ...]]:
    return {(x.kind, x.axes, x.size, x.count, x.bytes, x.looped) for x in found}


def test_a_tpu_program() -> None:
    found = collectives.of(TPU.replace("LIMIT", "5"), SIZES)
    assert rows(found) == {
        ("all-gather", ("fsdp",), 4, 5, 5 * 32 * 16 * 2, False),
        ("reduce-scatter", ("fsdp",), 4, 5, 5 * 32 * 16 * 2, False),
        ("collective-permute", ("tp",), 2, 15, 15 * 4 * 4, False),
    }
    assert next(x for x in found if x.kind == "all-gather").where == ("unshard",)


def test_a_loop_of_unknown_length_counts_one_pass() -> None:
    text = TPU.replace("%end = s32[] constant(LIMIT)", "%end = s32[] parameter(2)")
    assert ("all-gather", ("fsdp",), 4, 1, 32 * 16 * 2, True) in rows(collectives.of(text, SIZES))


def test_a_condition_runs_once_more_than_its_body() -> None:
    limit = "  %limit = s32[] constant(7)\n"
    reduced = "%m = s32[] all-reduce(%i.1), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add"
    text = TPU.replace("LIMIT", "5").replace(limit, f"{limit}  {reduced}\n")
    assert ("all-reduce", ("tp",), 2, 20, 20 * 4, False) in rows(collectives.of(text, SIZES))


def test_a_compiled_condition() -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("tp")))
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + 1, x))
    with jax.set_mesh(mesh):
        compiled = loop.lower(x).compile()
    assert rows(collectives.of(compiled, mesh)) == {("all-reduce", ("tp",), 2, 1, 4, True)}


def test_a_gpu_program() -> None:
    assert rows(collectives.of(GPU, SIZES)) == {
        ("all-gather", ("fsdp",), 4, 1, 4 * (16 * 8 * 4 + 4 * 2), False),
        ("all-reduce", ("fsdp", "tp"), 8, 1, 16 * 8 * 4, False),
        ("all-to-all", ("tp",), 2, 1, 16 * 8 * 4, False),
    }


def test_collectives_across_slices() -> None:
    """A program of one slice of four devices; the mesh has two slices."""
    text = (PROGRAMS / "slices.txt").read_text()
    sizes = {"data": 2, "fsdp": 2, "tp": 2}
    assert rows(collectives.of(text, sizes)) == {
        ("all-reduce", ("data",), 2, 1, 64 * 8 * 128 * 2, False),
        ("all-gather", ("data",), 2, 1, 2 * 32 * 4, False),
        ("all-reduce", ("tp",), 2, 1, 16 * 4, False),
    }


# As a TPU hands a collective to a core of its own: `async-start` runs a call that is not known by
# its target, which names the computation of the collective.
OFFLOADED = """HloModule offloaded, num_partitions=8

%gather (x: f32[16]) -> f32[64] {
  %x = f32[16] parameter(0)
  ROOT %g = f32[64] all-gather(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}
}, execution_thread="sparsecore"

%async (x.1: f32[16]) -> f32[64] {
  %x.1 = f32[16] parameter(0)
  ROOT %c = f32[64] custom-call(%x.1), custom_call_target="any", called_computations={%gather}
}, execution_thread="sparsecore"

ENTRY %main (y: f32[16]) -> f32[64] {
  %y = f32[16] parameter(0)
  %s = ((), (), (s32[8])) async-start(), async_execution_thread="sparsecore", calls=%async
  %u = ((f32[16]), f32[64], (s32[8])) async-update(%s, %y)
  ROOT %d = f32[64] async-done(%u)
}
"""


def test_a_collective_on_a_core_of_its_own() -> None:
    expected = {("all-gather", ("fsdp",), 4, 1, 64 * 4, False)}
    assert rows(collectives.of(OFFLOADED, SIZES)) == expected


def test_a_collective_that_nothing_is_known_to_run_is_not_left_out() -> None:
    text = OFFLOADED.replace("called_computations", "computations_in_some_new_way")
    with pytest.raises(ValueError, match="what runs computation gather, and how often, is not"):
        collectives.of(text, SIZES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['fsdp'=4,'tp'=2] {'fsdp'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['fsdp'=4,'tp'=2] {'tp'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'b','a'}", [[0, 2, 4, 6, 1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8], device_ids=([4,2]T(1,0)) {'a'}", [[0, 2, 4, 6, 1, 3, 5, 7]]),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups(text: str, expected: list[list[int]]) -> None:
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true, x={{{{0,1}}}}"
    assert collectives.replica_groups(attributes, 8).tolist() == expected


def test_groups_written_in_another_way_are_refused() -> None:
    with pytest.raises(ValueError, match="not known"):
        collectives.replica_groups("replica_groups=<odd>", 8)


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        collectives.of("module @jit {}", SIZES)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("(f32[], (s4[3], pred[5]{0}), /*index=2*/token[])", 4 + 2 + 5),
        ("f8e4m3fn[4,4]", 16),
        ("c64[2]", 16),
        ("f32[<=8]", 32),
    ],
)
def test_bytes_of_a_shape(shape: str, expected: int) -> None:
    assert hlo.nbytes(shape) == expected


def compiled_loop(mesh: jax.sharding.Mesh, layers: int) -> jax.stages.Compiled:
    """The gradient of layers of two products: weights over fsdp and tp, the batch over fsdp."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            up, down = jax.reshard(w[0], P(None, "tp")), jax.reshard(w[1], P("tp", None))
            y = jnp.einsum("bf,fd->bd", x @ up, down, out_sharding=P("fsdp", None))
            return jnp.tanh(y), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    def abstract(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    weights = (
        abstract((layers, 64, 128), P(None, "fsdp", "tp")),
        abstract((layers, 128, 64), P(None, "tp", "fsdp")),
    )
    with jax.set_mesh(mesh):
        return jax.jit(loss).lower(weights, abstract((32, 64), P("fsdp", None))).compile()


@pytest.mark.parametrize("layers", [3, 6])
def test_a_compiled_program(layers: int) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Explicit,) * 2)
    compiled = compiled_loop(mesh, layers)
    found = {(x.kind, x.axes): x for x in collectives.of(compiled, mesh)}
    gathers = found["all-gather", ("fsdp",)]
    assert (gathers.size, gathers.bytes) == (4, layers * 2 * 64 * 64 * 4)
    reduced = found["all-reduce", ("tp",)]
    assert (reduced.size, reduced.count, reduced.bytes) == (2, layers, layers * 8 * 64 * 4)


def test_a_mesh_whose_devices_are_permuted() -> None:
    devices = np.array(jax.devices()).reshape(2, 4).T
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    found = {(x.kind, x.axes) for x in collectives.of(compiled_loop(mesh, 2), mesh)}
    assert ("all-gather", ("fsdp",)) in found and ("all-reduce", ("tp",)) in found


def test_one_device_communicates_with_nobody() -> None:
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), (AxisType.Explicit,) * 2)
    assert collectives.of(compiled_loop(mesh, 2), mesh) == []


def test_the_table_marks_open_loops() -> None:
    row = Collective("all-gather", ("data", "fsdp"), size=8, count=3, bytes=4_000_000, looped=True)
    assert collectives.table([row]).splitlines()[1].split() == [
        "all-gather",
        "data,fsdp",
        "8",
        "3*",
        "4.00",
    ]
