"""The training step: a batch's loss, its gradients, and AdamW."""

from train.step.optimizer import FLOATS, Optimizer
from train.step.update import (
    REMAT,
    Report,
    State,
    abstract_batch,
    abstract_state,
    create_state,
    make_evaluation,
    make_step,
    stacked,
    state_of,
)

__all__ = [
    "FLOATS",
    "REMAT",
    "Optimizer",
    "Report",
    "State",
    "abstract_batch",
    "abstract_state",
    "create_state",
    "make_evaluation",
    "make_step",
    "stacked",
    "state_of",
]
