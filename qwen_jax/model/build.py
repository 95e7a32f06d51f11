"""Functions that make decoders, fresh or as shapes alone, and stack and unstack their layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from qwen_jax import meshes
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Maker, Weight
from qwen_jax.model.decoder import Block, Decoder


def create(config: Config, key: Key[Array, ""], *, dtype: DTypeLike) -> Decoder:
    """Make a decoder with freshly drawn weights, partitioned over the mesh in force.

    As in the original PyTorch code, weights are drawn from N(0, initializer_range^2), the two
    projections back into the residual stream divided by sqrt(2 L); biases are 0 and norms are 1.
    """
    make = _maker(config, key, dtype=dtype)
    blocks = [Block(config, make) for _ in range(config.num_layers)]
    return _assemble(config, make, blocks=blocks)


def abstract(config: Config, dtype: DTypeLike) -> Decoder:
    """Return the decoder of a config as shapes with partitionings, which take no memory."""

    def make() -> Maker:  # a key too is made as a shape: the devices may not be there
        return _maker(config, jax.random.key(0), dtype=dtype)

    block = jax.eval_shape(lambda: Block(config, make()))
    blocks = [jax.tree.map(lambda leaf: leaf, block) for _ in range(config.num_layers)]
    outer = jax.eval_shape(lambda: _assemble(config, make(), blocks=[]))
    return outer.replace(layers=blocks)


def stack(decoder: Decoder, consume: bool = False) -> Decoder:
    """Stack the leaves of all blocks on a new first axis L, so that one program serves any depth.

    consume: delete each leaf once it is stacked, so that beside the weights only one leaf of all
        layers is held twice.
    """

    def stacked(*leaves: Weight) -> Weight:
        arrays = [leaf[...] for leaf in leaves]
        whole = _stack(arrays)
        for array in arrays if consume else ():
            array.delete()
        return Weight(whole, letters=f"L{leaves[0].letters}")

    assert isinstance(decoder.layers, nnx.List), "the layers are stacked already"
    blocks = jax.tree.map(stacked, *decoder.layers, is_leaf=lambda x: isinstance(x, Weight))
    return decoder.replace(layers=blocks)


@jax.jit
def _stack(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack(arrays)


def unstack(decoder: Decoder) -> Decoder:
    """Undo `stack`: give each layer its separate leaves again, as decoding needs them.

    Call it under `jit`; otherwise each layer of each leaf is compiled as a program of its own.
    Donating the decoder saves nothing, as no result has the size of a stacked leaf.
    """

    def block(i: int) -> Block:
        def one(leaf: Weight) -> Weight:
            return Weight(leaf[i], letters=leaf.letters.removeprefix("L"))

        return jax.tree.map(one, decoder.layers, is_leaf=lambda x: isinstance(x, Weight))

    return decoder.replace(layers=[block(i) for i in range(decoder.config.num_layers)])


def _assemble(config: Config, make: Maker, *, blocks: list[Block]) -> Decoder:
    """Make a decoder from a list of blocks: add the embedding, the final norm and the head."""
    std = config.initializer_range
    head = None if config.tie_embeddings else make.normal("VD", std)
    return Decoder(
        config,
        make.normal("VD", std),
        layers=blocks,
        final_norm=make.full("D", 1),
        head=head,
    )


def _maker(config: Config, key: Key[Array, ""], *, dtype: DTypeLike) -> Maker:
    """Return a maker of leaves for a config, after checking that its axes divide over the mesh."""
    meshes.check(config.sizes, jax.sharding.get_abstract_mesh())
    return Maker(config.sizes, key, dtype=dtype)
