"""What is timed of attention, the programs that do it, and how times are taken.

A program runs a case through several layers, each with keys of its own: so nothing that belongs to
a call (a transposition, say) is done once for all, a cache does not stay in the chip's own memory,
and starting the program is a small part of its time. Programs take turns; a figure is a median.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.attention import cache, reference, registry, ring
from qwen_jax.attention.mask import FULL, Mask
from qwen_jax.kernels import choice, others
from qwen_jax.leaves import int8

TASKS = ("forward", "backward", "decode")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_LAYERS_BYTES, _MOST_LAYERS = 2**28, 4  # keys and values of all layers of a program
_PACKED = 4  # sequences of a row with features
_SECONDS = 0.02  # that a turn takes at least, so that the clock and the host do not count

Program = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that is timed. length: of queries and keys, or the slots of a cache, all written.

    cache: of what a cache is, "int8" or "int8_asymmetric"; None: of `dtype`. features: LogN, four
    packed sequences, and a window of half a sequence; else plain causal.
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

    @property
    def groups(self) -> int:
        return self.heads // (self.kv_heads or self.heads)

    @property
    def stored(self) -> str:
        """The dtype of the keys, by which a measured line is found."""
        return "int8" if self.cache else self.dtype

    def flops(self) -> float:
        """Of a layer; a causal mask counts as half of the pairs, nothing as computed twice."""
        pairs = self.batch * self.heads * self.length**2 / 2
        return pairs * self.head_dim * {"forward": 4, "backward": 10}[self.task]

    def bytes(self) -> int:
        """Of the keys and values of a layer, scales included."""
        leaf = jax.eval_shape(lambda: _leaf(self, 0))
        return 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))

    def layers(self) -> int:
        return max(1, min(_MOST_LAYERS, _LAYERS_BYTES // self.bytes()))

    @property
    def window(self) -> int:
        """Tokens that a query sees of its sequence, itself included."""
        return max(1, self.length // (2 * _PACKED)) if self.features else FULL

    def pairs(self) -> int:
        """Visible pairs of a row and head."""
        if not self.features:
            return self.length * (self.length + 1) // 2
        part, window = -(-self.length // _PACKED), self.window
        parts = [min(part, self.length - at) for at in range(0, self.length, part)]
        return sum(min(i + 1, window) for n in parts for i in range(n))


def medians(programs: dict[str, Program], rounds: int) -> dict[str, float]:
    """Seconds of a call of each, over rounds in which each has its turn."""
    calls = {name: _calls(program) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(_timed(program, calls[name]) / calls[name])
    return {name: statistics.median(each) for name, each in times.items()}


def _calls(program: Program) -> int:
    """How many calls fill a turn. It warms up on the way."""
    _timed(program, 1)
    calls = 1
    while (seconds := _timed(program, calls)) < _SECONDS:
        calls = max(2 * calls, min(16 * calls, math.ceil(calls * _SECONDS / max(seconds, 1e-9))))
    return calls


def _timed(program: Program, calls: int) -> float:
    started = time.perf_counter()
    results = [program() for _ in range(calls)][-1:]
    jax.block_until_ready(results)
    return time.perf_counter() - started


def available(names: Iterable[str], interpreted: bool = False) -> list[str]:
    """Those that a device runs in earnest: on a CPU not the kernels, unless `interpreted`."""
    on_cpu = choice.device().platform == "cpu"
    emulated = ("pallas", "splash", "flash", "paged")
    return [x for x in names if interpreted or not (on_cpu and x.startswith(emulated))]


def program(case: Case, name: str) -> Program:
    """`case` through an implementation of the registry: compiled and run once.

    Raises NotImplementedError for what the implementation does not do.
    """
    attend = registry.get(name)
    if case.task == "decode":
        return _decode(
            case, functools.partial(decode, attend), [_leaves(case, i) for i in _n(case)]
        )
    mask, scale = _mask(case), _scale(case)
    return _attention(case, lambda q, k, v: attend(q, k, v, mask, scale))


def call(case: Case, name: str) -> tuple[Callable[..., Any], Any]:
    """What `program` runs for one layer, to be compiled, and the shapes of its arguments: for
    devices that are not there.
    """
    attend, kv_heads = registry.get(name), case.heads // case.groups
    if case.task == "decode":
        token = dataclasses.replace(case, length=1)

        def arguments() -> Any:
            own = [_drawn(token, n, 0) for n in (case.heads, kv_heads, kv_heads)]
            start, index = jnp.zeros((case.batch,), jnp.int32), jnp.int32(case.length)
            return (
                *own,
                _leaf(case, 0),
                _leaf(case, 1),
                start,
                index,
                jnp.int32(FULL),
                _scale(token),
            )

        return functools.partial(decode, attend), jax.eval_shape(arguments)

    def run(q: Any, k: Any, v: Any, do: Any) -> Any:
        o, pull = jax.vjp(lambda *x: attend(*x, _mask(case), _scale(case)), q, k, v)
        return pull(do) if case.task == "backward" else o

    heads = (case.heads, kv_heads, kv_heads, case.heads)
    return run, jax.eval_shape(lambda: tuple(_drawn(case, n, 0) for n in heads))


def rival(case: Case, name: str) -> Program:
    """`case` as another implementation does it best: see `others.CAUSAL` and `others.CACHED`."""
    if case.features:
        raise NotImplementedError(f"{name}: LogN, windows and packing at once")
    if case.task != "decode":
        return _attention(case, others.CAUSAL[name])
    if case.cache:
        raise NotImplementedError(f"{name}: a cache of {case.cache}")
    layout, attend = others.CACHED[name]
    layers = [tuple(layout(x) for x in _leaves(case, i)) for i in _n(case)]

    def step(
        q: Any, k: Any, v: Any, keys: Any, values: Any, start: Any, index: Any, *_: Any
    ) -> Any:
        return attend(q, keys, values, index - start)

    return _decode(case, step, layers)


def _attention(case: Case, attend: Callable[..., jax.Array]) -> Program:
    q, do = (_normal(case, case.heads, i) for i in (0, 1))
    kv_heads = case.heads // case.groups
    keys = [tuple(_normal(case, kv_heads, 2 + 2 * i + j) for j in (0, 1)) for i in _n(case)]

    def forward(q: Any, keys: Any) -> Any:
        for k, v in keys:
            q = attend(q, k, v)
        return q

    def pullbacks(q: Any, keys: Any) -> Any:
        return [jax.vjp(attend, q, k, v)[1] for k, v in keys]

    def backward(pulls: Any, do: Any) -> Any:
        gradients = []
        for pull in pulls:
            do, *others = pull(do)
            gradients.append(others)
        return do, gradients

    if case.task == "forward":
        return _compiled(forward, q, keys)
    return _compiled(backward, jax.jit(pullbacks)(q, keys), do)


def _decode(case: Case, step: Callable[..., jax.Array], layers: Any) -> Program:
    token = dataclasses.replace(case, length=1)
    q = _normal(token, case.heads, 0)
    k, v = (_normal(token, case.heads // case.groups, i) for i in (1, 2))
    start, index = jnp.zeros((case.batch,), jnp.int32), jnp.int32(case.length)
    window, scale = jnp.int32(FULL), _scale(token)

    def run(q: Any, k: Any, v: Any, layers: Any, *rest: Any) -> Any:
        for leaves in layers:
            q = step(q, k, v, *leaves, *rest)
        return q

    return _compiled(run, q, k, v, layers, start, index, window, scale)


def decode(
    attend: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: Any,
    cache_v: Any,
    start: jax.Array,
    index: jax.Array,
    window: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Attend from a few tokens to a cache as `LayerCache.attend` does, without the write."""
    kernel = registry.decoder(attend, q, cache_k)
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


def _compiled(run: Callable[..., Any], *args: Any) -> Program:
    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return functools.partial(compiled, *args)


def _n(case: Case) -> range:
    return range(case.layers())


def _mask(case: Case) -> Mask:
    index = jnp.arange(case.length, dtype=jnp.int32)
    part = -(-case.length // _PACKED) if case.features else case.length
    positions, segments = (
        jnp.broadcast_to(x, (case.batch, case.length)) for x in (index % part, index // part + 1)
    )
    return Mask(positions, positions, segments, segments, jnp.int32(case.window))


def _scale(case: Case) -> jax.Array:
    logn = jnp.linspace(1, 1.5, case.length) if case.features else jnp.ones(case.length)
    return jnp.broadcast_to(logn * case.head_dim**-0.5, (case.batch, case.length))


@functools.cache  # one copy for all programs of a case
def _normal(case: Case, heads: int, seed: int) -> jax.Array:
    return _drawn(case, heads, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(case: Case, heads: int, seed: int) -> jax.Array:
    shape = (case.batch, case.length, heads, case.head_dim)
    return jax.random.normal(jax.random.key(seed), shape, case.dtype)


@functools.cache
def _leaves(case: Case, layer: int) -> tuple[Any, Any]:
    """Keys and values of a cache's layer."""
    return _leaf(case, 2 * layer), _leaf(case, 2 * layer + 1)


@functools.partial(jax.jit, static_argnums=0)
def _leaf(case: Case, seed: int) -> Any:
    shape = (case.batch, case.heads // case.groups, case.length, case.head_dim)
    x = jax.random.normal(jax.random.key(seed), shape, case.dtype)
    return int8.quantize(x, case.cache == "int8") if case.cache else x


def forget() -> None:
    """Let go of the arrays that programs were made with; those that are left keep their own."""
    _normal.cache_clear()
    _leaves.cache_clear()
    _wanted.cache_clear()


def error(case: Case, name: str, in_parts: bool = False) -> float:
    """The worst difference of an implementation from the reference in float32, over the largest
    number: outputs, or gradients, of a small call with packing, padding, LogN, a window and grouped
    heads. in_parts: also of the same call in two parts of its keys, merged by their log-sum-exp, as
    the chunks of a prompt and a ring of devices need it.
    """
    small, ways = _small(case), _ways(case, name, in_parts)
    wanted = len(ways) * _wanted(small)
    got = [x for attend in ways for x in _results(small, attend, case.dtype)]
    pairs = [(jnp.asarray(x, jnp.float32), y) for x, y in zip(got, wanted, strict=True)]
    worst = [jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)) for x, y in pairs]
    return max(float(x) if jnp.isfinite(x) else math.inf for x in worst)


def check(case: Case, name: str) -> None:
    """Trace the calls of `error` and run nothing. NotImplementedError where the implementation
    declines them.
    """
    small = _small(case)
    arrays = jax.eval_shape(lambda: _arguments(small, _drawn, _leaf))
    for attend in _ways(case, name, in_parts=True):
        jax.eval_shape(_call(small, attend), *arrays)


def _small(case: Case) -> Case:
    """The call by which an implementation is compared with the reference."""
    features, length = case.task != "decode", min(case.length, 4096) - 19
    shape = {"batch": 2, "length": length, "heads": 4, "kv_heads": 2}
    return dataclasses.replace(case, features=features, **shape)


def _ways(case: Case, name: str, in_parts: bool) -> list[Callable[..., Any]]:
    attend = registry.get(name)
    if in_parts and case.task != "decode":
        return [attend, functools.partial(_in_parts, attend)]
    return [attend]


@functools.lru_cache(maxsize=1)
def _wanted(case: Case) -> list[jax.Array]:
    return _results(case, reference.xla, "float32")


def _in_parts(
    attend: Callable[..., Any], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: Any
) -> jax.Array:
    """Attention over the first third of the keys and over the others, merged."""
    parts = []
    for cut in (slice(0, k.shape[1] // 3), slice(k.shape[1] // 3, None)):
        positions, segments = mask.k_positions[:, cut], mask.k_segments[:, cut]
        part = dataclasses.replace(mask, k_positions=positions, k_segments=segments)
        parts.append(attend(q, k[:, cut], v[:, cut], part, scale, return_lse=True))
    return ring.merge(parts)[0].astype(q.dtype)


def _with_all(mask: Mask) -> Mask:
    """The mask with a window that cuts its sequences, and with padding: on the left of the last
    row, on the right of the others.
    """
    length = mask.q_segments.shape[1]
    index, count = jnp.arange(length), length // 8 + 3
    real = jnp.broadcast_to(index < length - count, mask.q_segments.shape)
    segments = jnp.where(real.at[-1].set(index >= count), mask.q_segments, 0)
    window = jnp.int32(length // 7)  # a sequence has a quarter of the length
    return dataclasses.replace(mask, q_segments=segments, k_segments=segments, window=window)


def _results(case: Case, attend: Callable[..., Any], dtype: str) -> list[jax.Array]:
    def cast(x: Any) -> Any:
        x = x.dequantize(dtype) if hasattr(x, "dequantize") and dtype != case.dtype else x
        return x if hasattr(x, "dequantize") else x.astype(dtype)

    arrays = [cast(x) for x in _arguments(case, _normal, _leaf)]
    return _call(case, attend)(*arrays)


def _arguments(case: Case, normal: Callable[..., Any], leaf: Callable[..., Any]) -> list[Any]:
    """Of `_call`, drawn with `normal` and `leaf`."""
    if case.task == "decode":
        token = dataclasses.replace(case, length=1)
        own = [normal(token, n, i) for i, n in enumerate((case.heads, 2, 2))]
        return [*own, leaf(case, 0), leaf(case, 1)]
    return [normal(case, n, i) for i, n in enumerate((case.heads, 2, 2, case.heads))]


def _call(case: Case, attend: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """(q, k, v, and the gradient of the result, or the leaves of a cache) -> what is compared."""
    if case.task == "decode":
        start = jnp.array([case.length // 3, case.length // 2], jnp.int32)
        index, window = jnp.int32(case.length + 5), jnp.int32(case.length // 2 + 7)
        scale = _scale(dataclasses.replace(case, length=1))
        step = jax.jit(functools.partial(decode, attend))
        return lambda *arrays: [step(*arrays, start, index, window, scale)]
    mask, scale = _with_all(_mask(case)), _scale(case)

    @jax.jit
    def run(q: Any, k: Any, v: Any, do: Any) -> list[jax.Array]:
        if case.task == "forward":
            return [attend(q, k, v, mask, scale)]
        return list(jax.vjp(lambda *x: attend(*x, mask, scale), q, k, v)[1](do))

    return run


def product(dtype: str) -> tuple[Program, float]:
    """A large matrix product, and its FLOPs."""
    size = 512 if choice.device().platform == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return _compiled(jnp.dot, x, x), 2.0 * size**3


def copy() -> tuple[Program, float]:
    """A copy of much memory, and the bytes that it reads and writes."""
    size = 2**24 if choice.device().platform == "cpu" else 2**29
    x = jnp.ones(size // 4, jnp.float32)
    return _compiled(lambda x: x + 1, x), 2.0 * size
