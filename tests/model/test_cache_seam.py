"""A cache of another type, in pages that lie anywhere, which `model/` does not notice."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax.attention import Mask, ring
from qwen_jax.decoding.decode import positions
from tests.support.tiny import (
    frequencies,
    full_logits,
    on_mesh,
    place,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

PAGE = 4  # slots


@struct.dataclass
class PagedLayer:
    """Keys and values of one layer, [pages, PAGE, K, H] each."""

    k: jax.Array
    v: jax.Array

    def attend(
        self,
        implementation: Any,
        q: jax.Array,
        *,
        k: jax.Array,
        v: jax.Array,
        own: Mask,
        past: Mask | None,
        scale: jax.Array,
        index: Any,
    ) -> "tuple[jax.Array, PagedLayer]":
        table, written = index
        parts = [implementation(q, k, v, own, scale, return_lse=True)]
        kept = (x[table].reshape(len(table), -1, *x.shape[2:]) for x in (self.k, self.v))
        parts.append(implementation(q, *kept, past, scale, return_lse=True))
        places = written[:, None] + jnp.arange(k.shape[1])
        pages, slots = jnp.take_along_axis(table, places // PAGE, 1), places % PAGE
        new = (x.at[pages, slots].set(y) for x, y in ((self.k, k), (self.v, v)))
        return ring.merge(parts)[0].astype(q.dtype), PagedLayer(*new)


@struct.dataclass
class Pages:
    """table int32 [B, W]: the pages of each row. written int32 [B]: its tokens so far."""

    layers: tuple[PagedLayer, ...]
    table: jax.Array
    written: jax.Array

    def context(self, positions: jax.Array, segments: jax.Array) -> tuple[Mask, Any]:
        slots = jnp.arange(self.table.shape[1] * PAGE, dtype=jnp.int32)
        slots = jnp.broadcast_to(slots, (len(self.table), len(slots)))
        filled = (slots < self.written[:, None]).astype(jnp.int32)
        past = Mask(positions, slots, segments, filled, jnp.int32(0))
        return past, (self.table, self.written)

    def advanced(self, layers: tuple[PagedLayer, ...], length: int) -> "Pages":
        return Pages(layers, self.table, self.written + length)


def test_a_paged_cache_needs_nothing_of_the_model() -> None:
    chunks, batch = [6, 1, 1], 2
    tokens = tiny_tokens(batch, sum(chunks))
    with on_mesh():
        decoder = tiny_decoder(tiny_config(num_layers=1))
        config = decoder.config
        shape = 9, PAGE, config.num_kv_heads, config.head_dim
        layer = PagedLayer(jnp.zeros(shape), jnp.zeros(shape))
        table = np.array([[7, 2, 5], [1, 8, 3]], np.int32)
        held: Any = Pages(
            tuple(jax.tree.map(jnp.copy, layer) for _ in range(config.num_layers)),
            jnp.asarray(table),
            jnp.zeros(batch, jnp.int32),
        )
        rates, logits, done = frequencies(config, batch), [], 0
        for length in chunks:
            part = place(tokens[:, done : done + length], "BT")
            places, segments = positions(jnp.zeros(batch, jnp.int32), jnp.int32(done), length)
            output = decoder(
                decoder.embed(part), places, segments=segments, frequencies=rates, cache=held
            )
            held, done = output.cache, done + length
            logits.append(np.asarray(decoder.logits(output.last)))
        wanted = full_logits(decoder, tokens)
    np.testing.assert_allclose(np.concatenate(logits, 1), wanted, atol=1e-5)
    assert not any(np.any(x.k[0]) for x in held.layers)  # a page of nobody's
    assert dataclasses.asdict(held)["written"].tolist() == [sum(chunks)] * batch
