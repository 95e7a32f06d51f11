"""Attention calls by which kernels are tested and timed, and the programs that make them.

A program makes a call for each of several layers, each with its own keys. So work that belongs to a
call (a transposition, for example) is not done once for all, a cache does not stay in the chip's
on-chip memory, and the start of the program is a small part of its time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.attention import cache, registry, ring, timing
from qwen_jax.attention.reference import Attend
from qwen_jax.attention.registry import Implementation
from qwen_jax.attention.timing import TimedCall
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.kernels.flash import CacheLeaf
from qwen_jax.kernels.mask import FULL, Mask
from qwen_jax.leaves import int8
from qwen_jax.meshes import sharding

_LAYERS_BYTES, _MOST_LAYERS = 2**28, 4  # limits: keys and values of a program, and its layers
TASKS = ("forward", "backward", "decode")
_SHORTEST, _LONGEST = 256, 8192  # limits on the tokens of a timed call


_PACKED = 4  # sequences packed into a batch row, with `Case.features`


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention call by which kernels are tested or timed.

    task: "forward", "backward", "decode", or with pages, "paged decode", "paged prefill", "write".
    batch: the number of batch rows B.
    length: tokens of queries and keys, or slots of a cache, all written.
    heads, head_dim: the number of query heads N, and their length H.
    dtype: the dtype of queries, keys and values.
    kv_heads: the number of key/value heads K; None for as many as query heads.
    cache: "int8" or "int8_asymmetric"; None for a cache of `dtype`.
    features: whether the call has LogN, four packed sequences in a batch row, and a window of half
        a sequence; otherwise it is plain causal.
    page: the tokens in a page of the cache; 0 without pages.
    tokens: the query tokens of a row, of a call with pages.
    """

    task: str
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: str
    kv_heads: int | None = None
    cache: str | None = None
    features: bool = False
    page: int = 0
    tokens: int = 1

    @property
    def groups(self) -> int:
        """The number of query heads per key/value head."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def stored(self) -> str:
        """The dtype of attention keys in the lines of `measured.json` that are for such calls."""
        return "int8" if self.cache else self.dtype

    def flops(self) -> float:
        """Return the FLOPs of one causal call, half of a full one's, without recomputation."""
        pairs = self.batch * self.heads * self.length**2 / 2
        return pairs * self.head_dim * {"forward": 4, "backward": 10}[self.task]

    def bytes(self) -> int:
        """Return the bytes of one layer's keys and values, scales of quantised ones included."""
        arrays = jax.tree.leaves(jax.eval_shape(lambda: leaf(self, 0)))
        return 2 * sum(x.size * x.dtype.itemsize for x in arrays)

    def layers(self) -> int:
        """Return how many layers, with one attention call each, this case's program runs."""
        return max(1, min(_MOST_LAYERS, _LAYERS_BYTES // self.bytes()))

    @property
    def window(self) -> int:
        """The number of tokens that a query sees at most, its own included."""
        return max(1, self.length // (2 * _PACKED)) if self.features else FULL

    def pairs(self) -> int:
        """Return the number of visible query-key pairs for one batch row and one head."""
        if not self.features:
            return self.length * (self.length + 1) // 2
        part, window = -(-self.length // _PACKED), self.window
        parts = [min(part, self.length - at) for at in range(0, self.length, part)]
        return sum(min(i + 1, window) for n in parts for i in range(n))


def of_device(
    task: str,
    config: Config,
    *,
    dtype: DTypeLike,
    rows: int,
    length: int,
    sizes: Mapping[str, int],
    cache: str | None = None,
) -> Case:
    """Return one device's attention call, made smaller if the program's own is large.

    The XLA reference's scores must fit in memory, and a turn of timing should take milliseconds.
    """
    tp = sizes[sharding.TENSOR]
    length = min(max(_SHORTEST, 1 << (length - 1).bit_length()), _LONGEST)
    return Case(
        task,
        batch=min(rows, max(1, _LONGEST // length)),
        length=length,
        heads=config.num_heads // tp,
        head_dim=config.head_dim,
        dtype=jax.numpy.dtype(dtype).name,
        kv_heads=math.lcm(config.num_kv_heads, tp) // tp,
        cache=cache,
    )


def available(names: Iterable[str], interpreted: bool = False) -> list[str]:
    """Leave out of `names`, on a CPU, the implementations that would run interpreted.

    interpreted: whether to keep them nevertheless.
    """
    on_cpu = choice.device().platform == "cpu"
    emulated = ("pallas", "splash", "flash", "paged")
    return [x for x in names if interpreted or not (on_cpu and x.startswith(emulated))]


def program(case: Case, name: str) -> TimedCall:
    """Compile a program that makes a call by an implementation, and run it once.

    name: the implementation's name in the registry.

    Raises NotImplementedError if the implementation does not support the call.
    """
    attend = registry.get(name)
    if case.task == "decode":
        return decode_program(
            case,
            functools.partial(decode, attend),
            layers=[leaves(case, i) for i in range(case.layers())],
        )
    mask, scale = mask_of(case), scale_of(case)
    return whole_program(case, lambda q, k, v: attend(q, k, v, mask, scale))


def call(case: Case, name: str) -> tuple[Callable[..., Any], Any]:
    """Return a function that makes a case's call for one layer, and the shapes of its arguments.

    name: the implementation's name in the registry.

    It is for ahead-of-time compilation for devices that this machine lacks.
    """
    attend, kv_heads = registry.get(name), case.heads // case.groups
    if case.task == "decode":
        token = dataclasses.replace(case, length=1)

        def arguments() -> tuple[Any, ...]:
            own = [drawn(token, n, 0) for n in (case.heads, kv_heads, kv_heads)]
            start, index = jnp.zeros((case.batch,), jnp.int32), jnp.int32(case.length)
            return (
                *own,
                leaf(case, 0),
                leaf(case, 1),
                start,
                index,
                jnp.int32(FULL),
                scale_of(token),
            )

        return functools.partial(decode, attend), jax.eval_shape(arguments)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask_of(case), scale_of(case))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, pull = jax.vjp(whole, q, k, v)
        return pull(do) if case.task == "backward" else o

    heads = (case.heads, kv_heads, kv_heads, case.heads)
    return run, jax.eval_shape(lambda: tuple(drawn(case, n, 0) for n in heads))


def whole_program(case: Case, attend: Callable[..., jax.Array]) -> TimedCall:
    """Compile a program that makes a case's forward or backward calls for several layers.

    attend: computes o of q, k and v.
    """
    q, do = (normal(case, case.heads, i) for i in (0, 1))
    kv_heads = case.heads // case.groups
    keys = [
        tuple(normal(case, kv_heads, 2 + 2 * i + j) for j in (0, 1)) for i in range(case.layers())
    ]

    def forward(q: jax.Array, keys: Any) -> jax.Array:
        for k, v in keys:
            q = attend(q, k, v)
        return q

    def pullbacks(q: jax.Array, keys: Any) -> list[Any]:
        return [jax.vjp(attend, q, k, v)[1] for k, v in keys]

    def backward(pulls: list[Any], do: jax.Array) -> tuple[jax.Array, list[Any]]:
        gradients = []
        for pull in pulls:
            do, *others = pull(do)
            gradients.append(others)
        return do, gradients

    if case.task == "forward":
        return timing.compiled(forward, q, keys)
    return timing.compiled(backward, jax.jit(pullbacks)(q, keys), do)


def decode_program(case: Case, step: Callable[..., jax.Array], *, layers: Any) -> TimedCall:
    """Compile a program that makes a case's decode calls for several layers.

    step: computes o of q, k, v, a layer's cached keys and values, start, index, window and scale.
    layers: the cached keys and values of each layer.
    """
    token = dataclasses.replace(case, length=1)
    q = normal(token, case.heads, 0)
    k, v = (normal(token, case.heads // case.groups, i) for i in (1, 2))
    start, index = jnp.zeros((case.batch,), jnp.int32), jnp.int32(case.length)
    window, scale = jnp.int32(FULL), scale_of(token)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, layers: Any, *rest: Any) -> jax.Array:
        for leaves in layers:
            q = step(q, k, v, *leaves, *rest)
        return q

    return timing.compiled(run, q, k, v, layers, start, index, window, scale)


def decode(
    attend: Attend,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache_k: CacheLeaf,
    cache_v: CacheLeaf,
    start: Int[Array, " B"],
    index: Int[Array, ""],
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend from a few tokens to a cache and to themselves, without writing them into the cache.

    attend: an attention function, whose decode kernel is used if it has one.
    q: [B, T, N, H].
    k, v: [B, T, K, H], of the few tokens.
    cache_k, cache_v: [B, K, S, H], arrays or `Int8`.
    start, index: int32 [B] and [], the write index at which each sequence began, and the current
        write index.
    window: int32 [], the number of tokens that a query sees, its own included.
    scale: float32 [B, T], the factor on each query's scores.

    Returns o [B, T, N, H] in q's dtype.
    """
    kernel = Implementation.of(attend).decode_kernel(q, keys=cache_k)
    if kernel is not None:
        return kernel(q, k, v, cache_k, cache_v, start, index, window, scale)
    held = cache.Cache((cache.LayerCache(cache_k, cache_v),), start, index, fresh=False)
    positions = (index - start)[:, None] + jnp.arange(q.shape[1])
    segments = (positions >= 0).astype(jnp.int32)
    own = Mask(positions, positions, segments, segments, window)
    past = dataclasses.replace(held.past_mask(positions, segments), window=window)
    parts = [attend(q, k, v, own, scale, return_lse=True)]
    parts.append(attend(q, *held.layers[0].read(), past, scale, return_lse=True))
    return ring.merge(parts)[0].astype(q.dtype)


def mask_of(case: Case) -> Mask:
    """Return the mask of a call: causal and, with features, packed and with a window."""
    index = jnp.arange(case.length, dtype=jnp.int32)
    part = -(-case.length // _PACKED) if case.features else case.length
    positions, segments = (
        jnp.broadcast_to(x, (case.batch, case.length)) for x in (index % part, index // part + 1)
    )
    return Mask(positions, positions, segments, segments, jnp.int32(case.window))


def scale_of(case: Case) -> jax.Array:
    """Return the factor on each query's scores, float32 [B, T]: H**-0.5, times LogN if used."""
    logn = jnp.linspace(1, 1.5, case.length) if case.features else jnp.ones(case.length)
    return jnp.broadcast_to(logn * case.head_dim**-0.5, (case.batch, case.length))


@functools.cache  # all programs of a case share one copy
def normal(case: Case, heads: int, seed: int) -> jax.Array:
    """Draw an array [B, T, heads, H] from N(0, 1), once for all programs."""
    return drawn(case, heads, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(case: Case, heads: int, seed: int) -> jax.Array:
    """Draw an array [B, T, heads, H] from N(0, 1)."""
    shape = (case.batch, case.length, heads, case.head_dim)
    return jax.random.normal(jax.random.key(seed), shape, case.dtype)


@functools.cache
def leaves(case: Case, layer: int) -> tuple[Any, Any]:
    """Return random cached keys and values of a layer, [B, K, S, H] each.

    They are kept in memory, so that all implementations are timed on the same arrays.
    """
    return leaf(case, 2 * layer), leaf(case, 2 * layer + 1)


@functools.partial(jax.jit, static_argnums=0)
def leaf(case: Case, seed: int) -> CacheLeaf:
    """Draw cached keys or values [B, K, S, H] from N(0, 1), quantised if the case's cache is."""
    shape = (case.batch, case.heads // case.groups, case.length, case.head_dim)
    x = jax.random.normal(jax.random.key(seed), shape, case.dtype)
    return int8.quantize(x, case.cache == "int8") if case.cache else x
