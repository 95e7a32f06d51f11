"""From prompts to new tokens, on device: chunked prefill and the decode loop. No text, no files.

A pass is left-padded, so that all rows end together. The prompt runs in chunks of a few fixed
lengths (`buckets`), block by block through one compiled program; decoding is one program, a loop
over tokens that stops when every row has, so nothing is traced again as the sequence grows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax import cache as kv
from qwen_jax import sharding
from qwen_jax.cache import Cache
from qwen_jax.model import Decoder

_SHORTEST = 32  # tokens of the smallest prefill bucket
STRIDE = 32  # tokens that one call into the decode program makes at most


@struct.dataclass
class Rules:
    """What may be generated and when a row ends: the same for all rows of a call.

    allowed bool [V]: ids that exist; stops int32 [n, M]: token sequences that end a row, filled up
    on the left with -1; pad int32: what follows the end of a row.
    """

    allowed: jax.Array
    stops: jax.Array
    pad: jax.Array


@struct.dataclass
class State:
    """A batch between two tokens: `token` int32 [B] is chosen and not yet fed to the decoder.

    frequencies float32 [B, H/2]: each row's own RoPE; seen bool [B, V]: ids in the row; recent
    int32 [B, M]: its last new tokens; done bool [B]; seeds uint32 [B]; step int32: tokens chosen.
    """

    cache: Cache
    frequencies: jax.Array
    token: jax.Array
    seen: jax.Array
    recent: jax.Array
    done: jax.Array
    seeds: jax.Array
    step: jax.Array


def make_rules(allowed: np.ndarray, stops: Sequence[Sequence[int]], pad: int) -> Rules:
    """Rules from host values; stops may be of different lengths, none is empty."""
    longest = max((len(stop) for stop in stops), default=1)
    table = np.full((len(stops), longest), -1, np.int32)
    for row, stop in zip(table, stops, strict=True):
        row[longest - len(stop) :] = stop
    return Rules(jnp.asarray(allowed), jnp.asarray(table), jnp.int32(pad))


def buckets() -> list[int]:
    """The lengths in which a prompt is run. Longer ones pay where a pass costs little to start."""
    longest = 512 if jax.default_backend() == "cpu" else 2048
    return [_SHORTEST * 2**i for i in range((longest // _SHORTEST).bit_length())]


def plan(prompt: int, new: int) -> tuple[list[int], int]:
    """The chunk lengths for a prompt of that many tokens, and the slots of its cache.

    The first chunk takes the remainder, left-padded to a bucket. Capacities come in quarters of a
    power of two, so that few programs serve all lengths and at most a quarter is wasted.
    """
    sizes = buckets()
    full, rest = divmod(prompt, sizes[-1])
    chunks = [next(size for size in sizes if size >= rest)] * bool(rest) + [sizes[-1]] * full
    needed = sum(chunks) + new
    step = max(256, 2 ** (needed.bit_length() - 3))
    return chunks, -(-needed // step) * step


def prefill(
    decoder: Decoder,
    tokens: np.ndarray,
    lengths: np.ndarray,
    frequencies: np.ndarray,
    seeds: np.ndarray,
    rules: Rules,
    sampler: Any,
    new: int,
    attend: Callable[..., Any],
    cache_dtype: str | None = None,
) -> State:
    """Run left-padded prompts, int [B, T] with `lengths` [B] real tokens, and choose one token.

    new: how many tokens will be asked for, this one included; it sizes the cache.
    """
    chunks, capacity = plan(int(lengths.max()), new)
    total, (batch, width) = sum(chunks), tokens.shape
    padded = np.zeros((batch, total), np.int32)
    kept = min(width, total)
    padded[:, total - kept :] = tokens[:, width - kept :]
    start = sharding.place((total - lengths).astype(np.int32), "B")
    rates = sharding.place(frequencies.astype(np.float32), "BH")
    dtype = decoder.embedding[...].dtype
    cache = kv.empty(decoder.config, start, capacity, dtype, cache_dtype)
    state = State(
        cache=cache,
        frequencies=rates,
        token=sharding.place(np.zeros(batch, np.int32), "B"),
        seen=sharding.place(_seen(padded, total - lengths, decoder.config.vocab_size), "BT"),
        recent=sharding.place(np.full((batch, rules.stops.shape[1]), -1, np.int32), "BT"),
        done=sharding.place(np.zeros(batch, bool), "B"),
        seeds=sharding.place(seeds.astype(np.uint32), "B"),
        step=jnp.int32(0),
    )
    last = None
    for end, length in zip(np.cumsum(chunks), chunks, strict=True):
        chunk = sharding.place(padded[:, end - length : end], "BT")
        x = decoder.embed(chunk)
        places, segments = positions(cache.start, cache.index, chunk.shape[1])
        output = decoder(x, places, segments, rates, cache, attend)
        cache, last = output.cache or cache, output.last[:, -1:]
    assert last is not None  # a plan has at least one chunk
    return _first(decoder, last, dataclasses.replace(state, cache=cache), rules, sampler)


def decode(
    decoder: Decoder,
    state: State,
    sampler: Any,
    rules: Rules,
    attend: Callable[..., Any],
    new: int,
    at_once: int = STRIDE,
) -> Iterator[np.ndarray]:
    """The tokens after the first: int32 [B, n] a time, n at most `at_once`, `new` in all.

    Ends early when every row has met a stop. The state passed in is consumed.
    """
    while new > 0 and not sharding.fetch(jnp.all(state.done)):
        limit = min(new, at_once, STRIDE)
        state, tokens, written = _decode(decoder, state, sampler, rules, jnp.int32(limit), attend)
        new -= limit
        yield sharding.fetch(tokens)[:, : int(sharding.fetch(written))]


@functools.partial(jax.jit, static_argnames="attend", donate_argnames="state")
def _decode(
    decoder: Decoder,
    state: State,
    sampler: Any,
    rules: Rules,
    limit: jax.Array,
    attend: Callable[..., Any],
) -> tuple[State, jax.Array, jax.Array]:
    """Up to `limit` tokens (at most STRIDE): the state, int32 [B, STRIDE], and how many."""
    tokens = jnp.broadcast_to(rules.pad, (state.token.shape[0], STRIDE))
    tokens = jax.reshard(tokens, sharding.spec("BT"))

    def going(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, written = carry
        return (written < limit) & ~jnp.all(state.done)

    def step(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, tokens, written = carry
        cache = state.cache
        places, segments = positions(cache.start, cache.index, 1)
        x = decoder.embed(state.token[:, None])
        output = decoder(x, places, segments, state.frequencies, cache, attend)
        state = dataclasses.replace(state, cache=output.cache)
        state = _choose(decoder.logits(output.last)[:, 0], state, rules, sampler)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, written))
        return state, tokens, written + 1

    return jax.lax.while_loop(going, step, (state, tokens, jnp.int32(0)))


@jax.jit
def _first(decoder: Decoder, last: jax.Array, state: State, rules: Rules, sampler: Any) -> State:
    return _choose(decoder.logits(last)[:, 0], state, rules, sampler)


def _choose(logits: jax.Array, state: State, rules: Rules, sampler: Any) -> State:
    """Append one token to every row that has not ended; `pad` to those that have."""
    # Samplers see whole rows, on every device: no sharding for their arithmetic to agree on.
    logits = jnp.where(rules.allowed, jax.reshard(logits, P(None, None)), -jnp.inf)
    seen, seeds = jax.reshard(state.seen, P(None, None)), jax.reshard(state.seeds, P(None))
    token = jax.reshard(sampler(logits, seen, seeds, state.step), sharding.spec("B"))
    token = jnp.where(state.done, rules.pad, token)
    seen = state.seen | (jnp.arange(logits.shape[1]) == token[:, None])
    last = [jax.reshard(x, P(None, None)) for x in (state.recent[:, 1:], token[:, None])]
    recent = jax.reshard(jnp.concatenate(last, axis=1), sharding.spec("BT"))
    hit = (recent[:, None] == rules.stops) | (rules.stops < 0)  # [B, n, M]
    done = state.done | jnp.any(jnp.all(hit, axis=-1), axis=-1)
    step = state.step + 1
    return dataclasses.replace(state, token=token, seen=seen, recent=recent, done=done, step=step)


@functools.partial(jax.jit, static_argnames="length")
def positions(start: jax.Array, index: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, int32 [B, length], of the next tokens: segment 0 is padding."""
    places = index + jnp.arange(length, dtype=jnp.int32) - start[:, None]
    return places, (places >= 0).astype(jnp.int32)


def _seen(tokens: np.ndarray, start: np.ndarray, vocab_size: int) -> np.ndarray:
    """bool [B, V]: the ids of each row, padding left out."""
    seen = np.zeros((len(tokens), vocab_size), bool)
    for row, ids, first in zip(seen, tokens, start, strict=True):
        row[ids[first:]] = True
    return seen
