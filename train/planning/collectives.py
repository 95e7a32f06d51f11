"""Lists the collectives of a compiled program: their kind, mesh axes, number and bytes.

They are read from the program's text, for CPU, GPU and TPU alike. Plain, asynchronous and fused
collectives count, and those in a loop as often as the loop runs. Knows no hardware and no model;
`bounds.py` computes times.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled
from jaxtyping import Int

from train.planning import hlo
from train.planning.hlo import Computation, Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind over the same mesh axes.

    kind: one of `KINDS`.
    axes: the mesh axes along which the members of a group differ, in the mesh's order.
    size: the number of devices in a group.
    count: how often each device takes part per run of the program.
    bytes: the bytes on a device, added over all `count`: of the whole array that an all-gather
        makes or a reduce-scatter takes (a ring moves (size - 1) / size of it), of the operand for
        other kinds.
    looped: whether they are in a loop whose trip count the compiler does not know. Then only one
        pass of the loop is counted.
    where: the `op_name`s of the instructions, which name the places in the source.
    """

    kind: str
    axes: tuple[str, ...]
    _: dataclasses.KW_ONLY
    size: int
    count: int
    bytes: int
    looped: bool = False
    where: tuple[str, ...] = ()


def of(program: Compiled | str, mesh: Mesh | Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a program, merged by kind, axes and size, the largest first.

    program: a `jax.stages.Compiled` or its text. mesh: the mesh it was compiled for, or its axis
    sizes by name. Groups of one device are left out, as they move nothing.
    """
    found: dict[tuple[object, ...], list[Collective]] = {}
    for one in each(program, mesh):
        found.setdefault((one.kind, one.axes, one.size, one.looped), []).append(one)
    rows = [
        dataclasses.replace(
            same[0],
            count=sum(x.count for x in same),
            bytes=sum(x.bytes for x in same),
            where=tuple(dict.fromkeys(name for x in same for name in x.where)),
        )
        for same in found.values()
    ]
    return sorted(rows, key=lambda x: (-x.bytes, x.kind, x.axes))


def each(program: Compiled | str, mesh: Mesh | Mapping[str, int]) -> Iterator[Collective]:
    """Yield the collectives of a program, one for each place in the program's text.

    program: a `jax.stages.Compiled` or its text. mesh: the mesh it was compiled for, or its axis
    sizes by name. Raises ValueError if it is not known how often a computation with collectives
    runs, because sums would leave them out.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    sizes = dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
    parsed = hlo.parse(text)
    fused = _fused(parsed)
    across = _across_slices(text, sizes)
    runs = list(parsed.runs())
    reached = {computation.name for computation, _, _ in runs}
    for computation in parsed.computations.values():
        if computation.name not in reached and any(map(_kind, computation.instructions)):
            raise ValueError(
                f"what runs computation {computation.name}, and how often, is not known"
            )
    for computation, times, looped in runs:
        if computation.name in fused:
            continue  # its collectives are listed with the computation that calls it
        for place, instruction in _in(parsed, computation):
            one = _collective(place, instruction, sizes=sizes, across=across)
            if one is not None:
                yield dataclasses.replace(one, count=times, bytes=times * one.bytes, looped=looped)


def table(rows: list[Collective]) -> str:
    """Format collectives as a table for the terminal."""
    lines = [f"{'collective':<20} {'axes':<14} {'devices':>7} {'count':>6} {'MB a device':>12}"]
    for x in rows:
        count = f"{x.count}{'*' if x.looped else ''}"
        axes = ",".join(x.axes)
        lines.append(f"{x.kind:<20} {axes:<14} {x.size:>7} {count:>6} {x.bytes / 1e6:>12.2f}")
    return "\n".join(lines)


def _fused(program: hlo.HloProgram) -> set[str]:
    """Return the names of the computations that fusions call."""
    return {
        name
        for computation in program.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for name in instruction.called
    }


def _in(
    program: hlo.HloProgram, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Yield (computation, instruction) once for each collective of a computation and its fusions.

    A TPU program overlaps an asynchronous collective with several fusions: one starts it, others
    continue it, and one ends it. Each of these fusions contains the whole collective, with the same
    channel.
    """
    overlapped: dict[tuple[str, str], tuple[Computation, Instruction]] = {}
    for place, instruction in _through_fusions(program, computation):
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if place is computation or channel is None:
            yield place, instruction
        else:
            overlapped.setdefault((instruction.opcode, channel.group(1)), (place, instruction))
    yield from overlapped.values()


def _through_fusions(
    program: hlo.HloProgram, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Yield (computation, instruction) for each collective of a computation and of its fusions.

    A collective that overlaps with several fusions is in each of them.
    """
    for instruction in computation.instructions:
        if _kind(instruction):
            yield computation, instruction
        if instruction.opcode == "fusion":
            for name in instruction.called:
                yield from _through_fusions(program, program.computations[name])


def _across_slices(text: str, sizes: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes that extend over several TPU slices.

    text: the text of the program, which is written for the devices of one slice. sizes: the number
    of devices along each mesh axis; the first axes are the ones over slices.
    """
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    slices = math.prod(sizes.values()) // int(partitions.group(1)) if partitions else 1
    axes = []
    for axis, size in sizes.items():
        if slices > 1 and size > 1:
            axes.append(axis)
            slices //= size
    return tuple(axes)


# The collective across slices that a TPU program delegates to its runtime, as a send to the host.
_HANDED_OVER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _kind(instruction: Instruction) -> str | None:
    """Return the kind of collective that an instruction starts, or None for other instructions."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and (handed := _HANDED_OVER.search(instruction.rest)):
        kind = handed.group(1).lower().replace("_", "-")
        return kind if kind in KINDS else "collective-permute"
    return kind if kind in KINDS else None


def _collective(
    computation: Computation,
    instruction: Instruction,
    *,
    sizes: dict[str, int],
    across: tuple[str, ...],
) -> Collective | None:
    """Return one execution of a collective instruction, or None if it moves nothing.

    computation: the computation that contains the instruction.
    sizes: the number of devices along each mesh axis.
    across: the mesh axes that extend over slices.
    """
    kind = _kind(instruction)
    assert kind
    if instruction.opcode == "send":
        sent = computation.by_name.get(instruction.operands[0])
        size = hlo.nbytes(sent.shape) if sent else 0
        slices = math.prod(sizes[axis] for axis in across)
        total = size * slices if kind == "all-gather" else size
        return Collective(kind, across, size=slices, count=1, bytes=total) if across else None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU programs have it in this form
    made = [computation.by_name[x] for x in instruction.operands if x in computation.by_name]
    size = sum(hlo.nbytes(x.shape) for x in made)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest):
        groups = np.array(re.findall(r"\{(\d+),(\d+)", pairs.group(1) + "}"), int)
        groups = groups[groups[:, 0] != groups[:, 1]]
        devices = 2
    else:
        groups = replica_groups(instruction.rest, int(np.prod(list(sizes.values()))))
        devices = groups.shape[1]
    axes = _axes(groups, sizes)
    if not axes:
        return None
    if kind == "all-gather":
        size *= devices
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    where = (name.group(1),) if name else ()
    return Collective(kind, axes, size=devices, count=1, bytes=size, where=where)


def _axes(groups: Int[np.ndarray, "groups devices"], sizes: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of any group differ.

    groups: int [groups, devices of a group], indices of devices in the mesh's order. sizes: the
    number of devices along each mesh axis.
    """
    if not groups.size:
        return ()
    places = np.unravel_index(groups, tuple(sizes.values()))
    differs = [bool(np.any(place != place[:, :1])) for place in places]
    return tuple(axis for axis, moves in zip(sizes, differs, strict=True) if moves)


def replica_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups devices"]:
    """Parse an instruction's `replica_groups=` to int [groups, devices of a group].

    It may be a list, `{{0,1},{2,3}}` (`{}` is all devices); an iota, `[4,2]<=[2,4]T(1,0)`; or mesh
    axes, `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}`. attributes: the instruction's
    text after its arguments. devices: the number of all devices. Raises ValueError for any other
    form.
    """
    found = re.search(r"replica_groups=(\S.*)", attributes)
    if not found:
        return np.arange(devices)[None]
    text = found.group(1)
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if iota := re.match(r"(\[[\d,]+\]<=\[[\d,]+\](T\([\d,]+\))?)", text):
        shape, source = iota.group(1).split("<=")
        return _iota(source).reshape(_numbers(shape))
    listed = re.match(r"\{(\{[\d,]+\}(,\{[\d,]+\})*)?\}", text)
    if not listed:
        raise ValueError(f"replica_groups {text[:80]!r}: this way to write them is not known")
    rows = [_numbers(row) for row in re.findall(r"\{([\d,]+)\}", listed.group(0))]
    return np.array(rows) if rows else np.arange(devices)[None]


def _mesh_groups(text: str) -> Int[np.ndarray, "groups devices"]:
    """Parse `replica_groups` in the form of mesh axes to int [groups, devices of a group]."""
    found = re.match(r"mesh\[(.*?)\](, device_ids=\((.*?\)?)\))? \{(.*?)\}", text)
    if not found:
        raise ValueError(f"replica_groups {text[:80]!r}: this way to write them is not known")
    named, _, order, grouped = found.groups()
    axes = {name: int(size) for name, size in re.findall(r"'?([\w-]+)'?=(\d+)", named)}
    count = int(np.prod(list(axes.values())))
    ids = np.arange(count)
    if order:
        ids = _iota(order) if order.startswith("[") else np.array(_numbers(order))
    # 'b':(2)2 is a part of axis b, of size 2 after a part of size 2, so axes are split into parts.
    wanted = re.findall(r"'?([\w-]+)'?(?::\((\d+)\)(\d+))?", grouped)
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in axes.items()}
    for name, before, size in wanted:
        if before:
            cuts[name] |= {int(before), int(before) * int(size)}
    parts = [  # (axis, product before the part, its size)
        (name, before, after // before)
        for name in axes
        for before, after in itertools.pairwise(sorted(cuts[name]))
    ] or [("", 1, 1)]
    members = []
    for name, before, size in wanted:
        first, last = (int(before), int(before) * int(size)) if before else (1, axes[name])
        members += [i for i, (n, b, s) in enumerate(parts) if n == name and first <= b < last]
    others = [i for i in range(len(parts)) if i not in members]
    ids = ids.reshape([size for _, _, size in parts]).transpose(others + members)
    return ids.reshape(-1, int(np.prod([parts[i][2] for i in members])))


def _iota(text: str) -> Int[np.ndarray, " devices"]:
    """Expand `[2,4]T(1,0)`: 0, 1, 2 and so on in this shape, then transposed and flattened."""
    shape, _, order = text.partition("T")
    ids = np.arange(int(np.prod(_numbers(shape)))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    """Return the integers in a text, in order."""
    return [int(x) for x in re.findall(r"\d+", text)]
