"""The parts that all commands share: exit codes, one-line errors, progress on stderr, options.

Exit codes: 0 success, 2 a usage error, 130 interrupted, 1 any other error. With several processes,
only process 0 prints, except for errors.
"""

import argparse
import contextlib
import difflib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwen_jax.runtime import errors, paths, processes, streams, texts

# The names of `attention.IMPLEMENTATIONS`, for --help texts, which do not import jax.
ATTENTION = (
    "auto, xla, pallas_tpu, pallas_triton, pallas_hopper, dot_product, splash, flash or tokamax "
    "(docs/attention.md)"
)
DTYPE = "compute in this dtype (default: float32 on a CPU, bfloat16 or else float16 elsewhere)"


Group = argparse._ArgumentGroup  # options under a title of their own, in --help


class UsageError(ValueError):
    """Raised for invalid or contradictory arguments; the command exits with code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line, without the list of all options.

    Its help keeps the line breaks of its description and examples.
    """

    def __init__(self, *args: Any, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **settings)
        self.register("type", int, _whole)
        self.register("type", float, _number)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line. The error for an unknown option names the option it may mean."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown: {' '.join(unknown)}{hint}")
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert an argument's text by its type, of which any exception is a usage error."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            raise
        except Exception as error:
            what = f"{arg_string!r}: {str(error) or type(error).__name__}"
            raise argparse.ArgumentError(action, what) from None

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Convert an argument's texts. `--option=--` names no value: Python 3.11 makes it []."""
        if action.option_strings and "--" in arg_strings:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Print a usage error as one line, and exit with code 2."""
        self.exit(2, f"error: {_with_help(self, message.removeprefix('argument '))}\n")


def _with_help(parser: argparse.ArgumentParser, message: str) -> str:
    """A usage error in one line, with the command that prints the help."""
    said = texts.brief(texts.printable(" ".join(message.split())))
    return f"{said} (see {parser.prog} --help)"


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    *,
    argv: list[str] | None = None,
) -> int:
    """Run a command: parse its arguments, call `work` with them, and return the exit code.

    An exception becomes one line on stderr; with `--debug` it is raised. argv: None takes
    `sys.argv`.
    """
    streams.settle()
    args = parse(parser, argv)
    show_log(args.debug)
    warnings.formatwarning = _as_line
    try:
        work(args)
        streams.flush()
    except KeyboardInterrupt:
        if processes.count() > 1:
            processes.failed("interrupted", 130)
        say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        streams.discard()
        return 1
    except Exception as error:
        if args.debug:
            raise
        _hush()
        with contextlib.suppress(OSError):  # a failing stdout may be the error being reported
            streams.flush()
        processes.await_verdict(error)
        detail = errors.explain(error, vars(args))
        code = 1
        if isinstance(error, UsageError):
            code, detail = 2, _with_help(parser, detail)
        if processes.count() > 1:
            processes.failed(detail, code)
        say(f"error: {detail}")
        return code
    return 0


class _Absent(list[Any]):
    """The placeholder of an argument that the command line does not contain.

    It is a list because argparse appends to the values of some arguments.
    """


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, and list the arguments that it contains in `args.given`.

    They are named as attributes are, such as "top_k", and count even if their value equals the
    default. To find them, the command line is parsed a second time into a namespace of
    placeholders, as argparse does not replace a value that is there by a default.
    """
    args, absent = parser.parse_args(argv), _Absent()
    named = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    args.given = tuple(sorted(name for name, value in vars(named).items() if value is not absent))
    return args


def refuse(args: argparse.Namespace, names: Iterable[str], *, why: str) -> None:
    """Raise UsageError if the command line contains one of the arguments `names`.

    For options that have no effect together with others. names: as in `args.given`, such as
    "top_k". why: follows the option's name in the message, and says what to do.
    """
    for name in names:
        if name in args.given:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def check_new(option: str, path: Path) -> None:
    """Raise UsageError unless the file that an option names can be made.

    Its folder must exist, and nothing may be at its place that would be replaced.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; name a file")
    if path.exists():
        raise UsageError(f"{option} {path}: exists already; name another file, or remove it")
    if not paths.is_place(path):
        raise UsageError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    check_writable(option, path)


class _Probed(Exception):
    """Raised to drop the draft that `check_writable` has made."""


def check_writable(option: str, path: Path) -> None:
    """Raise UsageError if no file can be made at a place; what is there stays as it is.

    For commands that write the file after long work. option: the option or argument that names it.
    """
    try:
        with paths.draft(path):
            raise _Probed
    except _Probed:
        return
    except OSError as error:
        what = f"{option} {path}: no file can be made there"
        raise UsageError(f"{what}: {error.strerror or error}") from None


def _as_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Format a warning as one line, without file and line number; "" except in process 0."""
    line = f"warning: {' '.join(str(message).split())}\n"
    return line if processes.index() == 0 else ""


def say(line: str) -> None:
    """Print a line to stderr, from process 0 only; stdout is left to the command's results.

    A stderr that cannot be written to, such as a pipe whose reader has gone, loses the line.
    """
    if processes.index() == 0 and sys.stderr is not None:
        print(line, file=streams.lenient(sys.stderr), flush=True)


def _hush() -> None:
    """After a command has failed, silence the tracebacks of threads and other background work."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = threading.excepthook = _say_nothing


def _say_nothing(_: Any) -> None:
    """An exception hook that does nothing. It is not a lambda, because a thread may be about to
    call the hook while it is replaced, and a lambda could be freed by then.
    """


def show_log(debug: bool = False) -> None:
    """Print this package's log messages as plain lines on stderr, from process 0 only.

    Orbax, gcsfs and matplotlib log warnings about intended behaviour or about their own caches,
    which are hidden, and errors that are raised as well, which are shown only with `debug`.
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
    """Add the options of every command: `--debug`, which shows tracebacks, and `--version`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_version(parser)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option `--version`, which prints the versions of qwen_jax, jax and Python."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")


class _Version(argparse.Action):
    """The action of `--version`: it looks the versions up only when the option is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        from qwen_jax.runtime.version import VERSION

        jax, python = metadata.version("jax"), sys.version.split()[0]
        print(f"qwen_jax {VERSION} (jax {jax}, Python {python})")
        parser.exit()


def _whole(text: str) -> int:
    """Parse a whole number: an argparse type for `int` that says what is allowed."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    """Parse a number: an argparse type for `float` that says what is allowed."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.5") from None


def positive(text: str) -> int:
    """Parse a whole number of at least 1: an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def path(given: str) -> Path:
    """Parse a local path, or one in Google Cloud Storage (`gs://`): an argparse type."""
    try:
        return paths.parse(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text(given: str) -> str:
    """Parse text that is valid UTF-8, from the bytes of the command line: an argparse type.

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
    """Format a number of bytes as GB or MB, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def decimals(value: float) -> str:
    """Format a number with two decimals, and a large one in at most 9 characters, for people."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def overrides(items: Iterable[str]) -> dict[str, Any]:
    """Parse all `--set KEY=VALUE` options into a dict. Raises UsageError for a repeated key."""
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
