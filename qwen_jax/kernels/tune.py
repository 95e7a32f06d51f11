"""`python -m qwen_jax.kernels.tune` measures block sizes, and shows what `auto` found here.

The command lies in `attention/tuning.py`, beside the XLA reference with which it compares kernels;
this file gives it its name.
"""

from qwen_jax.attention.tuning import main

if __name__ == "__main__":
    raise SystemExit(main())
