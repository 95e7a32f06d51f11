"""What all commands share: exit codes, one-line errors, progress on stderr, common options.

Exit codes: 0 success, 2 a usage error, 130 interrupted, 1 any other error. With several processes,
only process 0 prints, except for errors.
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.runtime import errors, paths, processes, rendezvous

# The names of `attention.IMPLEMENTATIONS`, for helps, which do not import jax.
ATTENTION = (
    "auto, xla, pallas_tpu, pallas_triton, pallas_hopper, dot_product, splash, flash or tokamax "
    "(docs/attention.md)"
)
DTYPE = "compute in this dtype (default: float32 on a CPU, bfloat16 or else float16 elsewhere)"
_RAISING = ("strict", "surrogateescape", "surrogatepass")  # handlers that may raise on output


class UsageError(ValueError):
    """Arguments that are invalid or cannot be combined; the command exits with code 2."""


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    *,
    argv: list[str] | None = None,
) -> int:
    """Parse the arguments, call `work` with them, and return the exit code.

    An exception becomes one line on stderr; with `--debug` it is raised.
    """
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
        with contextlib.suppress(OSError):  # a failing stdout may be the error being reported
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
    """The value of an argument that the command line does not name. It is a list because argparse
    appends to the values of some arguments.
    """


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `given` of the result holds the names of the arguments that it
    contains.

    An argument counts as given even if its value equals the default. argparse can tell this only
    when the namespace holds other values beforehand, so the line is parsed twice.
    """
    args, absent = parser.parse_args(argv), _Absent()
    named = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    args.given = tuple(sorted(name for name, value in vars(named).items() if value is not absent))
    return args


def refuse(args: argparse.Namespace, names: Iterable[str], *, why: str) -> None:
    """Raise UsageError for the first of `names` that the command line contains.

    For options that have no meaning together with the others. `why` follows the option's name in
    the message, and says what to do.
    """
    for name in names:
        if name in args.given:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def _as_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Format a warning as one line without file and line number; "" except in process 0."""
    line = f"warning: {' '.join(str(message).split())}\n"
    return line if processes.index() == 0 else ""


def _settle_streams() -> None:
    """Make sure that printing cannot end a run.

    Characters that stdout's encoding lacks are replaced, and a closed stdout or stderr is replaced
    by the null device. (stderr always escapes such characters.)
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _RAISING:
        sys.stdout.reconfigure(errors="replace")


def _flush() -> None:
    """Flush stdout now, so that an error such as a full disk can still be reported."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard()
        error.filename = "stdout"
        raise


def _discard() -> None:
    """Redirect a broken stdout to the null device: Python's own flush at exit would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Print a line to stderr, from process 0 only; stdout is left to the command's results."""
    if processes.index() == 0:
        print(line, file=sys.stderr, flush=True)


def _hush() -> None:
    """Silence the tracebacks of background work, such as a checkpoint that threads are writing,
    once the command itself has failed.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = threading.excepthook = _say_nothing


def _say_nothing(_: Any) -> None:
    """A hook that does nothing. It is not a lambda, because a thread may be about to call the hook
    while it is replaced, and a lambda could be freed by then.
    """


def show_log(debug: bool = False) -> None:
    """Print the log lines of this package as `say` does.

    The logs of Orbax, gcsfs and matplotlib are shown for debugging only: they hold warnings about
    intended behaviour or about caches of their own, and errors that are raised as well.
    """
    handler = logging.Handler()
    handler.emit = lambda record: say(record.getMessage())
    logger = logging.getLogger("qwen_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library's handler on the root logger would print it again
    for name in ("absl", "gcsfs", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR if debug else logging.CRITICAL)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add what every command has: `--debug`, which shows tracebacks, and `--version`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_version(parser)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option that prints the version of the library, and of what its results depend on."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions, and exit")


class _Version(argparse.Action):
    """Looks versions up when they are asked for: every command has this option."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        from qwen_jax.runtime.version import VERSION

        jax, python = metadata.version("jax"), sys.version.split()[0]
        print(f"qwen_jax {VERSION} (jax {jax}, Python {python})")
        parser.exit()


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the processes of a run; `join` reads them."""
    group = parser.add_argument_group("several processes, on one host or many (docs/hosts.md)")
    add = group.add_argument
    add(
        "--distributed",
        action="store_true",
        help="join the processes of this TPU pod, Slurm job or other cluster that jax recognises",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 with a free port; goes with --processes and --process "
        "(default: one process, or as found by --distributed)",
    )
    add(
        "--processes",
        type=positive,
        metavar="N",
        help="how many processes there are (default: one, or as found by --distributed)",
    )
    add(
        "--process",
        type=int,
        metavar="I",
        help="the number of this process, from 0 (default: as found by --distributed)",
    )
    add(
        "--start-timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for all processes to start (default: %(default)s)",
    )
    add(
        "--heartbeat-timeout",
        type=positive,
        default=30,
        metavar="SECONDS",
        help="a process that is silent for this long counts as dead (default: %(default)s)",
    )


def join(args: argparse.Namespace) -> None:
    """Join the processes that the options of `add_processes` describe, if any.

    Must be called before jax is used. Raises UsageError for options that contradict each other, and
    ValueError if the processes were started with different arguments.
    """
    named = (args.coordinator, args.processes, args.process)
    if not args.distributed and named == (None, None, None):
        how = "applies to several processes: add --distributed, or --coordinator and its like"
        refuse(args, ("start_timeout", "heartbeat_timeout"), why=how)
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
    """An argparse type: text that is valid UTF-8, decoded from the bytes of the command line.

    File names may hold any bytes, so paths do not use this type.
    """
    try:
        given.encode()
        return given
    except UnicodeEncodeError:
        try:  # in the C locale, Python may not have decoded the bytes as UTF-8
            return os.fsencode(given).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(
                f"{given[:40]!a} is not UTF-8 text: see the encoding of this terminal or script"
            ) from None


def size(count: int) -> str:
    """A number of bytes in GB or MB, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def overrides(items: Iterable[str]) -> dict[str, Any]:
    """The values of all `--set KEY=VALUE` options, by key. Raises UsageError for a repeated key."""
    found: dict[str, Any] = {}
    for key, value in map(key_value, items):
        if key in found:
            raise UsageError(f"--set {key} is given twice: give it once")
        found[key] = value
    return found


def key_value(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE with VALUE in JSON: `use_dynamic_ntk=true` is ("use_dynamic_ntk", True)."""
    key, equals, value = text.partition("=")
    try:
        if not (key and equals):
            raise ValueError
        return key, json.loads(value)
    except (ValueError, RecursionError):
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise UsageError(f"--set {shown}: write KEY=VALUE with VALUE in JSON") from None
