"""The options by which a command runs as several processes, and joining these processes."""

import argparse
import json
import os
import sys

from qwen_jax.runtime import command, processes, rendezvous


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the processes of a run; `join` reads them."""
    group = parser.add_argument_group("several processes, on one host or many (docs/hosts.md)")
    option = group.add_argument
    option(
        "--distributed",
        action="store_true",
        help="join the processes of this TPU pod, Slurm job or other cluster that jax recognises",
    )
    option(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 with a free port; goes with --processes and --process "
        "(default: one process, or as found by --distributed)",
    )
    option(
        "--processes",
        type=command.positive,
        metavar="N",
        help="number of processes (default: one, or as found by --distributed)",
    )
    option(
        "--process",
        type=int,
        metavar="I",
        help="number of this process, from 0 (default: as found by --distributed)",
    )
    option(
        "--start-timeout",
        type=command.positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for all processes to start (default: %(default)s)",
    )
    option(
        "--heartbeat-timeout",
        type=command.positive,
        default=30,
        metavar="SECONDS",
        help="how long a process may be silent before it counts as dead (default: %(default)s)",
    )


def join(args: argparse.Namespace) -> None:
    """Join the processes that the options of `add` describe, if any.

    Must be called before jax is used. Raises UsageError for options that contradict each other, and
    ValueError if the processes were started with different arguments.
    """
    named = (args.coordinator, args.processes, args.process)
    if not args.distributed and named == (None, None, None):
        how = "applies only to several processes: leave it out, or add --distributed, or "
        how += "--coordinator, --processes and --process"
        command.refuse(args, ("start_timeout", "heartbeat_timeout"), why=how)
        return
    if not args.distributed and None in named:
        raise command.UsageError(
            "--coordinator, --processes and --process go together: give all three, or "
            "--distributed to have them found"
        )
    try:
        if args.coordinator is not None:
            rendezvous.address(args.coordinator)
        if None not in named and not 0 <= args.process < args.processes:
            last = args.processes - 1
            raise ValueError(
                f"process {args.process}: must be 0 to {last}, as --processes is {args.processes}"
            )
    except ValueError as error:
        raise command.UsageError(f"--{error}") from None
    processes.initialize(*named, args.start_timeout, args.heartbeat_timeout)
    if processes.count() > 1:
        _keep_stdout(processes.index() == 0)
        own = ("coordinator", "processes", "process", "distributed", "given")
        options = {name: str(x) for name, x in vars(args).items() if name not in own}
        processes.agree("arguments", json.dumps(options))


def _keep_stdout(shown: bool) -> None:
    """Reserve stdout for what Python prints, because native code reports on its sockets there.

    shown: whether this process prints at all; otherwise its stdout is discarded.

    Native output is discarded, unless NCCL_DEBUG is set: NVIDIA's NCCL then writes its report to
    stdout, which goes to stderr instead.
    """
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1) if shown else nowhere
    os.dup2(2 if "NCCL_DEBUG" in os.environ else nowhere, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(kept, "w", encoding=encoding, errors=errors)
