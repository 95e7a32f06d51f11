"""Training of the decoders of `qwen_jax`."""
