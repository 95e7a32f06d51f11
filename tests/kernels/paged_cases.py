"""Drawn calls of a kernel for pages, and what they must give: softmax in float64."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.leaves.int8 import quantize

FULL = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """written: of each row. width: pages in a row's table. heads: of keys."""

    tokens: int
    heads: int
    groups: int
    dim: int
    page: int
    width: int
    written: tuple[int, ...]
    dtype: str = "float32"
    int8: bool = False


def draw(case: Case, window: int, hidden_value: float = np.nan) -> dict[str, Any]:
    """Arguments of a kernel. Pages are in no order, and what no query sees is `hidden_value`."""
    random = np.random.default_rng(0)
    batch, width = len(case.written), case.width
    written = np.array(case.written)
    table = 1 + random.permutation(batch * width).reshape(batch, width)
    table[np.arange(width) * case.page >= written[:, None]] = 0  # a page that is nobody's
    token = np.arange(width * case.page).reshape(1, width, case.page)
    seen = (token < written[:, None, None]) & (token > written[:, None, None] - window)
    hidden = np.ones((1 + batch * width, case.page), bool)
    hidden[table.reshape(-1)] &= ~seen.reshape(-1, case.page)
    shape = (1 + batch * width, 2, case.heads, case.page, case.dim)
    kv = jnp.asarray(random.standard_normal(shape, np.float32) + 0.5, case.dtype)
    mask = jnp.asarray(hidden)[:, None, None]
    leaf: Any = jnp.where(mask[..., None], jnp.asarray(hidden_value, kv.dtype), kv)
    if case.int8:
        leaf = quantize(kv)
        leaf = leaf.replace(scale=jnp.where(mask, hidden_value, leaf.scale))
    queries = (batch, case.tokens, case.heads * case.groups, case.dim)
    return {
        "q": jnp.asarray(random.standard_normal(queries, np.float32), case.dtype),
        "kv": leaf,
        "table": jnp.asarray(table, jnp.int32),
        "written": jnp.asarray(written, jnp.int32),
        "window": jnp.int32(window),
        "scale": jnp.asarray(random.uniform(0.1, 0.4, queries[:2]), jnp.float32),
    }


def reference(drawn: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """o and the log-sum-exp."""
    kv, table = drawn["kv"], np.asarray(drawn["table"])
    kv = np.asarray(kv.dequantize(jnp.float32) if hasattr(kv, "dequantize") else kv, np.float64)
    q, scale = (np.asarray(drawn[name], np.float64) for name in ("q", "scale"))
    window = int(drawn["window"])
    groups = q.shape[2] // kv.shape[2]
    o, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, written in enumerate(np.asarray(drawn["written"])):
        pages = np.moveaxis(kv[table[b]], 0, 2)  # [2, K, W, page, H]
        pages = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
        for t in range(q.shape[1]):
            first = max(0, written + t - window + 1)
            if first >= written:
                continue
            keys, values = np.repeat(pages[:, :, first:written], groups, 1)
            scores = scale[b, t] * np.einsum("nsh,nh->ns", keys, q[b, t])
            largest = scores.max(1, keepdims=True)
            shares = np.exp(scores - largest)
            total = shares.sum(1, keepdims=True)
            o[b, t] = np.einsum("ns,nsh->nh", shares / total, values)
            lse[b, t] = (largest + np.log(total))[:, 0]
    return o, lse


def check(
    attend: Callable[..., Any], case: Case, windows: Sequence[int], hidden_value: float = np.nan
) -> None:
    """Within 1e-5 of the largest number in float32, 1e-2 in half precision; all in one program."""
    for window in windows:
        drawn = draw(case, window, hidden_value)
        found = jax.device_get(attend(**drawn))
        tolerance = 1e-5 if case.dtype == "float32" else 1e-2
        for x, expected in zip(found, reference(drawn), strict=True):
            assert x.dtype == np.float32 and x.shape == expected.shape
            empty = np.isneginf(expected)
            np.testing.assert_array_equal(np.isneginf(x), empty)
            x, expected = np.where(empty, 0, x), np.where(empty, 0, expected)
            assert np.max(np.abs(x - expected)) <= tolerance * np.max(np.abs(expected)), window
