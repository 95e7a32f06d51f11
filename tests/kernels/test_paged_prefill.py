"""Flash kernels over pages, interpreted on the CPU, against softmax in float64."""

import functools

import jax
import pytest

from qwen_jax.kernels import flash_tpu, flash_triton
from qwen_jax.kernels.flash_triton import TritonBlocks
from tests.kernels.paged_cases import FULL, Case, check, draw
from tests.support.tiny import QUICK

SMALL = TritonBlocks(tile=16, block=32, warps=4, stages=1)
TPU, TRITON = (
    functools.partial(flash_tpu.tpu_paged_prefill, interpret=True),
    functools.partial(flash_triton.triton_paged_prefill, interpret=True, blocks=SMALL),
)
CASES = {
    "tpu, int8": (TPU, Case(12, 5, 1, 128, 64, 5, (300, 0), "bfloat16", True)),
    "tpu, groups, large pages": (TPU, Case(12, 2, 2, 128, 256, 1, (150, 1))),
    "triton, int8, groups": (TRITON, Case(20, 1, 2, 96, 16, 6, (90, 0), "bfloat16", True)),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_softmax(name: str) -> None:
    attend, case = CASES[name]
    attend = jax.jit(attend, compiler_options=QUICK)
    check(attend, case, windows=(FULL, 60, 1), hidden_value=30.0)


def test_pages_larger_than_what_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of keys that is cut to whole pages is computed in even parts."""
    blocks = {0: flash_tpu.TpuBlocks(128, 256, 256)}
    monkeypatch.setattr(flash_tpu, "_SMALL", flash_tpu.Generation(blocks, blocks, 256, 2**24))
    check(jax.jit(TPU, compiler_options=QUICK), Case(2, 1, 1, 128, 384, 1, (384,)), (FULL,), 30.0)


def test_declines_pages_that_do_not_fill_registers_of_scores() -> None:
    drawn = draw(Case(12, 1, 1, 128, 48, 1, (5,)), FULL)
    with pytest.raises(NotImplementedError, match=r"pages of 48 .* divisors and multiples of 128"):
        TPU(**drawn)
