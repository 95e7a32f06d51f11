"""What the commands share: exit codes, one-line errors, progress on stderr, common arguments.

Exit codes: 0 success, 2 a usage error, 130 interrupted, 1 any other error. Of several processes
the first one alone speaks, but for errors.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qwen_jax.runtime import errors, paths, processes, rendezvous

_RAISING = ("strict", "surrogateescape", "surrogatepass")  # a stream's errors, of encodings


class UsageError(ValueError):
    """Arguments that cannot be; the command exits with 2."""


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> int:
    """Parse, work, and turn what goes wrong into one line on stderr and an exit code."""
    _settle_streams()
    args = parse(parser, argv)
    show_log(args.debug)
    warnings.formatwarning = _as_line
    try:
        work(args)
        _flush()
    except KeyboardInterrupt:
        if processes.count() > 1:
            processes.failed("interrupted", 130)
        say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        _discard()
        return 1
    except Exception as error:
        if args.debug:
            raise
        _hush()
        with contextlib.suppress(OSError):  # of stdout: perhaps the error itself
            _flush()
        processes.await_verdict(error)
        detail = errors.explain(error, vars(args))
        code = 2 if isinstance(error, UsageError) else 1
        if processes.count() > 1:
            processes.failed(detail, code)
        say(f"error: {detail}")
        return code
    return 0


class _Absent(list[Any]):
    """Stands for an argument that a command line does not name. A list: some are appended to."""


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, and in `given` the names of those that it names, be they
    what the default is. argparse tells these apart when the others are there already, so that it
    parses twice.
    """
    args, absent = parser.parse_args(argv), _Absent()
    named = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    args.given = tuple(sorted(name for name, value in vars(named).items() if value is not absent))
    return args


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise UsageError for the first of these arguments that the command line names: beside others
    it means nothing. why: goes on after the option, and says what to do.
    """
    for name in names:
        if name in args.given:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def _as_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as `say` would say it: one line, without the place in the code."""
    line = f"warning: {' '.join(str(message).split())}\n"
    return line if processes.index() == 0 else ""


def _settle_streams() -> None:
    """Let nothing that is printed end a run: what stdout's encoding lacks is replaced, and a stream
    that was closed takes everything. (stderr escapes what it lacks, whatever is asked.)
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _RAISING:
        sys.stdout.reconfigure(errors="replace")


def _flush() -> None:
    """Write out what was printed, while an error such as a full disk can still be told."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard()
        error.filename = "stdout"
        raise


def _discard() -> None:
    """Send what is left for stdout nowhere: Python would try once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """A line for the person at the terminal, out of the way of stdout, from process 0."""
    if processes.index() == 0:
        print(line, file=sys.stderr, flush=True)


def _hush() -> None:
    """Show no traceback of what else is under way when a command fails, such as a checkpoint that
    threads write: it fails with the command.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = threading.excepthook = _say_nothing


def _say_nothing(_: Any) -> None:
    """Do nothing. Not a lambda: a thread may be about to call a hook that is replaced, which must
    not go.
    """


def show_log(debug: bool = False) -> None:
    """Say what the library logs as `say` does.

    What Orbax, gcsfs and matplotlib log is shown for debugging alone: warnings of what is meant,
    or of caches of theirs, and errors that they also raise.
    """
    handler = logging.Handler()
    handler.emit = lambda record: say(record.getMessage())
    logger = logging.getLogger("qwen_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that log to the root would say it again
    for name in ("absl", "gcsfs", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that shows tracebacks."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options of several processes, for `join`."""
    group = parser.add_argument_group("several processes, on one host or many (docs/hosts.md)")
    add = group.add_argument
    add(
        "--distributed",
        action="store_true",
        help="join the processes of this TPU pod, Slurm job or other cluster that jax recognises",
    )
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, at a port that is free")
    add("--processes", type=positive, metavar="N", help="how many processes there are")
    add("--process", type=int, metavar="I", help="the number of this one, from 0")
    add(
        "--start-timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for all to start (default: %(default)s)",
    )
    add(
        "--heartbeat-timeout",
        type=positive,
        default=30,
        metavar="SECONDS",
        help="a process without a sign of life for so long counts as dead (default: %(default)s)",
    )


def join(args: argparse.Namespace) -> None:
    """Join the processes that `add_processes` speaks of, if any, before jax is used."""
    named = (args.coordinator, args.processes, args.process)
    if not args.distributed and named == (None, None, None):
        how = "is of several processes: add --distributed, or --coordinator and its like"
        refuse(args, ("start_timeout", "heartbeat_timeout"), how)
        return
    if not args.distributed and None in named:
        raise UsageError(
            "give all of --coordinator, --processes and --process, or --distributed to have them "
            "found"
        )
    try:
        if args.coordinator is not None:
            rendezvous.address(args.coordinator)
        if None not in named and not 0 <= args.process < args.processes:
            last = args.processes - 1
            raise ValueError(f"process {args.process} of {args.processes}: numbers are 0 to {last}")
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    processes.initialize(*named, args.start_timeout, args.heartbeat_timeout)
    if processes.count() > 1:
        _keep_stdout(processes.index() == 0)
        own = ("coordinator", "processes", "process", "distributed", "given")
        options = {name: str(x) for name, x in vars(args).items() if name not in own}
        processes.agree("arguments", json.dumps(options))


def _keep_stdout(shown: bool) -> None:
    """Keep stdout for what Python prints, if it is to be shown: native code says there how sockets
    fare.

    NVIDIA's NCCL, when asked to, speaks there too: that goes to stderr.
    """
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1) if shown else nowhere
    os.dup2(2 if "NCCL_DEBUG" in os.environ else nowhere, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(kept, "w", encoding=encoding, errors=errors)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def path(given: str) -> Path:
    """An argparse type: a local path, or one in gs://."""
    try:
        return paths.parse(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text(given: str) -> str:
    """An argparse type: a text, of the bytes that the system hands over. File names may hold any
    bytes, and have no type.
    """
    try:
        given.encode()
        return given
    except UnicodeEncodeError:
        try:  # in a locale without an encoding of its own, Python takes UTF-8 for bytes
            return os.fsencode(given).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(
                f"{given[:40]!a} is not UTF-8 text: see the encoding of this terminal or script"
            ) from None


def size(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def overrides(items: Iterable[str]) -> dict[str, Any]:
    """The values of every `--set KEY=VALUE`, by key. UsageError for a key that is given twice."""
    found: dict[str, Any] = {}
    for key, value in map(key_value, items):
        if key in found:
            raise UsageError(f"--set {key} is given twice: give it once")
        found[key] = value
    return found


def key_value(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE, the value in JSON: `use_dynamic_ntk=true` is ("use_dynamic_ntk", True)."""
    key, equals, value = text.partition("=")
    try:
        if not (key and equals):
            raise ValueError
        return key, json.loads(value)
    except (ValueError, RecursionError):
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise UsageError(f"--set {shown}: write KEY=VALUE with VALUE in JSON") from None
