"""A cache of another type, in pages that lie anywhere, which `model/` does not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from qwen_jax.attention import Attend, Mask, ring
from qwen_jax.meshes import sharding
from qwen_jax.model import running
from qwen_jax.model.context import KVCache
from tests.support.tiny import (
    frequencies,
    full_pass,
    on_mesh,
    place,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

PAGE = 4  # slots
TABLE = np.array([[7, 2, 5], [1, 8, 3]], np.int32)  # page 0 is nobody's


@struct.dataclass
class PagedLayer:
    """Keys and values of one layer, [pages, PAGE, K, H] each."""

    k: jax.Array
    v: jax.Array

    def attend(
        self,
        implementation: Attend,
        q: jax.Array,
        *,
        k: jax.Array,
        v: jax.Array,
        own: Mask,
        past: Mask | None,
        scale: jax.Array,
        index: tuple[jax.Array, jax.Array],
    ) -> "tuple[jax.Array, PagedLayer]":
        assert past is not None
        rows, pages = sharding.spec("BTNH"), sharding.spec("PSKH")

        @jax.shard_map(out_specs=(rows, PagedLayer(pages, pages)), check_vma=False)
        def local(q, k, v, own, past, scale, layer, table, places):
            parts = [implementation(q, k, v, own, scale, return_lse=True)]
            kept = (x[table].reshape(len(table), -1, *x.shape[2:]) for x in (layer.k, layer.v))
            parts.append(implementation(q, *kept, past, scale, return_lse=True))
            pages, slots = jnp.take_along_axis(table, places // PAGE, 1), places % PAGE
            pages = jnp.where(places < 0, len(layer.k), pages)  # padding is written nowhere
            new = (x.at[pages, slots].set(y, mode="drop") for x, y in ((layer.k, k), (layer.v, v)))
            return ring.merge(parts)[0].astype(q.dtype), PagedLayer(*new)

        table, places = index
        return local(q, k, v, own, past, scale, self, table, places)


@struct.dataclass
class Pages:
    """table int32 [B, W]: the pages of each row. written int32 [B]: its tokens so far."""

    layers: tuple[PagedLayer, ...]
    table: jax.Array
    written: jax.Array

    def context(
        self, positions: jax.Array, segments: jax.Array
    ) -> tuple[Mask, tuple[jax.Array, jax.Array]]:
        slots = jnp.arange(self.table.shape[1] * PAGE, dtype=jnp.int32)
        slots = jnp.broadcast_to(slots, (len(self.table), len(slots)))
        filled = (slots < self.written[:, None]).astype(jnp.int32)
        past = Mask(positions, slots, segments, filled, jnp.int32(0))
        return past, (self.table, positions)

    def advanced(self, layers: tuple[PagedLayer, ...], length: int) -> "Pages":
        return Pages(layers, self.table, self.written + length)


def empty(decoder) -> Pages:
    """A cache of 9 pages in each layer, whose rows begin one token apart."""
    config = decoder.config
    shape = 9, PAGE, config.num_kv_heads, config.head_dim

    def zeros() -> jax.Array:
        return jnp.zeros(shape, out_sharding=sharding.spec("PSKH"))

    layers = tuple(PagedLayer(zeros(), zeros()) for _ in range(config.num_layers))
    return Pages(layers, place(TABLE, "BW"), place(-np.arange(len(TABLE), dtype=np.int32), "B"))


@pytest.mark.parametrize("sizes", [{}, pytest.param({"tp": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_paged_cache_needs_nothing_of_the_model(sizes: dict[str, int]) -> None:
    """In more layers than run at a time, and for rows of which the second is a token shorter."""
    chunks, batch = [6, 1, 1], len(TABLE)
    tokens = tiny_tokens(batch, sum(chunks))
    with on_mesh(**sizes):
        decoder = tiny_decoder(tiny_config(num_layers=running.GROUP + 1))
        held: KVCache = empty(decoder)
        rates, logits, done = frequencies(decoder.config, batch), [], 0
        every = np.arange(sum(chunks), dtype=np.int32) - np.arange(batch, dtype=np.int32)[:, None]
        for length in chunks:
            part = slice(done, done + length)
            output = decoder(
                decoder.embed(place(tokens[:, part], "BT")),
                place(every[:, part], "BT"),
                segments=place((every[:, part] >= 0).astype(np.int32), "BT"),
                frequencies=rates,
                cache=held,
            )
            held, done = output.cache, done + length
            logits.append(np.asarray(decoder.logits(output.last)))
        found = np.concatenate(logits, 1)
        output = full_pass(decoder, tokens, every, (every >= 0).astype(np.int32))
        wanted = np.asarray(decoder.logits(output.last))
    real = every >= 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)
    assert len(held.layers) == running.GROUP + 1
    assert not any(np.any(x.k[0]) for x in held.layers)  # a page of nobody's
    assert dataclasses.asdict(held)["written"].tolist() == [8, 7]
