"""`python -m qwen_jax.kernels.tune`: block sizes measured, and what `auto` found on this device.

The command lies in `attention/`, beside the reference that it measures against; this is its name.
"""

from qwen_jax.attention.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
