"""A setting's programs compiled and estimated, with the attention that `auto` would take there."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from qwen_jax import meshes
from qwen_jax.attention import prove
from train.planning import estimate, programs, report
from train.planning import topology as topologies

_LONGEST = 300  # characters of what a kernel or a compiler says


class NotCompiled(ValueError):
    """A program that does not compile with the implementation that `auto` would take."""


def estimates(
    setting: Any, topology: Any, *, sizes: Mapping[str, int], decode: bool, label: str = ""
) -> Iterator[Any]:
    """Yield the estimates of a setting: of training, or of prefill and decoding. label: begins the
    line that is shown while one is compiled.
    """
    tasks = (estimate.prefill, estimate.decoding) if decode else (estimate.training,)
    for task in tasks:
        if setting.attention == "auto":
            yield _by_auto(task, setting, topology=topology, sizes=sizes, label=label)
        else:
            yield _compiled(task, setting, topology=topology, sizes=sizes, label=label)


def _compiled(
    task: Any, setting: Any, *, topology: Any, sizes: Mapping[str, int], label: str
) -> Any:
    """The estimate that a task makes, which compiles a program for minutes: it is said which."""
    with report.waiting(
        label + report.program(task.__name__, setting, topology=topology, sizes=sizes)
    ):
        return task(setting, topology, sizes=sizes)


def _by_auto(
    task: Any, setting: Any, *, topology: Any, sizes: Mapping[str, int], label: str
) -> Any:
    """The estimate with the implementation that `auto` would take there: the first whose self-test
    compiles, in the order of measured lines of the chip, else its own kernel first.

    Raises NotCompiled where the program does not compile with that one, as it would not there.
    """
    names, calls = _expected(setting, topology, sizes=sizes, task=task.__name__)
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


def _refusal(name: str, calls: Any, *, topology: Any, sizes: Mapping[str, int]) -> str | None:
    """Why `auto` would not take that kernel there: what its self-test is refused with."""
    device = topologies.mesh(topology, sizes).devices.flat[:1]
    try:
        with report.waiting(f"compiling for {topology}: the self-test of attention {name}"):
            programs.compile_calls(calls, name, mesh=meshes.make({}, device))
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _expected(
    setting: Any, topology: Any, *, sizes: Mapping[str, int], task: str
) -> tuple[list[str], Any]:
    """Names of the registry that `auto` may take there, the likeliest first, and the calls with
    which it would prove them.
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
