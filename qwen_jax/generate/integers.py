"""Chooses how the integers of a quantised model directory are multiplied by.

They become floats when they are loaded, or a kernel reads them. A kernel is tested on this device
before it is used: no machine that we have could.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import checkpoint
from qwen_jax.checkpoint.kinds import GROUPED
from qwen_jax.config import Config
from qwen_jax.leaves import grouped, grouped_calls
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.weights import Leaf, Weight

_SHARE = 0.5  # of a machine's memory that floats may take without being asked for
# The kernel of each platform, a name of KERNELS.
OF_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_triton", "cpu": "by_groups"}
Converter = Callable[[str, Weight | Leaf], Weight | Leaf]


def converter(
    path: str | Path, config: Config, *, dtype: str, dequantise: bool | None
) -> Converter | None:
    """Return the function that prepares each weight of a directory; None if all are floats.

    path, config: the model directory, and its architecture.
    dtype: the dtype in which the model computes.
    dequantise: whether integers become floats of it; None chooses, and says in a line of the log
        what it chose.

    Raises ValueError if that is asked for, and the weights are floats already.
    """
    found = {kind for kind in checkpoint.load_kinds(path).values() if kind in GROUPED}
    if not found:
        if dequantise is not None:
            raise ValueError(f"dequantise {dequantise}: {path} is not quantised: leave it out")
        return None
    if dequantise is None:
        dequantise = _chosen(path, config, dtype=dtype)
    kernels = {} if dequantise else {GROUPED[kind]: _kernel(GROUPED[kind], dtype) for kind in found}

    def prepared(_: str, leaf: Weight | Leaf) -> Weight | Leaf:
        if not isinstance(leaf, Grouped):
            return leaf
        if dequantise:
            return grouped.plain(leaf, dtype)
        kernel = kernels[leaf.bits]
        return leaf if kernel is None else grouped.for_kernel(leaf, kernel)

    return prepared


def _kernel(bits: int, dtype: str) -> str | None:
    """Return the kernel for weights of these bits on this device; None if none is right there."""
    name = OF_PLATFORM.get(jax.default_backend())
    if name is None:
        return None
    wrong = amiss(name, bits=bits, dtype=dtype)
    reason = "it agrees with its definition here" if wrong is None else wrong
    taken = "products with" if wrong is None else "floats are made for each product, and not by"
    logging.getLogger("qwen_jax").info("weights of %d bits: %s %s: %s", bits, taken, name, reason)
    return name if wrong is None else None


def amiss(name: str, *, bits: int, dtype: str) -> str | None:
    """Run a kernel on small weights on the first device, and say what is wrong with its products.

    Returns None if nothing is: for one row and for many, each product differs from that with exact
    floats by less than the rounding of `dtype` may, in the sum of the sizes of its terms.
    """
    rng, inputs, outputs, group = np.random.default_rng(0), 1024, 640, 128
    words = rng.integers(0, 2**32, (inputs * bits // 32, outputs), np.uint32)
    scales = rng.uniform(0.5, 1, (inputs // group, outputs)).astype(np.float16)
    multiply = grouped_calls.KERNELS[name]
    exact = np.asarray(grouped.unpack(words, bits), np.float64) - 2 ** (bits - 1)
    exact *= np.repeat(scales.astype(np.float64), group, axis=0)
    bound = {"float32": 2.0**-16, "float16": 2.0**-8, "bfloat16": 2.0**-6}[dtype]
    for rows in (1, 128):
        x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
        try:
            given = {"scales": jnp.asarray(scales), "zeros": None, "bits": bits}
            found = np.asarray(jax.jit(lambda x, w, g=given: multiply(x, w, **g))(x, words))
        except Exception as error:  # whatever the compiler or the device raises
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        wanted = np.asarray(x, np.float64) @ exact
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(exact)
        worst = float(np.max(np.abs(found.astype(np.float64) - wanted) / terms))
        if not worst < bound:
            return f"with {rows} rows it is wrong by {worst:.2g} of the sum of its terms"
    return None


def _chosen(path: str | Path, config: Config, *, dtype: str) -> bool:
    """Return whether integers become floats on this machine, and say so if it is a CPU."""
    if jax.default_backend() != "cpu":
        return False
    needed = config.num_params() * jnp.dtype(dtype).itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = needed <= _SHARE * there
    size = f"{needed / 1e9:.1f} GB of {there / 1e9:.1f}"
    if fits:
        line = f"its integers become {dtype} ({size}), which a CPU multiplies faster"
    else:
        line = f"its integers are kept: {dtype} would take {size}; a CPU is slower with them"
    other = "keeps them" if fits else "turns them into floats"
    logging.getLogger("qwen_jax").info(
        "%s: %s; dequantise=%s (--%sdequantise) %s",
        path,
        line,
        not fits,
        "no-" if fits else "",
        other,
    )
    return fits
