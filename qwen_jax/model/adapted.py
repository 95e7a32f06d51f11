"""Decoders with adapters to generate with: one for all rows of a batch, or several, chosen by row.

The layers of such a decoder are separate, as decoding needs them, and adapters are in the dtype in
which it computes. (`lora.py` has what training needs.) This module knows no files.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from qwen_jax.leaves.adapter_rows import AdapterRows
from qwen_jax.leaves.low_rank import Lora
from qwen_jax.leaves.weights import Leaf, Weight, map_leaves
from qwen_jax.model import Decoder, running
from qwen_jax.model.decoder import Block
from qwen_jax.model.lora import Adapters
from qwen_jax.model.running import Groups

_Tree = TypeVar("_Tree")
_Held = TypeVar("_Held", Weight, Weight | Leaf | None)
# The adapters of a weight: their place in a sequence of them, and the name of the group there.
_Owners = tuple[tuple[int, str], ...]
_Pair = tuple[Weight, Weight]


def attach_one(decoder: Decoder, adapters: Adapters) -> Decoder:
    """Put adapters on a decoder with separate layers, for all rows of a batch.

    An embedding and a head of the adapters' own take the place of the decoder's.
    """

    def made(leaf: Weight, pair: _Pair, _: _Owners) -> Lora:
        return Lora(leaf, *pair, key=None, scale=1.0, dropout=0.0)

    dtype = decoder.embedding.dtype

    def other(own: Weight | None, old: _Held) -> Weight | _Held:
        if own is None or old is None:
            return old
        return Weight(own[...].astype(dtype), letters=own.letters)

    found = _attach(decoder, [adapters], made)
    embedding = other(adapters.embedding, decoder.embedding)
    return found.replace(embedding=embedding, head=other(adapters.head, decoder.head))


def attach_several(decoder: Decoder, adapters: Sequence[Adapters]) -> Decoder:
    """Put several adapters on a decoder with separate layers, of which each row uses one or none.

    Until `select` has chosen them, no row uses any. The ranks of the adapters, and the weights that
    they are of, may differ.

    Raises ValueError for adapters with an embedding or a head of their own, which rows would share.
    """
    for number, each in enumerate(adapters):
        if own := [name for name in ("embedding", "head") if getattr(each, name) is not None]:
            raise ValueError(
                f"adapters[{number}] has its own {' and '.join(own)}, which all adapters on a "
                "decoder share: attach it alone, or merge it"
            )

    def made(leaf: Weight, pair: _Pair, owners: _Owners) -> AdapterRows:
        by_number = {number: adapters[number].a[group].shape[1] for number, group in owners}
        ranks = tuple(by_number.get(number, 0) for number in range(len(adapters)))
        return AdapterRows(leaf, *pair, rows=None, ranks=ranks)

    return _attach(decoder, adapters, made)


def select(tree: _Tree, rows: Int32[Array, " B"]) -> _Tree:
    """Choose the adapter of each row in a decoder, or in a part of one, made by `attach_several`.

    It costs nothing within a compiled program, which is where decoding calls it.

    rows: int32 [B]; i chooses the adapter i - 1 of the sequence that was attached, 0 none.
    """
    # Whole on each device: otherwise every weight would gather it as it gathers its own parts.
    return _with_rows(tree, jax.reshard(rows, P(None)))


@dataclasses.dataclass(frozen=True)
class GroupsByRow:
    """Blocks of a decoder made by `attach_several`, flattened once for passes with any rows.

    groups: the flattened blocks.
    places: for each group, the places of the rows among its leaves.
    """

    groups: Groups
    places: list[list[int]]

    @classmethod
    def of(cls, decoder: Decoder) -> "GroupsByRow":
        """Flatten the separate blocks of a decoder."""
        rows = np.zeros(1, np.int32)  # in the place of those that `select` gets
        groups = running.grouped([_with_rows(block, rows) for block in _blocks(decoder)])
        places = [[i for i, x in enumerate(leaves) if x is rows] for _, leaves, _ in groups.parts]
        return cls(groups, places)

    def select(self, rows: Int32[Array, " B"]) -> Groups:
        """Return the groups for a pass of these rows, without flattening anything.

        rows: int32 [B], whole on each device; i chooses the adapter i - 1, 0 none.
        """
        parts = []
        for (first, leaves, tree), places in zip(self.groups.parts, self.places, strict=True):
            chosen = leaves.copy()
            for place in places:
                chosen[place] = rows
            parts.append((first, chosen, tree))
        return Groups(parts)


def _blocks(decoder: Decoder) -> Sequence[Block]:
    """Return the separate blocks of a decoder. Raises ValueError for stacked ones."""
    if not isinstance(decoder.layers, Sequence):
        raise ValueError("a stacked decoder has no separate layers: unstack it first")
    return decoder.layers


def _with_rows(tree: _Tree, rows: Int32[Array, " B"] | Int32[np.ndarray, " B"]) -> _Tree:
    """Put one array of rows into all weights of a tree that have several adapters."""

    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, rows=rows) if isinstance(leaf, AdapterRows) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, AdapterRows))


def _attach(
    decoder: Decoder,
    adapters: Sequence[Adapters],
    made: Callable[[Weight, _Pair, _Owners], Leaf],
) -> Decoder:
    """Replace each weight of a decoder that has adapters by `made(weight, (a, b), owners)`.

    a, b: the factors of its adapters, one behind the other along the rank; scales are part of b.
    """
    owners, dtype = _owners(adapters), decoder.embedding.dtype
    pairs = [dataclasses.replace(each, embedding=None, head=None) for each in adapters]
    blocks = []
    for number, block in enumerate(_blocks(decoder)):
        a, b = _factors(pairs, np.int32(number), dtype=dtype)

        def one(path: str, leaf: Weight, a: Any = a, b: Any = b) -> Weight | Leaf:
            if path not in owners:
                return leaf
            return made(leaf, (a[owners[path]], b[path]), owners[path])

        blocks.append(map_leaves(one, block))
    return decoder.replace(layers=blocks)


def _owners(adapters: Sequence[Adapters]) -> dict[str, _Owners]:
    """Return the adapters of each weight of a block, by its path there."""
    found: dict[str, _Owners] = {}
    for number, each in enumerate(adapters):
        for group, members in each.groups:
            for path in members:
                found[path] = (*found.get(path, ()), (number, group))
    return found


@functools.partial(jax.jit, static_argnames="dtype")
def _factors(
    adapters: Sequence[Adapters], layer: Int32[Array, ""] | np.int32, *, dtype: DTypeLike
) -> tuple[dict[_Owners, Weight], dict[str, Weight]]:
    """Return the factors of all adapters in one layer: a by the adapters in it, b by path."""

    def part(leaf: Weight) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(leaf[...], layer, keepdims=False)

    def joined(parts: Sequence[jax.Array], letters: str) -> Weight:
        whole = jnp.concatenate(parts, axis=letters.index("R"))
        return Weight(whole.astype(dtype), letters=letters)

    a, b = {}, {}
    for path, owners in _owners(adapters).items():
        if owners not in a:
            leaves = [adapters[number].a[group] for number, group in owners]
            a[owners] = joined([*map(part, leaves)], leaves[0].letters[1:])
        scaled = [adapters[n].scale * part(adapters[n].b[path]) for n, _ in owners]
        b[path] = joined(scaled, adapters[owners[0][0]].b[path].letters[1:])
    return a, b
