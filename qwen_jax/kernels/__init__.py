"""Fused attention kernels in Pallas, one for each kind of hardware.

They know only arrays and masks (mask.py). flash.py holds what the kernels for many query tokens
share: unsupported calls, visible blocks of a mask, the derivative. flash_tpu.py, flash_triton.py
and flash_hopper.py are those kernels. decode_tpu.py and decode_triton.py attend from a few tokens
to a cache. choice.py finds the device that is compiled for and its measured block sizes, tune.py is
the command that measures them, and others.py has other libraries' attention for comparison.
"""
