"""Conversion between Hugging Face checkpoint folders and the model directories of `qwen_jax`."""
