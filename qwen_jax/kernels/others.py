"""Other libraries' attention with the arguments of `attention.xla`, to compare our kernels with.

No library takes positions and segments, so the functions of `ATTEND` pass a dense mask [B, T, S],
or biases of that size: right for any mask, but no way to run a long sequence. `CAUSAL` and `CACHED`
hold the fastest functions of each library, which take no mask: plain causal attention, and one
token's attention to a cache in the library's own layout.

Calls that are not supported raise NotImplementedError with the implementation's name, whatever the
underlying library raises. Libraries are imported when called.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.kernels import choice, flash
from qwen_jax.kernels.flash import Attended, KeysOrValues, Scale
from qwen_jax.kernels.mask import Mask

_PAGE = 256  # tokens in a page
_TPU_BLOCK = 128  # lengths are padded to multiples of it
# A bias that hides a key. In a row that is hidden whole, forward and backward must round to about
# the same number: with -1e30 the two differ by more than an exponential can take.
_HIDDEN = -1e7


def dot_product(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Run `jax.nn.dot_product_attention`, through cuDNN on CUDA and through XLA elsewhere."""
    name, on_cuda = "dot_product", _on_cuda()
    q, k, v, visible = _dense(name, q, k, v, mask, scale)
    dtype = q.dtype
    if return_lse:
        _need_residual(name)
        if on_cuda and dtype != jnp.float32:
            raise NotImplementedError(f"{name}: the log-sum-exp, which jax rounds to {dtype.name}")
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    settings: dict[str, Any] = {"implementation": "cudnn" if on_cuda else None}
    if return_lse:
        settings["return_residual"] = True
    with _declining(name, q):
        o = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], **settings)
    return _seen(visible, *o) if return_lse else _seen(visible, o.astype(dtype))


def splash(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Run jax's splash attention for TPU with a dense mask that is known only at run time.

    With return_lse it has no derivative.
    """
    name = "splash"
    interpret = choice.interpreted(name, "tpu")
    length, keys = q.shape[1], k.shape[1]
    q, k, v, visible = _dense(name, q, k, v, mask, scale)
    q = q * q.shape[-1] ** -0.5
    dense = flash.pad(flash.pad(visible, _padded(length), axis=1), _padded(keys), axis=2)

    def row(x: tuple[jax.Array, ...]) -> Any:
        q, k, v, visible = x
        kernel = _splash_kernel(visible[None], interpret=interpret, save_residuals=return_lse)
        return jax.vmap(kernel)(q[:, None], k[:, None], v[:, None])  # a head is a mapped row

    with _declining(name, q):
        o = jax.lax.map(row, (*_tpu_layout(q, k, v), dense))
    if not return_lse:
        return _seen(visible, jnp.swapaxes(o[:, :, 0], 1, 2)[:, :length])
    o, (lse,) = o
    o = jnp.swapaxes(o[:, :, 0], 1, 2)[:, :length]
    return _seen(visible, o.astype(jnp.float32), jnp.swapaxes(lse[:, :, 0], 1, 2)[:, :length])


def tpu_flash(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Run jax's flash attention for TPU with a bias [B, N, T, S] as mask.

    Raises NotImplementedError for return_lse, as it gives no log-sum-exp.
    """
    name = "flash"
    interpret = choice.interpreted(name, "tpu")
    if return_lse:
        raise NotImplementedError(f"{name}: the log-sum-exp")
    length = q.shape[1]
    q, k, v, visible = _dense(name, q, k, v, mask, scale)
    q, k, v = _tpu_layout(q, k, v)
    bias = jnp.where(visible, 0, _HIDDEN).astype(jnp.float32)
    widths = [(0, 0), (0, q.shape[2] - length), (0, k.shape[2] - bias.shape[2])]
    bias = jnp.pad(bias, widths, constant_values=_HIDDEN)
    bias = jnp.broadcast_to(bias[:, None], (*q.shape[:3], k.shape[2]))
    with _declining(name, q), _interpreting(interpret):
        o = _flash_module().flash_attention(q, k, v, bias, sm_scale=q.shape[-1] ** -0.5)
    return _seen(visible, jnp.swapaxes(o, 1, 2)[:, :length])


def tokamax(
    q: Float[Array, "B T N H"],
    k: KeysOrValues,
    v: KeysOrValues,
    mask: Mask,
    scale: Scale,
    return_lse: bool = False,
) -> Attended:
    """Run the package tokamax with its best kernel for the device.

    Raises NotImplementedError for return_lse, as it gives no log-sum-exp.
    """
    name = "tokamax"
    if return_lse:
        raise NotImplementedError(f"{name}: the log-sum-exp")
    q, k, v, visible = _dense(name, q, k, v, mask, scale)
    with _declining(name, q):
        o = _tokamax(q, k, v, mask=visible[:, None])
    return _seen(visible, o)


def _causal_dot_product(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    implementation = "cudnn" if _on_cuda() else None
    with _declining("dot_product", q):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def _causal_splash(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    interpret, length = choice.interpreted("splash", "tpu"), q.shape[1]
    with _declining("splash", q):
        masks = importlib.import_module(f"{_SPLASH}.splash_attention_mask")
        q, k, v = _tpu_layout(q * q.shape[-1] ** -0.5, k, v)
        mask = masks.MultiHeadMask([masks.CausalMask((q.shape[2], k.shape[2]))] * q.shape[1])
        o = jax.vmap(_splash_kernel(mask, interpret=interpret))(q, k, v)
    return jnp.swapaxes(o, 1, 2)[:, :length]


def _causal_flash(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    interpret, length = choice.interpreted("flash", "tpu"), q.shape[1]
    with _declining("flash", q), _interpreting(interpret):
        q, k, v = _tpu_layout(q, k, v)
        size = _even_block(512, q.shape[2], k.shape[2])
        module = _flash_module()
        fields = [x for x in module.BlockSizes.__dataclass_fields__ if x != "block_b"]
        blocks = module.BlockSizes(block_b=1, **dict.fromkeys(fields, size))
        scale = q.shape[-1] ** -0.5
        o = module.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=blocks)
    return jnp.swapaxes(o, 1, 2)[:, :length]


def _causal_tokamax(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    with _declining("tokamax", q):
        return _tokamax(q, k, v, is_causal=True)


class Cached(NamedTuple):
    """Another library's attention from one token to a cache.

    layout: converts a cache leaf [B, K, S, H] to the library's own layout.
    attend: computes o [B, 1, N, H] from q [B, 1, N, H], k and v in that layout, and the number of
        written tokens of each sequence, int32 [B].
    """

    layout: Callable[[jax.Array], jax.Array]
    attend: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _cached_dot_product(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    length: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    implementation = "cudnn" if _on_cuda() else None
    with _declining("dot_product", q):
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=length, implementation=implementation
        )


def _pages(x: Float[Array, "B K S H"]) -> Float[Array, "K pages page H"]:
    """Cut a cache leaf [B, K, S, H] into pages of `_PAGE` tokens, [K, pages, page, H]."""
    x = flash.pad(x, flash.round_up(x.shape[2], _PAGE), axis=2)
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, _PAGE, x.shape[3])


def _cached_paged(
    q: Float[Array, "B T N H"],
    k: Float[Array, "K pages page H"],
    v: Float[Array, "K pages page H"],
    length: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    interpret, batch = choice.interpreted("paged", "tpu"), q.shape[0]
    table = jnp.arange(k.shape[1], dtype=jnp.int32).reshape(batch, -1)
    most = _even_block(8, table.shape[1])
    with _declining("paged", q), _interpreting(interpret):
        module = importlib.import_module("jax.experimental.pallas.ops.tpu.paged_attention")
        o = module.paged_attention(
            q[:, 0] * q.shape[-1] ** -0.5, k, v, length, table, pages_per_compute_block=most
        )
    return o[:, None].astype(q.dtype)


ATTEND: dict[str, Callable[..., Attended]] = {
    "dot_product": dot_product,
    "splash": splash,
    "flash": tpu_flash,
    "tokamax": tokamax,
}
# name -> o [B, T, N, H] of q [B, T, N, H] and k, v [B, T, K, H], scaled by H**-0.5, plain causal
CAUSAL: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "dot_product": _causal_dot_product,
    "splash": _causal_splash,
    "flash": _causal_flash,
    "tokamax": _causal_tokamax,
}
CACHED: dict[str, Cached] = {
    "dot_product": Cached(lambda x: jnp.swapaxes(x, 1, 2), _cached_dot_product),
    "paged": Cached(_pages, _cached_paged),  # jax's paged attention for TPU
}

_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"


def _on_cuda() -> bool:
    return choice.device().platform in ("cuda", "gpu")


@contextlib.contextmanager
def _declining(name: str, q: jax.Array) -> Iterator[None]:
    """Turn exceptions of a library, called in a `with` statement, into NotImplementedError.

    name: the implementation's name in the error.
    q: the queries; if they are float32, products are computed in full float32.
    """
    precision = "highest" if q.dtype == jnp.float32 else None
    try:
        with jax.default_matmul_precision(precision):
            yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotImplementedError(f"{name}: {reason}") from error


def _dense(
    name: str, q: jax.Array, k: KeysOrValues, v: KeysOrValues, mask: Mask, scale: Scale
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return a library's operands: scaled q, k and v as arrays of q's dtype, and the dense mask.

    q is multiplied by scale without its factor H**-0.5, which the library applies. The mask is bool
    [B, T, S]. Raises NotImplementedError for an unsupported dtype or number of heads.
    """
    flash.decline(name, q, k=k, dtypes=("bfloat16", "float16", "float32"), head_dims=(q.shape[-1],))
    k, v = (x.dequantize(q.dtype) if isinstance(x, flash.Quantised) else x for x in (k, v))
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])
    return flash.factored(q, scale), k.astype(q.dtype), v.astype(q.dtype), mask.visible()


def _seen(visible: jax.Array, o: jax.Array, lse: jax.Array | None = None) -> Attended:
    """Set o to 0 and the log-sum-exp to -inf for queries that see no key.

    visible: bool [B, T, S], the dense mask.

    Returns o, or (o, lse) if lse is given.
    """
    some = jnp.any(visible, -1)[:, :, None]
    o = jnp.where(some[..., None], o, 0)
    return o if lse is None else (o, jnp.where(some, lse.astype(jnp.float32), -jnp.inf))


def _need_residual(name: str) -> None:
    """Raise NotImplementedError if this jax version returns no log-sum-exp."""
    parameters = jax.nn.dot_product_attention.__kwdefaults__ or {}
    if "return_residual" not in parameters:
        raise NotImplementedError(f"{name}: the log-sum-exp, in jax {jax.__version__}")


def _padded(length: int) -> int:
    return flash.round_up(length, _TPU_BLOCK)


def _tpu_layout(*arrays: jax.Array) -> list[jax.Array]:
    """Repeat the heads of keys and values, pad lengths, and reorder axes for jax's TPU kernels.

    arrays: q first, then others; [B, length, heads, H] each.

    Returns [B, N, padded length, H] each, with the N heads of q.
    """
    heads = arrays[0].shape[2]
    arrays_ = [jnp.repeat(x, heads // x.shape[2], 2) for x in arrays]
    return [jnp.swapaxes(flash.pad(x, _padded(x.shape[1]), axis=1), 1, 2) for x in arrays_]


def _even_block(most: int, *lengths: int) -> int:
    """Return the largest power of two, at most `most`, that divides all `lengths`."""
    return min(most, math.gcd(*lengths) & -math.gcd(*lengths))


def _splash_kernel(mask: Any, **settings: Any) -> Callable[..., Any]:
    """Make the splash kernel for a mask [heads, T, S], an array or a mask object of the library."""
    module = importlib.import_module(f"{_SPLASH}.splash_attention_kernel")
    dense = isinstance(mask, jax.Array)
    size = _even_block(512 if dense else 1024, *mask.shape[1:])
    compute = min(size, 512)
    blocks = module.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=compute,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    kernel = module.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, **settings
    )
    # jax turns this flag into an array and branches on it, which fails when it is traced.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=None)
    return kernel


def _flash_module() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")


def _interpreting(interpret: bool) -> contextlib.AbstractContextManager[Any]:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext()


def _tokamax(q: jax.Array, k: jax.Array, v: jax.Array, **settings: Any) -> jax.Array:
    try:
        module = importlib.import_module("tokamax")
    except ImportError as error:
        raise NotImplementedError("the package is not installed") from error
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # absl would otherwise parse the command line of the program
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return module.dot_product_attention(q, k, v, precision=precision, **settings)
