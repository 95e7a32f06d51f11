"""The kernels for TPUs cost no more cycles than jax's best, and masks no more than they must."""

import functools

import pytest

from benchmarks import aot, kernel_cost

LENGTH = 8192


@functools.cache
def cost(task: str, target: str) -> aot.Cost:
    entry = kernel_cost.OURS[task]
    blocks = kernel_cost.best(entry, target, LENGTH)
    (found,) = kernel_cost.measure(entry, target, LENGTH, blocks).values()
    return found


@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("task", ["forward", "backward"])
def test_no_slower_than_splash(task: str, target: str) -> None:
    ours = kernel_cost.OURS[task]
    blocks = kernel_cost.best(ours, target, LENGTH)
    counts = {kernel: cost(task, target) for kernel in ours.kernels}
    cycles = kernel_cost.whole(ours, counts, target, LENGTH, blocks)
    for rival in kernel_cost.RIVALS[task]:
        blocks = kernel_cost.best(rival, target, LENGTH)
        measured = kernel_cost.measure(rival, target, LENGTH, blocks)
        assert cycles <= kernel_cost.whole(rival, measured, target, LENGTH, blocks)


@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("task", ["forward", "backward"])
def test_a_block_that_is_wholly_visible_pays_for_no_mask(task: str, target: str) -> None:
    full, near, mixed = cost(task, target).steps
    assert full.used["VALU"] < 0.85 * near.used["VALU"] < near.used["VALU"] < mixed.used["VALU"]
    assert full.cycles <= 1.02 * min(near.cycles, mixed.cycles)
    assert near.cycles <= mixed.cycles <= 1.35 * full.cycles
