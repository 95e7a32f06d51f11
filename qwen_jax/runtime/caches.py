"""Folders of what can be made again: compiled programs, verdicts on kernels, encoded data."""

import argparse
import atexit
import errno
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from qwen_jax.runtime import paths


def own_cache(name: str) -> Path:
    """A folder of this user's files that can be made again, in XDG_CACHE_HOME or the home; it is
    there.

    Where none can be written to, it is one that goes with this process, with one warning.
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
    folder = _passing_root(reason) / name
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _passing_root(reason: str) -> Path:
    """A folder that goes with this process. The warning comes once, as the folder is made once."""
    warnings.warn(
        f"{reason}: compiled programs, verdicts on kernels and encoded data are not kept after "
        "this run; set XDG_CACHE_HOME to a folder that can be written to",
        stacklevel=4,
    )
    root = Path(tempfile.mkdtemp(prefix="qwen_jax-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Add the option that `use_compilation_cache` takes."""
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept; of several hosts one that all see, or gs:// "
        "(default: $JAX_COMPILATION_CACHE_DIR, or a cache of the user)",
    )


def use_compilation_cache(place: str | None = None) -> None:
    """Keep compiled programs between runs.

    place: a folder, which may be in `gs://`; None is the place that the user has told jax, or one
    in the home. Of several processes jax lets process 0 alone write, and all read: the others find
    programs only where all see the same folder. Raises ValueError or OSError for a place that
    cannot be.
    """
    import jax

    if place is None and jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = own_cache("jax") if place is None else paths.absolute(place)
    if place is not None:
        paths.make_folder(folder)  # jax would say with each program that it is not there
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if paths.is_remote(folder):
        # What XLA keeps of GPU kernels beside the programs, it writes to a disk only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
