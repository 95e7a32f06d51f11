"""Makes the advice printed at the start of a run.

It suggests options that would waste less work on the run's examples, and says what follows if rows
are not as long as the model's `seq_length`.
"""

import math
from collections.abc import Mapping

from qwen_jax.config import Config
from qwen_jax.meshes import sharding
from train.data.packing import Rows
from train.run.recipes import Recipe

_LITTLE = 0.5  # the share of used token positions below which advice is given
_FINE, _COARSE = 16, 64  # lengths are multiples of the first, and above the second of that


def less_waste(rows: Rows, recipe: Recipe, *, sizes: Mapping[str, int], platform: str) -> list[str]:
    """Suggest options that need less work per step for the same examples, with the gain of each.

    rows: the packed training rows.
    recipe: the recipe of the run.
    sizes: the number of devices along each mesh axis.
    platform: jax's name of the backend.

    A suggested `--length` cuts no example, and every value divides over the mesh.
    """
    found = []
    if rows.efficiency < _LITTLE:
        either = [*_shorter(rows, recipe, sizes=sizes), *_together(rows, recipe, sizes=sizes)]
        found += [" or ".join(either)] if either else []
    if recipe.rows > len(rows):
        unit = _unit(recipe, sizes)
        fewer = max(1, len(rows) // unit) * unit
        if fewer < recipe.rows:
            found.append(
                f"--rows {fewer}, as a batch of {recipe.rows} repeats the {len(rows)} rows"
            )
    if platform == "cpu" and recipe.dtype == "bfloat16":
        found.append("--dtype float32, which CPUs compute faster than bfloat16 as a rule")
    return found


def _shorter(rows: Rows, recipe: Recipe, *, sizes: Mapping[str, int]) -> list[str]:
    """Return a suggestion of shorter rows, in a list; [] if they would save nothing.

    They are as long as the longest example, or as all examples together if one row holds them.
    """
    if recipe.pack != "alone" and len(rows) > 1:
        return []
    need = rows.longest if recipe.pack == "alone" else rows.tokens
    context = sizes[sharding.CONTEXT]
    pieces = 2 * context if context > 1 else 1
    unit = math.lcm(_FINE if need <= _COARSE else _COARSE, pieces, sizes[sharding.TENSOR])
    length = -(-need // unit) * unit
    if length >= recipe.length:
        return []
    used = rows.tokens / (len(rows) * length)
    what = "the longest example" if recipe.pack == "alone" else "all of it"
    return [f"--length {length} ({what} has {need:,} tokens), of which {used:.0%} are used"]


def _together(rows: Rows, recipe: Recipe, *, sizes: Mapping[str, int]) -> list[str]:
    """Return a suggestion to pack several examples into a row, in a list; [] if that saves nothing.

    The batch of the suggestion has about as many examples as the recipe's batch.
    """
    if recipe.pack != "alone":
        return []
    per_row = recipe.length * len(rows) // rows.tokens
    unit = _unit(recipe, sizes)
    batch = -(-recipe.rows // (per_row * unit)) * unit
    if batch >= recipe.rows:
        return []
    return [
        f"--pack fitted --rows {batch}, with some {per_row} examples in a row of {recipe.length}"
    ]


def _unit(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Return the number of which a batch's number of rows must be a multiple."""
    return recipe.accumulate * math.prod(sizes[axis] for axis in sharding.BATCH)


def other_length(recipe: Recipe, config: Config, *, fresh: bool) -> str | None:
    """Say what follows if rows are not as long as the model's `seq_length`; None if they are.

    fresh: whether the run starts from fresh weights.
    """
    length, known = recipe.length, config.seq_length
    if length == known:
        return None
    if fresh:
        follows = f"set it to {length} if the model is to learn that length"
    elif length < known:
        follows = f"attention over more than {length} tokens is not trained"
    elif config.dynamic_ntk or config.logn:
        follows = (
            "generation extends the context beyond it by dynamic NTK or LogN, training does not"
        )
    else:
        follows = "positions beyond it are new to the model"
    return f"--length {length}: the model's config.json has seq_length {known}; {follows}"
