"""Parses the text of a compiled program into computations and instructions, with run counts.

Only the parts that cost estimates need are parsed: names, opcodes, shapes, operands, attributes,
called computations, and the trip counts of loops. Knows no collectives, meshes or hardware.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)"
    r"|\b(?:branch|called)_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Instructions that pass a loop counter on unchanged.
_SAME = ("copy", "convert", "bitcast", "copy-start", "copy-done", "optimization-barrier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a compiled program: a line of a computation.

    name: the name of the instruction and of its result.
    shape: the type of the result as text, such as "f32[8,128]{1,0}".
    opcode: the operation, such as "all-gather".
    operands: the names of the instructions whose results it takes.
    arguments: the text between the parentheses.
    rest: the text after the parentheses, which holds the attributes.
    root: whether its result is that of the computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Return the computation that an attribute such as `body=%region_0` names, or None."""
        found = re.search(rf"\b{name}=%([\w.-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def called(self) -> list[str]:
        """The names of the computations that the instruction runs, such as a loop's body."""
        if self.opcode.endswith(("-done", "-update")):
            return []  # repeats the names that its start instruction has run
        names = []
        for one, several in _CALLED.findall(self.rest):
            names += [one] if one else re.findall(r"%([\w.-]+)", several)
        return names


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named sequence of instructions, such as the body of a loop."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The computation's instructions, by name."""
        return {x.name: x for x in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's result."""
        return next(x for x in self.instructions if x.root)

    def parameter(self, index: int) -> Instruction | None:
        """Return the instruction that stands for the parameter of this index, or None."""
        found = (x for x in self.instructions if x.opcode == "parameter")
        return next((x for x in found if x.arguments == str(index)), None)


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """A parsed program: its computations by name, and the name of the `entry`, which runs first."""

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> Iterator[tuple[Computation, int, bool]]:
        """Yield (computation, times, looped) for each place that calls a computation.

        times: how often the computation runs from this place. looped: whether `times` is for one
        pass of a loop whose trip count is unknown. All branches of a conditional count. A loop's
        condition runs once more than its body.
        """
        stack = [(self.entry, 1, False)]
        while stack:
            name, times, looped = stack.pop()
            computation = self.computations[name]
            yield computation, times, looped
            for instruction in computation.instructions:
                trips = self.trips(computation, instruction)
                open_ended = looped or trips is None
                for called in instruction.called:
                    last = called == instruction.attribute("condition")
                    runs = 1 if trips is None else trips + last
                    if called in self.computations:
                        stack.append((called, times * runs, open_ended))

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Return how often a loop's body runs; 1 for any other instruction, None if unknown.

        computation: the computation that contains the instruction `loop`. On CPU and GPU the
        compiler states the number; on TPU it follows from a counter that is compared with a
        constant.
        """
        if loop.opcode != "while":
            return 1
        if known := _TRIPS.search(loop.rest):
            return int(known.group(1))
        condition, body = loop.attribute("condition"), loop.attribute("body")
        if condition is None or body is None:
            return None
        test = self.computations[condition]
        compare = test.root
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (test.by_name.get(x) for x in compare.operands)
        index = _index(counter)
        if counter is None or limit is None or index is None:
            return None
        start = self._element(computation, loop.operands[0], index=index)
        if (place := _index(limit)) is not None:
            stop = self._element(computation, loop.operands[0], index=place)
        else:
            stop = _constant(limit)
        step = self._step(self.computations[body], index)
        if start is None or stop is None or not step:
            return None
        return max(0, -(-(stop - start) // step))

    def _element(self, computation: Computation, name: str, *, index: int) -> int | None:
        """Return an integer in the tuple that a loop starts from, or None if it is not constant.

        computation, name: the computation that makes the tuple, and the tuple's name. index: the
        integer's place in the tuple.
        """
        made = computation.by_name.get(name)
        if made is None or made.opcode != "tuple":
            return None
        value = computation.by_name.get(made.operands[index])
        while value is not None and value.opcode in _SAME:
            value = computation.by_name.get(value.operands[0])
        return None if value is None else _constant(value)

    def _step(self, body: Computation, index: int) -> int | None:
        """Return the constant that each pass of a loop adds to its counter, or None.

        body: the loop's body. index: the counter's place in the tuple that the loop carries.
        """
        if body.root.opcode != "tuple":
            return None
        value = body.by_name.get(body.root.operands[index])
        while value is not None and value.opcode in _SAME:
            value = body.by_name.get(value.operands[0])
        if value is None:
            return None
        if value.opcode == "fusion":  # the addition, perhaps fused with other uses of the counter
            inner = self.computations.get(value.called[0]) if value.called else None
            value, body = (None, body) if inner is None else (inner.root, inner)
        if value is None or value.opcode != "add":
            return None
        steps = [_constant(x) for x in map(body.by_name.get, value.operands) if x is not None]
        steps = [x for x in steps if x is not None]
        return steps[0] if len(steps) == 1 else None


def parse(text: str) -> HloProgram:
    """Parse the text of a program, as `jax.stages.Compiled.as_text` returns it.

    Raises ValueError if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            found = re.match(r"(ENTRY )?%?([\w.-]+)", line)
            assert found
            name, lines = found.group(2), []
            entry = name if found.group(1) else entry
        elif line.startswith("}") and name is not None:
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif name is not None and (instruction := _instruction(line)):
            lines.append(instruction)
    if entry is None:
        raise ValueError("this text is no compiled program: it has no ENTRY computation")
    return HloProgram(computations, entry)


def nbytes(shape: str) -> int:
    """Return the bytes of an array type or a tuple type, such as "(bf16[8,128]{1,0}, f32[])"."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim.removeprefix("<="))
        width = re.match(r"[a-z]+(\d+)", dtype)
        bits = _BITS.get(dtype, int(width.group(1)) if width else 0)
        total += -(-size * bits // 8)
    return total


def _instruction(line: str) -> Instruction | None:
    """Parse one line of a computation; return None if it is not an instruction."""
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    opcode = _OPCODE.search(line, found.end() - 1)
    if not opcode:
        return None
    end = _closing(line, opcode.end())
    arguments = line[opcode.end() : end]
    return Instruction(
        name=found.group(2),
        shape=line[found.end() : opcode.start()],
        opcode=opcode.group(1),
        operands=tuple(re.findall(r"%([\w.-]+)", arguments)),
        arguments=arguments,
        rest=line[end:],
        root=bool(found.group(1)),
    )


def _closing(line: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one just before `start`."""
    depth = 1
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i
    return len(line)


def _index(value: Instruction | None) -> int | None:
    """Return the tuple index that a get-tuple-element reads, or None for other instructions."""
    if value is None or value.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", value.rest)
    return int(found.group(1)) if found else None


def _constant(value: Instruction) -> int | None:
    """Return the value of an integer constant, or None for other instructions."""
    number = value.arguments.strip()
    is_integer = value.opcode == "constant" and re.fullmatch(r"-?\d+", number)
    return int(number) if is_integer else None
