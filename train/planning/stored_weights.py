"""How the weights of a planned model are stored: as floats, or its layers as integers in groups."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax import model
from qwen_jax.checkpoint import kinds
from qwen_jax.config import Config
from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder

FORMS = ("float", "int4", "int8")
_Tree = TypeVar("_Tree")
BITS = {"int4": 4, "int8": 8}
_GROUP = 128  # inputs that share a scale, as in the published checkpoints
_SCALE_BYTES = 2
# The kernel that multiplies by integers on each platform, if there is one.
KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_triton"}


def decoder(config: Config, dtype: DTypeLike, *, form: str, kernel: str | None = None) -> Decoder:
    """Return a decoder as shapes with partitionings on the mesh in force.

    dtype: of plain weights.
    form: how the matrices of layers are stored, one of `FORMS`.
    kernel: the kernel that multiplies by integers; None makes floats of them for each product.

    Raises ValueError for a matrix whose inputs do not divide into groups.
    """
    plain, mesh = model.abstract(config, dtype), jax.sharding.get_abstract_mesh()
    if form == "float":
        return plain
    bits = BITS[form]

    def one(path: str, leaf: Weight) -> Any:
        if not path.startswith("layers.") or len(leaf.letters) != 2:
            return leaf
        outputs, inputs = leaf.shape
        if inputs % _GROUP:
            raise ValueError(
                f"--weights {form}: {path} has {inputs} inputs, which do not divide into groups of "
                f"{_GROUP}: leave it out"
            )
        stored = {
            "codes": (inputs * bits // 32, outputs),
            "scales": (inputs // _GROUP, outputs),
        }
        made = kinds.abstract(f"grouped{bits}", leaf, stored=stored, mesh=mesh, sizes=config.sizes)
        assert isinstance(made, Grouped)
        if kernel is None:
            return made
        return jax.eval_shape(functools.partial(grouped.for_kernel, kernel=kernel), made)

    return map_leaves(one, plain)


def on_devices(mesh: Mesh, tree: _Tree) -> _Tree:
    """Give shapes shardings on the devices of a mesh, and words of weights their layout in memory.

    tree: shapes with partitionings, in which only words are uint32 of two axes. The layout is the
    one of `grouped.for_kernel`, which shapes do not keep.
    """

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.dtype != jnp.uint32 or x.ndim != 2:
            return x
        place = Format(grouped.OUTPUTS_LAST, x.sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, sharding.on_devices(mesh, tree))


def size(config: Config, item_bytes: int, *, form: str) -> float:
    """Return the bytes of all weights. item_bytes: of an element of plain weights."""
    if form == "float":
        return config.num_params() * item_bytes
    layers = config.num_params() - _outside(config)
    matrices = layers - config.num_layers * _vectors(config)
    each = BITS[form] / 8 + _SCALE_BYTES / _GROUP
    return (config.num_params() - matrices) * item_bytes + matrices * each


def table_share(config: Config, item_bytes: int, *, form: str) -> float:
    """Return the share of one table of the vocabulary, [V, D], in the bytes of all weights.

    item_bytes: of an element of plain weights.
    """
    table = config.vocab_size * config.hidden_size
    return table * item_bytes / size(config, item_bytes, form=form)


def multiplied_share(config: Config, item_bytes: int, *, form: str) -> float:
    """Return the share of the bytes of all weights that a token is multiplied with.

    These are all but an embedding that is not the head, too: it is looked up. item_bytes: of an
    element of plain weights.
    """
    return 1 if config.tie_embeddings else 1 - table_share(config, item_bytes, form=form)


def _outside(config: Config) -> int:
    """Return the number of weights outside the layers."""
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return tables + config.hidden_size


def _vectors(config: Config) -> int:
    """Return the number of weights of a layer that are in no matrix: norms and biases."""
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.qkv_bias
    return biases + 2 * config.hidden_size + 2 * config.head_dim * config.qk_norm
