"""The serving engine: pages of the KV cache, a scheduler, and the steps that devices run."""
