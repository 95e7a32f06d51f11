"""Decoders whose layers are integers in groups, rounded to the nearest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Weight, map_leaves
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder


def rounded(
    weight: np.ndarray, *, bits: int, group: int, symmetric: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes uint8 [in, out], scales float16 and zeros of a weight [out, in], by rounding."""
    columns = weight.T.astype(np.float32)
    groups = columns.reshape(-1, group, columns.shape[1])
    top = 2**bits - 1
    if symmetric:
        scales = np.abs(groups).max(1) / (top / 2)
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    else:
        low, high = groups.min(1), groups.max(1)
        scales = (high - low) / top
        zeros = np.clip(np.round(-low / scales), 0, top)
    scales = scales.astype(np.float16)
    steps = np.round(groups / scales[:, None].astype(np.float32)) + zeros[:, None]
    codes = np.clip(steps, 0, top).astype(np.uint8).reshape(columns.shape)
    return codes, scales, None if symmetric else zeros.astype(np.uint8)


def of(
    weight: np.ndarray,
    letters: str,
    *,
    bits: int,
    group: int,
    symmetric: bool = True,
    order: np.ndarray | None = None,
    lengths: Any = None,
) -> Grouped:
    """A weight [out, in] as integers, on the mesh in force.

    order: the inputs sorted by group; the weight of sorted inputs is rounded.
    """
    sorted_ = weight if order is None else weight[:, order]
    codes, scales, zeros = rounded(sorted_, bits=bits, group=group, symmetric=symmetric)
    inward = letters[::-1]

    def put(array: np.ndarray) -> Weight:
        return Weight(place(array, inward, lengths=lengths), letters=inward)

    return Grouped(
        codes=put(grouped.pack(codes, bits)),
        scales=put(scales),
        zeros=None if zeros is None else put(zeros),
        order=None if order is None else Weight(_whole(order), letters="I"),
        bits=bits,
    )


def _whole(array: np.ndarray) -> jax.Array:
    return jax.device_put(jnp.asarray(array, jnp.int32), P(None))


def decoder_of(
    decoder: Decoder, *, bits: int = 4, group: int = 8, kernel: str | None = None
) -> Decoder:
    """A decoder with separate layers, whose matrices in layers are integers."""

    def one(path: str, leaf: Weight) -> Any:
        if not path.startswith("layers.") or leaf.ndim != 2:
            return leaf
        weight = np.asarray(leaf[...], np.float32)
        made = of(weight, leaf.letters, bits=bits, group=group, lengths=decoder.config.sizes)
        return made if kernel is None else grouped.for_kernel(made, kernel)

    return map_leaves(one, decoder)
