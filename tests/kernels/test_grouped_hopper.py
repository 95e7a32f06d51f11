"""Products with weights in groups for Hopper GPUs, emulated where jax can, against float64.

The emulator knows no layouts and no PTX: that codes reach the registers which wgmma reads them from
is tested apart. `tests/aot/test_grouped_products.py` compiles them.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from qwen_jax.kernels import choice, grouped_hopper
from qwen_jax.leaves import grouped_calls
from tests.kernels.grouped_cases import Case, check, draw

emulates = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax does not emulate Mosaic GPU"
)
CASES = [
    (Case(5, 448, 208, 64, asymmetric=True), 2),
    (Case(70, 256, 144, bits=8), 1),
]
MORE = [
    *[(Case(rows, 512, 208, size, bits, asymmetric=size < 128), None)
      for rows, size in ((1, 128), (8, 16), (17, 32), (65, 64), (130, 16), (130, 128))
      for bits in (4, 8)],
    (Case(3, 1024, 128, 256, dtype="float32", scales="float32", asymmetric=True), 3),
    (Case(33, 640, 128, 128, dtype="float16"), 2),
    (Case(2, 704, 16, 704), 1),
    (Case(9, 1408, 48, 32, bits=8), 4),
]  # fmt: skip


def _product(weight: jax.Array, x: Any) -> jax.Array:
    """The emulator multiplies no arrays of registers: the product is jax's here."""
    return jnp.dot(weight.astype(jnp.float32), x[...].astype(jnp.float32).T, precision="highest")


@emulates
@pytest.mark.parametrize(
    ("case", "splits"),
    [*CASES, *(pytest.param(*each, marks=pytest.mark.release) for each in MORE)],
    ids=str,
)
def test_agrees_with_float64(case: Case, splits: int | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(grouped_hopper, "_product", _product)
    product = functools.partial(
        grouped_hopper.hopper_product,
        bits=case.bits,
        dtype="float32",
        interpret=plgpu.InterpretGPUParams(),  # pyright: ignore
        splits=splits,
    )
    check(jax.jit(product), case)


def held(layout: Any, array: np.ndarray) -> np.ndarray:
    """What each thread holds of an array in a layout: [128 threads, registers, numbers of one]."""
    for tile in layout.tiling.tiles:
        first = array.ndim - len(tile)
        tiles = zip(array.shape[first:], tile, strict=True)
        split = [x for length, size in tiles for x in (length // size, size)]
        array = array.reshape(*array.shape[:first], *split)
        outer, inner = range(first, array.ndim, 2), range(first + 1, array.ndim, 2)
        array = np.transpose(array, (*range(first), *outer, *inner))
    threads = [array.ndim + k for k in (*layout.warp_dims, *layout.lane_dims)]
    vector = array.ndim + layout.vector_dim
    rest = [k for k in range(array.ndim) if k not in (*threads, vector)]
    array = np.transpose(array, (*threads, *rest, vector))
    return array.reshape(128, -1, array.shape[-1])


@pytest.mark.parametrize("bits", [4, 8])
def test_registers_of_words_are_those_of_wgmma(bits: int) -> None:
    """As the kernel joins them, each thread already holds the numbers that wgmma takes from it."""
    count, words = 16 // bits, 4 * bits
    numbers = np.arange(count * words * 64 * 2, dtype=np.uint16).reshape(count, words, 64, 2)
    pairs = list(numbers.view(np.uint32)[..., 0])
    wide = grouped_hopper._joined([jnp.asarray(x) for x in pairs], interpret=True)
    wanted = held(mgpu.WGMMA_LAYOUT, np.asarray(wide).view(np.uint16))
    registers = [held(grouped_hopper._WORDS.to_mgpu(), pair) for pair in pairs]
    for thread in range(128):
        mine = grouped_hopper.in_order([x[thread] for x in registers])
        np.testing.assert_array_equal(mine.reshape(-1, 1).view(np.uint16), wanted[thread])


def test_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(case: Case) -> jax.Array:
        return grouped_hopper.hopper_product(**draw(case), bits=case.bits)

    with pytest.raises(NotImplementedError, match="is for Hopper GPUs, this is cpu"):
        product(Case(2, 256, 128))
    monkeypatch.setattr(choice, "is_hopper", lambda _: True)
    for case, told in (
        (Case(2, 288, 128, 96), "groups of 96 inputs, only 16, 32, 64 and multiples of 128"),
        (Case(2, 256, 72), "72 outputs, only multiples of 16"),
        (Case(2, 96, 128, 32), "96 inputs, only multiples of 64"),
        (Case(2, 96, 128, 32, dtype="float8_e5m2"), "dtype float8_e5m2, only"),
    ):
        with pytest.raises(NotImplementedError, match=f"grouped_hopper: {told}"):
            product(case)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(1, 256, 128), "one_row"),
        (Case(2, 256, 128), "hopper_product"),
        (Case(2, 256, 72), "triton_product"),
        (Case(1, 256, 72), "one_row"),
    ],
    ids=str,
)
def test_shapes_that_it_declines_go_to_triton(case: Case, name: str, monkeypatch: Any) -> None:
    for other in ("one_row", "hopper_product", "triton_product"):
        monkeypatch.setattr(grouped_calls, other, lambda *_, other=other, **__: other)
    assert grouped_calls.KERNELS["pallas_hopper"](**draw(case), bits=case.bits) == name
