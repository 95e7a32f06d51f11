"""Drawn calls of a decode kernel, and what they must give: softmax in float64, key by key."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax.leaves.int8 import quantize

FULL = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """starts: `index - start` is a row's number of tokens. kind: of the cache's leaves."""

    tokens: int
    heads: int
    groups: int
    slots: int
    dim: int
    index: int
    starts: tuple[int, ...]
    window: int = FULL
    dtype: str = "float32"
    kind: str | None = None
    block: int | None = None


def draw(case: Case, seed: int) -> dict[str, Any]:
    """Arguments of `attend`; slots that hold no visible token are not finite."""
    random = np.random.default_rng(seed)
    batch, dim, start = len(case.starts), case.dim, np.array(case.starts, np.int64)

    def normal(*shape: int) -> Any:
        return jnp.asarray(random.standard_normal(shape, np.float32), case.dtype)

    token = (np.arange(case.slots) - start[:, None]) % case.slots
    count = case.index - start[:, None]
    hidden = jnp.asarray((token >= count) | (token <= count - case.window))[:, None]

    def leaf() -> Any:
        array = normal(batch, case.heads, case.slots, dim)
        if case.kind is None:
            return jnp.where(hidden[..., None], jnp.nan, array)
        leaf = quantize(array + 0.5, symmetric=case.kind == "int8")
        zero = None if leaf.zero is None else jnp.where(hidden, jnp.nan, leaf.zero)
        return leaf.replace(scale=jnp.where(hidden, jnp.nan, leaf.scale), zero=zero)

    return {
        "q": normal(batch, case.tokens, case.heads * case.groups, dim),
        "k": normal(batch, case.tokens, case.heads, dim),
        "v": normal(batch, case.tokens, case.heads, dim),
        "cache_k": leaf(),
        "cache_v": leaf(),
        "start": jnp.asarray(start, jnp.int32),
        "index": jnp.int32(case.index),
        "window": jnp.int32(case.window),
        "scale": jnp.asarray(random.uniform(0.1, 0.4, (batch, case.tokens)), jnp.float32),
    }


def reference(case: Case, drawn: dict[str, Any]) -> np.ndarray:
    def plain(x: Any) -> np.ndarray:
        x = x.dequantize(jnp.float32) if hasattr(x, "dequantize") else x
        return np.asarray(x, np.float64)

    q, own_k, own_v, cache_k, cache_v, scale = (
        plain(drawn[name]) for name in ("q", "k", "v", "cache_k", "cache_v", "scale")
    )
    o = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head, count = n // case.groups, case.index - case.starts[b]
        seen = range(max(0, count + t - case.window + 1), count + t + 1)
        past = [(case.starts[b] + p) % case.slots for p in seen if p < count]
        own = [p - count for p in seen if p >= count]
        if not seen:
            continue
        keys, values = (
            np.concatenate([cache[b, head, past], new[b, own, head]])
            for cache, new in ((cache_k, own_k), (cache_v, own_v))
        )
        scores = scale[b, t] * keys @ q[b, t, n]
        shares = np.exp(scores - scores.max())
        o[b, t, n] = shares @ values / shares.sum()
    return o


def check(attend: Callable[..., Any], case: Case, drawn: dict[str, Any]) -> None:
    """Within 1e-5 of the largest output in float32, 1e-2 in half precision."""
    o = attend(**drawn)
    expected = reference(case, drawn)
    assert o.dtype == case.dtype and o.shape == drawn["q"].shape
    error = np.max(np.abs(np.asarray(o, np.float64) - expected))
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    assert error <= tolerance * np.max(np.abs(expected)), error
