"""`python -m qwen_jax.chat`: an interactive chat with a model.

The command lies in `terminal/program.py`, above the model that answers; this file gives it its
name.
"""

from qwen_jax.terminal.program import main

if __name__ == "__main__":
    raise SystemExit(main())
