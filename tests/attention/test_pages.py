"""Pages against the ring cache and the full pass, through the decoder."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import attention
from qwen_jax.attention import Attend, Implementation, implementation, pages
from qwen_jax.attention.pages import Pages, Places
from qwen_jax.model import Decoder
from tests.support.tiny import (
    cached_logits,
    frequencies,
    full_logits,
    on_mesh,
    place,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

SIZE = 4  # slots of a page
TABLE = np.array([[7, 2, 5, 11], [1, 8, 3, 10]], np.int32)  # page 0 is nobody's


def paged_logits(
    decoder: Decoder,
    tokens: np.ndarray,
    chunks: list[int],
    kind: str | None = None,
    attend: Attend = attention.auto,
) -> np.ndarray:
    """The logits of passes over pages, float32 [B, T, V]; rows on the second half of a mesh."""
    rows, (batch, length) = len(TABLE), tokens.shape
    held = pages.empty(decoder.config, 12 * batch // rows, size=SIZE, dtype="float32", kind=kind)
    rates, logits, done = frequencies(decoder.config, batch), [], 0
    for count in chunks:
        width = count if count == 1 else -(-count // SIZE) * SIZE
        part = np.zeros((batch, width), np.int32)
        part[:, :count] = tokens[:, done : done + count]
        places = Places(
            place(np.tile(TABLE, (batch // rows, 1)), "BS"),
            place(np.full(batch, done, np.int32), "B"),
            place(np.full(batch, count, np.int32), "B"),
        )
        segments = np.broadcast_to(np.arange(width) < count, part.shape).astype(np.int32)
        output = decoder(
            decoder.embed(place(part, "BT")),
            place(done + np.arange(width, dtype=np.int32) + 0 * part, "BT"),
            segments=place(segments, "BT"),
            frequencies=rates,
            cache=Pages(held, places),
            attend=attend,
        )
        assert output.cache is not None
        held, done = output.cache.layers, done + count
        logits.append(np.asarray(decoder.logits(output.last))[:, :count])
    assert done == length
    return np.concatenate(logits, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_windows": (3, None)}, {"logn": True, "num_kv_heads": 2}],
    ids=["full", "window", "logn"],
)
def test_pages_agree_with_the_full_pass(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two pages, so that a row of 13 tokens takes two of them."""
    monkeypatch.setattr(pages, "BLOCK", 2 * SIZE)
    with on_mesh():
        decoder = tiny_decoder(tiny_config(seq_length=8, **changes))
        tokens = tiny_tokens(len(TABLE), 15)
        found = paged_logits(decoder, tokens, [8, 4, 1, 1, 1])
        np.testing.assert_allclose(found, full_logits(decoder, tokens), atol=2e-5)
        # A partial chunk ends within a page, which decoding goes on to fill.
        found = paged_logits(decoder, tokens, [8, 3, 1, 1, 1, 1])
        np.testing.assert_allclose(found, full_logits(decoder, tokens), atol=2e-5)


def test_int8_pages_agree_with_an_int8_cache() -> None:
    with on_mesh():
        decoder, tokens = tiny_decoder(tiny_config()), tiny_tokens(len(TABLE), 10)
        found = paged_logits(decoder, tokens, [8, 1, 1], kind="int8")
        wanted = cached_logits(decoder, tokens, [8, 1, 1], kind="int8")
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        assert np.abs(found - full_logits(decoder, tokens)).max() > 1e-4


def test_kernels_for_pages_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    def attends(task: str) -> Any:
        def attend(q: Any, kv: Any, table: Any, written: Any, window: Any, scale: Any) -> Any:
            taken.add(task)
            places = Places(table, written, jnp.ones_like(written) * q.shape[1])
            return pages.attend_pages(
                attention.xla, q, kv=kv, places=places, window=window, scale=scale
            )

        return attend

    def write(kv: Any, new: Any, where: Any, slots: Any = None) -> Any:
        taken.add("pages" if slots is None else "token")
        return pages.scatter(kv, new, where, slots)

    monkeypatch.setattr(implementation, "FEW", 4)
    made = Implementation("spy", attention.xla, None, False, attends("few"), attends("many"), write)
    with on_mesh():
        decoder, tokens = tiny_decoder(tiny_config()), tiny_tokens(len(TABLE), 9)
        found = paged_logits(decoder, tokens, [8, 1], attend=made)
        np.testing.assert_allclose(found, full_logits(decoder, tokens), atol=2e-5)
    assert taken == {"few", "many", "pages", "token"}


def test_a_kernel_sees_nothing_of_rows_that_take_no_part() -> None:
    given = []

    def attend(q: Any, kv: Any, table: Any, written: Any, window: Any, scale: Any) -> Any:
        given.extend([np.asarray(written).tolist(), kv.dtype])
        return jnp.zeros(q.shape), jnp.zeros(q.shape[:3])

    made = Implementation("spy", attention.xla, paged_decode=attend)
    places = Places(jnp.asarray(TABLE), jnp.array([5, 7]), jnp.array([1, 0]))
    q, kv = jnp.zeros((2, 1, 4, 16), "bfloat16"), jnp.zeros((12, 2, 4, SIZE, 16))
    pages.attend_pages(made, q, kv=kv, places=places, window=jnp.int32(9), scale=jnp.zeros((2, 1)))
    assert given == [[5, 0], jnp.bfloat16]  # pages of a CPU are float32


@pytest.mark.parametrize("sizes", [pytest.param({"data": 2, "tp": 2}, marks=pytest.mark.slow)])
def test_a_mesh_splits_the_pool(sizes: dict[str, int]) -> None:
    """Each half of the batch has half of the pages, under the same numbers."""
    with on_mesh(**sizes):
        decoder, tokens = tiny_decoder(tiny_config()), tiny_tokens(2 * len(TABLE), 10)
        found = paged_logits(decoder, tokens, [8, 1, 1])
        np.testing.assert_allclose(found, full_logits(decoder, tokens), atol=2e-5)


def test_a_row_that_is_not_finite_leaves_nothing_to_others() -> None:
    """Another row that gets the page would multiply its slots by 0, and 0 NaN is NaN."""
    with on_mesh():
        decoder = tiny_decoder(tiny_config())
        held = pages.empty(decoder.config, 3, size=SIZE, dtype="float32", kind=None)
        broken = np.full((1, SIZE, 4, 16), np.nan, np.float32)
        places = [place(np.array([x], np.int32), "B") for x in (0, SIZE)]
        where = Places(place(np.array([[1, 2]], np.int32), "BS"), *places)
        new = pages.put(held[0].kv, place(broken, "BTKH"), v=place(broken, "BTKH"), places=where)
        assert np.isfinite(np.asarray(new)).all()


def test_pages_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        pages.empty(tiny_config(), 4, size=SIZE, dtype="float32", kind="int8_asymmetric")
