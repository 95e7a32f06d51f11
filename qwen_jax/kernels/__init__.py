"""Fused kernels in Pallas, one for each kind of hardware: attention, and products with weights.

They know only arrays and masks (mask.py). flash_tpu.py, flash_triton.py and flash_hopper.py are
kernels for many query tokens, and flash.py holds their shared parts: refusal of unsupported calls,
visible blocks of a mask, the derivative. decode_tpu.py and decode_triton.py attend from a few
tokens to a cache. grouped_tpu.py, grouped_triton.py and grouped_hopper.py multiply by weights of 4-
and 8-bit integers, and grouped_xla.py has the forms of such products that XLA compiles. choice.py
finds the device that programs are compiled for and a kernel's measured block sizes, tune.py is the
command that measures them, and others.py has other libraries' attention for comparison.
"""
