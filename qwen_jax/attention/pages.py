"""The KV cache of the engine: keys and values in pages, which lie anywhere in a pool.

Each layer has one array for keys and values, [P, 2, K, page, H]: a decode kernel then copies both
in one piece. A row of the batch has a list of pages, the same in every layer. Page 0 is nobody's:
what has no place is written there. Where a mesh splits the batch, it splits the pool too, and each
part of the batch has page numbers of its own.

The result of a row depends on nothing but its own tokens, to the bit: pages go through attention a
fixed number of tokens at a time, and a block of them in which a row sees nothing changes nothing.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen_jax.attention import registry, ring
from qwen_jax.attention.cache import held_dtype
from qwen_jax.attention.reference import Attend, WritePages, xla
from qwen_jax.attention.registry import Implementation
from qwen_jax.config import Config
from qwen_jax.kernels.flash import KeysOrValues, NewPart, PoolLeaf, Quantised, Scale
from qwen_jax.kernels.mask import Mask
from qwen_jax.leaves.int8 import Int8, quantize
from qwen_jax.meshes import sharding

BLOCK = 64  # tokens of a row that are gathered at a time: more would not stay in a CPU's cache


@struct.dataclass
class Places:
    """Where the rows of a batch have their tokens.

    table: int32 [B, W], the pages of each row, in the order of their tokens.
    written: int32 [B], the tokens of each row in its pages, before this pass.
    count: int32 [B], the tokens of each row in this pass; the others are padding, on the right.
    """

    table: Int[Array, "B W"]
    written: Int[Array, " B"]
    count: Int[Array, " B"]


@struct.dataclass
class PagedLayer:
    """The pages of one layer.

    kv: [P, 2, K, page, H], keys after RoPE, and values, as an array or `Int8`.
    """

    kv: PoolLeaf

    def attend(
        self,
        implementation: Attend,
        q: Float[Array, "B T N H"],
        *,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        own: Mask,
        past: Mask | None,
        scale: Scale,
        index: Places,
    ) -> tuple[Float[Array, "B T N H"], "PagedLayer"]:
        """Attend to this pass's keys and those in the pages. Returns o and the new layer.

        The arguments are those of `model.context.KVCacheLayer`; `past` is None. An implementation
        that has kernels for pages is used by way of them.
        """
        made = Implementation.of(implementation)
        write = made.write_kernel(q, kv=self.kv)
        few = q.shape[1] <= registry.FEW and made.paged_kernel(q, kv=self.kv) is not None
        near = xla if few else implementation
        rows = jax.typeof(q).sharding.spec
        leaves = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self)

        @jax.shard_map(out_specs=(rows, leaves), check_vma=False)
        def local(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            own: Mask,
            scale: jax.Array,
            layer: PagedLayer,
            places: Places,
        ) -> tuple[jax.Array, PagedLayer]:
            found = near(q, k, v, own, scale, return_lse=True)
            cached = attend_pages(
                implementation, q, kv=layer.kv, places=places, window=own.window, scale=scale
            )
            o = ring.merge([found, cached])[0].astype(q.dtype)
            # This is 0, but the compiler cannot know: the write waits for the read (`cache.py`).
            after_reading = (jnp.max(jnp.abs(o)) < 0).astype(jnp.int32)
            places = Places(places.table, places.written + after_reading, places.count)
            kv = put(layer.kv, k, v=v, places=places, write=write)
            # Otherwise the compiler defers the writes of all layers to the end of a decode step,
            # and keeps their operands until then.
            o, kv = jax.lax.optimization_barrier((o, kv))
            return o, PagedLayer(kv)

        return local(q, k, v, own, jnp.asarray(scale, jnp.float32), self, index)


@struct.dataclass
class Pages:
    """The pages of a whole model, as a KV cache for a pass of the decoder (`model.context`).

    layers: the pages of each layer.
    places: where the rows of this pass have their tokens.
    """

    layers: tuple[PagedLayer, ...]
    places: Places

    def context(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[None, Places]:
        """Return no mask, as the layers make masks of the rows' places, and these places."""
        return None, self.places

    def advanced(self, layers: tuple[PagedLayer, ...], length: int) -> "Pages":
        """Return the cache after a pass, in which each row has written `count` tokens."""
        places = self.places
        written = places.written + places.count
        return Pages(layers, Places(places.table, written, places.count))


def empty(
    config: Config, pages: int, *, size: int, dtype: DTypeLike, kind: str | None
) -> tuple[PagedLayer, ...]:
    """Make the pool of pages, one layer after the other.

    pages: the number of pages P, the same in each part of the batch, times the parts.
    size: the tokens in a page.
    dtype: the dtype of computed keys and values.
    kind: None to store them as floats (in `cache.held_dtype(dtype)`), or "int8".

    Raises ValueError for another kind.
    """
    if kind not in (None, "int8"):
        raise ValueError(f"cache_dtype {kind!r}: pages are int8 or None, which is the model's own")
    shape = pages, 2, sharding.held_heads(config.num_kv_heads), size, config.head_dim
    make = functools.partial(_zeros, shape, held_dtype(dtype), kind)
    return tuple(make() for _ in range(config.num_layers))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: DTypeLike, kind: str | None) -> PagedLayer:
    """Make the pages of one layer, [P, 2, K, page, H], all zeros."""

    def zeros(letters: str, dtype: DTypeLike) -> jax.Array:
        return jnp.zeros(shape[: len(letters)], dtype, out_sharding=sharding.spec(letters))

    if kind is None:
        return PagedLayer(zeros("BXKSH", dtype))
    return PagedLayer(Int8(zeros("BXKSH", jnp.int8), zeros("BXKS", jnp.float32), None))


def attend_pages(
    implementation: Attend,
    q: Float[Array, "B T N H"],
    *,
    kv: PoolLeaf,
    places: Places,
    window: Int[Array, ""],
    scale: Float[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from the queries of this pass to the tokens in their rows' pages.

    q: [B, T, N, H]; query t of row b is token `written[b] + t`.
    kv: [P, 2, K, page, H].
    window: int32 [], the number of tokens that a query sees, its own included.
    scale: float32 [B, T], the factor on each query's scores.

    Returns o and the log-sum-exp of scores, in float32; 0 and -inf for a query that sees nothing.
    An implementation's kernel for pages computes it, or else, block by block, its function for
    attention; of `xla` that is the definition of the kernels. Runs within `shard_map`.
    """
    # Rows that take no part in the pass see nothing.
    written = jnp.where(places.count > 0, places.written, 0)
    kernel = Implementation.of(implementation).paged_kernel(q, kv=kv)
    if kernel is not None:
        kv = kv if isinstance(kv, Quantised) else kv.astype(q.dtype)  # a CPU's is float32
        return kernel(q, kv, places.table, written, window, scale)
    size = jax.tree.leaves(kv)[0].shape[3]
    number = -(-BLOCK // size)  # pages in a block
    table = jnp.pad(places.table, ((0, 0), (0, -places.table.shape[1] % number)))
    rows, tokens = q.shape[:2]
    positions = places.written[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    queries = (jnp.arange(tokens) < places.count[:, None]).astype(jnp.int32)
    # Blocks from the first that any row sees to the last.
    seen = jnp.where(written > 0, jnp.maximum(written - window + 1, 0), jnp.max(written))
    first, last = jnp.min(seen) // (number * size), -(-jnp.max(written) // (number * size))

    def fold(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pages = jax.lax.dynamic_slice_in_dim(table, i * number, number, 1)
        token = i * number * size + jnp.arange(number * size, dtype=jnp.int32)
        token = jnp.broadcast_to(token, (rows, len(token)))
        there = (token < written[:, None]).astype(jnp.int32)
        mask = Mask(positions, token, queries, there, window)
        keys, values = _read(kv, pages)
        return ring.merge([found, implementation(q, keys, values, mask, scale, return_lse=True)])

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    return jax.lax.fori_loop(first, last, fold, nothing)


def _read(kv: PoolLeaf, pages: Int[Array, "B n"]) -> tuple[KeysOrValues, KeysOrValues]:
    """Gather the keys and the values of some pages of each row, [B, n page, K, H] each."""

    def gather(x: jax.Array, which: int) -> jax.Array:
        # [P, 2, K, page, ...] -> [B, n page, K, ...]
        heads = jnp.arange(x.shape[2])
        # Heads first, as the definition of attention wants them, and in pieces that lie together.
        piece = (2 * pages[:, None] + which) * len(heads) + heads[:, None]
        found = x.reshape(-1, *x.shape[3:])[piece]  # [B, K, n, page, ...]
        return jnp.swapaxes(found.reshape(*found.shape[:2], -1, *found.shape[4:]), 1, 2)

    keys, values = (jax.tree.map(functools.partial(gather, which=i), kv) for i in range(2))
    return keys, values


def put(
    kv: PoolLeaf,
    k: Float[Array, "B T K H"],
    *,
    v: Float[Array, "B T K H"],
    places: Places,
    write: WritePages | None = None,
) -> PoolLeaf:
    """Return the pages with this pass's keys and values written.

    k, v: [B, T, K, H]. The pass begins at a page's first slot, and fills whole pages, if T > 1;
        what padding leaves in them lies behind the row's tokens, and is overwritten by later ones.
    write: an implementation's kernel; None is `scatter`.

    What is not finite is written as 0, since another row may get the page, and a product of 0 with
    NaN is NaN. The request that it comes from fails in the same pass. Runs within `shard_map`.
    """
    write = write or scatter
    size = jax.tree.leaves(kv)[0].shape[3]
    new = jnp.stack([k, v], 2)  # [B, T, 2, K, H]
    new = jnp.where(jnp.isfinite(new), new, 0)
    part = quantize(new) if isinstance(kv, Quantised) else new
    if k.shape[1] == 1:
        page = jnp.take_along_axis(places.table, (places.written // size)[:, None], 1)[:, 0]
        page = jnp.where(places.count > 0, page, 0)
        return write(kv, jax.tree.map(lambda x: x[:, 0], part), page, places.written % size)
    whole = k.shape[1] // size
    number = places.written[:, None] // size + jnp.arange(whole, dtype=jnp.int32)
    pages = jnp.take_along_axis(places.table, number, 1, mode="clip")
    pages = jnp.where(jnp.arange(whole) * size < places.count[:, None], pages, 0)

    def by_page(x: jax.Array) -> jax.Array:  # [B, T, 2, K, ...] -> [B whole, 2, K, page, ...]
        return jnp.moveaxis(x.reshape(-1, size, *x.shape[2:]), 1, 3)

    return write(kv, jax.tree.map(by_page, part), pages.reshape(-1))


def scatter(
    kv: PoolLeaf,
    new: NewPart,
    pages: Int[Array, " n"],
    slots: Int[Array, " n"] | None = None,
) -> PoolLeaf:
    """Return the pages with new keys and values written: one token in each page, or whole pages.

    kv: [P, 2, K, page, H].
    new: [n, 2, K, H], one token for each of n pages, or [n, 2, K, page, H]; a leaf of kv's kind.
    pages: int32 [n], which pages. Only page 0, which is nobody's, may occur more than once.
    slots: int32 [n], the slot of each token in its page; None for whole pages.

    It is the definition of the kernels that write into pages.
    """
    where = (pages,) if slots is None else (pages, slice(None), slice(None), slots)
    return jax.tree.map(lambda pool, x: pool.at[where].set(x.astype(pool.dtype)), kv, new)
