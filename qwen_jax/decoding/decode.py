"""From prompts to new tokens, on device: chunked prefill and the decode loop. No text, no files.

A pass is left-padded, so that all rows end together. The prompt runs in chunks of a few fixed
lengths (`buckets`), a few blocks at a time through one compiled program; decoding is one program, a
loop over tokens that stops when every row has, so nothing is traced again as the sequence grows.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from qwen_jax import model
from qwen_jax.attention import cache as kv
from qwen_jax.attention.cache import Cache
from qwen_jax.decoding import sampling
from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import moves, sharding
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
class DecodeState:
    """A batch between two tokens: `token` int32 [B] is chosen and not yet fed to the decoder.

    frequencies float32 [B, H/2]: each row's own RoPE; seen bool [B', V]: ids in the row, kept as
    `unseen` says; recent int32 [B, M]: its last new tokens; done bool [B]; fault int32 [B]: 0, or
    the code of `sampling.FAULTS` that ended the row; seeds uint32 [B]; step int32: tokens chosen.
    """

    cache: Cache
    frequencies: jax.Array
    token: jax.Array
    seen: jax.Array
    recent: jax.Array
    done: jax.Array
    fault: jax.Array
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
) -> DecodeState:
    """Run left-padded prompts, int [B, T] with `lengths` [B] real tokens, and choose one token.

    new: how many tokens will be asked for, this one included; it sizes the cache.
    """
    chunks, capacity = plan(int(lengths.max()), new)
    total, (batch, width) = sum(chunks), tokens.shape
    padded = np.zeros((batch, total), np.int32)
    kept = min(width, total)
    padded[:, total - kept :] = tokens[:, width - kept :]
    start = moves.place((total - lengths).astype(np.int32), "B")
    rates = moves.place(frequencies.astype(np.float32), "BH")
    dtype = decoder.embedding[...].dtype
    cache = kv.empty(decoder.config, start, capacity, dtype, cache_dtype)
    state = DecodeState(
        cache=cache,
        frequencies=rates,
        token=moves.place(np.zeros(batch, np.int32), "B"),
        seen=unseen(batch, decoder.config.vocab_size),
        recent=moves.place(np.full((batch, rules.stops.shape[1]), -1, np.int32), "BT"),
        done=moves.place(np.zeros(batch, bool), "B"),
        fault=moves.place(np.zeros(batch, np.int32), "B"),
        seeds=moves.place(seeds.astype(np.uint32), "B"),
        step=jnp.int32(0),
    )
    grouped, last, seen = decoder.grouped(), None, state.seen
    for end, length in zip(np.cumsum(chunks), chunks, strict=True):
        chunk = moves.place(padded[:, end - length : end], "BT")
        x = decoder.embed(chunk)
        places, segments = positions(cache.start, cache.index, chunk.shape[1])
        output = grouped(
            x, places, segments=segments, frequencies=rates, cache=cache, attend=attend
        )
        cache, last = output.cache or cache, output.last
        seen = _mark(seen, chunk, segments)
    assert last is not None  # a plan has at least one chunk
    # Without the cache, whose leaves would only pass through.
    state = dataclasses.replace(state, cache=None, seen=seen)  # type: ignore[arg-type]
    state = _first(decoder.output, last, state, rules, sampler)
    return dataclasses.replace(state, cache=cache)


def decode(
    decoder: Decoder,
    state: DecodeState,
    sampler: Any,
    rules: Rules,
    attend: Callable[..., Any],
    new: int,
    at_once: int = STRIDE,
) -> Iterator[np.ndarray]:
    """Yield the new tokens as they are generated, `new` for each row in all.

    First int32 [B, 1], which `prefill` chose, then int32 [B, n] with n at most `at_once`.

    Ends early when every row has met a stop. The state passed in is consumed. The device is a
    stride ahead: while the tokens of one are fetched and used, the next is under way, which does
    nothing where every row has ended. Raises ValueError for a row for which no token can be chosen,
    when all tokens before that have been handed over.
    """
    leaves, tree = jax.tree.flatten(decoder)  # once: a module of 80 layers takes 1.5 ms
    chosen = _report(state.token[:, None], np.int32(1), state.done, state.fault)
    reports = collections.deque([moves.begin_fetch(chosen)])
    new, made = new - 1, 0
    while True:
        # Nothing goes ahead of the first token, which would wait for the loop to be compiled.
        while made and new > 0 and len(reports) < 2:
            limit = min(new, at_once, STRIDE)
            state, report = run_stride(leaves, state, sampler, rules, np.int32(limit), tree, attend)
            reports.append(moves.begin_fetch(report))
            new -= limit
        if not reports:
            return
        told = np.asarray(reports.popleft())
        tokens, (written, done, fault) = told[:, :-3], told[:, -3:].T
        good = int(written[0]) - bool(fault.any())
        made += good
        if good:
            yield tokens[:, :good]
        if fault.any():
            row = int(np.flatnonzero(fault)[0])
            raise ValueError(
                f"row {row}, new token {made + 1}: {sampling.FAULTS[int(fault[row])]}, so no token "
                "can be chosen: look at the weights, their dtype and the repetition penalty"
            )
        if done.all():
            return


@functools.partial(jax.jit, static_argnames=("tree", "attend"), donate_argnames="state")
def run_stride(
    leaves: list[jax.Array],
    state: DecodeState,
    sampler: Any,
    rules: Rules,
    limit: jax.Array,
    tree: Any,
    attend: Callable[..., Any],
) -> tuple[DecodeState, jax.Array]:
    """Decode up to `limit` tokens (at most STRIDE): the state after them, and a `_report` of them.

    leaves, tree: of the decoder.
    """
    decoder: Decoder = tree.unflatten(leaves)
    tokens = jnp.broadcast_to(rules.pad, (state.token.shape[0], STRIDE))
    tokens = jax.reshard(tokens, sharding.spec("BT"))

    def going(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
        state, _, written = carry
        wanted, faulty = jnp.any(jnp.stack([~state.done, state.fault > 0]), axis=1)
        return (written < limit) & wanted & ~faulty

    def step(
        carry: tuple[DecodeState, jax.Array, jax.Array],
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        state, tokens, written = carry
        cache = state.cache
        places, segments = positions(cache.start, cache.index, 1)
        x = decoder.embed(state.token[:, None])
        output = decoder(
            x, places, segments=segments, frequencies=state.frequencies, cache=cache, attend=attend
        )
        state = dataclasses.replace(state, cache=output.cache)
        state = choose(decoder.logits(output.last)[:, 0], state, rules, sampler)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, written))
        return state, tokens, written + 1

    state, tokens, written = jax.lax.while_loop(going, step, (state, tokens, jnp.int32(0)))
    return state, _report(tokens, written, state.done, state.fault)


@jax.jit
def _report(tokens: jax.Array, written: jax.Array, done: jax.Array, fault: jax.Array) -> jax.Array:
    """What the host has to know, in one array on every device: int32 [B, n + 3], tokens [B, n], how
    many of them are written, and of each row whether it is done, and its fault.
    """
    rows = jax.reshard(jnp.broadcast_to(written, done.shape), sharding.spec("B"))
    columns = jnp.stack([rows, done.astype(jnp.int32), fault], axis=1)
    return jax.reshard(jnp.concatenate([tokens, columns], axis=1), P(None, None))


@jax.jit
def _first(
    head: Weight, last: jax.Array, state: DecodeState, rules: Rules, sampler: Any
) -> DecodeState:
    """The state after the prompt: the head alone of the decoder, the state without its cache."""
    return choose(model.logits(last[:, -1:], head)[:, 0], state, rules, sampler)


def choose(logits: jax.Array, state: DecodeState, rules: Rules, sampler: Any) -> DecodeState:
    """Append one token to every row that has not ended; `pad` to those that have."""
    rows = sharding.spec("BT")

    @jax.shard_map(out_specs=(rows, sharding.rows_spec(2)), check_vma=False)
    def drawn(
        logits: jax.Array,
        seen: jax.Array,
        seeds: jax.Array,
        step: jax.Array,
        allowed: jax.Array,
        sampler: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Each row's token and fault, and `seen` with the token. Every device draws for some rows,
        of which it has all logits: no sharding for their arithmetic to agree on.
        """
        count, seeds = len(seeds), moves.own_rows(seeds)
        logits = jnp.where(allowed, moves.whole_rows(logits), -jnp.inf)
        token = sampler(logits, seen, seeds, step)
        both = jnp.stack([token, sampling.faults(sampler, logits, seen)], axis=1)
        seen = seen | (jnp.arange(logits.shape[1]) == token[:, None])
        return moves.all_rows(both, count), seen

    both, seen = drawn(logits, state.seen, state.seeds, state.step, rules.allowed, sampler)
    fault = jnp.where(state.done, 0, both[:, 1])
    ended = state.done | (fault > 0)
    token = jnp.where(ended, rules.pad, both[:, 0])
    recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
    hit = (recent[:, None] == rules.stops) | (rules.stops < 0)  # [B, n, M]
    return dataclasses.replace(
        state,
        token=token,
        seen=seen,
        recent=recent,
        done=ended | jnp.any(jnp.all(hit, axis=-1), axis=-1),
        fault=fault,
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames="length")
def positions(start: jax.Array, index: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, int32 [B, length], of the next tokens: segment 0 is padding."""
    places = index + jnp.arange(length, dtype=jnp.int32) - start[:, None]
    return places, (places >= 0).astype(jnp.int32)


def unseen(batch: int, vocab_size: int) -> jax.Array:
    """bool [B', V], all False: which ids are in each row, partitioned as the sampler takes it, by
    rows over every device of the mesh; B' is B filled up so that it divides.
    """
    shape = (sharding.padded_rows(batch), vocab_size)
    return jnp.zeros(shape, bool, out_sharding=sharding.rows_spec(2))


@functools.partial(jax.jit, donate_argnames="seen")
def _mark(seen: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """`seen` with the tokens int32 [B, T] of a chunk, but for padding (segment 0)."""

    @jax.shard_map(out_specs=sharding.rows_spec(2), check_vma=False)
    def local(seen: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        ids = moves.own_rows(jnp.where(segments > 0, tokens, seen.shape[1]))
        return seen.at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")

    return local(seen, tokens, segments)
