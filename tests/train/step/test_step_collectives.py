"""What a compiled training step sends and holds: exact numbers, which an accident would change."""

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import attention, meshes
from qwen_jax.model import vocabulary
from tests.support.tiny import QUICK, tiny_config
from train import step
from train.planning import collectives, hlo

# No weight of a block has the size of an activation, nor two kinds of activations the same size.
L, D, F, V, BATCH, LENGTH = 3, 64, 88, 640, 16, 24
CONFIG = tiny_config(
    num_layers=L,
    hidden_size=D,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    intermediate_size=F,
    vocab_size=V,
)
FLOAT = 4
ROWS = 128  # of the table that are gathered at a time
WHOLE = BATCH * LENGTH * D * FLOAT  # the residual of all rows


def compiled(
    mesh: Any,
    monkeypatch: pytest.MonkeyPatch,
    layers: int = L,
    batch: int = BATCH,
    **options: Any,
) -> Any:
    config = dataclasses.replace(CONFIG, num_layers=layers)
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 1)  # chunks of ROWS
    optimizer = step.Optimizer()
    with jax.set_mesh(mesh):
        state = step.abstract_state(config, optimizer, mesh=mesh)
        rows = step.abstract_batch(batch, LENGTH, mesh=mesh)
        run = step.make_step(optimizer, attention.xla, dtype=jnp.float32, **options)
        return run.lower(state, rows).compile(compiler_options=QUICK)


def sent(program: Any, mesh: Any) -> Counter[tuple[str, tuple[str, ...], int]]:
    """How often each kind goes over which axes with how many bytes at a time."""
    counted: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    for one in collectives.each(program, mesh):
        assert not one.looped
        counted[one.kind, one.axes, one.bytes // one.count] += one.count
    return counted


def without_small(counted: Counter[Any], axis: str) -> dict[tuple[str, int], int]:
    """Of 4 KiB and more, all of which go over one axis. A sum may carry scalars with it."""
    assert {axes for _, axes, _ in counted} == {(axis,)}
    return {(kind, size): n for (kind, _, size), n in counted.items() if size >= 4096}


def block_bytes(split: int) -> int:
    """The gradients of a block that are summed over the axis that splits D, in one collective;
    split: into how many parts tp cuts the weights.
    """
    matrices = (4 * D * D + 3 * D * F) // split
    return FLOAT * (matrices + 2 * D + 3 * D // split)  # norms and biases with them


def test_fsdp_gathers_weights_and_no_activation(monkeypatch):
    """Each matrix is gathered twice, forward and in the recomputation; its gradient is summed once
    (by an all-reduce of all leaves of a block together, where a TPU or GPU scatters).
    """
    mesh = meshes.make({"fsdp": 8})
    counted = without_small(sent(compiled(mesh, monkeypatch), mesh), "fsdp")
    assert counted == {
        ("all-gather", D * D * FLOAT): 2 * 4 * L,
        ("all-gather", D * F * FLOAT): 2 * 3 * L,
        ("all-reduce", block_bytes(1)): L,
        # The head, a chunk at a time: forward, backward, and its gradient.
        ("all-gather", ROWS * D * FLOAT): 2 * V // ROWS,
        ("reduce-scatter", ROWS * D * FLOAT): V // ROWS,
        # The look-up exchanges columns for tokens, there and back: the only activations.
        ("all-to-all", WHOLE // 8): 2,
    }


def test_without_recomputation_weights_are_gathered_once(monkeypatch):
    mesh = meshes.make({"fsdp": 8})
    counted = without_small(sent(compiled(mesh, monkeypatch, remat="none"), mesh), "fsdp")
    assert counted["all-gather", D * D * FLOAT] == 4 * L
    assert counted["all-gather", D * F * FLOAT] == 3 * L


def test_tp_sums_activations(monkeypatch):
    """Of a block: after attention and after the FFN, forward; the former again, as the FFN's input
    is recomputed; and before both, backward. No weight moves.
    """
    mesh = meshes.make({"tp": 8})
    counted = without_small(sent(compiled(mesh, monkeypatch), mesh), "tp")
    assert {kind for kind, _ in counted} == {"all-reduce"}
    assert all(WHOLE <= size < WHOLE + 256 for _, size in counted)
    # And the look-up, and the gradient of the logits.
    assert sum(counted.values()) == 5 * L + 2


def test_sequence_parallel_gathers_instead(monkeypatch):
    """Sums end on the device of their tokens (here an all-reduce and a slice, elsewhere a
    reduce-scatter), and tokens are gathered before each pair of products: forward, again in the
    recomputation, and of the gradient.
    """
    mesh = meshes.make({"tp": 8})
    program = compiled(mesh, monkeypatch, sequence_parallel=True)
    counted = without_small(sent(program, mesh), "tp")
    kinds = Counter[str]()
    for (kind, size), n in counted.items():
        assert WHOLE <= size < WHOLE + 256
        kinds[kind] += n
    # And the final norm's result before the logits, and the look-up's gradient.
    assert kinds["all-gather"] == 6 * L + 2
    assert kinds["all-reduce"] == 5 * L + 1
    assert kinds["reduce-scatter"] == 1  # of the logits' gradient
    plain = compiled(mesh, monkeypatch).memory_analysis()
    assert program.memory_analysis().temp_size_in_bytes < plain.temp_size_in_bytes


def test_fsdp_and_tp_each_over_their_own_axis(monkeypatch):
    mesh = meshes.make({"fsdp": 4, "tp": 2})
    counted = sent(compiled(mesh, monkeypatch), mesh)
    assert {axes for _, axes, _ in counted} == {("fsdp",), ("tp",)}
    assert counted["all-gather", ("fsdp",), D * D * FLOAT // 2] == 2 * 4 * L
    assert counted["all-gather", ("fsdp",), D * F * FLOAT // 2] == 2 * 3 * L
    assert counted["all-reduce", ("fsdp",), block_bytes(2)] == L
    activations = [
        n for (kind, axes, size), n in counted.items() if axes == ("tp",) and size >= WHOLE // 4
    ]
    assert sum(activations) == 5 * L + 2


def test_data_sums_each_gradient_once(monkeypatch):
    """Between copies only what each device keeps of the gradients moves: 1/4 of the weights."""
    mesh = meshes.make({"data": 2, "fsdp": 4})
    counted = sent(compiled(mesh, monkeypatch), mesh)
    across = Counter[str]()
    for (kind, axes, size), n in counted.items():
        if "data" in axes and size > 64:
            across[kind] += n * size
    kept = FLOAT * CONFIG.num_params() / 4
    assert set(across) == {"all-reduce"}
    assert kept * 0.97 < across["all-reduce"] < kept * 1.1


def test_context_passes_keys_round(monkeypatch):
    """Of each layer: keys and values forward, and in the recomputation; backward with their
    gradients. Weights as under fsdp.
    """
    mesh = meshes.make({"context": 4})
    counted = without_small(sent(compiled(mesh, monkeypatch), mesh), "context")
    keys = WHOLE // 4
    assert counted["collective-permute", keys] == (2 + 2 + 4) * 4 * L
    assert counted["all-gather", D * D * FLOAT] == 2 * 4 * L
    assert counted["all-gather", D * F * FLOAT] == 2 * 3 * L
    assert counted["all-reduce", block_bytes(1)] == L
    assert {kind for kind, size in counted if size in (keys, WHOLE)} == {
        "collective-permute",
        "all-to-all",  # of the look-up
    }


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"context": 4, "tp": 2}])
def test_state_is_split_over_all_devices(monkeypatch, sizes):
    """A float32 weight and its two moments, 12 bytes, over the devices; and nothing comes back
    that was not given.
    """
    mesh = meshes.make(sizes)
    memory = compiled(mesh, monkeypatch).memory_analysis()
    rows = BATCH * LENGTH // math.prod(n for axis, n in sizes.items() if axis != "tp")
    wanted = 12 * CONFIG.num_params() / mesh.size + 5 * FLOAT * rows
    assert wanted <= memory.argument_size_in_bytes < 1.05 * wanted
    assert memory.output_size_in_bytes < 1.05 * wanted
    assert memory.alias_size_in_bytes > 0.95 * 12 * CONFIG.num_params() / mesh.size, "donated"


# What scale costs


@pytest.mark.slow
def test_depth_costs_what_a_layer_must(monkeypatch):
    """No instruction; and in temporary memory, of each layer, the residual that is saved, float32
    gradients of a device's part of the weights, and at most one copy of that part to compute with.
    """
    mesh, deep = meshes.make({"fsdp": 8}), 4 * L
    programs = [compiled(mesh, monkeypatch, layers=layers) for layers in (L, deep)]
    counts = [
        sum(len(c.instructions) for c in hlo.parse(p.as_text()).computations.values())
        for p in programs
    ]
    # XLA cuts the sums of the norm into windows by their sizes; a layer has hundreds.
    assert abs(counts[1] - counts[0]) < 0.01 * counts[0]
    held = [p.memory_analysis().temp_size_in_bytes for p in programs]
    growth = (held[1] - held[0]) / (deep - L)
    layer = dataclasses.replace(CONFIG, num_layers=L + 1).num_params() - CONFIG.num_params()
    gradients = FLOAT * layer / 8
    assert WHOLE / 8 + gradients <= growth <= WHOLE / 8 + 2 * gradients


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_devices(monkeypatch):
    """At two rows a device, temporary memory is a constant and what is split over the devices: the
    latter halves, gradients and all, and nothing else changes.
    """
    held = []
    for devices in (2, 4, 8):
        program = compiled(meshes.make({"fsdp": devices}), monkeypatch, batch=2 * devices)
        held.append(program.memory_analysis().temp_size_in_bytes)
    falls = [before - after for before, after in itertools.pairwise(held)]
    assert falls[0] > FLOAT * CONFIG.num_params() / 4
    assert falls[1] == pytest.approx(falls[0] / 2, rel=0.03)
