"""Saves and restores a run's checkpoints with Orbax, and keeps the latest and the best.

A step's folder gets its name only when it is complete. A state is saved leaf by leaf under each
leaf's path, so it can be restored on any mesh. Knows no model and no loop.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

STATE, FACTS = "state", "facts"


class Checkpoints:
    """Saves the checkpoints of one run in the background, in a folder that all its processes see.

    last: how many of the latest checkpoints to keep. best: how many of those with the lowest
    held-out loss to keep besides.
    """

    def __init__(self, folder: Path, last: int = 2, *, best: int = 0):
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(last)]
        if best:
            score = lambda metrics: -metrics["loss"]  # noqa: E731
            only = {"keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(get_metric_fn=score, n=best, **only))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # Only given this, Orbax stores a checkpoint's loss, which the next start needs.
            best_fn=(lambda metrics: metrics["loss"]) if best else None,
            best_mode="min",
            enable_async_checkpointing=True,
        )
        handlers = {STATE: ocp.StandardCheckpointHandler(), FACTS: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(str(folder), options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: PyTree, *, facts: Mapping[str, object], loss: float | None = None
    ) -> None:
        """Copy the training state at once, and write it to disk while the caller goes on.

        step: the number of updates so far; nothing is done if the latest checkpoint is of this
            step.
        state: the training state.
        facts: other values to store with it, as JSON.
        loss: the held-out loss. If it is None or not finite, the checkpoint is not among the best.
        """
        if self.latest == step:
            return
        items = {
            STATE: ocp.args.StandardSave(_by_path(state)),
            FACTS: ocp.args.JsonSave(dict(facts)),
        }
        metrics = {"loss": loss} if loss is not None and math.isfinite(loss) else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Read the training state and the other stored values of the latest checkpoint.

        like: the state as shapes with shardings. Raises ValueError if the checkpoint is damaged or
        holds another kind of state.
        """
        step, wanted = self.latest, _by_path(like)
        items = {STATE: ocp.args.StandardRestore(wanted), FACTS: ocp.args.JsonRestore()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds, Exception itself too
            detail = " ".join(str(error).split())[:200]
            path = self._manager.directory / str(step)
            others = [x for x in self._manager.all_steps() if x != step]
            before = f"step {max(others)}" if others else "the beginning"
            raise ValueError(
                f"{path} cannot be restored: {detail}; if it is damaged, remove it, and --resume "
                f"goes on from {before}"
            ) from error
        leaves = [found[STATE][path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), dict(found[FACTS])

    def wait(self) -> None:
        """Wait until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Release Orbax's threads; waits for saves as `wait` does."""
        self._manager.close()


def ignore_late_callbacks() -> None:
    """Silence errors of callbacks that arrive after Orbax has given up a read or write.

    TensorStore goes on then and calls a closed event loop, for which Python would print a traceback
    for each array.
    """
    global _earlier_hook
    if sys.unraisablehook is not _pass_on:
        _earlier_hook, sys.unraisablehook = sys.unraisablehook, _pass_on


_earlier_hook = sys.unraisablehook


def _pass_on(unraisable: "sys.UnraisableHookArgs") -> None:
    """Pass an unraisable exception to the earlier hook, unless a late callback caused it.

    A module's function is never freed: Python holds no reference to a hook that a thread is about
    to call, and would crash if another thread replaced it just then.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        _earlier_hook(unraisable)


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
