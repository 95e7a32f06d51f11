"""The choice of next tokens: what a batch of sequences has come to, and the rules that it follows.

Every device chooses for some sequences of the batch, with all their logits, so the tokens do not
depend on the mesh. Nothing here knows of a decoder.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from qwen_jax.decoding import sampling
from qwen_jax.decoding.sampling import Sampler
from qwen_jax.meshes import moves, sharding


@struct.dataclass
class Rules:
    """The token ids that may be generated, and the stops that end a sequence of a batch.

    allowed: bool [V], True for ids that may be generated.
    stops: int32 [n, M], the ids of each stop, filled up on the left with -1.
    pad: int32 [], the token id written after a sequence has ended.
    """

    allowed: Bool[Array, " V"]
    stops: Int32[Array, "n M"]
    pad: Int32[Array, ""]


@struct.dataclass
class DecodeState:
    """The state of a batch between two decode steps, beside its KV cache.

    frequencies: float32 [B, H/2], the RoPE frequencies of each sequence.
    token: int32 [B], the last chosen tokens, not yet fed to the decoder.
    seen: bool [B', V], the ids that each sequence contains; B' >= B, as `unseen` says.
    recent: int32 [B, M], the last M new tokens of each sequence, as many as the longest stop has.
    done: bool [B], whether a sequence has ended.
    fault: int32 [B], 0, or the code in `sampling.FAULTS` that ended the sequence.
    seeds: uint32 [B], the sampling seed of each sequence.
    step: int32 [], the number of tokens chosen so far.
    """

    frequencies: Float[Array, "B pairs"]
    token: Int32[Array, " B"]
    seen: Bool[Array, "padded V"]
    recent: Int32[Array, "B M"]
    done: Bool[Array, " B"]
    fault: Int32[Array, " B"]
    seeds: UInt32[Array, " B"]
    step: Int32[Array, ""]


def make_rules(
    allowed: Bool[np.ndarray, " V"], stops: Sequence[Sequence[int]], *, pad: int
) -> Rules:
    """Make `Rules` from a bool array [V], stops as id sequences (none empty), and the pad id."""
    longest = max((len(stop) for stop in stops), default=1)
    table = np.full((len(stops), longest), -1, np.int32)
    for row, stop in zip(table, stops, strict=True):
        row[longest - len(stop) :] = stop
    return Rules(jnp.asarray(allowed), jnp.asarray(table), jnp.int32(pad))


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
        """Choose each sequence's token and fault, and mark the token in `seen`.

        Every device draws for some sequences and holds all their logits, so results do not depend
        on the mesh.
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


def unseen(batch: int, vocab_size: int) -> Bool[Array, "padded V"]:
    """Make the array that marks the ids that each sequence contains, bool [B', V], all False.

    Its first axis is split over all devices, as the sampler takes it; B' is B rounded up to fit.
    """
    shape = (sharding.padded_rows(batch), vocab_size)
    return jnp.zeros(shape, bool, out_sharding=sharding.rows_spec(2))


@functools.partial(jax.jit, donate_argnames="seen")
def mark(
    seen: Bool[Array, "padded V"], tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"]
) -> Bool[Array, "padded V"]:
    """Mark the tokens of a prompt chunk, int32 [B, T], in `seen`, except padding (segment 0)."""

    @jax.shard_map(out_specs=sharding.rows_spec(2), check_vma=False)
    def local(seen: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        ids = moves.own_rows(jnp.where(segments > 0, tokens, seen.shape[1]))
        return seen.at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")

    return local(seen, tokens, segments)
