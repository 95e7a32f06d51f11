"""Generation of tokens: callers' arguments as arrays, samplers, and the decode loop on
the devices.
"""
