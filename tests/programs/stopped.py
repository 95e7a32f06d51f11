"""`stopped.py WHERE COUNT PROCESS SIGNAL MODULE ...`: run a command that is stopped at some point.

Process number PROCESS gets the signal when the function WHERE, `package.module:name`, is called for
the COUNT-th time. Bytes are copied in blocks of 4 kB, so `convert.copying:_check_stop`, which is
called before each block, counts what has been written.
"""

import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

BLOCK = 4096


def stopping(
    where: str, count: int, stop: Callable[[], Any], patch: Callable[..., Any] = setattr
) -> None:
    """Have `stop` called when the function `where` is called for the `count`-th time.

    patch: setattr, or that of a monkeypatch.
    """
    module, _, name = where.partition(":")
    *path, name = name.split(".")
    home = functools.reduce(getattr, path, importlib.import_module(module))
    function, calls = getattr(home, name), itertools.count(1)

    def counted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == count:
            stop()
        return function(*arguments, **more)

    patch(home, name, counted)


def main() -> int:
    """Run the command, and return its exit code."""
    where, count, victim, sent, module, *arguments = sys.argv[1:]
    number = arguments[arguments.index("--process") + 1] if "--process" in arguments else victim
    from convert import copying

    copying.BLOCK_BYTES = BLOCK
    if number == victim:
        stopping(where, int(count), lambda: os.kill(os.getpid(), int(sent)))
    return importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
