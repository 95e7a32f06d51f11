"""`counted.py FILE MODULE ...`: run a command; write the bytes that it has read to FILE.PROCESS.

They are the kernel's own count of what went through `read` and its kin, whether from disk or not.
Imports come before, as far as they can.
"""

import importlib
import sys
from pathlib import Path


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def main() -> int:
    file, module, *arguments = sys.argv[1:]
    for name in ("tensorstore", "convert.copying", "qwen_jax.generate.language_model"):
        importlib.import_module(name)
    command = importlib.import_module(module)
    before = bytes_read()
    code = command.main(arguments)
    number = arguments[arguments.index("--process") + 1]
    Path(f"{file}.{number}").write_text(str(bytes_read() - before))
    return code


if __name__ == "__main__":
    sys.exit(main())
