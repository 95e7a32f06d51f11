"""A run from beginning to end: its recipe, its folder, its loop, its checkpoints."""

from train.run.task import Task, train

__all__ = ["Task", "train"]
