"""Turns an exception into one line for the person at the terminal: what went wrong, what to do.

Some libraries raise errors without a message, others with messages that do not help. This module
rewords the common cases: jax without its devices, too little memory, missing packages, files.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Collection

from qwen_jax.runtime import texts

_LONGEST = 500  # characters kept of a library's message; XLA appends a list of allocations
# The extra of this package that installs each optional package.
_EXTRAS = {
    "grain": "train",
    "matplotlib": "train",
    "pyarrow": "train",
    "tensorboardX": "train",
    "tokenizers": "train",
    "huggingface_hub": "hub",
    "prompt_toolkit": "chat",
    "rich": "chat",
    "gcsfs": "gcs",
    "libtpu": "aot",
    **dict.fromkeys(
        ("fastapi", "llguidance", "prometheus_client", "sse_starlette", "starlette", "uvicorn"),
        "serve",
    ),
}
_OWN = ("convert", "train")  # packages of the checkout, which are not installed
_CLOUD = ("gcsfs", "aiohttp", "google")  # packages whose errors come from access to gs://
# For each jax platform: the device's name, and how to get it to work.
_PLATFORMS = {
    "cuda": (
        "CUDA device",
        "pip install -e '.[cuda]', and see with nvidia-smi that there is a GPU and its driver",
    ),
    "tpu": ("TPU", "on a TPU VM pip install -e '.[tpu]', and let no other process hold it"),
}
_PLATFORMS["gpu"] = _PLATFORMS["cuda"]
# Advice against running out of memory: options to lower, and options with a value that saves.
_LOWER = ("length", "lengths", "max_length", "max_new_tokens", "rows", "batch")
_TAKE = {
    "accumulate": "a larger --accumulate",
    "remat": "--remat full",
    "cache_dtype": "--cache-dtype int8",
    "base_dtype": "--base-dtype int8",
    "mesh": "a --mesh of more devices",
}
# What to do about a system error, by its number.
_FILES = {
    errno.EACCES: "this user may not do that: see its owner and mode",
    errno.EPERM: "this user may not do that: see its owner and mode",
    errno.EROFS: "choose a place that can be written to",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of that path is a file",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ELOOP: "a link leads back to itself",
}
# Messages of CUDA libraries that mean an unsuitable driver.
_DRIVER = re.compile(
    r"driver version is insufficient|DRIVER_MISMATCH|CUDA_ERROR_(NO_DEVICE|UNKNOWN|COMPAT\w*|"
    r"UNSUPPORTED_PTX\w*)|cuInit|cuDNN|CUDNN|DNN library|libcud\w+\.so"
)


def explain(error: BaseException, options: Collection[str] = ()) -> str:
    """Describe an exception in one line for the user: what went wrong, and what to do.

    options: names of the command's arguments; advice mentions only options among them.
    """
    words = " ".join(str(error).split())
    line = (
        _cloud(error, words)
        or _file(error)
        or _package(error)
        or _devices(error, words)
        or _memory(error, words, options=options)
        or _characters(error)
    )
    if line is None:
        known = isinstance(error, ValueError | OSError | NotImplementedError)
        kind = "" if known and words else f"{type(error).__name__}: "
        hint = "" if known and words else "; --debug shows where"
        line = f"{kind}{words or 'no message'}{hint}"
    return texts.brief(texts.printable(line))


def _short(words: str) -> str:
    """Cut a library's message to `_LONGEST` characters."""
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _cloud(error: BaseException, words: str) -> str | None:
    """Describe an error in access to Google Cloud Storage in one line; None for other errors.

    words: the error's message.
    """
    if type(error).__module__.partition(".")[0] not in _CLOUD:
        return None
    return (
        f"Google Cloud Storage cannot be used: {_short(words) or type(error).__name__}; see to the "
        "network, and to credentials: gcloud auth application-default login"
    )


def _file(error: BaseException) -> str | None:
    """Describe an OSError in one line: message, file, what to do; None for other errors."""
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    names = [
        os.fsdecode(x) for x in (error.filename, error.filename2) if isinstance(x, str | bytes)
    ]
    where = f": {' -> '.join(names)}" if names else ""
    hint = _FILES.get(error.errno or 0)
    return f"{error.strerror}{where}{f' ({hint})' if hint else ''}"


def _package(error: BaseException) -> str | None:
    """Describe a failed import in one line, and how to fix it; None for other errors."""
    if not isinstance(error, ImportError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    if name in _OWN:
        found = sys.modules.get(name)
        if found is not None and not hasattr(found, "__path__"):
            return (
                f"{found.__file__} hides the package {name} of qwen_jax: rename it, or start the "
                "command by its file, such as python train/sft.py"
            )
        return f"there is no package {error.name}: run this from the root of a checkout"
    if not isinstance(error, ModuleNotFoundError):
        return None
    extra = f"[{_EXTRAS[name]}]" if name in _EXTRAS else ""
    return f"the package {name} is not installed: pip install -e '.{extra}' in the checkout"


def _devices(error: BaseException, words: str) -> str | None:
    """Describe in one line a device that jax does not find, or a GPU driver that is too old.

    words: the error's message. Returns None for other errors.
    """
    frames = traceback.extract_tb(error.__traceback__)
    silent = not words and bool(frames) and frames[-1].filename.endswith("xla_bridge.py")
    failed = re.search(r"Unable to initialize backend '(\w+)': ?(.*)", words)
    if not silent and not failed:
        if isinstance(error, RuntimeError) and _DRIVER.search(words):
            return (
                f"{_short(words)}; CUDA 13 needs a driver of version 580 or later (nvidia-smi "
                "shows it), and no other CUDA libraries on LD_LIBRARY_PATH"
            )
        return None
    asked = os.environ.get("JAX_PLATFORMS", "")
    name = failed[1] if failed else asked.partition(",")[0]
    # For "gpu" jax tries CUDA and ROCm, and its message names the last that it tried.
    name = asked if asked in _PLATFORMS else name
    what, advice = _PLATFORMS.get(name, ("platform", "known platforms are cpu, cuda and tpu"))
    what = what if name in _PLATFORMS else f"{what} {name!r}"
    reason = failed[2].partition(" (set JAX_PLATFORMS=")[0].rstrip(". ") if failed else ""
    asked_for = f" (JAX_PLATFORMS={asked})" if asked else ""
    unset = "; or unset JAX_PLATFORMS, to take what there is" if asked else ""
    because = f": {_short(reason)}" if reason else ""
    return f"jax finds no {what} here{asked_for}{because}; {advice}{unset}"


def _memory(error: BaseException, words: str, *, options: Collection[str]) -> str | None:
    """Describe exhausted device or host memory in one line, with options that would reduce its use.

    words: the error's message.
    options: names of the command's arguments, the only options to mention.

    Returns None for other errors.
    """
    of_device = isinstance(error, RuntimeError) and re.search(
        r"RESOURCE_EXHAUSTED|[Oo]ut of memory|OUT_OF_MEMORY", words
    )
    if not of_device and not isinstance(error, MemoryError):
        return None
    if re.search(r"\bvmem\b|\bsmem\b|[Ss]hared memory", words):
        return f"a kernel does not fit this chip: {_short(words)}; take --attention xla"
    where = "a device" if of_device else "this machine"
    lower = [f"--{name.replace('_', '-')}" for name in _LOWER if name in options]
    advice = [f"lower {' or '.join(lower)}"] if lower else []
    advice += [value for name, value in _TAKE.items() if name in options]
    what = f": {'; or '.join(advice)}" if advice else ": free some, or take a larger one"
    said = f" ({_short(words)})" if words else ""
    return f"not enough memory on {where}{what}{said}"


def _characters(error: BaseException) -> str | None:
    """Describe in one line an encoding error, or input nested too deeply; None for other errors."""
    if isinstance(error, RecursionError):
        return "something is nested too deeply, such as brackets in JSON; --debug shows where"
    if isinstance(error, UnicodeEncodeError):
        letter = error.object[error.start]
        return f"{letter!a} cannot be written in {error.encoding}; --debug shows where"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"0x{byte:02x} at byte {error.start} is not {error.encoding}; --debug shows where"
    return None
