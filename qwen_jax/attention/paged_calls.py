"""Calls over pages by which kernels are tested and timed, beside the definitions in `pages.py`.

A task of `workloads.Case` with pages is one of three: "paged decode" and "paged prefill" attend to
the pages of some rows, and "write" writes into them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen_jax.attention import pages, timing
from qwen_jax.attention.pages import Places
from qwen_jax.attention.reference import xla
from qwen_jax.attention.registry import FEW, IMPLEMENTATIONS, Implementation
from qwen_jax.attention.timing import TimedCall
from qwen_jax.attention.workloads import Case
from qwen_jax.kernels.flash import NewPart, PoolLeaf
from qwen_jax.kernels.mask import FULL
from qwen_jax.leaves import int8

_STEP = 7919
_WRITES = 32  # calls of a timed program, which copies the pages once


class Arrays(NamedTuple):
    """The random operands of a case's calls.

    q: [B, T, N, H].
    kv: [P, 2, K, page, H], an array or `Int8`.
    token, whole: [B, 2, K, H] and [B, 2, K, page, H], to be written into one page of each row.
    table, written: int32 [B, W] and [B].
    scale: float32 [B, T].
    """

    q: Float[Array, "B T N H"]
    kv: PoolLeaf
    token: NewPart
    whole: NewPart
    table: Int[Array, "B W"]
    written: Int[Array, " B"]
    scale: Float[Array, "B T"]


def check(case: Case, name: str) -> None:
    """Check that an implementation supports the calls of a case and of `error`, by tracing them.

    Raises NotImplementedError if the implementation declines one.
    """
    for each in (case, _small(case)):
        arrays = jax.eval_shape(functools.partial(_draw, each, 0))
        jax.eval_shape(_call(each, name), arrays, np.int32(FULL))


def error(case: Case, name: str, *, in_parts: bool = False) -> float:
    """Return an implementation's largest error, relative to the definition's largest value.

    It compares the results of small calls: rows of different lengths, one of them empty, LogN, a
    window and none, grouped heads; or a token in a page of each row, and whole pages. The
    definition computes in float32. A result that is not finite has an infinite error, unless it is
    the log-sum-exp of a query that sees no key.

    case: the call's task, dtype, head dim, cache and page; its shape is replaced by a small one.
    in_parts: without meaning here, because these calls are parts already.
    """
    small = _small(case)
    arrays = jax.jit(functools.partial(_draw, small, 0))()
    own, definition = jax.jit(_call(small, name)), _call(small, "xla")

    def exact(arrays: Arrays, window: jax.Array) -> Any:
        def wide(x: jax.Array) -> jax.Array:
            return x.astype(jnp.float32) if x.dtype == jnp.dtype(case.dtype) else x

        return definition(jax.tree.map(wide, arrays), window)

    reference, worst = jax.jit(exact), 0.0
    for window in (np.int32(FULL), np.int32(small.length // 2)):
        found, wanted = (
            jax.tree.leaves(jax.device_get(call(arrays, window))) for call in (own, reference)
        )
        worst = max(worst, *(_difference(x, y) for x, y in zip(found, wanted, strict=True)))
    return worst


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest difference of x from y, over y's largest value."""
    x, y = (z.astype(np.float32) for z in (x, y))
    empty = np.isneginf(y)
    if not np.all(np.where(empty, np.isneginf(x), np.isfinite(x))):
        return math.inf
    x, y = (np.where(empty, 0, z) for z in (x, y))
    return float(np.max(np.abs(x - y)) / np.max(np.abs(y)))


def program(case: Case, name: str) -> TimedCall:
    """Compile a program that makes a case's call by an implementation, and run it once.

    Raises NotImplementedError if the implementation does not support the call.
    """
    call = _call(case, name)
    if case.task == "write":
        return _writing(case, name)
    layers = [jax.jit(functools.partial(_draw, case, i))() for i in range(case.layers())]

    def run(layers: list[Arrays]) -> jax.Array:
        q = layers[0].q
        for arrays in layers:
            q = call(arrays._replace(q=q), jnp.int32(FULL))[0].astype(q.dtype)
        return q

    return timing.compiled(run, layers)


def _writing(case: Case, name: str) -> TimedCall:
    """Compile a program that writes tokens as often as `layers` programs attend, and more."""
    write = Implementation.of(IMPLEMENTATIONS[name]).write or pages.scatter
    arrays = jax.jit(functools.partial(_draw, case, 0))()
    number = _WRITES * case.layers()

    def run(arrays: Arrays) -> PoolLeaf:
        def one(i: jax.Array, kv: PoolLeaf) -> PoolLeaf:
            slots = jnp.full(arrays.table.shape[:1], i % case.page, jnp.int32)
            return write(kv, arrays.token, arrays.table[:, 0], slots)

        return jax.lax.fori_loop(0, number, one, arrays.kv)

    return timing.compiled(run, arrays)


def _small(case: Case) -> Case:
    """Return the case in the small shape in which kernels are compared with the definition."""
    tokens = 3 if case.task == "paged decode" else min(case.tokens, 5 * FEW)
    if case.task == "paged prefill":
        tokens = max(tokens, FEW + 1)
    shape = {"batch": 4, "length": 5 * case.page, "heads": 4, "kv_heads": 2, "tokens": tokens}
    return dataclasses.replace(case, features=True, **shape)


def _call(case: Case, name: str) -> Callable[[Arrays, jax.Array], Any]:
    """Return a function that makes a case's call by an implementation, given a window.

    name: the implementation's name in the registry; one without a kernel for the task stands for
        the definition.
    """
    kernel = Implementation.of(IMPLEMENTATIONS[name]).of_task(case.task)

    def write(arrays: Arrays, window: jax.Array) -> list[PoolLeaf]:
        by, first = kernel or pages.scatter, arrays.table[:, 0]
        slots = arrays.written % case.page
        return [by(arrays.kv, arrays.token, first, slots), by(arrays.kv, arrays.whole, first)]

    def attend(arrays: Arrays, window: jax.Array) -> Any:
        q, kv, table, written = arrays.q, arrays.kv, arrays.table, arrays.written
        if kernel is not None:
            return kernel(q, kv, table, written, window, arrays.scale)
        places = Places(table, written, jnp.full_like(written, q.shape[1]))
        return pages.attend_pages(xla, q, kv=kv, places=places, window=window, scale=arrays.scale)

    return write if case.task == "write" else attend


def _draw(case: Case, seed: int) -> Arrays:
    """Draw the operands of a case's call: q and pages from N(0, 1), and new pages from those."""
    width, heads = -(-case.length // case.page), case.heads // case.groups

    def normal(seed: int, *shape: int) -> jax.Array:
        key = jax.random.key(seed, impl="rbg")  # which compiles in a twentieth of the time
        return jax.random.normal(key, (*shape, case.head_dim), case.dtype)

    kv: PoolLeaf = normal(2 * seed, 1 + case.batch * width, 2, heads, case.page)
    kv = int8.quantize(kv) if case.cache else kv
    # In no order, each a prime number of steps from the one before.
    number = case.batch * width
    table = 1 + jnp.arange(number, dtype=jnp.int32) * _STEP % number
    written = jnp.full(case.batch, case.length, jnp.int32)
    if case.features:  # a whole table, a page and a part, nothing, a token
        written = jnp.array([case.length, case.page + 5, 0, 1], jnp.int32)
    logn = jnp.linspace(1, 1.5, case.tokens) if case.features else jnp.ones(case.tokens)
    return Arrays(
        normal(2 * seed + 1, case.batch, case.tokens, case.heads),
        kv,
        jax.tree.map(lambda x: x[::-1][: case.batch, :, :, 0], kv),
        jax.tree.map(lambda x: x[::-1][: case.batch], kv),
        table.reshape(case.batch, width),
        written,
        jnp.broadcast_to(logn * case.head_dim**-0.5, (case.batch, case.tokens)),
    )
