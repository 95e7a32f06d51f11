"""The memory of this machine, or the part of it that a container may use."""

import contextlib
import os
from pathlib import Path

# Where Linux says the limit of a container, seen from within: control groups of version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable() -> int:
    """Return the bytes of memory that this process may use, if nothing else needs any."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)
