"""Generation on the devices, from prompts to new tokens: chunked prefill and the decode loop.

Prompts are left-padded, so that all sequences of a batch end together. A prompt runs in chunks of a
few fixed lengths (`buckets`), a few blocks at a time through one compiled program. Decoding is one
program that loops over tokens until every sequence has ended, so nothing is traced again as they
grow. Nothing here knows of text or files.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, UInt

from qwen_jax import model
from qwen_jax.attention import Attend
from qwen_jax.attention import cache as kv
from qwen_jax.attention.cache import Cache
from qwen_jax.decoding import choosing, sampling
from qwen_jax.decoding.choosing import DecodeState, Rules
from qwen_jax.decoding.sampling import Sampler
from qwen_jax.leaves.weights import Leaf, Weight
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import Decoder, running
from qwen_jax.model.running import Structure

_SHORTEST = 32  # tokens in the smallest prefill bucket
STRIDE = 32  # the most tokens that one call of the decode program generates


# The cache, the state, tokens int32 [B, STRIDE] and the number of them, in the decode loop.
Carry = tuple[Cache, DecodeState, Int32[Array, "B n"], Int32[Array, ""]]


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
    tokens: Int[np.ndarray, "B T"],
    *,
    lengths: Int[np.ndarray, " B"],
    frequencies: Float[np.ndarray, "B pairs"],
    seeds: UInt[np.ndarray, " B"],
    rules: Rules,
    sampler: Sampler,
    new: int,
    attend: Attend,
    cache_dtype: str | None = None,
) -> tuple[DecodeState, Cache]:
    """Run left-padded prompts through the decoder, and choose the first new token of each.

    Returns the state with these tokens, and the KV cache with the prompts' keys and values.

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
        frequencies=rates,
        token=moves.place(np.zeros(batch, np.int32), "B"),
        seen=choosing.unseen(batch, decoder.config.vocab_size),
        recent=moves.place(np.full((batch, rules.stops.shape[1]), -1, np.int32), "BT"),
        done=moves.place(np.zeros(batch, bool), "B"),
        fault=moves.place(np.zeros(batch, np.int32), "B"),
        seeds=moves.place(seeds.astype(np.uint32), "B"),
        step=jnp.int32(0),
    )
    groups = running.grouped(decoder.layers)
    last, seen = None, state.seen
    for end, length in zip(np.cumsum(chunks), chunks, strict=True):
        chunk = moves.place(padded[:, end - length : end], "BT")
        x = decoder.embed(chunk)
        places, segments = positions(cache.start, cache.index, length=length)
        output = decoder(
            x,
            places,
            segments=segments,
            frequencies=rates,
            cache=cache,
            attend=attend,
            groups=groups,
        )
        assert output.cache is not None
        cache, last = output.cache, output.last
        seen = choosing.mark(seen, chunk, segments=segments)
    assert last is not None  # a plan has at least one chunk
    state = dataclasses.replace(state, seen=seen)
    state = _first(decoder.unembedding, last, state=state, rules=rules, sampler=sampler)
    return state, cache


def decode(
    decoder: Decoder,
    state: DecodeState,
    *,
    cache: Cache,
    sampler: Sampler,
    rules: Rules,
    attend: Attend,
    new: int,
    at_once: int = STRIDE,
) -> Iterator[Int32[np.ndarray, "B n"]]:
    """Yield new tokens as they are generated, `new` in all for each sequence.

    The first array is int32 [B, 1], the tokens that `prefill` chose; later arrays are int32 [B, n],
    n at most `at_once`. Ends early when every sequence has met a stop. `state` and `cache` are the
    results of `prefill`, and are donated.

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
            state, cache, report = run_stride(
                leaves,
                state,
                cache=cache,
                sampler=sampler,
                rules=rules,
                limit=np.int32(limit),
                tree=tree,
                attend=attend,
            )
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


@functools.partial(jax.jit, static_argnames=("tree", "attend"), donate_argnames=("state", "cache"))
def run_stride(
    leaves: list[jax.Array],
    state: DecodeState,
    *,
    cache: Cache,
    sampler: Sampler,
    rules: Rules,
    limit: Int32[Array, ""] | np.int32,
    tree: Structure[Decoder],
    attend: Attend,
) -> tuple[DecodeState, Cache, Int32[Array, "B columns"]]:
    """Decode up to `limit` tokens, at most STRIDE, with a flattened decoder (`leaves` and `tree`).

    Returns the new state and cache, and int32 [B, STRIDE + 3]: tokens, their number, `done` and
    `fault`.
    """
    decoder = tree.unflatten(leaves)
    tokens = jnp.broadcast_to(rules.pad, (state.token.shape[0], STRIDE))
    tokens = jax.reshard(tokens, sharding.spec("BT"))

    def going(carry: Carry) -> Bool[Array, ""]:
        _, state, _, written = carry
        wanted, faulty = jnp.any(jnp.stack([~state.done, state.fault > 0]), axis=1)
        return (written < limit) & wanted & ~faulty

    def step(carry: Carry) -> Carry:
        cache, state, tokens, written = carry
        places, segments = positions(cache.start, cache.index, length=1)
        x = decoder.embed(state.token[:, None])
        output = decoder(
            x, places, segments=segments, frequencies=state.frequencies, cache=cache, attend=attend
        )
        assert output.cache is not None
        state = choosing.choose(
            decoder.logits(output.last)[:, 0], state, rules=rules, sampler=sampler
        )
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (np.int32(0), written))
        return output.cache, state, tokens, written + 1

    start = cache, state, tokens, jnp.int32(0)
    cache, state, tokens, written = jax.lax.while_loop(going, step, start)
    return state, cache, _report(tokens, written, done=state.done, fault=state.fault)


@jax.jit
def _report(
    tokens: Int32[Array, "B n"],
    written: Int32[Array, ""] | np.int32,
    *,
    done: Bool[Array, " B"],
    fault: Int32[Array, " B"],
) -> Int32[Array, "B columns"]:
    """Join the results of a stride in one replicated array for the host, int32 [B, n + 3].

    The columns are the tokens [B, n], the number of tokens written, `done` and `fault`.
    """
    rows = jax.reshard(jnp.broadcast_to(written, done.shape), sharding.spec("B"))
    columns = jnp.stack([rows, done.astype(jnp.int32), fault], axis=1)
    return jax.reshard(jnp.concatenate([tokens, columns], axis=1), P(None, None))


@jax.jit
def _first(
    head: Weight | Leaf,
    last: Float[Array, "B T D"],
    *,
    state: DecodeState,
    rules: Rules,
    sampler: Sampler,
) -> DecodeState:
    """Choose the first new tokens from the prefill's last hidden states, [B, T, D]."""
    return choosing.choose(
        model.logits(last[:, -1:], head)[:, 0], state, rules=rules, sampler=sampler
    )


@functools.partial(jax.jit, static_argnames="length")
def positions(
    start: Int[Array, " B"], index: Int[Array, ""] | int, *, length: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Return positions and segments of the next tokens, int32 [B, length]; segment 0 is padding.

    The cache slot of each sequence's first token is `start`, and of the next token `index`.
    """
    places = index + jnp.arange(length, dtype=jnp.int32) - start[:, None]
    return places, (places >= 0).astype(jnp.int32)
