"""What benchmarks/aot.py reads out of dumps, on small ones made by hand, and how costs add up."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import aot, kernel_cost
from benchmarks.aot import Region
from qwen_jax.kernels import flash_tpu
from qwen_jax.kernels.flash_tpu import TpuBlocks

# A grid of unknown length over a body that starts something, computes in one of two ways, with a
# loop of three trips in the second, and finishes.
SCHEDULE = """
$region0: #{kernel.1}
  // region range: [0, 60)
  $region1: #{kernel.1} parent=0 // loop_pre_header
    // region range: [1, 2)
  $region2: #{kernel.1} parent=0 // loop_body
    // region range: [2, 50)
    $region3: #{kernel.1} parent=2 // pred_check_branch
      // region range: [2, 4)
      %1 = sbr.rel (%p1) target bundleno = 9 (0x9), region = 4
    $region5: #{kernel.1} parent=2 // pred_check_branch
      // region range: [9, 10)
      %2 = sbr.rel (%p2) target bundleno = 20 (0x14), region = 6
    $region7: #{kernel.1} parent=2 // pred_check_branch
      // region range: [20, 21)
      %3 = sbr.rel (%p3) target bundleno = 40 (0x28), region = 8
    loop: start=0, step=2, limit=5
    $region9: #{kernel.1} parent=2 // loop_body
      // region range: [25, 35)
      %4 = sbr.rel (%p4) target bundleno = 25 (0x19), region = 9
    $region10: #{kernel.1} parent=2 // loop_footer
      // region range: [40, 50)
      %5 = sbr.rel (%p5) target bundleno = 2 (0x2), region = 2
"""
START = Region("predicated", 4, 9)
WAYS = (
    Region("predicated", 10, 20),
    Region("predicated", 21, 40, children=(Region("loop", 25, 35, 3),)),
)
COLUMNS = (*aot.SLOTS[:7], "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
CAPACITY = [4, 4, 3, 4, 2, 1, 3, 3, 1, 1, 2]


def use(*at: tuple[str, int, int]) -> np.ndarray:
    """Slots of 60 bundles: one of that name in [first, last)."""
    used = np.zeros((60, len(COLUMNS)), int)
    for name, first, last in at:
        used[first:last, COLUMNS.index(name)] = 1
    return used


USED = use(("VALU", 4, 40), ("MATMUL", 12, 18), ("MATMUL", 25, 35), ("EUP", 30, 35))


def utilization(used: np.ndarray) -> str:
    rows = "\n".join(" ".join(map(str, row)) for row in used)
    head = f"== CAPACTIY:\n{', '.join(COLUMNS)}\n{' '.join(map(str, CAPACITY))}"
    return f"{head}\n== UTILIZATION:\n{rows}\n"


def dump(folder: Path, name: str, share: str = "100.00") -> None:
    analysis = (
        "Schedule analysis:\n\ttotal scheduled bundles:    55\n"
        f"\t55.00 scheduled bundles ({share}%): %{name} = bf16[8] custom-call(%x), custom\n"
    )
    files = {
        "63-post-bundle-packing-post-ra": SCHEDULE,
        "64-pre-delay_hlo-static-per-bundle-utilization": utilization(USED),
        "65-final_hlo-static-per-bundle-utilization": "later, and of other bundles",
        "66-schedule-analysis_final_bundles": analysis,
    }
    for what, text in files.items():
        (folder / f"1234-{name}-{what}.txt").write_text(text)


@pytest.fixture
def program(tmp_path: Path) -> aot.Program:
    dump(tmp_path, "kernel.1")
    (found,) = aot.programs(tmp_path)
    return found


def test_branches_make_a_tree_of_regions() -> None:
    loop = Region("loop", 2, 50, None, (START, *WAYS))
    assert aot.regions(SCHEDULE) == Region("program", 0, 60, None, (loop,))


def test_crossing_branches_are_refused() -> None:
    crossing = SCHEDULE.replace("bundleno = 40 ", "bundleno = 30 ")
    with pytest.raises(ValueError, match="not a tree"):
        aot.regions(crossing)


def test_slots_are_read_by_name() -> None:
    used, capacity = aot.utilization(utilization(USED))
    assert used.shape == (60, len(aot.SLOTS))
    assert used.sum(0)[aot.SLOTS.index("MATMUL")] == 16
    assert capacity[aot.SLOTS.index("FILL")] == 3


def test_only_kernels_are_programs(tmp_path: Path) -> None:
    dump(tmp_path, "kernel.1")
    dump(tmp_path, "fusion.7", share="40.00")
    assert [program.name for program in aot.programs(tmp_path)] == ["kernel.1"]


def test_slots_and_schedule_must_be_of_one_program(tmp_path: Path) -> None:
    dump(tmp_path, "kernel.1")
    (path,) = tmp_path.glob("*pre-delay*")
    path.write_text(utilization(USED[:50]))
    with pytest.raises(ValueError, match="60 bundles scheduled, slots of 50"):
        aot.programs(tmp_path)


def test_a_step_goes_one_way_and_through_its_loops(program: aot.Program) -> None:
    """Of the loop's 48 bundles, those outside predicated regions are 48 - 5 - 10 - 19 = 14."""
    cost = aot.steady(program)
    assert [step.cycles for step in cost.steps] == [14 + 10, 14 + 9 + 3 * 10]
    assert [step.idle for step in cost.steps] == [14, 14]
    assert [step.used["MATMUL"] for step in cost.steps] == [6, 30]
    assert cost.steps[1].used["EUP"] == 15
    assert cost.edges == (5,)
    assert (cost.bundles, cost.final) == (60, 55)
    assert cost.share("MATMUL") == 6 / (24 * 4)


def test_an_edge_runs_its_loops_too(program: aot.Program) -> None:
    """With the matrix work elsewhere, the second way is such an edge."""
    slots = program.slots.copy()
    slots[25:35, aot.SLOTS.index("MATMUL")] = 0
    cost = aot.steady(aot.Program("", program.root, slots, program.capacity, 55))
    assert cost.edges == (5, 9 + 3 * 10)


PTXAS = """ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_what_ptxas_says_of_a_kernel() -> None:
    assert aot.ptxas(PTXAS, "first", 128, 4096) == aot.GpuKernel("first", 128, 168, 5120, 16)
    assert aot.ptxas(PTXAS, "second", 256, 0) == aot.GpuKernel("second", 256, 40, 0, 0)


def test_a_head_costs_its_steps_and_its_edges(program: aot.Program) -> None:
    cost = aot.steady(program)
    assert kernel_cost.cycles(cost, kernel_cost.Counts((3, 2), 1, (7,))) == (
        3 * 24 + 2 * 53 + 14 + 7 * 5
    )
    assert kernel_cost.cycles(cost, kernel_cost.Counts((3,), 2, (7,))) == 3 * 24 + 2 * 14 + 7 * 5


def test_counts_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks a side: which of the 16 are full, cut by positions, cut by segments."""
    kind = "TPU v5 lite"
    monkeypatch.setattr(aot.Chip, "kind", kind)
    chip = flash_tpu.CHIPS[kind]
    monkeypatch.setitem(flash_tpu.CHIPS, kind, dataclasses.replace(chip, resident=512))
    blocks = TpuBlocks(256, 256, 128)

    def counts(mask: object, backward: bool = False) -> kernel_cost.Counts:
        return kernel_cost.our_counts("v5e", 1024, blocks, backward=backward, mask=mask)

    causal = kernel_cost.causal(1024)
    assert counts(causal) == kernel_cost.Counts((6, 4, 0), 0, (4, 4))
    assert kernel_cost.visible(causal) == 1024 * 1025 // 2
    # Of the first 512 queries, the last two blocks of keys are seen by none.
    assert counts(causal, backward=True) == kernel_cost.Counts((6, 4, 0), 2, (2, 8, 8))
    window = kernel_cost.packed(1024, 1024, window=256)
    assert counts(window) == kernel_cost.Counts((0, 7, 0), 0, (4, 4))
    assert kernel_cost.visible(window) == 256 * 257 // 2 + 768 * 256
    documents = kernel_cost.packed(1024, 512)
    assert counts(documents) == kernel_cost.Counts((2, 4, 0), 0, (4, 4))
    shifted = kernel_cost.packed(1024, 512, first=100)
    assert sum(counts(shifted).steps) == counts(shifted).steps[2] + counts(shifted).steps[1]
    assert kernel_cost.visible(shifted) == 100 * 101 // 2 + 512 * 513 // 2 + 412 * 413 // 2


def test_splash_visits_the_blocks_up_to_the_diagonal() -> None:
    counts = kernel_cost.splash_counts("v5e", 2048, TpuBlocks(512, 1024, 512), by_key=False)
    assert counts == kernel_cost.Counts((6,), 2, (4,))
