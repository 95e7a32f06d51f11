"""The rows of the engine's batch on the devices: all that a request is, but for its pages' content.

Every number of a request is a value of its row, so no request compiles anything. The host writes a
row once, when a request gets it (`admit`); from then on devices move it on by themselves, and a
step brings along three integers a row (`orders.of_rows`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from qwen_jax.engine.settings import MOST_BIASES, MOST_STOPS, Settings
from qwen_jax.meshes import moves, sharding

_WORDS = 1024  # of a mask that are unpacked at a time


@struct.dataclass
class Rows:
    """The state of R rows.

    table: int32 [R, W], the pages of each row.
    written: int32 [R], the tokens in its pages.
    on: bool [R], whether it is decoding.
    token: int32 [R], the last chosen token, not yet fed to the decoder.
    step: int32 [R], the number of tokens chosen so far.
    broken: bool [R], whether its prompt has made something that is not finite.
    history: int32 [R, V], for each id twice the times it was chosen, plus 1 if it is in the prompt.
    mask: int32 [R, words], a bit for each id that may be chosen, as `settings.Grammar` returns it.
    frequencies: float32 [R, H/2], the RoPE frequencies.
    seed: uint32 [R].
    limit, least: int32 [R], the most new tokens, and those before which no stop is chosen.
    stops: int32 [R, MOST_STOPS], filled up with V.
    bias_ids, biases: int32 and float32 [R, MOST_BIASES], the ids filled up with V.
    temperature, top_p, min_p, repetition, presence, frequency: float32 [R].
    top_k: int32 [R].
    logprobs: int32 [R], the alternatives returned with each token; -1 for no log-probability.
    adapter: int32 [R], the number of the adapter; 0 for none.
    """

    table: Int[Array, "R W"]
    written: Int[Array, " R"]
    on: Bool[Array, " R"]
    token: Int[Array, " R"]
    step: Int[Array, " R"]
    broken: Bool[Array, " R"]
    history: Int[Array, "R V"]
    mask: Int[Array, "R words"]
    frequencies: Float[Array, "R pairs"]
    seed: UInt32[Array, " R"]
    limit: Int[Array, " R"]
    least: Int[Array, " R"]
    stops: Int[Array, "R stops"]
    bias_ids: Int[Array, "R biases"]
    biases: Float[Array, "R biases"]
    temperature: Float[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    repetition: Float[Array, " R"]
    presence: Float[Array, " R"]
    frequency: Float[Array, " R"]
    top_k: Int[Array, " R"]
    logprobs: Int[Array, " R"]
    adapter: Int[Array, " R"]


class Sizes(NamedTuple):
    """The lengths of the axes of `Rows`: R, W, V, and the pairs of a RoPE rotation, H/2."""

    rows: int
    width: int
    vocab: int
    pairs: int

    @property
    def words(self) -> int:
        """The 32-bit words of a mask of ids."""
        return -(-self.vocab // 32)


def _shapes(sizes: Sizes) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shape of one row's part of each field, and its dtype."""
    whole, real, flag = np.dtype(np.int32), np.dtype(np.float32), np.dtype(bool)
    scalars = {name: ((), whole) for name in ("written", "token", "step", "limit", "least")}
    scalars |= {name: ((), whole) for name in ("top_k", "logprobs", "adapter")}
    scalars |= {name: ((), flag) for name in ("on", "broken")}
    scalars |= {name: ((), real) for name in ("temperature", "top_p", "min_p")}
    scalars |= {name: ((), real) for name in ("repetition", "presence", "frequency")}
    return scalars | {
        "seed": ((), np.dtype(np.uint32)),
        "table": ((sizes.width,), whole),
        "history": ((sizes.vocab,), whole),
        "mask": ((sizes.words,), whole),
        "frequencies": ((sizes.pairs,), real),
        "stops": ((MOST_STOPS,), whole),
        "bias_ids": ((MOST_BIASES,), whole),
        "biases": ((MOST_BIASES,), real),
    }


def off(sizes: Sizes) -> Rows:
    """Make the state of rows that are all off."""

    @jax.jit
    def make() -> Rows:
        fields = {}
        for name, (shape, dtype) in _shapes(sizes).items():
            spec = sharding.spec("B" + "X" * len(shape))
            fields[name] = jnp.zeros((sizes.rows, *shape), dtype, out_sharding=spec)
        return Rows(**fields)

    return make()


def entry(
    settings: Settings,
    prompt: Int[np.ndarray, " T"],
    *,
    pages: Int[np.ndarray, " n"],
    frequencies: Float[np.ndarray, " pairs"],
    allowed: Int32[np.ndarray, " words"],
    adapter: int,
    sizes: Sizes,
) -> Int32[np.ndarray, " all"]:
    """Make the vector that `admit` writes into a row.

    pages: the pages of the prompt.
    allowed: the mask of ids that may be generated.
    adapter: the number of the adapter; 0 for none.

    The prompt's ids are a bit each, from which devices make the row of `history`.
    """
    vocab = sizes.vocab
    fields: dict[str, object] = {
        "table": _filled(pages, sizes.width, 0),
        "history": bits(prompt, vocab),
        "mask": allowed,
        "frequencies": frequencies,
        "seed": settings.seed,
        "limit": settings.max_new_tokens,
        "least": settings.min_new_tokens,
        "stops": _filled(settings.stops, MOST_STOPS, vocab),
        "bias_ids": _filled(list(settings.logit_bias), MOST_BIASES, vocab),
        "biases": _filled(list(settings.logit_bias.values()), MOST_BIASES, 0),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repetition": settings.repetition_penalty,
        "presence": settings.presence_penalty,
        "frequency": settings.frequency_penalty,
        "top_k": min(settings.top_k, vocab),
        "logprobs": -1 if settings.logprobs is None else settings.logprobs,
        "adapter": adapter,
    }
    parts = []
    for name, (_, dtype) in _sent(sizes).items():
        x = np.atleast_1d(np.asarray(fields[name], dtype))
        parts.append(x.view(np.int32))
    return np.concatenate(parts)


def _sent(sizes: Sizes) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the fields of a row that the host sends, in the order of the vector."""
    kept = ("written", "token", "step", "on", "broken")
    sent = {name: value for name, value in _shapes(sizes).items() if name not in kept}
    return sent | {"history": ((sizes.words,), np.dtype(np.int32))}


def length(sizes: Sizes) -> int:
    """Return the length of the vector that `entry` makes."""
    return sum(int(np.prod(shape)) for shape, _ in _sent(sizes).values())


def _filled(values: object, length: int, rest: float) -> np.ndarray:
    """Fill a list of numbers up to a length."""
    x = np.asarray(values)
    return np.concatenate([x, np.full(length - len(x), rest)])


def bits(ids: Int[np.ndarray, " n"], vocab: int) -> Int32[np.ndarray, " words"]:
    """Make a mask with a bit for each id: bit i % 32 of word i // 32 is 1 for id i."""
    flags = np.zeros(-(-vocab // 32) * 32, bool)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


def unpacked(mask: Int[Array, "n words"], vocab: int) -> Bool[Array, "n V"]:
    """Unpack masks of ids to a bool for each id."""
    place = jnp.arange(32, dtype=jnp.int32)

    def piece(words: jax.Array) -> jax.Array:
        return ((words[:, :, None] >> place) & 1).reshape(len(words), -1)

    # Piece by piece, as a TPU fills the axis of 32 up to 128.
    pieces = [piece(mask[:, i : i + _WORDS]) for i in range(0, mask.shape[1], _WORDS)]
    return jnp.concatenate(pieces, axis=1)[:, :vocab] != 0


def specs() -> Rows:
    """Return the partitioning of each field, for `jax.shard_map`: rows over the batch axes."""
    sizes = Sizes(1, 1, 1, 1)
    fields = {
        name: sharding.spec("B" + "X" * len(shape)) for name, (shape, _) in _shapes(sizes).items()
    }
    return Rows(**fields)  # type: ignore[arg-type]  # partitionings in the place of arrays


@functools.partial(jax.jit, static_argnames="sizes", donate_argnames="rows")
def admit(rows: Rows, row: Int32[Array, ""], *, vector: Int32[Array, " all"], sizes: Sizes) -> Rows:
    """Write a request into a row, which is off until the last chunk of its prompt has run.

    row: the number of the row.
    vector: the result of `entry`.
    """

    @jax.shard_map(out_specs=specs(), check_vma=False)
    def local(rows: Rows, row: jax.Array, vector: jax.Array) -> Rows:
        fields: dict[str, jax.Array] = {}
        at = 0
        for name, (shape, dtype) in _sent(sizes).items():
            length = int(np.prod(shape))
            part = vector[at : at + length]
            fields[name] = jax.lax.bitcast_convert_type(part, dtype).reshape(shape)
            at += length
        fields["history"] = unpacked(fields["history"][None], sizes.vocab)[0].astype(jnp.int32)
        for name in ("written", "token", "step"):
            fields[name] = jnp.int32(0)
        fields["on"] = fields["broken"] = jnp.bool_(False)
        here = _place(row, len(rows.on))
        new = {
            name: getattr(rows, name).at[here].set(value, mode="drop")
            for name, value in fields.items()
        }
        return Rows(**new)

    return local(rows, row, vector)


@functools.partial(jax.jit, donate_argnames="rows")
def set_masks(
    rows: Rows, which: Int32[Array, " n"] | np.ndarray, *, masks: Int32[Array, "n words"]
) -> Rows:
    """Write the masks of ids of some rows.

    which: the numbers of the rows; R for entries that are not used.
    """

    @jax.shard_map(out_specs=specs().mask, check_vma=False)
    def local(mask: jax.Array, which: jax.Array, masks: jax.Array) -> jax.Array:
        return mask.at[_place(which, len(mask))].set(masks, mode="drop")

    return dataclasses.replace(rows, mask=local(rows.mask, jnp.asarray(which), masks))


def _place(row: jax.Array, share: int) -> jax.Array:
    """Return the place of a row among this device's `share` rows, or `share` if it is elsewhere."""
    place = row - moves.part_of_batch() * share
    return jnp.where((place >= 0) & (place < share), place, share)
