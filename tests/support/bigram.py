"""The loss of a bigram model on a text: the baseline that a trained model has to beat."""

from collections.abc import Sequence

import numpy as np


def held_out_loss(train: Sequence[np.ndarray], held_out: Sequence[np.ndarray], size: int) -> float:
    """The mean loss in nats of every token in `held_out` but the first of each document.

    train, held_out: token ids of documents; size: of the vocabulary. The model counts pairs with
        absolute discounting, backed off to single tokens (Ney, Essen and Kneser, 1994), with the
        discount that is best on the held-out tokens themselves.
    """
    single = np.full(size, 0.01)
    pairs = np.zeros((size, size))
    for ids in train:
        np.add.at(single, ids[1:], 1)
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    single /= single.sum()
    seen, kinds = pairs.sum(1), (pairs > 0).sum(1)
    before = np.concatenate([ids[:-1] for ids in held_out])
    after = np.concatenate([ids[1:] for ids in held_out])

    def loss(discount: float) -> float:
        total = np.maximum(seen[before], 1)
        rest = np.where(seen[before] > 0, discount * kinds[before] / total, 1)
        pair = np.maximum(pairs[before, after] - discount, 0) / total
        return float(-np.log(pair + rest * single[after]).mean())

    return min(map(loss, np.linspace(0.3, 0.95, 14)))
