"""The loss of a batch: cross-entropy of the next token, in float32, over the whole mesh.

Knows no optimiser and no data format. The logits of a batch never exist whole (`vocabulary.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import meshes
from qwen_jax.meshes import moves, sharding
from qwen_jax.meshes.dropout import Dropout
from qwen_jax.model import Decoder, rope, vocabulary
from qwen_jax.model.vocabulary import TokenScores
from train.data.batch import Batch


@struct.dataclass
class Metrics:
    """float32 scalars. loss: mean over the weighted targets; accuracy: how many of them are their
    most likely token; targets: the sum of the weights. Those of parts of a batch add up.
    """

    loss: jax.Array
    accuracy: jax.Array
    targets: jax.Array


def scores(
    decoder: Decoder,
    batch: Batch,
    *,
    frequencies: Any,
    attend: Callable[..., Any],
    dtype: Any,
    remat: Callable[..., Any] | None = None,
    sequence_parallel: bool = False,
    dropout: Dropout | None = None,
) -> tuple[TokenScores, jax.Array]:
    """What a decoder makes of each target, float32 [B, T], and the targets' weights; both in the
    order in which `moves.zigzag` puts tokens.

    decoder: stacked or not, of any storage dtype; `dtype` is what it computes in. frequencies [H/2]
    or [B, H/2]: of RoPE. remat: as `Decoder.__call__`. sequence_parallel: keep the residual split
    over `tp` by tokens. Ids beyond the vocabulary make their weight no number.
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
        return vocabulary.token_scores(x, decoder.output[...], targets=batch.targets), batch.weights


def loss(
    decoder: Decoder,
    batch: Batch,
    *,
    attend: Callable[..., Any],
    dtype: Any,
    remat: Callable[..., Any] | None = None,
    sequence_parallel: bool = False,
    total: jax.Array | None = None,
    z_loss: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, Metrics]:
    """The mean cross-entropy of a batch, and its metrics.

    As the original in training, RoPE scaling by length and LogN are off. total: the sum of all
    weights of the batch that this one is a part of. z_loss: times the mean of log(Z)^2, Z the sum
    that the softmax divides by, is added to what is minimised (PaLM, arXiv 2204.02311, section 5).
    Ids beyond the vocabulary make the loss, and every gradient, no number. The other arguments are
    those of `scores`.
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
