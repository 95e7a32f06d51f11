"""A training run from start to finish: recipe, folder, loop and checkpoints.

Start reading at `task.py`. Nothing is imported here, so that commands answer `--help` quickly.
"""
