"""`python -m qwen_jax.checkpoint inspect DIR`: shows what a model directory holds."""

from qwen_jax.checkpoint.inspection import main

if __name__ == "__main__":
    raise SystemExit(main())
