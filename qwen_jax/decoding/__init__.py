"""Tokens after tokens: the loop on the devices, samplers, and the callers' arguments as arrays."""
