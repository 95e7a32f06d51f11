"""Compiling for accelerators that are not there: `make test-aot`, in an environment of its own.

`make test` runs those marked `smoke` there. Without the packages of the `aot` extra, the tests that
need them are not collected.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import pytest

from benchmarks import aot

PACKAGES = ("libtpu", "jax_plugins.xla_cuda13")


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


COMPILED = [
    "test_cache.py",
    "test_pages.py",
    "test_cost.py",
    "test_engine_programs.py",
    "test_grouped_products.py",
    "test_pod.py",
    "test_quantised_steps.py",
    "test_cuda.py",
    "test_plan.py",
    "test_tpu.py",
]
collect_ignore = COMPILED
if all(map(_there, PACKAGES)):
    aot.prepare()
    collect_ignore = []


@pytest.fixture(autouse=True, scope="session")
def _compile_again() -> None:
    """A program out of a cache leaves no dump to read."""
    jax.config.update("jax_enable_compilation_cache", False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A target, and the shape of attention there: queries, or slots of a cache."""

    target: str
    length: int
    heads: int
    dim: int = 128

    @property
    def batch(self) -> int:
        """Many rows: XLA compiles for a minute where q, k and v fit into a TPU's VMEM whole."""
        return max(1, 2**19 // (self.length * self.heads))

    @property
    def queries(self) -> int:
        """Elements of q."""
        return self.batch * self.length * self.heads * self.dim

    def __str__(self) -> str:
        return f"{self.target}-{self.length}-{self.heads}x{self.dim}"


def parameter(*values: Any, smoke: bool = False, release: bool = False) -> Any:
    """A parameter of a test: one that `make test` runs too, or that only a release needs."""
    name = "-".join(getattr(value, "NAME", str(value)) for value in values)
    marks = [pytest.mark.smoke] * smoke + [pytest.mark.release] * release
    return pytest.param(*values, marks=marks, id=name)
