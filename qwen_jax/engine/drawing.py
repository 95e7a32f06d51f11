"""The choice of the rows' next tokens, by the settings of each row.

It is `decoding.sampling` with numbers that differ by row, and more of them. Each row has all its
logits, and no row's numbers have a part in another's token: filters that some row needs run for
all, and leave the others unchanged to the bit.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from qwen_jax.decoding import sampling
from qwen_jax.engine.rows import Rows, unpacked
from qwen_jax.engine.settings import MOST_LOGPROBS
from qwen_jax.meshes import moves, sharding

# Why a row is done with its last token, in the second column of `choose`'s result.
GOES_ON, STOP, LIMIT, BROKEN, EMPTY, NOTHING = range(6)
FAULTS = {BROKEN: sampling.FAULTS[1], EMPTY: sampling.FAULTS[2]}
_BLOCK = 8  # rows whose scores are held at once: those of a tile of a TPU
COLUMNS = 3 + 2 * MOST_LOGPROBS  # the columns of `choose`'s result


def choose(
    logits: Float[Array, "B V"],
    rows: Rows,
    *,
    forced: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[Rows, Int32[Array, "B line"]]:
    """Choose the next tokens of rows, and move the rows on by them.

    forced: the tokens that take the place of the chosen ones; -1 for none.
    active: the rows that choose at all.

    Returns the rows, and a line for each on every device: the token, one of the codes above, and
    the bits of the token's float32 log-probability; then the ids of the most likely tokens, and the
    bits of their log-probabilities, all 0 where the row asks for none.
    """
    line = sharding.spec("BT")

    @jax.shard_map(out_specs=(line, sharding.spec("BX")), check_vma=False)
    def local(
        logits: jax.Array, rows: Rows, forced: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        count = len(forced)
        mine = jax.tree.map(moves.own_rows, rows)
        whole = moves.whole_rows(logits)
        lines = _by_blocks(whole, mine, forced=moves.own_rows(forced))
        lines = moves.all_rows(lines, count)
        # Every device of `tp` has the whole history, of which it reads its own rows.
        token = lines[:, 0]
        add = jnp.where(active, 2, 0)
        return lines, rows.history.at[jnp.arange(count), token].add(add)

    lines, history = local(logits, rows, forced, active)
    token, step = lines[:, 0], rows.step + active
    stopped = jnp.any(rows.stops == token[:, None], axis=1)
    code = jnp.where(stopped, STOP, jnp.where(step >= rows.limit, LIMIT, GOES_ON))
    code = jnp.where(lines[:, 1] > 0, lines[:, 1], code)
    code = jnp.where(rows.broken, BROKEN, code)
    code = jnp.where(active, code, NOTHING)
    lines = jnp.concatenate([token[:, None], code[:, None], lines[:, 2:]], axis=1)
    rows = dataclasses.replace(
        rows,
        token=jnp.where(active, token, rows.token),
        step=step,
        on=rows.on & ~(active & (code != GOES_ON)),
        history=history,
    )
    return rows, jax.reshard(lines, P(None, None))


def _by_blocks(logits: jax.Array, rows: Rows, *, forced: jax.Array) -> jax.Array:
    """Choose the tokens of this device's rows as `_drawn` does, `_BLOCK` rows after another.

    A row's scores are as large as its logits, and several copies of them are there at a time.
    """
    count = len(forced)
    block = math.gcd(count, _BLOCK)
    if block == count:
        return _drawn(logits, rows, forced=forced)

    leaves, tree = jax.tree.flatten((logits, rows, forced))
    blocks = [x.reshape(count // block, block, *x.shape[1:]) for x in leaves]

    def one(some: list[jax.Array]) -> jax.Array:
        logits, rows, forced = tree.unflatten(some)
        return _drawn(logits, rows, forced=forced)

    lines = jax.lax.map(one, blocks)
    return lines.reshape(count, -1)


def _drawn(logits: jax.Array, rows: Rows, *, forced: jax.Array) -> jax.Array:
    """Choose the tokens of this device's rows. Returns the lines of `choose`, faults as codes."""
    scores = _penalised(logits, rows)
    broken = jnp.any(~(scores < jnp.inf), axis=-1)  # also True for NaN
    empty = ~jnp.any(scores > -jnp.inf, axis=-1)
    hot = rows.temperature > 0

    def sampled(scores: jax.Array) -> jax.Array:
        kept = _kept(scores, rows)
        return kept + sampling.noise(rows.seed, rows.step, size=scores.shape[1])

    drawn = _where(hot, sampled, scores=scores)
    token = jnp.argmax(drawn, axis=-1).astype(jnp.int32)
    token = jnp.where(forced >= 0, forced, token)
    fault = jnp.where(broken, BROKEN, jnp.where(empty, EMPTY, 0)).astype(jnp.int32)
    return jnp.concatenate(
        [token[:, None], fault[:, None], likelihoods(logits, token, wanted=rows.logprobs)], axis=1
    )


def likelihoods(
    logits: Float[Array, "n V"], token: Int[Array, " n"], *, wanted: Int[Array, " n"]
) -> Int32[Array, "n columns"]:
    """Compute log-probabilities of tokens, and the most likely tokens with theirs.

    wanted: -1 for rows that ask for none; nothing is computed if no row asks for any.

    Returns int32 [n, 1 + 2 MOST_LOGPROBS]: the bits of the token's float32 log-probability, ids,
    and the bits of their log-probabilities.
    """
    most = min(MOST_LOGPROBS, logits.shape[1])

    def compute(logits: jax.Array) -> jax.Array:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, token[:, None], axis=1) - total
        top, ids = jax.lax.top_k(logits, most)
        pad = ((0, 0), (0, MOST_LOGPROBS - most))
        ids = jnp.pad(ids.astype(jnp.int32), pad)
        found = jnp.concatenate([own, jnp.pad(top - total, pad)], axis=1)
        found = jax.lax.bitcast_convert_type(found, jnp.int32)
        return jnp.concatenate([found[:, :1], ids, found[:, 1:]], axis=1)

    nothing = jnp.zeros((len(logits), 1 + 2 * MOST_LOGPROBS), jnp.int32)
    found = jax.lax.cond(jnp.any(wanted >= 0), compute, lambda _: nothing, logits)
    return jnp.where(wanted[:, None] >= 0, found, 0)


def _penalised(logits: jax.Array, rows: Rows) -> jax.Array:
    """Return the logits of a greedy choice: what may be chosen, with biases and penalties."""
    count, vocab = logits.shape
    each = jnp.arange(count)[:, None]
    scores = jnp.where(unpacked(rows.mask, vocab), logits, -jnp.inf)
    scores = scores.at[each, rows.bias_ids].add(rows.biases, mode="drop")
    chosen = rows.history >> 1
    scores = sampling.penalise(scores, rows.history > 0, penalty=rows.repetition[:, None])
    scores = scores - rows.presence[:, None] * (chosen > 0)
    scores = scores - rows.frequency[:, None] * chosen
    early = jnp.where((rows.step < rows.least)[:, None], rows.stops, vocab)
    return scores.at[each, early].set(-jnp.inf, mode="drop")


def _kept(scores: jax.Array, rows: Rows) -> jax.Array:
    """Return the logits of the distribution that is drawn from; -inf for what is cut off."""
    scores = sampling.divide(scores, jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None])

    def most_likely(scores: jax.Array) -> jax.Array:
        ones = (scores >= -jnp.inf).astype(jnp.float32)
        return sampling.keep_largest(scores, ones, target=rows.top_k[:, None].astype(jnp.float32))

    def nucleus(scores: jax.Array) -> jax.Array:
        mass = jnp.maximum(rows.top_p, 1e-30)[:, None]  # 0 keeps the most likely token
        return sampling.keep_largest(scores, jax.nn.softmax(scores, axis=-1), target=mass)

    def not_rare(scores: jax.Array) -> jax.Array:
        least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
        return jnp.where(scores >= least, scores, -jnp.inf)

    # At top_p = 1 nothing may be cut, though a float32 sum reaches 1 before the last token.
    scores = _where(rows.top_k > 0, most_likely, scores=scores)
    scores = _where(rows.top_p < 1, nucleus, scores=scores)
    return _where(rows.min_p > 0, not_rare, scores=scores)


def _where(
    on: jax.Array, change: Callable[[jax.Array], jax.Array], *, scores: jax.Array
) -> jax.Array:
    """Apply a function to the rows where `on`; if there are none, skip its computation."""

    def some(scores: jax.Array) -> jax.Array:
        return jnp.where(on[:, None], change(scores), scores)

    return jax.lax.cond(jnp.any(on), some, lambda scores: scores, scores)
