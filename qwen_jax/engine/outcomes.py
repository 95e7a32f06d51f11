"""Reads the lines of integers that a step's programs return for each row (`drawing.choose`)."""

import numpy as np
from jaxtyping import Int32

from qwen_jax.engine import drawing
from qwen_jax.engine.settings import MOST_LOGPROBS, Choice


def choice(line: Int32[np.ndarray, " line"], wanted: int | None) -> Choice:
    """Return the token of a line, with its log-probability if one was asked for.

    wanted: the number of alternatives; None for no log-probabilities.
    """
    if wanted is None:
        return Choice(int(line[0]))
    return likely(int(line[0]), line[2:], wanted=wanted)


def likely(token: int, columns: Int32[np.ndarray, " columns"], *, wanted: int) -> Choice:
    """Return a token with its log-probability.

    columns: of `drawing.likelihoods`.
    wanted: the number of alternatives.
    """
    own, ids = columns[:1], columns[1 : 1 + wanted]
    logprobs = columns[1 + MOST_LOGPROBS :][:wanted]
    top = zip(ids.tolist(), logprobs.view(np.float32).tolist(), strict=True)
    return Choice(token, float(own.view(np.float32)[0]), tuple(top))


def fault(code: int) -> str:
    """Return why no token could be chosen."""
    return f"{drawing.FAULTS[code]}, so no token can be chosen"
