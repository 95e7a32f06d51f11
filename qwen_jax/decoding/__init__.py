"""Token generation: callers' arguments as arrays, samplers, and the decode loop on devices."""
