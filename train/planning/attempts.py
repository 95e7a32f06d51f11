"""Compiles and estimates a plan's programs, with the attention that `auto` would choose.

`auto` is decided as on the planned devices: by whether a kernel's self-test compiles for them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from qwen_jax import meshes
from qwen_jax.attention import prove
from qwen_jax.attention.workloads import Case
from train.planning import estimate, programs, report
from train.planning import topology as topologies
from train.planning.estimate import Estimate
from train.planning.programs import Setting
from train.planning.topology import Topology

_LONGEST = 300  # characters of a kernel's or compiler's message that are shown
_Task = Callable[..., Estimate]  # `estimate.training`, `decoding` or `prefill`


class NotCompiled(ValueError):
    """Raised if a program does not compile with the attention that `auto` would choose."""


def estimates(
    setting: Setting,
    topology: Topology,
    *,
    sizes: Mapping[str, int],
    decode: bool,
    label: str = "",
) -> Iterator[Estimate]:
    """Yield the estimates of a setting: of a training step, or of prefill and decoding.

    setting: the model, batch and options (`programs.Setting`).
    topology: the planned devices (`topology.Topology`).
    sizes: the number of devices along each mesh axis.
    decode: whether to estimate prefill and decoding instead of training.
    label: the beginning of the line that is shown while a program is compiled.
    """
    tasks = (estimate.prefill, estimate.decoding) if decode else (estimate.training,)
    for task in tasks:
        if setting.attention == "auto":
            yield _by_auto(task, setting, topology=topology, sizes=sizes, label=label)
        else:
            yield _compiled(task, setting, topology=topology, sizes=sizes, label=label)


def _compiled(
    task: _Task, setting: Setting, *, topology: Topology, sizes: Mapping[str, int], label: str
) -> Estimate:
    """Compile one program and return its estimate; show which program it is, as this takes minutes.

    task: `estimate.training`, `estimate.prefill` or `estimate.decoding`. label: the beginning of
    the line that is shown.
    """
    with report.waiting(
        label + report.program(task.__name__, setting, topology=topology, sizes=sizes)
    ):
        return task(setting, topology, sizes=sizes)


def _by_auto(
    task: _Task, setting: Setting, *, topology: Topology, sizes: Mapping[str, int], label: str
) -> Estimate:
    """Return an estimate with the attention implementation that `auto` would choose.

    This is the first implementation whose self-test compiles for the planned devices, in the order
    of the times measured on the chip or, without such times, with the chip's own kernel first;
    "xla" if there is none. task: `estimate.training`, `prefill` or `decoding`. Raises NotCompiled
    if the program does not compile with this implementation, because it would not compile on the
    devices either.
    """
    names, calls = _candidates(setting, topology, sizes=sizes, task=task.__name__)
    passed: list[str] = []
    for name in names:
        named = dataclasses.replace(
            setting, attention=name, by_auto=True, passed_over=tuple(passed)
        )
        try:
            return _compiled(task, named, topology=topology, sizes=sizes, label=label)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            reason = _refusal(name, calls, topology=topology, sizes=sizes)
            if reason is None:
                raise NotCompiled(
                    f"{task.__name__} does not compile with {name}, which auto would take there, "
                    f"as its self-test does: {_one_line(error)}; take a smaller --batch or "
                    "--length, or --attention xla"
                ) from error
        passed.append(f"{name}: {reason}")
    named = dataclasses.replace(setting, attention="xla", by_auto=True, passed_over=tuple(passed))
    return _compiled(task, named, topology=topology, sizes=sizes, label=label)


def _refusal(
    name: str, calls: Sequence[Case], *, topology: Topology, sizes: Mapping[str, int]
) -> str | None:
    """Return why `auto` would not choose a kernel, or None if the kernel's self-test compiles.

    name: the kernel's name in the registry. calls: the attention calls of the self-test. The reason
    is the error of the self-test, in one line.
    """
    device = topologies.mesh(topology, sizes).devices.flat[:1]
    try:
        with report.waiting(f"compiling for {topology}: the self-test of attention {name}"):
            programs.compile_calls(calls, name, mesh=meshes.make({}, device))
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    """Return an error's message in one line, cut to `_LONGEST` characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _candidates(
    setting: Setting, topology: Topology, *, sizes: Mapping[str, int], task: str
) -> tuple[list[str], Sequence[Case]]:
    """Return the implementations that `auto` may take, and the attention calls of their self-test.

    sizes: the number of devices along each mesh axis. task: "training", "prefill" or "decoding".
    The names are in order, the likeliest first.
    """
    config, dtype = setting.config, "bfloat16"
    if task == "decoding":
        calls = prove.decoding(
            config,
            dtype,
            rows=setting.batch,
            slots=setting.length,
            cache=setting.cache_dtype,
            mesh=sizes,
        )
    else:
        rows = setting.batch // setting.accumulate
        backward = task == "training"
        calls = prove.passes(
            config, dtype, rows=rows, length=setting.length, backward=backward, mesh=sizes
        )
    with jax.set_mesh(topologies.mesh(topology, sizes)):
        names, measured = prove.candidates(calls)
    if not measured:
        names = sorted(names, key=lambda name: name != topology.chip.kernel)
    return names, calls
