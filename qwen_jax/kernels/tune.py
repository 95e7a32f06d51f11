"""`python -m qwen_jax.kernels.tune` measures block sizes, and shows what `auto` found here.

The command lies in `attention/`, beside the reference that it measures against; this is its name.
"""

from qwen_jax.attention.tuning import main

if __name__ == "__main__":
    raise SystemExit(main())
