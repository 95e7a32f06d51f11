"""Carries out a conversion: locks the target, resumes, copies, verifies and completes it.

Both converters follow this protocol, alone or as several processes; `Conversion` says what differs
between them. Knows no formats.
"""

import abc
import argparse
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from convert import copying, target
from convert.copying import Job
from qwen_jax.checkpoint import directory
from qwen_jax.runtime import command, paths, process_options, processes


@dataclasses.dataclass(frozen=True)
class Remaining:
    """The copying that a conversion still has to do.

    done, needed: the bytes already written and the bytes left to write, over all processes.
    jobs: the copying jobs of this process.
    """

    done: int
    needed: int
    jobs: list[Job]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(abc.ABC):
    """The plan of a conversion, whose input has been checked, and its steps.

    source, target: the folder to read and the folder to write.
    facts: values that identify the conversion, so that only the same command resumes it.
    carried: patterns of the names of small files that are copied as they are.
    """

    source: Path
    target: Path
    facts: dict[str, Any]
    carried: ClassVar[tuple[str, ...]] = directory.CARRIED
    workers: ClassVar[int] = 2  # threads that copy

    @abc.abstractmethod
    def remaining(self, resumed: bool) -> Remaining:
        """Return what is left to copy. resumed: whether files of an earlier start are continued."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Write the small files that come first. Process 0 calls this."""

    def copied(self) -> None:  # noqa: B027 (not every conversion has such files)
        """Write the small files that come after all copied ones. Process 0 calls this."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Compare every tensor of the target with the source; ValueError if any differs."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Check the sizes of all files, and mark the target as complete. Process 0 calls this."""


def join(args: argparse.Namespace) -> None:
    """Join the processes of a conversion, and keep jax off accelerators: bytes are only copied."""
    process_options.join(args)
    import jax

    jax.config.update("jax_platforms", "cpu")


def run(plan: Conversion, *, verify: bool) -> None:
    """Carry out a conversion, or continue it.

    verify: whether to compare the result with the source. Raises ValueError if the target holds
    anything but unfinished work of the same command, and `lock.Busy` if another program writes to
    it.
    """
    with target.locked(plan.target) as check:
        copy(plan)
        if verify:
            plan.verify()
        check()
        if processes.index() == 0:
            plan.finish()
        processes.barrier()
    command.say(f"{plan.target} is complete")


def copy(plan: Conversion) -> None:
    """Write all files of the target but those that mark it as complete, each process its share."""
    left = _begun(plan) if processes.index() == 0 else None
    processes.barrier()
    if left is None:
        target.check_shared(plan.target, plan.facts)
        left = plan.remaining(resumed=True)
    with target.explained(plan.target, left.needed):
        done = left.done if processes.count() == 1 else 0
        copying.run("converting", left.jobs, done=done, workers=plan.workers)
    processes.barrier()
    if processes.index() == 0:
        plan.copied()
    processes.barrier()


def _begun(plan: Conversion) -> Remaining:
    """Begin or resume the target in process 0, and return what is left to copy."""
    resumed = target.check_usable(plan.target, plan.facts)
    left = plan.remaining(resumed)
    directory.remove_drafts(plan.target)
    target.check_space(plan.target, left.needed)
    if resumed:
        done, whole = command.size(left.done), command.size(left.done + left.needed)
        command.say(f"continuing: {done} of {whole} are there")
    with target.explained(plan.target, left.needed):
        paths.make_folder(plan.target)
        directory.write_json(plan.target / directory.UNFINISHED, plan.facts)
        for file in directory.carried(plan.source, plan.carried):
            paths.copy(file, plan.target / file.name)
        plan.begin()
    return left
