"""`counted.py FILE MODULE ...`: run a command, and write the bytes that it has read to
FILE.PROCESS.

The kernel counts what goes through `read` and similar calls, whether from disk or not. Modules are
imported beforehand, as far as possible.
"""

import importlib
import sys
from pathlib import Path


def bytes_read() -> int:
    """The bytes that this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def main() -> int:
    """Run the command, and return its exit code."""
    file, module, *arguments = sys.argv[1:]
    for name in ("tensorstore", "convert.copying", "qwen_jax.generate.from_directory"):
        importlib.import_module(name)
    command = importlib.import_module(module)
    before = bytes_read()
    code = command.main(arguments)
    number = arguments[arguments.index("--process") + 1]
    Path(f"{file}.{number}").write_text(str(bytes_read() - before))
    return code


if __name__ == "__main__":
    sys.exit(main())
