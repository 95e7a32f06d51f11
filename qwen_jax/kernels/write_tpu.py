"""Writing into the pages of a KV cache in place, for TPUs (Pallas, Mosaic).

XLA writes to computed pages by a scatter, whose time on a TPU nobody has measured. These kernels
copy what they change and nothing else: the register rows around one token, or whole pages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import NewPart, PoolLeaf, Ref, decline_page

NAME = "write_tpu"
_HEADS = 8  # heads of a page that are copied at once: a page of all heads may not fit into VMEM


def tpu_write(
    kv: PoolLeaf,
    new: NewPart,
    pages: Int[Array, " n"],
    slots: Int[Array, " n"] | None = None,
    *,
    interpret: bool | None = None,
) -> PoolLeaf:
    """Return the pages with new keys and values written: one token in each page, or whole pages.

    The memory is that of `kv`, if the program need not keep it.

    kv: [P, 2, K, page, H], an array or an int8 leaf with values and scale.
    new: [n, 2, K, H], one token for each of n pages, or [n, 2, K, page, H]; a leaf of kv's kind.
    pages: int32 [n], which pages. Only page 0, which is nobody's, may occur more than once.
    slots: int32 [n], the slot of each token in its page; None for whole pages.
    interpret: whether to interpret the kernel; None does so on a CPU only.

    Raises NotImplementedError for a page size or a device that the kernel does not support.
    """
    interpret = choice.interpreted(NAME, "tpu") if interpret is None else interpret
    pool, structure = jax.tree.flatten(kv)
    decline_page(NAME, kv, multiple=_rows(pool[0]))
    leaves = zip(pool, jax.tree.leaves(new), strict=True)
    parts = [x.astype(old.dtype) for old, x in leaves]
    if slots is None:
        written = _whole_pages(pool, parts, pages, interpret)
    else:
        written = _tokens(pool, parts, pages, slots, interpret)
    return jax.tree.unflatten(structure, written)


def _rows(x: jax.Array) -> int:
    """Return the rows of a register of x's dtype, the fewest that are copied."""
    return 32 // x.dtype.itemsize


def _tokens(
    pool: list[jax.Array],
    parts: list[jax.Array],
    pages: jax.Array,
    slots: jax.Array,
    interpret: bool,
) -> list[jax.Array]:
    """Write one token into each of some pages."""

    def size(old: jax.Array) -> int:
        return _rows(old) if old.ndim == 5 else old.shape[3]  # scales lie along lanes

    def old_spec(old: jax.Array) -> pl.BlockSpec:
        def index(i: jax.Array, pages: Ref, slots: Ref) -> tuple[Any, ...]:
            return (pages[i], 0, 0, slots[i] // size(old), 0)[: old.ndim]

        return pl.BlockSpec((None, 2, old.shape[2], size(old), *old.shape[4:]), index)

    def new_spec(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, *_: (i, 0, 0, 0)[: x.ndim])

    specs = [old_spec(old) for old in pool]
    return _call(
        _write_token,
        (parts[0].shape[0],),
        (pages, slots),
        parts,
        [new_spec(x) for x in parts],
        pool,
        specs,
        specs,
        interpret,
    )


def _whole_pages(
    pool: list[jax.Array], parts: list[jax.Array], pages: jax.Array, interpret: bool
) -> list[jax.Array]:
    """Replace some pages."""
    number, heads = parts[0].shape[0], pool[0].shape[2]
    size = _HEADS if heads % _HEADS == 0 else heads

    def spec(old: jax.Array, *, indexed: bool) -> pl.BlockSpec:
        def index(i: jax.Array, group: jax.Array, pages: Ref) -> tuple[Any, ...]:
            return (pages[i] if indexed else i, 0, group, 0, 0)[: old.ndim]

        return pl.BlockSpec((None, 2, size, *old.shape[3:]), index)

    return _call(
        _write_pages,
        (number, heads // size),
        (pages,),
        parts,
        [spec(old, indexed=False) for old in pool],
        pool,
        [pl.BlockSpec(memory_space=pl.ANY)] * len(pool),
        [spec(old, indexed=True) for old in pool],
        interpret,
    )


def _call(
    body: Any,
    grid: tuple[int, ...],
    scalars: tuple[jax.Array, ...],
    parts: list[jax.Array],
    part_specs: list[pl.BlockSpec],
    pool: list[jax.Array],
    pool_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    interpret: bool,
) -> list[jax.Array]:
    """Run a kernel that writes `parts` into the arrays of the pool in place."""
    before = len(scalars) + len(parts)
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pool],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[part_specs, pool_specs],
            out_specs=out_specs,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * len(grid)),
        input_output_aliases={before + i: i for i in range(len(pool))},
        interpret=interpret,
        name=NAME,
    )(*(x.astype(jnp.int32) for x in scalars), parts, pool)


def _write_token(pages: Ref, slots: Ref, parts: list[Ref], pool: list[Ref], *written: Ref) -> None:
    """Copy the rows around one token's slot with the token in it."""
    slot = slots[pl.program_id(0)]
    for part, old, out in zip(parts, pool, written, strict=True):
        here = lax.broadcasted_iota(jnp.int32, old.shape, 2) == slot % old.shape[2]
        wide = jnp.int32 if old.dtype == jnp.int8 else jnp.float32  # of which registers have masks
        new = part[...].astype(wide)
        new = new[:, :, None] if old.ndim == 4 else new.reshape(*new.shape, 1)
        new = jnp.where(here, jnp.broadcast_to(new, old.shape), old[...].astype(wide))
        out[...] = new.astype(old.dtype)


def _write_pages(pages: Ref, parts: list[Ref], pool: list[Ref], *written: Ref) -> None:
    """Copy some heads of a page."""
    for part, out in zip(parts, written, strict=True):
        out[...] = part[...]
