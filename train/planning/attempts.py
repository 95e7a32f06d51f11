"""A setting's programs compiled and estimated, with the attention that `auto` would take there."""

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
    """A program that does not compile with the implementation that `auto` would take."""


def estimates(
    setting: Setting,
    topology: Topology,
    *,
    sizes: Mapping[str, int],
    decode: bool,
    label: str = "",
) -> Iterator[Estimate]:
    """Yield the estimates of a setting: of training, or with `decode` of prefill and decoding.

    sizes: of the mesh by axis. label: the beginning of the line that is shown while a program is
    compiled.
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
    """The estimate of a task. It compiles a program for minutes, and shows which one meanwhile."""
    with report.waiting(
        label + report.program(task.__name__, setting, topology=topology, sizes=sizes)
    ):
        return task(setting, topology, sizes=sizes)


def _by_auto(
    task: _Task, setting: Setting, *, topology: Topology, sizes: Mapping[str, int], label: str
) -> Estimate:
    """The estimate with the attention that `auto` would take on these devices: the first kernel
    whose self-test compiles. Kernels are tried fastest first if the chip was measured, otherwise
    the chip's own kernel first.

    Raises NotCompiled if the program does not compile with that kernel, as a run would then fail.
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
    """The message with which a kernel's self-test is refused on these devices; None if it compiles,
    so that `auto` would take the kernel.
    """
    device = topologies.mesh(topology, sizes).devices.flat[:1]
    try:
        with report.waiting(f"compiling for {topology}: the self-test of attention {name}"):
            programs.compile_calls(calls, name, mesh=meshes.make({}, device))
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    """An error's message in one line, cut to `_LONGEST` characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _candidates(
    setting: Setting, topology: Topology, *, sizes: Mapping[str, int], task: str
) -> tuple[list[str], Sequence[Case]]:
    """The names of attention implementations that `auto` may take, likeliest first, and the calls
    of their self-test.
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
