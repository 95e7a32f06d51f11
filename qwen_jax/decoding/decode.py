"""Generation on the devices, from prompts to new tokens: chunked prefill and the decode loop.

Prompts are left-padded, so that all sequences of a batch end together. A prompt runs in chunks of a
few fixed lengths (`buckets`), a few blocks at a time through one compiled program. Decoding is one
program that loops over tokens until every sequence has ended, so nothing is traced again as they
grow. Nothing here knows of text or files.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import model
from qwen_jax.attention import Attend
from qwen_jax.attention import cache as kv
from qwen_jax.attention.cache import Cache
from qwen_jax.decoding import sampling
from qwen_jax.decoding.sampling import Sampler
from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import Decoder, running

_SHORTEST = 32  # tokens in the smallest prefill bucket
STRIDE = 32  # the most tokens that one call of the decode program generates


@struct.dataclass
class Rules:
    """The token ids that may be generated, and the stops that end a sequence of a batch.

    allowed: bool [V], True for ids that may be generated.
    stops: int32 [n, M], the ids of each stop, filled up on the left with -1.
    pad: int32 [], the token id written after a sequence has ended.
    """

    allowed: jax.Array
    stops: jax.Array
    pad: jax.Array


@struct.dataclass
class DecodeState:
    """The state of a batch between two decode steps.

    cache: the KV cache.
    frequencies: float32 [B, H/2], the RoPE frequencies of each sequence.
    token: int32 [B], the last chosen tokens, not yet fed to the decoder.
    seen: bool [B', V], the ids that each sequence contains; B' >= B, as `unseen` says.
    recent: int32 [B, M], the last M new tokens of each sequence, as many as the longest stop has.
    done: bool [B], whether a sequence has ended.
    fault: int32 [B], 0, or the code in `sampling.FAULTS` that ended the sequence.
    seeds: uint32 [B], the sampling seed of each sequence.
    step: int32 [], the number of tokens chosen so far.
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


def make_rules(allowed: np.ndarray, stops: Sequence[Sequence[int]], *, pad: int) -> Rules:
    """Make `Rules` from a bool array [V], stops as id sequences (none empty), and the pad id."""
    longest = max((len(stop) for stop in stops), default=1)
    table = np.full((len(stops), longest), -1, np.int32)
    for row, stop in zip(table, stops, strict=True):
        row[longest - len(stop) :] = stop
    return Rules(jnp.asarray(allowed), jnp.asarray(table), jnp.int32(pad))


def buckets() -> list[int]:
    """Return the lengths in tokens that a prefill chunk can have, in ascending order."""
    longest = 512 if jax.default_backend() == "cpu" else 2048
    return [_SHORTEST * 2**i for i in range((longest // _SHORTEST).bit_length())]


def plan(prompt: int, new: int) -> tuple[list[int], int]:
    """Return the chunk lengths for `prompt` tokens, and the slots to cache these and `new` more.

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
    *,
    lengths: np.ndarray,
    frequencies: np.ndarray,
    seeds: np.ndarray,
    rules: Rules,
    sampler: Sampler,
    new: int,
    attend: Attend,
    cache_dtype: str | None = None,
) -> DecodeState:
    """Run left-padded prompts through the decoder, and choose the first new token of each.

    tokens, lengths: int [B, T], and the number of real tokens in each sequence, [B].
    frequencies, seeds: each sequence's RoPE frequencies [B, H/2] and sampling seed [B].
    new: the number of tokens to generate in all, the first included. It sizes the cache.
    cache_dtype: "int8" or "int8_asymmetric" for an 8-bit KV cache; None for the decoder's dtype.
    """
    chunks, capacity = plan(int(lengths.max()), new)
    total, (batch, width) = sum(chunks), tokens.shape
    padded = np.zeros((batch, total), np.int32)
    kept = min(width, total)
    padded[:, total - kept :] = tokens[:, width - kept :]
    start = moves.place((total - lengths).astype(np.int32), "B")
    rates = moves.place(frequencies.astype(np.float32), "BH")
    dtype = decoder.embedding[...].dtype
    cache = kv.empty(decoder.config, start, capacity=capacity, dtype=dtype, kind=cache_dtype)
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
    grouped = decoder.replace(layers=running.grouped(decoder.layers))
    last, seen = None, state.seen
    for end, length in zip(np.cumsum(chunks), chunks, strict=True):
        chunk = moves.place(padded[:, end - length : end], "BT")
        x = decoder.embed(chunk)
        places, segments = positions(cache.start, cache.index, chunk.shape[1])
        output = grouped(
            x, places, segments=segments, frequencies=rates, cache=cache, attend=attend
        )
        cache, last = output.cache or cache, output.last
        seen = _mark(seen, chunk, segments=segments)
    assert last is not None  # a plan has at least one chunk
    # Without the cache, whose leaves would only pass through.
    state = dataclasses.replace(state, cache=None, seen=seen)  # type: ignore[arg-type]
    state = _first(decoder.unembedding, last, state=state, rules=rules, sampler=sampler)
    return dataclasses.replace(state, cache=cache)


def decode(
    decoder: Decoder,
    state: DecodeState,
    *,
    sampler: Sampler,
    rules: Rules,
    attend: Attend,
    new: int,
    at_once: int = STRIDE,
) -> Iterator[np.ndarray]:
    """Yield new tokens as they are generated, `new` in all for each sequence.

    The first array is int32 [B, 1], the tokens that `prefill` chose; later arrays are int32 [B, n],
    n at most `at_once`. Ends early when every sequence has met a stop. `state` is donated.

    The device works one stride ahead of the host, which fetches and uses the tokens of one stride
    while the next one runs; if every sequence has ended, the next stride does nothing. Raises
    ValueError if no token can be chosen for a sequence, after yielding all earlier tokens.
    """
    leaves, tree = jax.tree.flatten(decoder)  # once: a module of 80 layers takes 1.5 ms
    chosen = _report(state.token[:, None], np.int32(1), done=state.done, fault=state.fault)
    reports = collections.deque([moves.begin_fetch(chosen)])
    new, made = new - 1, 0
    while True:
        # The loop starts after the first token was yielded, which would otherwise wait for the
        # loop to compile.
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
    sampler: Sampler,
    rules: Rules,
    limit: jax.Array,
    tree: Any,
    attend: Attend,
) -> tuple[DecodeState, jax.Array]:
    """Decode up to `limit` tokens, at most STRIDE, with a flattened decoder (`leaves` and `tree`).

    Returns the new state, and int32 [B, STRIDE + 3]: tokens, their number, `done` and `fault`.
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
        state = choose(decoder.logits(output.last)[:, 0], state, rules=rules, sampler=sampler)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, written))
        return state, tokens, written + 1

    state, tokens, written = jax.lax.while_loop(going, step, (state, tokens, jnp.int32(0)))
    return state, _report(tokens, written, done=state.done, fault=state.fault)


@jax.jit
def _report(
    tokens: jax.Array, written: jax.Array, *, done: jax.Array, fault: jax.Array
) -> jax.Array:
    """Join the results of a stride in one replicated array for the host, int32 [B, n + 3].

    The columns are the tokens [B, n], the number of tokens written, `done` and `fault`.
    """
    rows = jax.reshard(jnp.broadcast_to(written, done.shape), sharding.spec("B"))
    columns = jnp.stack([rows, done.astype(jnp.int32), fault], axis=1)
    return jax.reshard(jnp.concatenate([tokens, columns], axis=1), P(None, None))


@jax.jit
def _first(
    head: Weight, last: jax.Array, *, state: DecodeState, rules: Rules, sampler: Sampler
) -> DecodeState:
    """Choose the first new tokens from the prefill's last hidden states, [B, T, D]."""
    return choose(model.logits(last[:, -1:], head)[:, 0], state, rules=rules, sampler=sampler)


def choose(
    logits: Float[Array, "B V"], state: DecodeState, *, rules: Rules, sampler: Sampler
) -> DecodeState:
    """Choose the next token of each sequence from logits [B, V], or `pad` if it has ended.

    Returns the state with these tokens, in which the sequences that they end are marked as done.
    """
    rows = sharding.spec("BT")

    @jax.shard_map(out_specs=(rows, sharding.rows_spec(2)), check_vma=False)
    def drawn(
        logits: jax.Array,
        seen: jax.Array,
        seeds: jax.Array,
        step: jax.Array,
        allowed: jax.Array,
        sampler: Sampler,
    ) -> tuple[jax.Array, jax.Array]:
        """Choose each sequence's token and fault, and mark the token in `seen`. Every device draws
        for some sequences and holds all their logits, so results do not depend on the mesh.
        """
        count, seeds = len(seeds), moves.own_rows(seeds)
        logits = jnp.where(allowed, moves.whole_rows(logits), -jnp.inf)
        token = sampler(logits, seen, seeds=seeds, step=step)
        both = jnp.stack([token, sampling.faults(sampler, logits, seen=seen)], axis=1)
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
def positions(
    start: Int[Array, " B"], index: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Return positions and segments of the next tokens, int32 [B, length]; segment 0 is padding.
    The cache slot of each sequence's first token is `start`, and of the next token `index`.
    """
    places = index + jnp.arange(length, dtype=jnp.int32) - start[:, None]
    return places, (places >= 0).astype(jnp.int32)


def unseen(batch: int, vocab_size: int) -> jax.Array:
    """Make the array that marks the ids that each sequence contains, bool [B', V], all False.

    Its first axis is split over all devices, as the sampler takes it; B' is B rounded up to fit.
    """
    shape = (sharding.padded_rows(batch), vocab_size)
    return jnp.zeros(shape, bool, out_sharding=sharding.rows_spec(2))


@functools.partial(jax.jit, donate_argnames="seen")
def _mark(seen: jax.Array, tokens: jax.Array, *, segments: jax.Array) -> jax.Array:
    """Mark the tokens of a prompt chunk, int32 [B, T], in `seen`, except padding (segment 0)."""

    @jax.shard_map(out_specs=sharding.rows_spec(2), check_vma=False)
    def local(seen: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        ids = moves.own_rows(jnp.where(segments > 0, tokens, seen.shape[1]))
        return seen.at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")

    return local(seen, tokens, segments)
