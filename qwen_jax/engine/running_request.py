"""A request inside the engine: the scheduler's request, and what the scheduler need not know."""

import dataclasses
import logging

import numpy as np
from jaxtyping import Float, Int32

from qwen_jax.engine import scheduler
from qwen_jax.engine.scheduler import Row
from qwen_jax.engine.settings import Choice, Event, Listener, Settings


@dataclasses.dataclass(eq=False, kw_only=True)
class Running(scheduler.Request):
    """A request that has been submitted, and has not ended.

    number: what `Engine.submit` has returned.
    frequencies: the RoPE frequencies of its row.
    allowed: the mask of ids that may be generated, but for a grammar.
    scores: the log-probabilities of its prompt's tokens that are known so far.
    """

    number: int
    settings: Settings
    listener: Listener
    frequencies: Float[np.ndarray, " pairs"]
    allowed: Int32[np.ndarray, " words"]
    scores: list[Choice] = dataclasses.field(default_factory=list)

    def tell(self, event: Event) -> None:
        """Call the listener. Its error is logged, as the engine has other requests to serve."""
        try:
            self.listener(event)
        except Exception:
            log = logging.getLogger("qwen_jax")
            log.exception("the listener of request %d failed", self.number)


def of_row(row: Row) -> Running:
    """Return the request of a row."""
    assert isinstance(row.request, Running)
    return row.request
