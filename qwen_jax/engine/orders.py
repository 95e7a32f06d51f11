"""Makes the arrays that tell a step's programs what to do, from the scheduler's plan."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from qwen_jax.engine.scheduler import Plan
from qwen_jax.engine.steps import FEED, SKIP, Shape


def of_rows(plan: Plan, rows: int) -> Int32[np.ndarray, "R 3"]:
    """Return the orders of `Steps.decode`. rows: R."""
    orders = np.tile(np.array([0, -1, SKIP], np.int32), (rows, 1))
    for row in plan.decode:
        i = row.index
        orders[i] = plan.pages.get(i, 0), plan.forced.get(i, -1), FEED
    return orders


class Chunks(NamedTuple):
    """The arguments of `Steps.prefill`."""

    tokens: Int32[np.ndarray, "n C"]
    which: Int32[np.ndarray, " n"]
    begin: Int32[np.ndarray, " n"]
    count: Int32[np.ndarray, " n"]
    forced: Int32[np.ndarray, " n"]
    last: Bool[np.ndarray, " n"]
    scored: Int32[np.ndarray, "n C"] | None


def of_chunks(plan: Plan, shape: Shape, *, replicas: int) -> tuple[Chunks, list[int]]:
    """Return the arguments of `Steps.prefill`, and the place of each chunk among the n.

    replicas: the parts of the batch, each of which has `shape.chunks` places.
    """
    n, share = shape.chunks * replicas, shape.rows // replicas
    tokens, scored = np.zeros((n, shape.chunk), np.int32), np.full((n, shape.chunk), -1, np.int32)
    which, begins, counts, forced = (np.full(n, x, np.int32) for x in (0, 0, 0, -1))
    last = np.zeros(n, bool)
    places, used = [], [0] * replicas
    for row, begin, count in plan.chunks:
        request, replica = row.request, row.index // share
        place = replica * shape.chunks + used[replica]
        used[replica] += 1
        places.append(place)
        prompt, end = request.prompt, begin + count
        tokens[place, :count] = prompt[begin:end]
        which[place], begins[place], counts[place] = row.index % share, begin, count
        last[place] = end == len(prompt)
        if last[place]:
            forced[place] = plan.forced.get(row.index, -1)
        if request.unscored is not None:
            first = max(request.unscored - 1, begin)  # the token before the first one scored
            after = prompt[first + 1 : end + 1]
            scored[place, first - begin :][: len(after)] = after
    wanted = scored if (scored >= 0).any() else None
    return Chunks(tokens, which, begins, counts, forced, last, wanted), places
