"""Makes an `Engine` from a loaded model: chooses the sizes of its programs, and compiles them."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax import meshes
from qwen_jax.attention import cache, prove
from qwen_jax.checkpoint import adapter_files
from qwen_jax.config import Config
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.following import Leader, follow
from qwen_jax.engine.steps import Shape, Steps
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder, adapted, rope
from qwen_jax.runtime import paths, processes, values

_SHARE = 0.9  # of the free memory of an accelerator that pages take; programs need the rest
_CPU_SHARE = 0.25  # of a host's memory


def make(
    model: LanguageModel,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    rows: int | None = None,
    cache_gb: float | None = None,
    page: int | None = None,
    chunk: int | None = None,
    chunks: int = 1,
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> Engine | None:
    """Make an engine for a loaded model, and compile its programs. `Engine.start` starts it.

    All processes call it. Process 0 gets the engine; in the others it runs the programs that the
    engine asks for, and returns None when the engine is closed.

    adapters: folders of adapters in PEFT's format, by the names that requests call them.
    rows: the most requests that decode at a time; None for 64 on an accelerator and 16 on a CPU,
        times the parts into which the mesh splits a batch.
    cache_gb: GB of memory for pages on each device; None for what is free on an accelerator, and
        on a CPU for a quarter of the machine's memory, but no more than all rows can use.
    page: the tokens in a page; None for 128 on an accelerator and 16 on a CPU.
    chunk: the prompt tokens that are computed between two decode steps, a multiple of `page`; None
        for 512 on an accelerator and 64 on a CPU.
    chunks: the prompts of each part of the batch of which a chunk is computed at a time.
    report: is called with the name of each program and the seconds until it was ready.

    Raises ValueError for an adapter that does not fit the model, sizes that do not fit each other,
    or a cache that holds less than one request of two pages.
    """
    decoder = _with_adapters(model, list((adapters or {}).values()))
    slow = jax.default_backend() == "cpu"
    sizes = sharding.axis_sizes(model.mesh)
    replicas = math.prod(sizes[axis] for axis in sharding.BATCH)
    rows = values.whole("rows", rows or (16 if slow else 64) * replicas, least=1)
    if rows % replicas:
        raise ValueError(f"rows {rows}: must be a multiple of the mesh's {replicas} parts of it")
    page = values.whole("page", page or (16 if slow else 128), least=1, most=1024)
    chunk = values.whole("chunk", chunk or (64 if slow else 512), least=1)
    if chunk % page:
        raise ValueError(f"chunk {chunk}: must be a multiple of the page, {page} tokens")
    width = -(-model.max_length // page)
    dtype = model.decoder.embedding[...].dtype
    each = page_bytes(
        model.config, page, dtype=dtype, kind=model.cache_dtype, tp=sizes[sharding.TENSOR]
    )
    room = _free() if cache_gb is None else int(values.number("cache_gb", cache_gb, least=0) * 1e9)
    pages = min(room // each, 1 + rows // replicas * width)
    if pages < 3:
        raise ValueError(
            f"cache_gb: {room / 1e9:.2f} GB hold {pages} pages of {page} tokens, {each / 1e6:.1f} "
            "MB each: give more, or take a smaller --page or --cache-dtype int8"
        )
    if processes.count() > 1:  # whose memory may differ
        pages = min(int(each) for each in processes.gather(str(pages)))
    shape = Shape(rows, width, pages, page, chunk, chunks, model.cache_dtype)
    attend = prove.resolve_pages(
        model.attend,
        prove.paging(
            model.config,
            dtype,
            rows=rows,
            slots=width * page,
            page=page,
            chunk=chunk,
            cache=model.cache_dtype,
            mesh=model.mesh,
        ),
    )
    kind = Leader if processes.count() > 1 and processes.index() == 0 else Steps
    steps = kind(decoder, attend, mesh=model.mesh, shape=shape)
    if processes.index():
        follow(steps)
        return None
    steps.compile(report)
    return Engine(
        steps,
        scheme=rope.from_config(model.config),
        known=model.known_ids(),
        max_length=model.max_length,
        adapters={name: number for number, name in enumerate(adapters or {}, 1)},
    )


def _with_adapters(model: LanguageModel, folders: Sequence[str | Path]) -> Decoder:
    """Return a model's decoder with the adapters of these folders, in this order."""
    with meshes.entered(model.mesh):
        found = [
            adapter_files.read(paths.parse(folder), model.decoder, whole=False)
            for folder in folders
        ]
        return adapted.attach_several(model.decoder, found)


def page_bytes(config: Config, page: int, *, dtype: DTypeLike, kind: str | None, tp: int) -> int:
    """Return the bytes that a page takes on each device, in all layers.

    page: the tokens in it.
    dtype: of the model's keys and values.
    kind: None, or "int8".
    tp: the devices that share the heads.
    """
    heads = math.lcm(config.num_kv_heads, tp) // tp
    vector = config.head_dim * jnp.dtype(cache.held_dtype(dtype)).itemsize
    if kind is not None:
        vector = config.head_dim + 4  # with a float32 scale
    return 2 * config.num_layers * heads * page * vector


def _free() -> int:
    """Return the bytes of memory for pages on each device."""
    device = jax.local_devices()[0]
    if (stats := device.memory_stats()) and "bytes_limit" in stats:
        return int(_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_CPU_SHARE * total) // len(jax.local_devices())
