"""Measures a model's perplexity on long text, by row length and context extension."""
