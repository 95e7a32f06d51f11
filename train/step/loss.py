"""Computes the training loss of a batch: next-token cross-entropy in float32, over the whole mesh.

Knows no optimiser and no data format. The full logits are never in memory (`vocabulary.py`).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen_jax import meshes
from qwen_jax.attention import Attend
from qwen_jax.leaves.weights import Weight
from qwen_jax.meshes import moves, sharding
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import Decoder, rope, vocabulary
from qwen_jax.model.vocabulary import TokenScores
from train.data.batch import Batch


@struct.dataclass
class Metrics:
    """The loss and accuracy of a batch, float32 []. Metrics of a batch's parts add up.

    loss: the mean cross-entropy of the targets.
    accuracy: the weighted share of targets that are the most likely token.
    targets: the sum of the targets' weights.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    targets: Float[Array, ""]


def perplexity(entropy: float) -> float:
    """Return exp of a mean cross-entropy: NaN for NaN, and infinity beyond the largest float."""
    try:
        return math.exp(entropy)
    except OverflowError:
        return math.inf


def scores(
    decoder: Decoder,
    batch: Batch,
    *,
    frequencies: Float[Array | np.ndarray, "*B pairs"],
    attend: Attend,
    dtype: DTypeLike,
    remat: Callable[..., bool] | None = None,
    sequence_parallel: bool = False,
    dropout: Dropout | None = None,
) -> tuple[TokenScores, Float[Array, "B T"]]:
    """Score the targets of a batch by a decoder; return the scores and the targets' weights.

    decoder: with stacked or separate layers, stored in any dtype; it computes in `dtype`. Its head
        is of floats, as it is read by its rows.
    frequencies: the RoPE frequencies, [H/2] or [B, H/2].
    attend: the implementation of attention.
    remat: a policy of `jax.checkpoint_policies` for each layer; None recomputes nothing.
    sequence_parallel: whether to split the tokens of the residual stream over `tp`.
    dropout: dropout in training, or None.

    Scores and weights are float32 [B, T], in the token order of `moves.zigzag`. A token or target
    outside the vocabulary makes its weight NaN.
    """
    rows, tokens = batch.tokens.shape
    lengths = {**decoder.config.sizes, "B": rows, "T": tokens}
    meshes.check(lengths, jax.sharding.get_abstract_mesh(), sequence_parallel=sequence_parallel)
    known = [(ids >= 0) & (ids < lengths["V"]) for ids in (batch.tokens, batch.targets)]
    weights = jnp.where(known[0] & known[1], batch.weights, jnp.nan)
    batch = jax.tree.map(moves.zigzag, dataclasses.replace(batch, weights=weights))
    rates = jnp.broadcast_to(jnp.asarray(frequencies), (rows, decoder.config.head_dim // 2))
    x = decoder.embed(batch.tokens, dtype)
    if dropout is not None:
        x = dropout.of_embeddings(x)
    if sequence_parallel:
        x = moves.sequence_parallel(x)
    x = decoder(
        x,
        batch.positions,
        segments=batch.segments,
        frequencies=jax.reshard(rates, sharding.spec("BH")),
        attend=attend,
        remat=remat,
        dropout=dropout,
    ).last
    with jax.named_scope("vocabulary"):
        head = decoder.unembedding
        assert isinstance(head, Weight), "`integers.for_passes` makes floats of a head in int8"
        return vocabulary.token_scores(x, head[...], targets=batch.targets), batch.weights


def loss(
    decoder: Decoder,
    batch: Batch,
    *,
    attend: Attend,
    dtype: DTypeLike,
    remat: Callable[..., bool] | None = None,
    sequence_parallel: bool = False,
    total: Float[Array, ""] | None = None,
    z_loss: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the mean cross-entropy of a batch, with the z-loss added, and the batch's metrics.

    attend: the implementation of attention.
    dtype: the dtype to compute in.
    remat: a policy of `jax.checkpoint_policies` for each layer; None recomputes nothing.
    sequence_parallel: whether to split the tokens of the residual stream over `tp`.
    total: the sum of the weights of the whole batch, if this is one part of it.
    z_loss: the factor of the mean of log(Z)^2 in the loss, where Z is the softmax denominator
        (PaLM, arXiv 2204.02311, section 5).
    dropout: dropout in training, or None.

    RoPE scaling by length and LogN are off, as in Qwen's own training. Ids outside the vocabulary
    make the loss and every gradient NaN.
    """
    decoder = decoder.replace(config=decoder.config.in_training)
    rates = rope.from_config(decoder.config).frequencies()
    found, weights = scores(
        decoder,
        batch,
        frequencies=rates,
        attend=attend,
        dtype=dtype,
        remat=remat,
        sequence_parallel=sequence_parallel,
        dropout=dropout,
    )
    targets = jnp.sum(weights)
    share = weights / jnp.maximum(targets if total is None else total, 1)
    mean = jnp.sum(share * (found.lse - found.logit))
    right = (found.logit >= found.largest).astype(jnp.float32)
    metrics = Metrics(mean, jnp.sum(share * right), targets)
    return mean + z_loss * jnp.sum(share * jnp.square(found.lse)), metrics
