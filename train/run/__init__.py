"""A run from beginning to end: its recipe, its folder, its loop, its checkpoints.

Begin with `task.py`. Nothing is imported here, so that a command is quick to say its `--help`.
"""
