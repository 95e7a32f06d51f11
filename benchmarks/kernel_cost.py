"""Cycles of attention kernels on TPUs, this project's and jax's, from their compiled programs.

    JAX_PLATFORMS=cpu python benchmarks/kernel_cost.py TABLE ... [--target v5e ...]

The tables are flash, masks, decode, paged, prefill and gpu. No accelerator is needed; `aot.py` says
what is counted and what is not. Prints Markdown. All cases are in bf16 with head dim 128 and as
many key/value heads as query heads, on one core.

* flash: causal attention against jax's splash attention with its best blocks. Figures are cycles
  per 1000 (query, key) pairs. `block` is for a computing step in a block that is entirely visible,
  with the bookkeeping of the step. `whole` is for the visible pairs over a whole sequence, and
  includes blocks that cross the diagonal, steps skipped above it, and the start and finish of each
  row of blocks, but not copies that arrive late. `ideal` is the share of the FLOPs of a pair (512
  forward, 1280 backward: nothing computed twice) over the peak of a core.
* masks: the additional cost of windows and packed documents. The scale of a query (LogN) is an
  argument of every call, so it costs nothing more.
* decode: one token against a cache, and jax's two kernels for it. `limit` is the time that the
  bytes of the cache take to arrive, as a share of the time of the kernel's program; above 100 % the
  kernel waits for them.
* paged: the same where the cache lies in pages of 128 tokens, beside `decode`'s own kernel and
  jax's ragged_paged_attention. Our kernel for pages leaves out the pass's own token, which is
  attended to apart; `+ own` adds the cycles that the kernel of `decode` spends on that token.
* prefill: a chunk of 512 tokens against 8,192 in pages, all visible, beside the kernel of `flash`
  on the same keys without pages. Figures are cycles per 1000 pairs.
* gpu: the resources of the GPU kernels, as reported by ptxas.

`--sweep` compiles all block sizes of `flash` and prints the best for each length, to be put into
`BEST` (for this project's kernels: `flash_tpu.CHIPS`); otherwise only those are compiled.
"""

import dataclasses
import datetime
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import paged_attention, ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import aot
from qwen_jax import attention
from qwen_jax.attention import pages
from qwen_jax.kernels import (
    choice,
    decode_tpu,
    decode_triton,
    flash_hopper,
    flash_tpu,
    flash_triton,
)
from qwen_jax.kernels.flash_tpu import TpuBlocks
from qwen_jax.leaves.int8 import Int8
from qwen_jax.runtime import command

HEADS, DIM, PAGE = 4, 128, 128
FORWARD, BACKWARD = 4 * DIM, 10 * DIM  # FLOPs per pair: 2 and 5 products
DECODE_HEADS = 32
CHUNK, CACHED = 512, 8192  # of a prompt, against its tokens before
LENGTHS = (2048, 8192, 32768)
Built = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often a kernel runs each of its parts for one head over a sequence.

    steps: for each kind of computing step, in the order of the program (one number: the cheapest
        kind).
    skipped: steps that compute nothing.
    edges: for each start or finish (one number: all of them).
    """

    steps: tuple[int, ...]
    skipped: int
    edges: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A kernel, or several that do one task together.

    flops: per pair.
    build: what to compile for a length and blocks.
    kernels: for each kernel that counts, a part of its name, and its counts for a target, length
        and blocks.
    sizes: the blocks to try.
    """

    name: str
    flops: int
    build: Callable[[int, TpuBlocks], Built]
    kernels: dict[str, Callable[[str, int, TpuBlocks], Counts]]
    sizes: tuple[TpuBlocks, ...]


def array(shape: Sequence[int], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an argument."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def causal(length: int) -> attention.Mask:
    """The mask of plain causal attention."""
    return packed(length, length)


def packed(length: int, document: int, first: int = 0, window: int = attention.FULL) -> Any:
    """The mask of a sequence of packed documents, each with its own positions.

    document: tokens per document; first: tokens of another document before them.
    """
    token = np.arange(length)
    since = np.where(token < first, token, (token - first) % document)
    segment = 1 + np.where(token < first, 0, 1 + (token - first) // document)
    positions, segments = (jnp.asarray(x[None], jnp.int32) for x in (since, segment))
    return attention.Mask(positions, positions, segments, segments, jnp.int32(window))


def visible(mask: attention.Mask) -> int:
    """The number of (query, key) pairs that a mask of `packed` lets through."""
    return int(np.minimum(np.asarray(mask.q_positions) + 1, int(mask.window)).sum())


def our_counts(
    target: str, length: int, blocks: TpuBlocks, *, backward: bool, mask: Any = None
) -> Counts:
    """The counts in flash_tpu's list of steps for a mask; without one, for causal attention."""
    mask = causal(length) if mask is None else mask
    parts = -(-length // flash_tpu.CHIPS[aot.TPUS[target].kind].resident) if backward else 1
    part = length // parts
    blocks = blocks.fitted(part, length)
    kinds = np.concatenate(
        [
            np.asarray(flash_tpu._kinds(_queries(mask, slice(at, at + part)), blocks))
            for at in range(0, length, part)
        ],
        2 if backward else 1,
    )
    _, full, near, mixed = np.bincount(kinds.ravel(), minlength=4)
    rows = parts * length // blocks.k if backward else kinds.shape[1]
    empty = int((kinds == 0).all(1 if backward else 2).sum())
    edges = (parts, rows, rows) if backward else (rows, rows)
    return Counts((int(full), int(near), int(mixed)), empty, edges)


def _queries(mask: attention.Mask, rows: slice) -> attention.Mask:
    """The mask of a range of queries."""
    return dataclasses.replace(
        mask, q_positions=mask.q_positions[:, rows], q_segments=mask.q_segments[:, rows]
    )


def our_body(blocks: TpuBlocks) -> flash_tpu.TpuBody:
    """This project's kernel with these blocks."""
    chip = flash_tpu.CHIPS[choice.device().device_kind]
    return flash_tpu.TpuBody(blocks, blocks, chip.resident, chip.vmem)


def our_forward(length: int, blocks: TpuBlocks) -> Built:
    """The forward pass of this project's kernel."""

    def run(q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
        return our_body(blocks).forward(q, k, v, mask, scale, q.dtype)

    return run, (*_inputs(length, 3), *mask_and_scale(1, length, length))


def our_backward(length: int, blocks: TpuBlocks) -> Built:
    """The backward pass of this project's kernel."""

    def run(q: Any, k: Any, v: Any, mask: Any, scale: Any, lse: Any, delta: Any, do: Any) -> Any:
        return our_body(blocks).backward(q, k, v, mask, scale, lse, delta, do)

    q, k, v, do = _inputs(length, 4)
    stat = array((1, length, HEADS), jnp.float32)
    return run, (q, k, v, *mask_and_scale(1, length, length), stat, stat, do)


def mask_and_scale(batch: int, queries: int, keys: int) -> tuple[Any, Any]:
    """The shapes of a mask and of the queries' scale."""
    q, k = (array((batch, length), jnp.int32) for length in (queries, keys))
    scale = array((batch, queries), jnp.float32)
    return attention.Mask(q, k, q, k, array((), jnp.int32)), scale  # type: ignore[arg-type]


def both_passes(
    attend: Callable[..., Any], batch: int, length: int, heads: int, dim: int = DIM
) -> Built:
    """The forward pass and the gradients of q, k, v."""

    def run(q: Any, k: Any, v: Any, mask: Any, scale: Any, do: Any) -> Any:
        o, pull = jax.vjp(lambda *x: attend(*x, mask, scale), q, k, v)
        return o, pull(do)

    x = array((batch, length, heads, dim))
    return run, (x, x, x, *mask_and_scale(batch, length, length), x)


def splash_counts(target: str, length: int, blocks: TpuBlocks, *, by_key: bool) -> Counts:
    """The counts of splash attention: a grid over all blocks that skips those above the diagonal.

    by_key: whether rows of the grid are blocks of keys.
    """
    del target
    rows, columns = length // blocks.q, length // blocks.k
    computing = sum(-(-(row + 1) * blocks.q // blocks.k) for row in range(rows))
    edges = columns if by_key else rows
    return Counts((computing,), rows * columns - computing, (edges,))


def splash_forward(length: int, blocks: TpuBlocks) -> Built:
    """The forward pass of jax's splash attention."""
    sizes = splash.BlockSizes(block_q=blocks.q, block_kv=blocks.k, block_kv_compute=blocks.compute)
    return _splash(length, sizes, 3)


def splash_backward(length: int, blocks: TpuBlocks, *, fused: bool) -> Built:
    """The backward pass of jax's splash attention. fused: in one kernel."""
    sizes = splash.BlockSizes(
        block_q=min(512, length),
        block_kv=min(512, length),
        block_q_dkv=blocks.q,
        block_kv_dkv=blocks.k,
        block_kv_dkv_compute=blocks.compute,
        block_q_dq=None if fused else blocks.q,
        block_kv_dq=None if fused else blocks.k,
        use_fused_bwd_kernel=fused,
    )
    forward, inputs = _splash(length, sizes, 4)
    return lambda q, k, v, do: jax.vjp(forward, q, k, v)[1](do), inputs


def _splash(length: int, sizes: splash.BlockSizes, inputs: int) -> Built:
    """Causal splash attention, with the shapes of `inputs` arguments."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * HEADS)
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)(
            q, k, v
        )

    return attend, (array((HEADS, length, DIM)),) * inputs


def _inputs(length: int, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of `count` arguments [1, length, HEADS, DIM]."""
    return (array((1, length, HEADS, DIM)),) * count


SIZES = tuple(
    TpuBlocks(q, k, compute)
    for q, k, compute in itertools.product((512, 1024, 2048), (512, 1024, 2048), (256, 512, 1024))
    if compute <= k
)
# A block is unrolled: larger ones make programs of a hundred thousand instructions.
OUR_SIZES = tuple(x for x in SIZES if x.q * x.k <= 2**21 and x.compute <= 512)
BY_ROW = functools.partial(splash_counts, by_key=False)
BY_COLUMN = functools.partial(splash_counts, by_key=True)
OURS = {
    "forward": Entry(
        "flash_tpu forward",
        FORWARD,
        our_forward,
        {"flash_forward": functools.partial(our_counts, backward=False)},
        OUR_SIZES,
    ),
    "backward": Entry(
        "flash_tpu backward",
        BACKWARD,
        our_backward,
        {"flash_backward": functools.partial(our_counts, backward=True)},
        OUR_SIZES,
    ),
}
RIVALS = {
    "forward": (Entry("splash forward", FORWARD, splash_forward, {"mha_fwd": BY_ROW}, SIZES),),
    "backward": (
        Entry(
            "splash backward",
            BACKWARD,
            functools.partial(splash_backward, fused=True),
            {"mha_dkv": BY_COLUMN},
            SIZES,
        ),
        Entry(
            "splash backward, 2 kernels",
            BACKWARD,
            functools.partial(splash_backward, fused=False),
            {"mha_dq": BY_ROW, "mha_dkv": BY_COLUMN},
            SIZES,
        ),
    ),
}

# The blocks with the lowest `whole` among the `sizes` of an entry: by entry, target and length.
BEST: dict[tuple[str, str, int], TpuBlocks] = {
    ("splash forward", "v5e", 2048): TpuBlocks(1024, 1024, 512),
    ("splash forward", "v5e", 8192): TpuBlocks(2048, 2048, 256),
    ("splash forward", "v5e", 32768): TpuBlocks(2048, 2048, 256),
    ("splash backward", "v5e", 2048): TpuBlocks(512, 512, 512),
    ("splash backward", "v5e", 8192): TpuBlocks(1024, 1024, 1024),
    ("splash backward", "v5e", 32768): TpuBlocks(1024, 2048, 512),
    ("splash backward, 2 kernels", "v5e", 2048): TpuBlocks(512, 512, 256),
    ("splash backward, 2 kernels", "v5e", 8192): TpuBlocks(1024, 1024, 1024),
    ("splash backward, 2 kernels", "v5e", 32768): TpuBlocks(1024, 2048, 1024),
    ("splash forward", "v5p", 2048): TpuBlocks(1024, 1024, 512),
    ("splash forward", "v5p", 8192): TpuBlocks(2048, 2048, 256),
    ("splash forward", "v5p", 32768): TpuBlocks(2048, 2048, 256),
    ("splash backward", "v5p", 2048): TpuBlocks(512, 512, 512),
    ("splash backward", "v5p", 8192): TpuBlocks(1024, 1024, 1024),
    ("splash backward", "v5p", 32768): TpuBlocks(1024, 2048, 512),
    ("splash backward, 2 kernels", "v5p", 2048): TpuBlocks(512, 512, 256),
    ("splash backward, 2 kernels", "v5p", 8192): TpuBlocks(1024, 1024, 1024),
    ("splash backward, 2 kernels", "v5p", 32768): TpuBlocks(1024, 2048, 1024),
    ("splash forward", "v6e", 2048): TpuBlocks(1024, 1024, 512),
    ("splash forward", "v6e", 8192): TpuBlocks(2048, 2048, 1024),
    ("splash forward", "v6e", 32768): TpuBlocks(2048, 2048, 1024),
    ("splash backward", "v6e", 2048): TpuBlocks(1024, 1024, 1024),
    ("splash backward", "v6e", 8192): TpuBlocks(1024, 1024, 1024),
    ("splash backward", "v6e", 32768): TpuBlocks(1024, 2048, 256),
    ("splash backward, 2 kernels", "v6e", 2048): TpuBlocks(1024, 1024, 512),
    ("splash backward, 2 kernels", "v6e", 8192): TpuBlocks(1024, 1024, 512),
    ("splash backward, 2 kernels", "v6e", 32768): TpuBlocks(1024, 2048, 256),
}


def best(entry: Entry, target: str, length: int) -> TpuBlocks:
    """The best blocks of an entry."""
    chip = flash_tpu.CHIPS[aot.TPUS[target].kind]
    ours = {OURS["forward"].name: chip.forward, OURS["backward"].name: chip.backward}
    if entry.name in ours:
        return flash_tpu.blocks_for(ours[entry.name], length)
    return BEST[entry.name, target, length]


@functools.cache
def measure(entry: Entry, target: str, length: int, blocks: TpuBlocks) -> dict[str, aot.Cost]:
    """The cost of each kernel that counts, compiled for one length; it differs little for
    others.
    """
    programs = aot.compile_tpu(*entry.build(length, blocks), target)[1]
    return {
        kernel: aot.steady(program)
        for kernel in entry.kernels
        for program in programs
        if kernel in program.name
    }


def cycles(cost: aot.Cost, counts: Counts) -> int:
    """Cycles for one head over a whole sequence."""
    steps = cost.steps if len(counts.steps) > 1 else (cost.step,)
    edges = cost.edges if len(counts.edges) > 1 else (sum(cost.edges),)
    total = sum(n * x.cycles for n, x in zip(counts.steps, steps, strict=True))
    total += sum(n * x for n, x in zip(counts.edges, edges, strict=True))
    return total + counts.skipped * cost.step.idle


def whole(
    entry: Entry, costs: dict[str, aot.Cost], target: str, length: int, blocks: TpuBlocks
) -> float:
    """Cycles per 1000 pairs of causal attention over a whole sequence."""
    counted = {kernel: count(target, length, blocks) for kernel, count in entry.kernels.items()}
    total = sum(cycles(costs[kernel], counts) for kernel, counts in counted.items())
    return 1000 * total / (length * (length + 1) / 2)


def sweep(entry: Entry, target: str, lengths: list[int]) -> None:
    """Print the best blocks of an entry."""
    tried = {}
    for blocks in entry.sizes:
        try:
            tried[blocks] = measure(entry, target, max(lengths), blocks)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # which means too large for VMEM
                raise
    for length in lengths:
        fitting = (blocks for blocks in tried if max(blocks.q, blocks.k) <= length)
        found = {blocks: whole(entry, tried[blocks], target, length, blocks) for blocks in fitting}
        for blocks in sorted(found, key=found.__getitem__)[:3]:
            sizes = f"TpuBlocks({blocks.q}, {blocks.k}, {blocks.compute})"
            print(f'    ("{entry.name}", "{target}", {length}): {sizes},  # {found[blocks]:.2f}')
    sys.stdout.flush()


def line(*cells: Any) -> None:
    """Print a line of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def header(*cells: str) -> None:
    """Print the head of a Markdown table."""
    line(*cells)
    print("|---" * len(cells) + "|")


def flash_table(targets: list[str], lengths: list[int]) -> None:
    """Print the table `flash`."""
    slots = ("MATMUL", "VALU", "EUP")
    header(
        "kernel", "chip", "T", "blocks", "block", "ideal", "whole", "ideal", "ours / best", *slots
    )
    for target, task, length in itertools.product(targets, OURS, lengths):
        measured = []
        for entry in (OURS[task], *RIVALS[task]):
            blocks = best(entry, target, length)
            costs = measure(entry, target, length, blocks)
            measured.append((entry, blocks, costs, whole(entry, costs, target, length, blocks)))
        rival = min(value for *_, value in measured[1:])
        for entry, blocks, costs, value in measured:
            ideal = 1000 * entry.flops / aot.TPUS[target].flops
            step = sum(1000 * x.step.cycles / (blocks.q * blocks.k) for x in costs.values())
            shares = [" + ".join(f"{x.share(s):.0%}" for x in costs.values()) for s in slots]
            line(
                *(entry.name, target, length, f"{blocks.q}/{blocks.k}/{blocks.compute}"),
                *(f"{step:.2f}", f"{ideal / step:.0%}", f"{value:.2f}", f"{ideal / value:.0%}"),
                f"**{value / rival:.3f}**" if entry is OURS[task] else "",
                *shares,
            )


MASKS: dict[str, Callable[[int], Any]] = {
    "causal": causal,
    "window 4096": lambda length: packed(length, length, window=4096),
    "documents of 2048": lambda length: packed(length, 2048),
    "documents of 2048, not on blocks": lambda length: packed(length, 2048, first=700),
}


def masks_table(targets: list[str], lengths: list[int]) -> None:
    """Print the table `masks`."""
    header(
        *("kernel", "chip", "T", "mask", "blocks: full", "positions", "segments"),
        *("cycles / causal: of a block", "of a visible pair"),
    )
    for target, task, length in itertools.product(targets, OURS, lengths):
        blocks = best(OURS[task], target, length)
        (cost,) = measure(OURS[task], target, length, blocks).values()
        base = None
        for name, make in MASKS.items():
            mask = make(length)
            counts = our_counts(target, length, blocks, backward=task == "backward", mask=mask)
            total = cycles(cost, counts)
            value = np.array([total / sum(counts.steps), total / visible(mask)])
            base = value if base is None else base
            of_block, of_pair = value / base
            line(
                *(OURS[task].name, target, length, name, *counts.steps),
                *(f"{of_block:.2f}", f"{of_pair:.2f}"),
            )


def our_decode(
    attend: Callable[..., Any],
    batch: int,
    slots: int,
    kind: str | None,
    heads: int = DECODE_HEADS,
    dim: int = DIM,
) -> Built:
    """Decoding of one token per row against a cache by this project's kernel. kind: None is
    bf16.
    """
    own = array((batch, 1, heads, dim))
    row, one = array((batch,), jnp.int32), array((), jnp.int32)
    shape = (batch, heads, slots)
    cache = array((*shape, dim))
    if kind is not None:
        cache = Int8(array((*shape, dim), jnp.int8), array(shape, jnp.float32), None)  # type: ignore[arg-type]
    scale = array((batch, 1), jnp.float32)
    return attend, (own, own, own, cache, cache, row, one, one, scale)


def our_paged(
    batch: int,
    slots: int,
    kind: str | None,
    *,
    page: int = PAGE,
    heads: int = DECODE_HEADS,
    dim: int = DIM,
    tokens: int = 1,
) -> tuple[Any, ...]:
    """The arguments of this project's kernels for pages: a pool that the rows fill. kind: None is
    bf16.
    """
    width = slots // page
    shape = (1 + batch * width, 2, heads, page)
    pool: Any = array((*shape, dim))
    if kind is not None:
        pool = Int8(array((*shape, dim), jnp.int8), array(shape, jnp.float32), None)  # type: ignore[arg-type]
    queries, table = array((batch, tokens, heads, dim)), array((batch, width), jnp.int32)
    row, one = array((batch,), jnp.int32), array((), jnp.int32)
    return queries, pool, table, row, one, array((batch, tokens), jnp.float32)


def paged_layers(
    attend: Any, batch: int, slots: int, kind: str | None, *, tokens: int = 1, layers: int = 2
) -> Built:
    """A pass through the attention of some layers with pages, which it writes into (argument 0)."""
    q, pool, table, row, window, scale = our_paged(batch, slots, kind, tokens=tokens)
    token = array((batch, tokens), jnp.int32)
    own: Any = attention.Mask(token, token, token, token, window)  # type: ignore[arg-type]

    def run(held: Any, q: Any, own: Any, scale: Any, places: Any) -> Any:
        written = []
        for layer in held:
            q, layer = layer.attend(
                attend, q, k=q, v=q, own=own, past=None, scale=scale, index=places
            )
            written.append(layer)
        return written, q

    held = [pages.PagedLayer(pool)] * layers
    return run, (held, q, own, scale, pages.Places(table, row, row))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A rival of decode_tpu.

    build: for batch, slots, the cache's kind, and the slots per step.
    size: a number of slots per step beyond which the cost changes little.
    heads: per step, by the kind of cache.
    """

    name: str
    build: Callable[[int, int, str | None, int], Built]
    size: int
    heads: dict[str | None, int]


def paged(batch: int, slots: int, kind: str | None, size: int) -> Built:
    """jax's `paged_attention`."""
    page, heads = PAGE, DECODE_HEADS
    assert kind is None
    run = functools.partial(paged_attention.paged_attention, pages_per_compute_block=size // page)
    pool = array((heads, batch * slots // page, page, DIM))
    table = array((batch, slots // page), jnp.int32)
    return run, (array((batch, heads, DIM)), pool, pool, array((batch,), jnp.int32), table)


def ragged(batch: int, slots: int, kind: str | None, size: int) -> Built:
    """jax's `ragged_paged_attention`; an int8 cache has one scale, which is the cheapest case."""
    page, heads = PAGE, DECODE_HEADS
    scale = None if kind is None else 0.1
    run = functools.partial(
        ragged_paged_attention.ragged_paged_attention,
        num_kv_pages_per_block=size // page,
        num_queries_per_block=1 if batch == 1 else 8,
        vmem_limit_bytes=64 * 2**20,
        k_scale=scale,
        v_scale=scale,
    )
    shape = (batch * slots // page, page, 2 * heads, DIM)
    cache = array(shape, jnp.bfloat16 if kind is None else jnp.int8)
    table = array((batch, slots // page), jnp.int32)
    lengths, starts = array((batch,), jnp.int32), array((batch + 1,), jnp.int32)
    one = array((1,), jnp.int32)
    return run, (array((batch, heads, DIM)), cache, lengths, table, starts, one)


DECODERS = (
    Decoder("paged_attention", paged, 4096, {None: 1}),
    Decoder("ragged_paged_attention", ragged, 2048, {None: 8, "int8": 16}),
)
CACHES = ((1, 32768), (64, 2048))


def our_decode_cycles(cost: aot.Cost, batch: int, slots: int, kind: str | None) -> float:
    """Cycles of a whole call of decode_tpu.

    Its program has three kinds of steps: the beginning of a row, a block of slots that are all
    visible, and a block of which some are.
    """
    dtype = jnp.dtype(jnp.bfloat16 if kind is None else jnp.int8)
    shape = decode_tpu._shape(1, 1, DECODE_HEADS, slots, DIM, dtype, None)
    begin, full, _ = cost.steps
    blocks = -(-slots // shape.block)
    row = begin.cycles - begin.idle + blocks * full.cycles + sum(cost.edges)
    return batch * DECODE_HEADS / shape.heads * row


def our_paged_cycles(cost: aot.Cost, batch: int, slots: int, kind: str | None) -> float:
    """Cycles of a whole call of the kernel for pages, whose rows begin without a product."""
    dtype = jnp.dtype(jnp.bfloat16 if kind is None else jnp.int8)
    shape = decode_tpu._shape(1, 1, DECODE_HEADS, slots, DIM, dtype, None)
    full, _ = cost.steps
    row = -(-slots // shape.block) * full.cycles + sum(cost.edges)
    return batch * DECODE_HEADS / shape.heads * row


def rival_cycles(rival: Decoder, cost: aot.Cost, batch: int, slots: int, kind: str | None) -> float:
    """Cycles of a whole call of a rival, without the start of each row before the loop over its
    blocks.
    """
    steps = batch * slots // min(rival.size, slots) * DECODE_HEADS // rival.heads[kind]
    rows = batch * DECODE_HEADS // rival.heads[kind]
    return steps * cost.step.cycles + rows * sum(cost.edges)


def decode_table(targets: list[str]) -> None:
    """Print the table `decode`."""
    header("kernel", "chip", "batch x slots", "cache", "cycles / 1000", "HBM limit", "ours / best")
    for target, (batch, slots), kind in itertools.product(targets, CACHES, (None, "int8")):
        built = our_decode(decode_tpu.tpu_decode, batch, slots, kind)
        cost = decode_cost(built, target, decode_tpu.NAME)
        found = {decode_tpu.NAME: our_decode_cycles(cost, batch, slots, kind)}
        for rival in DECODERS:
            if kind in rival.heads:
                built = rival.build(batch, slots, kind, min(rival.size, slots))
                cost = decode_cost(built, target, "paged")
                found[rival.name] = rival_cycles(rival, cost, batch, slots, kind)
        best = min(list(found.values())[1:])
        for name, cycles in found.items():
            value = 1000 * cycles / (batch * slots * DECODE_HEADS)
            limit = 1000 * cache_bytes(name, kind) / aot.TPUS[target].hbm
            ratio = f"**{cycles / best:.3f}**" if name == decode_tpu.NAME else ""
            shape = f"{batch} x {slots}", kind or "bf16"
            line(name, target, *shape, f"{value:.0f}", f"{limit / value:.0%}", ratio)


def paged_table(targets: list[str]) -> None:
    """Print the table `paged`."""
    header(
        *("kernel", "chip", "batch x slots", "cache", "cycles / 1000", "HBM limit"),
        *("/ contiguous", "/ ragged"),
    )
    for target, (batch, slots), kind in itertools.product(targets, CACHES, (None, "int8")):
        found = paged_cycles(target, batch, slots, kind)
        for name, cycles in found.items():
            value = 1000 * cycles / (batch * slots * DECODE_HEADS)
            limit = 1000 * cache_bytes(name, kind) / aot.TPUS[target].hbm
            others = [found.get(x) for x in ("decode_tpu", "ragged_paged_attention")]
            ratios = [f"{cycles / x:.3f}" if x and x != cycles else "" for x in others]
            shape = f"{batch} x {slots}", kind or "bf16"
            line(name, target, *shape, f"{value:.0f}", f"{limit / value:.0%}", *ratios)


def paged_cycles(target: str, batch: int, slots: int, kind: str | None) -> dict[str, float]:
    """Cycles of a decode step over pages, by kernel: ours, without and with the time that the
    contiguous kernel takes for the pass's own token; the contiguous kernel; and jax's, unless the
    compiler refuses it for this chip.
    """
    attend, rival = decode_tpu.tpu_paged_decode, DECODERS[1]
    built = attend, our_paged(batch, slots, kind)
    own = our_paged_cycles(decode_cost(built, target, decode_tpu.NAME), batch, slots, kind)
    built = our_decode(decode_tpu.tpu_decode, batch, slots, kind)
    cost = decode_cost(built, target, decode_tpu.NAME)
    begin = cost.steps[0].cycles - cost.steps[0].idle
    dtype = jnp.dtype(jnp.bfloat16 if kind is None else jnp.int8)
    shape = decode_tpu._shape(1, 1, DECODE_HEADS, slots, DIM, dtype, None)
    found = {
        "decode_tpu, pages": own,
        "decode_tpu, pages, + own": own + batch * DECODE_HEADS / shape.heads * begin,
        decode_tpu.NAME: our_decode_cycles(cost, batch, slots, kind),
    }
    try:
        built = rival.build(batch, slots, kind, min(rival.size, slots))
        cost = decode_cost(built, target, "paged")
    except (jax.errors.JaxRuntimeError, ValueError) as refusal:
        print(f"{rival.name}, {target}: {str(refusal).splitlines()[0]}", file=sys.stderr)
        return found
    return found | {rival.name: rival_cycles(rival, cost, batch, slots, kind)}


def prefill_table(targets: list[str]) -> None:
    """Print the table `prefill`."""
    header("kernel", "chip", "chunk x slots", "cache", "cycles / 1000", "/ contiguous")
    for target in targets:
        found = prefill_cycles(target)
        for name, cycles in found.items():
            kernel, cache = name
            ratio = f"{cycles / found['flash_tpu', 'bf16']:.3f}" if "pages" in kernel else ""
            line(kernel, target, f"{CHUNK} x {CACHED}", cache, f"{cycles:.2f}", ratio)


def prefill_cycles(target: str) -> dict[tuple[str, str], float]:
    """Cycles per 1000 pairs of a chunk of a prompt against cached keys, by kernel and cache."""
    own, keys = (array((1, length, DECODE_HEADS, DIM)) for length in (CHUNK, CACHED))

    def flat(q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
        blocks = flash_tpu.blocks_for(flash_tpu.CHIPS[choice.device().device_kind].forward, CACHED)
        return our_body(blocks).forward(q, k, v, mask, scale, q.dtype)

    built: dict[tuple[str, str], Built] = {
        ("flash_tpu", "bf16"): (flat, (own, keys, keys, *mask_and_scale(1, CHUNK, CACHED)))
    }
    for kind in (None, "int8"):
        arguments = our_paged(1, CACHED, kind, tokens=CHUNK)
        built["flash_tpu, pages", kind or "bf16"] = flash_tpu.tpu_paged_prefill, arguments
    sizes = flash_tpu.CHIPS[aot.TPUS[target].kind].forward
    blocks = flash_tpu.blocks_for(sizes, CACHED).fitted(CHUNK, CACHED)
    found = {}
    for name, call in built.items():
        cost = decode_cost(call, target, "flash")
        full = cost.steps[::3]  # of each head: wholly visible, with positions, with segments
        idle = max(x.idle for x in full)
        step = (sum(x.cycles - x.idle for x in full) + idle) / len(full)
        total = CACHED / blocks.k * step + sum(cost.edges) / len(full)
        found[name] = 1000 * CHUNK / blocks.q * total / (CHUNK * CACHED)
    return found


def cache_bytes(name: str, kind: str | None) -> int:
    """Bytes of a key and a value in the cache; int8 ones of decode_tpu have a scale each."""
    if kind is None:
        return 2 * DIM * 2
    return 2 * (DIM + 4 * name.startswith(decode_tpu.NAME))


def decode_cost(built: Built, target: str, name: str) -> aot.Cost:
    """Compile a kernel, and return its cost."""
    (program,) = (x for x in aot.compile_tpu(*built, target)[1] if name in x.name)
    return aot.steady(program)


def gpu_table() -> None:
    """Print the table `gpu`."""
    header("kernel", "chip", "shape", "registers", "threads", "shared memory", "bytes spilled")
    for target, (name, shape, built) in itertools.product(("h200", "a100"), gpu_kernels()):
        if target == "a100" and name == flash_hopper.NAME:
            continue
        for kernel in pallas(aot.compile_gpu(*built, target)[1]):
            short = kernel.name.removesuffix("_mosaic_gpu_kernel")
            line(
                *(f"{name}: {short}", target, shape, kernel.registers, kernel.threads),
                *(f"{kernel.shared / 1024:.0f} KiB", kernel.spilled),
            )


def pallas(kernels: list[aot.GpuKernel]) -> list[aot.GpuKernel]:
    """The kernels without XLA's own."""
    return sorted((x for x in kernels if "fusion" not in x.name), key=lambda x: x.name)


def gpu_kernels() -> Iterator[tuple[str, str, Built]]:
    """Name, shape, and what to compile, for each GPU kernel."""
    hopper, triton = flash_hopper.hopper_attention, flash_triton.triton_attention
    passes = (
        (flash_hopper.NAME, hopper, 128),
        (flash_triton.NAME, triton, 128),
        (flash_triton.NAME, triton, 64),
    )
    for name, attend, dim in passes:
        built = both_passes(attend, 1, 8192, HEADS, dim)
        yield name, f"T 8192, H {dim}", built
    for kind in (None, "int8"):
        yield (
            decode_triton.NAME,
            f"S 8192, cache {kind or 'bf16'}",
            our_decode(decode_triton.triton_decode, 1, 8192, kind),
        )
        yield (
            f"{decode_triton.NAME}, pages",
            f"S 8192, cache {kind or 'bf16'}",
            (decode_triton.triton_paged_decode, our_paged(1, 8192, kind)),
        )
        yield (
            f"{flash_triton.NAME}, pages",
            f"T {CHUNK}, S {CACHED}, cache {kind or 'bf16'}",
            (flash_triton.triton_paged_prefill, our_paged(1, CACHED, kind, tokens=CHUNK)),
        )


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="Cycles of attention kernels.")
    tables = ("flash", "masks", "decode", "paged", "prefill", "gpu")
    parser.add_argument("table", nargs="*", help=", ".join(tables))
    parser.add_argument("--target", nargs="+", choices=aot.TPUS, help="default: v5e v5p v6e")
    parser.add_argument("--length", nargs="+", type=int, choices=LENGTHS, help="default: all")
    parser.add_argument("--only", default="", help="of a sweep: entries whose name holds this")
    parser.add_argument("--sweep", action="store_true", help="find the best blocks again")
    args = parser.parse_args()
    wanted = args.table or tables
    if unknown := set(wanted) - {*tables}:
        parser.error(f"{min(unknown)}: choose from {', '.join(tables)}")
    if args.only and not args.sweep:
        parser.error("--only applies to a sweep: add --sweep")
    if args.table and args.sweep:
        parser.error(f"{args.table[0]}: --sweep prints no table")
    if args.length and not {*wanted} & {"flash", "masks"}:
        parser.error("--length applies to the tables flash and masks, and to a sweep")
    if args.target and {*wanted} == {"gpu"}:
        parser.error("--target applies to TPUs, which the table gpu does not compile for")
    targets: list[str] = args.target or ["v5e", "v5p", "v6e"]
    lengths: list[int] = args.length or [*LENGTHS]
    if args.sweep:
        entries = [*OURS.values(), *itertools.chain(*RIVALS.values())]
        for target, entry in itertools.product(targets, entries):
            if args.only in entry.name:
                sweep(entry, target, lengths)
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{versions}, {datetime.date.today()}: `python {' '.join(sys.argv)}`\n")
    for table in wanted:
        if table == "flash":
            flash_table(targets, lengths)
        elif table == "masks":
            masks_table(targets, lengths)
        elif table == "decode":
            decode_table(targets)
        elif table == "paged":
            paged_table(targets)
        elif table == "prefill":
            prefill_table(targets)
        else:
            gpu_table()
        print()


if __name__ == "__main__":
    main()
