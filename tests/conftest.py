"""What every test shares: eight virtual CPU devices and a compilation cache, before jax starts."""

import contextlib
import gc
import importlib.util
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # the environments of other tests have none
    import hypothesis

    # Nothing depends on how quick the machine is.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("tests")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAG = "--xla_force_host_platform_device_count"
FLAGS = {FLAG: "8"}
_JAXLIB = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
if _JAXLIB < (0, 11) and importlib.util.find_spec("libtpu") is None:
    # Without its newer emitters XLA compiles for a CPU in less than half the time: steps of the
    # tiny decoder on meshes took 24 instead of 58 CPU seconds. Later jaxlibs have no such choice,
    # and they, as libtpu, end the process over flags that they do not know.
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
if importlib.util.find_spec("libtpu") is None:  # with it, programs are compiled to be measured
    # Nearly all programs run once, for milliseconds, and take longer to be optimised. `make
    # test-slow` and CI's second run of tests have them optimised.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

# A shell starts what it runs in the background with SIGINT ignored, and so would be every command
# that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands that tests start inherit these: they compile what an earlier run compiled once only.
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


if importlib.util.find_spec("jaxtyping") is not None:
    from tests.support import axes

    axes.install()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What training has encoded goes here, not to the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """What the tests of a file have compiled and traced is kept, as later files use some of it, and
    taken from what Python's garbage collector looks through: tracing is several times slower in the
    end without that. Where there are so many programs that the system would soon give no memory
    for more (each has mappings of its own, of which a Linux process may have 65,530), all go.
    """
    yield
    if _mappings() > 20_000:
        import jax

        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _mappings() -> float:
    """How many mappings of memory this process has; without /proc, more than any limit."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return math.inf


@pytest.fixture(autouse=True)
def _own_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does to the process lasts as long as its test: where the library's log goes,
    and that a command which fails silences its threads.
    """
    log = logging.getLogger("qwen_jax")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="session")
def golden_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's tiny checkpoint, converted once for all tests; do not change it."""
    from convert import from_hf

    target = tmp_path_factory.mktemp("golden") / "ckpt"
    assert from_hf.main([str(Path(__file__).parent / "golden/checkpoint"), str(target)]) == 0
    return target


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random chat model with the real tokenizer, converted; do not change it."""
    from convert import from_hf
    from tests.tools.make_checkpoint import make_checkpoint

    work = tmp_path_factory.mktemp("chat")
    make_checkpoint(work / "hf", "demo", "float32", tokenizer=True)
    assert from_hf.main([str(work / "hf"), str(work / "ckpt")]) == 0
    return work / "ckpt"
