"""Cache folders for data that can be recomputed: compiled programs, kernel checks, encoded data."""

import argparse
import atexit
import errno
import functools
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from qwen_jax.runtime import paths

_LEAST_FREE = 64 * 2**20  # bytes of a disk; a compiled program may take tens of millions


def own_cache(name: str) -> Path:
    """Return this user's cache folder of the given name, and create it if needed.

    The folder is in `$XDG_CACHE_HOME/qwen_jax`, or if that is unset in `~/.cache/qwen_jax`. If it
    is not writable, a temporary folder is used, which is removed when the process ends, and one
    warning says so.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen_jax"
    except RuntimeError:
        return _passing_cache("this user has no home", name)
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
        if not os.access(root / name, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        return _passing_cache(f"{root} cannot be written to: {error.strerror}", name)
    return root / name


def _passing_cache(reason: str, name: str) -> Path:
    """Return a temporary cache folder of the given name, and create it if needed.

    reason: why the user's own cache folder cannot be used, for the warning.
    """
    folder = _passing_root(reason) / name
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _passing_root(reason: str) -> Path:
    """Create the temporary folder of this process's caches, and warn that it is removed at exit.

    reason: why the user's own cache folder cannot be used, for the warning.

    `functools.cache` makes sure that the folder is created once and the warning given once.
    """
    warnings.warn(
        f"{reason}: compiled programs, verdicts on kernels and encoded data are not kept after "
        "this run; set XDG_CACHE_HOME to a folder that can be written to",
        stacklevel=4,
    )
    root = Path(tempfile.mkdtemp(prefix="qwen_jax-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Add the option `--compilation-cache DIR`, the folder that keeps compiled programs."""
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="folder that keeps compiled programs; for several hosts a shared one, or gs:// "
        "(default: $JAX_COMPILATION_CACHE_DIR, or in the user's cache)",
    )


def use_compilation_cache(place: str | None = None) -> None:
    """Keep compiled programs between runs in jax's persistent compilation cache.

    place: the cache's folder, which may be in `gs://`. None keeps the folder that jax is configured
        with, or if there is none uses a folder in the user's cache.

    With several processes, jax lets only process 0 write to the cache while all read from it, so
    the other processes find programs only if all use the same folder. Programs in a folder that
    cannot be written to, or on a disk that is nearly full, are used, and one warning says that no
    more are kept. Raises ValueError or OSError if the folder cannot be used.
    """
    import jax

    if place is None and (configured := jax.config.values["jax_compilation_cache_dir"]):
        _write_if_possible(paths.absolute(configured))
        return
    folder = own_cache("jax") if place is None else paths.absolute(place)
    if place is not None:
        paths.make_folder(folder)  # if it is missing, jax warns at every program
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if paths.is_remote(folder):
        # XLA's own caches of GPU kernels can be written to local disks only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _write_if_possible(folder)


def _write_if_possible(folder: Path) -> None:
    """Have jax not write to a local folder that cannot take compiled programs, and warn once.

    jax would warn at every program, and what it wrote to a full disk in part it would neither read
    nor replace at any later start.
    """
    import jax

    if paths.is_remote(folder) or not folder.is_dir():
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES)
    elif (free := shutil.disk_usage(folder).free) < _LEAST_FREE:
        reason = (
            f"{free / 2**20:.0f} MiB of its disk are free, at least {_LEAST_FREE >> 20} must be"
        )
    else:
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    warnings.warn(f"{folder}: {reason}: newly compiled programs are not kept", stacklevel=3)
