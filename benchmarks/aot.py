"""Compile for accelerators that are not attached, and read a kernel's cost from its program.

    JAX_PLATFORMS=cpu python benchmarks/aot.py FILE.py --target v5e v6e [--pairs N] [--regions]

FILE.py defines `fn` and `args` (arrays or ShapeDtypeStructs) or `build(target) -> (fn, args)`, and
may define `pairs`, the number of (query, key) pairs per computing step. Needs the `aot` extra.

**How the numbers of a TPU kernel are derived.** For each kernel, libtpu's compiler dumps the
program of the VLIW core after register allocation: a tree of regions with the range of bundles of
each, the branches with their target bundles, and the trip counts of loops
(`*-post-bundle-packing-post-ra.txt`). A second file lists the slots that each bundle uses, and the
capacity of the core (`*-pre-delay_hlo-static-per-bundle-utilization.txt`). A bundle takes one
cycle. Empty bundles are waits for a result, such as the matrix unit's. The later
`*-final_bundles.txt` leaves out many of them, because the hardware waits by itself: it counts
instructions and not cycles, and is reported only as `final`.

A branch takes effect after a few delay bundles, at the end of the region that holds it. The
branches determine the loops (a backward jump: the body is from its target to the branch) and the
predicated regions (a forward jump: the region that it skips). Then:

* *step*: one pass of the root loop. That is the outermost loop with matrix work, which is the
  grid's, or the innermost loop with matrix work and an unknown trip count, which is a loop over
  blocks inside a grid step. A step has all bundles outside predicated regions, inner loops times
  their trip counts, and the predicated regions that have matrix work or no vector work at all
  (these start and await copies). If several regions with matrix work exclude each other, as a
  masked and an unmasked one may, each is a step of its own kind;
* *edges*: predicated regions with vector work and no matrix work, such as the start and finish of a
  query block. They are reported, and not part of a step.

MATMUL and MATPUSH count the cycles in which matrix units are busy, not instructions.

Not included: copies between HBM and VMEM that arrive late, bank conflicts, instruction fetches, and
everything outside the kernel. A predicated instruction counts whether it executes or not.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.meshes.hardware import GPUS
from qwen_jax.runtime import command
from train.planning import topology

SLOTS: tuple[str, ...] = (
    "MATMUL",
    "MATPUSH",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "FILL",
    "VSTORE",
    "SPILL",
)
VECTOR = ("XLU", "VALU", "EUP", "VLOAD", "VSTORE")  # a region without these is bookkeeping


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU; all figures are per core.

    topology: a topology with this chip; version: jax's name for it.
    rows: of bf16 activations that a matrix unit multiplies by its square of weights per cycle.
    """

    topology: str
    version: pltpu.ChipVersion
    rows: int

    @property
    def info(self) -> pltpu.TpuInfo:
        """jax's data about the chip."""
        return pltpu.get_tpu_info_for_chip(self.version, 1)

    @property
    def kind(self) -> str:
        """jax's `device_kind` of the chip."""
        return _devices(self.topology).flat[0].device_kind

    @property
    def flops(self) -> int:
        """bf16 FLOPs per cycle of all matrix units of a core."""
        return 2 * self.info.num_mxus * self.info.mxu_column_size**2 * self.rows

    @property
    def clock(self) -> float:
        """Cycles/s, derived from the published peak (in jax's table of chips)."""
        return self.info.bf16_ops_per_second / self.flops

    @property
    def hbm(self) -> float:
        """Bytes that HBM delivers per cycle to a core, at the published bandwidth."""
        return self.info.mem_bw_bytes_per_second / self.clock


TPUS = {
    "v4": Chip("v4:2x2x1", pltpu.ChipVersion.TPU_V4, 1),
    "v5e": Chip("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1),
    "v5p": Chip("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 1),
    "v6e": Chip("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 2),
    "v7x": Chip("tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X, 2),
}


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles [first, last) of a program: a loop's body, or what a predicate may skip.

    kind: "program", "loop" or "predicated"; trips: a loop's trip count, if the compiler knows it.
    """

    kind: str
    first: int
    last: int
    trips: int | None = None
    children: tuple["Region", ...] = ()

    def walk(self) -> Iterator["Region"]:
        """The region and all regions within it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Program:
    """The schedule of a kernel.

    root: the tree of its regions.
    slots: int [bundles, len(SLOTS)], the slots that each bundle uses.
    capacity: int [len(SLOTS)], the slots of a bundle.
    final: the number of instructions in the end.
    """

    name: str
    root: Region
    slots: np.ndarray
    capacity: np.ndarray
    final: int

    def used(self, region: Region) -> np.ndarray:
        """int [len(SLOTS)]: the slots that a region uses."""
        return self.slots[region.first : region.last].sum(0)

    def hot(self, region: Region) -> bool:
        """Whether a region has matrix work."""
        return bool(self.used(region)[SLOTS.index("MATMUL")])

    def scalar(self, region: Region) -> bool:
        """Whether a region has no vector work."""
        return not any(self.used(region)[SLOTS.index(slot)] for slot in VECTOR)


@dataclasses.dataclass(frozen=True)
class Step:
    """The cost of one kind of computing step.

    used: slots by name, over all its cycles.
    idle: cycles of a step that reaches the last of its predicated regions and skips it.
    """

    label: str
    cycles: int
    idle: int
    used: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a kernel.

    steps: the kinds of computing steps.
    edges: cycles of each region that is part of no computing step.
    capacity: slots of a bundle, by name.
    bundles: of the whole program; final: its instructions.
    """

    name: str
    steps: tuple[Step, ...]
    edges: tuple[int, ...]
    capacity: dict[str, int]
    bundles: int
    final: int

    @property
    def step(self) -> Step:
        """The cheapest kind of computing step; in a kernel with masked blocks, that of the
        others.
        """
        return min(self.steps, key=lambda step: step.cycles)

    def share(self, slot: str) -> float:
        """The fraction of the slots of this kind that the cycles of a step use."""
        return self.step.used[slot] / (self.step.cycles * self.capacity[slot])

    @property
    def spills(self) -> int:
        """Vector registers that a step spills to memory and fills again."""
        return self.step.used["SPILL"] + self.step.used["FILL"]


_RANGE = re.compile(r"// region range: \[(\d+), (\d+)\)")
_REGION = re.compile(r"\s*\$region(\d+): ")
_BRANCH = re.compile(r"= sbr\.rel (\(.*?\) )?target bundleno = (\d+)")
_LIMIT = re.compile(r"loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)")


def regions(text: str) -> Region:
    """Parse the tree of loops and predicated regions in a `*-post-bundle-packing-post-ra.txt`."""
    end, size, trips, body = 0, 0, None, False
    limits: dict[int, int | None] = {}
    branches: list[tuple[int, int]] = []
    for line in text.splitlines():
        if found := _LIMIT.search(line):
            start, step, limit = map(int, found.groups())
            trips = -(-(limit - start) // step)
        elif found := _RANGE.search(line):
            first, end = map(int, found.groups())
            size = max(size, end)
            if body:
                limits[first], trips = trips, None
        elif _REGION.match(line):
            body = line.endswith("// loop_body")
        elif found := _BRANCH.search(line):
            branches.append((end, int(found.group(2))))
    spans = [
        Region("loop", target, end, limits[target])
        if target < end
        else Region("predicated", end, target)
        for end, target in branches
    ]
    return _nest(Region("program", 0, size), spans)


def _nest(outer: Region, spans: Sequence[Region]) -> Region:
    """The region `outer` with the spans inside it as children, nested in turn."""
    spans = sorted((s for s in spans if s.last > s.first), key=lambda s: (s.first, -s.last))
    children = []
    while spans:
        head, *rest = spans
        inside = [s for s in rest if s.last <= head.last]
        if crossing := [s for s in rest if s.first < head.last < s.last]:
            raise ValueError(f"regions {head} and {crossing[0]} overlap: this flow is not a tree")
        children.append(_nest(head, inside))
        spans = [s for s in rest if s.first >= head.last]
    return dataclasses.replace(outer, children=tuple(children))


def utilization(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Parse a `*per-bundle-utilization.txt`: slots used [bundles, len(SLOTS)], and their
    capacity.
    """
    head, rows = text.split("== UTILIZATION:\n")
    names, capacity = head.splitlines()[1:3]
    order = [name.strip().rpartition(":")[2] for name in names.split(",")]
    columns = [order.index(slot) for slot in SLOTS]
    table = np.array([line.split() for line in rows.splitlines() if line], int)
    return table[:, columns], np.array(capacity.split(), int)[columns]


def programs(folder: Path) -> list[Program]:
    """Read the Pallas kernels whose dumps are in the folder, in the order of compilation."""
    found = []
    for path in sorted(folder.glob("*-post-bundle-packing-post-ra.txt")):
        stem = re.fullmatch(r"(\d+-(.*))-\d+-post-bundle-packing-post-ra.txt", path.name)
        assert stem
        prefix, name = stem.groups()
        read = functools.partial(_only, folder, prefix)
        analysis = read("schedule-analysis_final_bundles")
        if not re.search(rf"\(100\.00%\): %{re.escape(name)} = .* custom-call\(", analysis):
            continue  # a kernel of XLA's own
        slots, capacity = utilization(read("pre-delay_hlo-static-per-bundle-utilization"))
        total = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
        assert total
        root = regions(path.read_text(encoding="utf-8"))
        if len(slots) - root.last not in (
            0,
            1,
        ):  # one more if the program ends in a fall-through
            raise ValueError(f"{name}: {root.last} bundles scheduled, slots of {len(slots)} listed")
        found.append(Program(name, root, slots, capacity, int(total.group(1))))
    return found


def _only(folder: Path, prefix: str, what: str) -> str:
    """The text of the one dump of this kind."""
    (path,) = [
        path
        for path in folder.iterdir()
        if path.name.startswith(prefix)
        and re.fullmatch(rf"-\d+-{what}\.txt", path.name[len(prefix) :])
    ]
    return path.read_text(encoding="utf-8")


def steady(program: Program, trips: int = 1) -> Cost:
    """The cost of a kernel's computing steps, as the module's docstring defines them.

    trips: assumed for loops inside the step whose trip count the compiler does not know.
    """
    loops = [r for r in program.root.walk() if r.kind == "loop" and program.hot(r)]
    unknown = [r for r in loops if r.trips is None]
    roots = [r for r in unknown if not any(s in r.walk() for s in unknown if s is not r)]
    roots = roots or loops[:1] or [program.root]
    steps, edges = [], []
    for root in roots:
        for path in _paths(program, root):
            total, idle = (_total(program, root, p, trips) for p in (path, path[:-1]))
            used = dict(zip(SLOTS, total[1:].tolist(), strict=True))
            steps.append(Step(_label(path), int(total[0]), int(idle[0]), used))
        edges += [
            int(_total(program, region, (), trips)[0])
            for region in root.walk()
            if region.kind == "predicated" and not (program.hot(region) or program.scalar(region))
        ]
    capacity = dict(zip(SLOTS, program.capacity.tolist(), strict=True))
    return Cost(
        program.name, tuple(steps), tuple(edges), capacity, len(program.slots), program.final
    )


def _label(path: Sequence[Region]) -> str:
    """A name for a kind of step: where its predicated regions begin."""
    return " ".join(f"{region.first:#x}" for region in path)


def _paths(program: Program, region: Region) -> list[tuple[Region, ...]]:
    """The paths through a region to matrix work, as the predicated regions that each passes."""
    hot = [child for child in region.children if program.hot(child)]
    ways = itertools.product(*(_paths(program, child) for child in hot if child.kind == "loop"))
    through = [sum(way, ()) for way in ways]
    inner = [(r, *path) for r in hot if r.kind == "predicated" for path in _paths(program, r)]
    return [path + way for path in inner or [()] for way in through]


def _total(program: Program, region: Region, path: Sequence[Region], trips: int) -> np.ndarray:
    """[cycles, slots used...] of one pass through a region; predicated regions count if on the
    path.
    """
    own = np.concatenate([[region.last - region.first], program.used(region)])
    for child in region.children:
        own -= np.concatenate([[child.last - child.first], program.used(child)])
        if child.kind == "loop":
            count = trips if child.trips is None else child.trips
            own += count * _total(program, child, path, trips)
        elif child in path or program.scalar(child):
            own += _total(program, child, path, trips)
    return own


def compile_tpu(
    fn: Callable[..., Any],
    args: Sequence[Any],
    target: str,
    donate: Sequence[int] = (),
    row_major: Sequence[int] = (),
) -> tuple[jax.stages.Compiled, list[Program]]:
    """Compile a function for one chip of `TPUS`; returns it, and the programs of its Pallas
    kernels.

    args: trees of arrays or ShapeDtypeStructs, each placed whole on the chip.
    donate: the indices of those whose memory results may take.
    row_major: the indices of arrays that lie so in memory, whatever XLA would choose.

    libtpu must not be loaded in this process yet, because it reads where to dump when it starts.
    """
    folder = _dumps()
    mesh = Mesh(_devices(TPUS[target].topology)[:1], ("x",), axis_types=(AxisType.Explicit,))
    for path in folder.iterdir():
        path.unlink()
    return _compile(fn, args, mesh, donate, row_major), programs(folder)


def _compile(
    fn: Callable[..., Any],
    args: Sequence[Any],
    mesh: Mesh,
    donate: Sequence[int],
    row_major: Sequence[int] = (),
) -> jax.stages.Compiled:
    """Compile a function for a mesh on which all arguments are replicated.

    A function that was compiled before is compiled again: jax would keep it, and leave no dump.
    """
    whole = NamedSharding(mesh, P())

    def placed(x: Any, place: NamedSharding | Format) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    args = [jax.tree.map(lambda x: placed(x, whole), x) for x in args]
    for i in row_major:
        args[i] = placed(args[i], Format(Layout(tuple(range(args[i].ndim))), whole))
    with jax.set_mesh(mesh):
        return jax.jit(lambda *args: fn(*args), donate_argnums=donate).lower(*args).compile()


@functools.cache
def _dumps() -> Path:
    """The folder for libtpu's dumps."""
    folder = Path(tempfile.mkdtemp(prefix="libtpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    topology.prepare("tpu")
    passes = "post-bundle-packing-post-ra|pre-delay|final"  # dumps of all passes would be slow
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex={passes}"
    )
    return folder


@functools.cache
def _devices(topology: str) -> np.ndarray:
    """The devices of a TPU topology."""
    _dumps()
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """The resources of a GPU kernel, as reported by ptxas.

    threads: per block.
    registers: per thread.
    shared: bytes of shared memory per block, including what the launch requests.
    spilled: bytes of spill stores and loads.
    """

    name: str
    threads: int
    registers: int
    shared: int
    spilled: int


def compile_gpu(
    fn: Callable[..., Any], args: Sequence[Any], target: str, donate: Sequence[int] = ()
) -> tuple[jax.stages.Compiled, list[GpuKernel]]:
    """Compile a function for one GPU of `GPUS`; returns it and its kernels.

    The kernels are Triton's (also XLA's own), then Mosaic's. args, donate: as in `compile_tpu`.

    The CUDA plugin must not be loaded in this process yet, because it reads where to dump when it
    starts. A Mosaic kernel is reported only once per process, as it is not compiled again.
    """
    with gpu_kernels(target) as kernels:
        one = topology.devices(topology.Topology(GPUS[target], (1, 1)))
        mesh = Mesh(np.array(one), ("x",), axis_types=(AxisType.Explicit,))
        compiled = _compile(fn, args, mesh, donate)
    return compiled, kernels


@contextlib.contextmanager
def gpu_kernels(target: str) -> Iterator[list[GpuKernel]]:
    """Collect the kernels of what is compiled within, for a GPU of `GPUS`, as `compile_gpu` does.

    The list is filled at the end.
    """
    folder = _gpu_dumps()
    for path in folder.iterdir():  # dumps of CPU programs are folders
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found: list[GpuKernel] = []
    yield found
    arch = f"sm_{GPUS[target].capability}0" + "a" * (GPUS[target].capability >= 9)
    found += [*_triton(folder, arch), *_mosaic(folder)]


def prepare() -> None:
    """Set the folders of dumps for all backends, each of which reads its own when it starts.

    For processes that use jax otherwise before they compile here.
    """
    _dumps()
    _gpu_dumps()


@functools.cache
def _gpu_dumps() -> Path:
    """The folder for the dumps of XLA and Mosaic."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    topology.prepare("cuda")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    return folder


def _triton(folder: Path, arch: str) -> Iterator[GpuKernel]:
    """The Triton kernels in a folder of dumps. arch: the architecture for ptxas, such as
    "sm_90a".
    """
    launches = re.compile(r"\] (\S+) grid: .* threads: \[(\d+), .* shared_memory: (\d+) bytes")
    thunks = "\n".join(
        path.read_text(encoding="utf-8") for path in folder.glob("*.thunk_sequence.txt")
    )
    launched = {name: sizes for name, *sizes in launches.findall(thunks)}
    for path in sorted(folder.glob("*.ptx")):
        names = re.findall(r"\.entry (\w+)\(", path.read_text(encoding="utf-8"))
        if not set(names) & set(launched):
            continue
        command = ["ptxas", "-v", f"-arch={arch}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name in names:
            threads, shared = map(int, launched[name])
            yield ptxas(report, name, threads, shared)


def _mosaic(folder: Path) -> Iterator[GpuKernel]:
    """The Mosaic kernels in a folder of dumps."""
    launch = re.compile(r"threads\(.*?\) in \(.* = %c(\d+), .* dynamic_shared_memory_size %c(\d+)")
    for path in sorted(folder.glob("*.ptxas")):
        passes = path.with_name(f"{path.stem}.mlir-passes.log").read_text(encoding="utf-8")
        found = launch.search(passes)
        assert found
        threads, shared = map(int, found.groups())
        report = path.read_text(encoding="utf-8")
        for name in re.findall(r"entry function '(\w+)'", report):
            yield ptxas(report, name, threads, shared)


def ptxas(report: str, name: str, threads: int, shared: int) -> GpuKernel:
    """Parse the kernel of this name in a report of `ptxas -v`.

    threads: per block; shared: bytes that the launch requests.
    """
    part = report.split(f"entry function '{name}'")[1].split("entry function")[0]
    registers, *_ = map(int, re.findall(r"Used (\d+) registers", part))
    static = sum(map(int, re.findall(r"(\d+) bytes smem", part)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
    return GpuKernel(name, threads, registers, shared + static, spilled)


HEADER = (
    f"{'kernel':40} {'chip':4} {'cycles':>8} {'idle':>6} {'/1000':>7} {'matrix':>6} {'VALU':>6} "
    f"{'EUP':>6} {'XLU':>6} {'VLOAD':>6} {'VSTORE':>6} {'spills':>6} {'final':>6}  edges"
)


def row(name: str, target: str, cost: Cost, pairs: int | None = None) -> str:
    """A line under `HEADER`: cycles per step and per 1000 pairs, and shares of capacity."""
    per = f"{1000 * cost.step.cycles / pairs:7.3f}" if pairs else " " * 7
    slots = ("MATMUL", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")
    shares = " ".join(f"{cost.share(slot):6.1%}" for slot in slots)
    edges = "+".join(map(str, cost.edges))
    return (
        f"{name:40} {target:4} {cost.step.cycles:8} {cost.step.idle:6} {per} {shares} "
        f"{cost.spills:6} {cost.final:6}  {edges}"
    )


def _show(program: Program, region: Region, depth: int = 0) -> None:
    """Print a tree of regions with the slots that they use."""
    trips = "" if region.kind != "loop" else f" x {region.trips or '?'}"
    used = dict(zip(SLOTS, program.used(region).tolist(), strict=True))
    slots = " ".join(f"{slot} {count}" for slot, count in used.items() if count)
    size = region.last - region.first
    print(f"{'  ' * depth}{region.kind}@{region.first:#x}{trips}: {size} cycles; {slots}")
    for child in region.children:
        _show(program, child, depth + 1)


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="What the TPU kernels of a function cost.")
    parser.add_argument("file", help="python file that defines fn and args, or build(target)")
    parser.add_argument("--target", nargs="+", choices=[*TPUS, *GPUS], default=["v5e", "v6e"])
    parser.add_argument("--pairs", type=int, help="(query, key) pairs of a computing step")
    parser.add_argument("--trips", type=int, help="of loops whose trips are not known; default: 1")
    parser.add_argument("--regions", action="store_true", help="print each program's regions too")
    args = parser.parse_args()
    if not {*args.target} & {*TPUS} and (args.pairs or args.trips or args.regions):
        parser.error("--pairs, --trips and --regions apply to TPUs: name one in --target")
    names = runpy.run_path(args.file)
    print(HEADER)
    for target in args.target:
        fn, given = names["build"](target) if "build" in names else (names["fn"], names["args"])
        if target in GPUS:
            print("\n".join(map(str, compile_gpu(fn, given, target)[1])))
            continue
        for program in compile_tpu(fn, given, target)[1]:
            cost = steady(program, args.trips or 1)
            pairs = args.pairs or names.get("pairs")
            for step in sorted(cost.steps, key=lambda step: step.cycles):
                kind = dataclasses.replace(cost, steps=(step,))
                print(row(f"{cost.name} {step.label}", target, kind, pairs))
            if args.regions:
                _show(program, program.root)


if __name__ == "__main__":
    main()
