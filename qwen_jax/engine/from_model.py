"""Makes an `Engine` from a loaded model: chooses the sizes of its programs, and compiles them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax import meshes
from qwen_jax.attention import Attend, cache, prove
from qwen_jax.checkpoint import adapter_files
from qwen_jax.config import Config
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.following import Leader, follow
from qwen_jax.engine.steps import Shape, Steps
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.meshes import sharding
from qwen_jax.meshes.sharding import MeshOrSizes
from qwen_jax.model import Decoder, adapted, rope
from qwen_jax.runtime import memory, paths, processes, values

SHARE = 0.9  # of the free memory of an accelerator that pages take; programs need the rest
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
    step_timeout: float = math.inf,
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> Engine | None:
    """Make an engine for a loaded model, and compile its programs. `Engine.start` starts it.

    All processes call it. Process 0 gets the engine; in the others it runs the programs that the
    engine asks for, and returns None when the engine is closed.

    adapters: folders of adapters in PEFT's format, by the names that requests call them.
    rows: the most requests that decode at a time; None for 64 on an accelerator and 16 on a CPU,
        times the parts into which the mesh splits a batch.
    cache_gb: GB of memory for pages on each device, of which no more is taken than requests of
        `max_length` tokens in all rows can use; None for nine tenths of what is free on an
        accelerator, and for a quarter of the machine's memory on a CPU.
    page: the tokens in a page; None for 128 on an accelerator and 16 on a CPU.
    chunk: the prompt tokens that are computed between two decode steps, a multiple of `page`; None
        for 512 on an accelerator and 64 on a CPU.
    chunks: the prompts of each part of the batch of which a chunk is computed at a time.
    step_timeout: the seconds after which a step that has not finished counts as a failure.
    report: is called with the name of each program and the seconds until it was ready.

    Raises ValueError for an adapter that does not fit the model, sizes that do not fit each other,
    or a cache that holds less than one request of two pages.
    """
    decoder = _with_adapters(model, list((adapters or {}).values()))
    dtype = model.decoder.embedding[...].dtype
    room = _free() if cache_gb is None else int(values.number("cache_gb", cache_gb, least=0) * 1e9)
    shape = sizes(
        model.config,
        model.mesh,
        dtype=cache.held_dtype(dtype),
        max_length=model.max_length,
        slow=jax.default_backend() == "cpu",
        room=room,
        rows=rows,
        page=page,
        chunk=chunk,
        chunks=chunks,
        cache_dtype=model.cache_dtype,
    )
    if processes.count() > 1:  # whose memory may differ
        pages = min(int(each) for each in processes.gather(str(shape.pages)))
        shape = shape._replace(pages=pages)
    attend = with_kernels(model.attend, model.config, shape=shape, dtype=dtype, mesh=model.mesh)
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
        step_timeout=step_timeout,
    )


def _with_adapters(model: LanguageModel, folders: Sequence[str | Path]) -> Decoder:
    """Return a model's decoder with the adapters of these folders, in this order."""
    with meshes.entered(model.mesh):
        found = [
            adapter_files.read(paths.parse(folder), model.decoder, whole=False)
            for folder in folders
        ]
        return adapted.attach_several(model.decoder, found)


def sizes(
    config: Config,
    mesh: MeshOrSizes,
    *,
    dtype: DTypeLike,
    max_length: int,
    room: int,
    slow: bool = False,
    rows: int | None = None,
    page: int | None = None,
    chunk: int | None = None,
    chunks: int = 1,
    cache_dtype: str | None = None,
) -> Shape:
    """Choose the sizes of an engine's programs.

    mesh: the mesh, or the sizes of its axes by name.
    dtype: of keys and values as pages hold them, from `cache.held_dtype`.
    max_length: the most tokens of a request.
    room: the bytes of memory for pages on each device.
    slow: whether the devices are CPUs, which take fewer rows, and smaller pages and chunks.

    The other arguments are those of `make`, which also says what is raised.
    """
    each = sharding.axis_sizes(mesh)
    replicas = math.prod(each[axis] for axis in sharding.BATCH)
    rows = values.whole("rows", (16 if slow else 64) * replicas if rows is None else rows, least=1)
    if rows % replicas:
        raise ValueError(f"rows {rows}: must be a multiple of the mesh's {replicas} parts of it")
    page = values.whole("page", (16 if slow else 128) if page is None else page, least=1, most=1024)
    chunk = values.whole("chunk", (64 if slow else 512) if chunk is None else chunk, least=1)
    if chunk % page:
        raise ValueError(f"chunk {chunk}: must be a multiple of the page, {page} tokens")
    width = -(-max_length // page)
    size = page_bytes(config, page, dtype=dtype, kind=cache_dtype, tp=each[sharding.TENSOR])
    pages = min(room // size, 1 + rows // replicas * width)
    if pages < 3:
        raise ValueError(
            f"cache_gb: {room / 1e9:.2f} GB hold {pages} pages of {page} tokens, {size / 1e6:.1f} "
            "MB each: give more, or take a smaller --page or --cache-dtype int8"
        )
    return Shape(rows, width, pages, page, chunk, chunks, cache_dtype)


def with_kernels(
    attend: Attend, config: Config, *, shape: Shape, dtype: DTypeLike, mesh: MeshOrSizes
) -> Attend:
    """Return an attention function with the kernels for pages that an engine's calls take.

    attend: a function of `attention.IMPLEMENTATIONS`, or what "auto" chose.
    dtype: of the model's keys and values.
    """
    cases = prove.paging(
        config,
        dtype,
        rows=shape.rows,
        slots=shape.width * shape.size,
        page=shape.size,
        chunk=shape.chunk,
        cache=shape.cache_dtype,
        mesh=mesh,
    )
    return prove.resolve_pages(attend, cases)


def page_bytes(config: Config, page: int, *, dtype: DTypeLike, kind: str | None, tp: int) -> int:
    """Return the bytes that a page takes on each device, in all layers.

    page: the tokens in it.
    dtype: of keys and values as pages hold them, from `cache.held_dtype`.
    kind: None, or "int8".
    tp: the devices that share the heads.
    """
    heads = math.lcm(config.num_kv_heads, tp) // tp
    vector = config.head_dim * jnp.dtype(dtype).itemsize
    if kind is not None:
        vector = config.head_dim + 4  # with a float32 scale
    return 2 * config.num_layers * heads * page * vector


def _free() -> int:
    """Return the bytes of memory for pages on each device."""
    device = jax.local_devices()[0]
    if (stats := device.memory_stats()) and "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    total = memory.usable()
    return int(_CPU_SHARE * total) // len(jax.local_devices())
