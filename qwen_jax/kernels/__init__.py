"""Fused attention in Pallas: a body for each kind of hardware. They know arrays and masks alone.

flash.py is what the bodies for many query tokens share: what is declined, which blocks of a mask
are visible, the derivative. flash_tpu.py, flash_triton.py and flash_hopper.py are those bodies;
decode_tpu.py and decode_triton.py attend from a few tokens to a cache. choice.py says which device
is compiled for and what was measured on it, timing.py and tune.py measure, others.py has
other libraries' attention for comparison.
"""
