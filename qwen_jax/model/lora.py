"""Low-rank adapters (LoRA, arXiv 2106.09685): created, attached to a decoder, merged into it.

A decoder with adapters is still a decoder. `attach` turns its leaves into `low_rank.Lora`, and
`merge` adds the adapters to the weights. Axis letter R is the rank. Projections that the original
code stacks into one module (queries, keys and values) share one `a`. This module knows no files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax.leaves import int8
from qwen_jax.leaves.low_rank import Lora
from qwen_jax.leaves.weights import (
    Leaf,
    Maker,
    Weight,
    map_leaves,
    named_leaves,
    precision,
)
from qwen_jax.meshes import gathering
from qwen_jax.model import Decoder


@struct.dataclass
class Adapters:
    """The trained parameters of LoRA, with the adapters of all layers stacked.

    a: by the name of a group, the matrix [L, R, in] that its leaves share. float32 while trained,
        as is b.
    b: by the path of a leaf, its matrix [L, out, R].
    embedding, head: trained copies that replace the decoder's whole arrays, or None.
    groups: the name of each group, with the paths of its leaves.
    scale: the factor on each adapter's product, such as alpha / rank.
    """

    a: dict[str, Weight]
    b: dict[str, Weight]
    embedding: Weight | None
    head: Weight | None
    groups: tuple[tuple[str, tuple[str, ...]], ...] = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)


def create(
    decoder: Decoder,
    groups: Mapping[str, Sequence[str]],
    *,
    rank: int,
    alpha: float,
    key: jax.Array,
    embeddings: bool = False,
) -> Adapters:
    """Make adapters for a decoder. They change nothing yet, as b is 0.

    As in PEFT, a is drawn from U(-1/sqrt(in), 1/sqrt(in)).

    groups: for each group the paths of its leaves in a block, such as "attn.q"; they share an `a`.
    rank: R, the rank of the adapters.
    alpha: the scale of the adapters times the rank.
    key: the PRNG key for drawing `a`.
    embeddings: train copies of the embedding and the head too.
    """
    sizes = {**decoder.config.sizes, "L": decoder.config.num_layers, "R": rank}
    make = Maker(sizes, key, dtype="float32")
    letters = {path: named for path, (named, _) in weights_of_block(decoder).items()}
    a, b = {}, {}
    for group, members in groups.items():
        (into,) = {letters[member][1] for member in members}
        a[group] = make.uniform(f"LR{into}")
        for member in members:
            b[member] = make.full(f"L{letters[member][0]}R", 0)

    def floats(leaf: Weight | Leaf | None) -> Weight | None:
        if isinstance(leaf, int8.Int8):
            return int8.plain(leaf, "float32")
        if not isinstance(leaf, Weight):
            return None
        return Weight(leaf[...].astype(jnp.float32), letters=leaf.letters)

    whole = [floats(leaf) if embeddings else None for leaf in (decoder.embedding, decoder.head)]
    members = tuple((name, tuple(group)) for name, group in groups.items())
    return Adapters(a, b, *whole, groups=members, scale=alpha / rank)


def weights_of_block(decoder: Decoder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the axis letters and the shape of each weight in one block, by its path there.

    decoder: with stacked or with separate layers.
    """
    layers = decoder.layers
    block, outer = (layers[0], 0) if isinstance(layers, Sequence) else (layers, 1)  # outer: L
    return {
        path: (leaf.letters[outer:], tuple(leaf.shape[outer:]))
        for path, leaf in named_leaves(block).items()
    }


def attach(
    decoder: Decoder, adapters: Adapters, *, key: jax.Array | None = None, dropout: float = 0.0
) -> Decoder:
    """Put adapters on the leaves of a stacked decoder.

    key: the PRNG key of the dropout on each adapter's input; None for no dropout.
    dropout: the share of inputs that is dropped.
    """
    layers = decoder.config.num_layers
    group_of = {leaf: name for name, members in adapters.groups for leaf in members}
    keys = {}
    if key is not None and dropout:
        for number, (name, _) in enumerate(adapters.groups):
            own = jax.random.fold_in(key, number)
            keys[name] = jax.random.key_data(jax.random.split(own, layers))

    def one(path: str, leaf: Weight) -> Any:
        if path not in group_of:
            return leaf
        group = group_of[path]
        pair = adapters.a[group], adapters.b[path]
        return Lora(leaf, *pair, keys.get(group), adapters.scale, dropout)

    return decoder.replace(
        embedding=decoder.embedding if adapters.embedding is None else adapters.embedding,
        layers=map_leaves(one, decoder.layers),
        head=decoder.head if adapters.head is None else adapters.head,
    )


def merge(decoder: Decoder, adapters: Adapters) -> Decoder:
    """Add adapters into the weights of a stacked decoder; each weight keeps its dtype."""
    group_of = {leaf: name for name, members in adapters.groups for leaf in members}

    def one(path: str, leaf: Weight) -> Weight:
        if path not in group_of:
            return leaf
        a, b = adapters.a[group_of[path]], adapters.b[path]
        a, b = (gathering.unshard(w) for w in (a, b))
        spec = jax.typeof(leaf[...]).sharding.spec
        added = jnp.einsum(
            "LOR,LRI->LOI",
            b[...],
            a[...],
            precision=precision(b[...]),
            out_sharding=P(*spec.partitions),
        )
        whole = leaf[...].astype(jnp.float32) + adapters.scale * added
        return Weight(whole.astype(leaf.dtype), letters=leaf.letters)

    dtype = decoder.embedding.dtype  # a head in int8 has another

    def cast(new: Weight | None, old: Any) -> Any:
        if new is None:
            return old
        return Weight(new[...].astype(dtype), letters=old.letters)

    return decoder.replace(
        embedding=cast(adapters.embedding, decoder.embedding),
        layers=map_leaves(one, decoder.layers),
        head=cast(adapters.head, decoder.head),
    )
