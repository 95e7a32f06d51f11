"""`Grid`: the numbers that the integers of a group of weights stand for, and how it is chosen."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

# So many ranges are tried for 4 bits, each narrower than the last by half a step of the codes:
# clipping a few large weights may cost less than wider steps for all of them. (8 bits would gain a
# hundredth of their error, and no nearer predictions.)
_RANGES = 16


@struct.dataclass
class Grid:
    """The scale and the zero of a group, for each output: a code c stands for (c - zero) * scale.

    scale: float32 [outputs], which float16 can represent.
    zero: float32 [outputs], whole numbers from 0 to `top`.
    top: the largest code. The smallest is 0.
    """

    scale: Float[Array, "*groups outputs"]
    zero: Float[Array, "*groups outputs"]
    top: int = struct.field(pytree_node=False)

    def nearest(self, weight: Float[Array, "*size outputs"]) -> Float[Array, "*size outputs"]:
        """Return the codes of the numbers that are nearest to weights, as floats."""
        return jnp.clip(jnp.round(weight / self.scale) + self.zero, 0, self.top)

    def floats(self, codes: Float[Array, "*size outputs"]) -> Float[Array, "*size outputs"]:
        """Return the numbers that codes stand for."""
        return (codes - self.zero) * self.scale


def choose(
    weight: Float[Array, "size outputs"],
    cost: Float[Array, " size"],
    *,
    bits: int,
    symmetric: bool,
) -> Grid:
    """Choose the grid of a group of weights.

    cost: by how much the squared error of each input's weights counts.
    symmetric: whether 2^(bits - 1) stands for 0; otherwise each output has its own zero.

    8 bits cover the weights wholly. For 4 bits it tries ranges that cover them wholly or in part,
    and takes the one whose rounding costs least. A symmetric range is as wide below 0 as above,
    also where all weights have one sign.
    """
    top = 2**bits - 1
    low = jnp.minimum(jnp.min(weight, axis=0), 0)
    high = jnp.maximum(jnp.max(weight, axis=0), 0)
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high

    def covering(part: Float[Array, ""]) -> tuple[Float[Array, " outputs"], Grid]:
        scale = _float16((high - low) * part / top)
        if symmetric:
            zero = jnp.full_like(scale, 2 ** (bits - 1))
        else:
            zero = jnp.clip(jnp.round(-low * part / scale), 0, top)
        grid = Grid(scale, zero, top)
        return cost @ jnp.square(weight - grid.floats(grid.nearest(weight))), grid

    def better(
        best: tuple[Float[Array, " outputs"], Grid], part: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, " outputs"], Grid], None]:
        tried = covering(part)
        less = tried[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(less, new, old), tried, best), None

    whole = covering(jnp.float32(1))
    if bits == 8:
        return whole[1]
    parts = 1 - jnp.arange(1, _RANGES, dtype=jnp.float32) / 2 ** (bits + 1)
    return jax.lax.scan(better, whole, parts)[0][1]


def _float16(scale: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
    """Round numbers that are not negative to float16's, and to at least the smallest above 0.

    It is done by arithmetic in float32, because a compiler may drop a conversion to float16 and
    back, and a processor may take subnormal numbers, which scales of 8 bits can be, for 0.
    """
    scale = jnp.maximum(scale, 2.0**-24)
    exponent = jnp.frexp(scale)[1]
    unit = jnp.ldexp(jnp.ones_like(scale), jnp.maximum(exponent - 11, -24))
    return jnp.round(scale / unit) * unit
