"""The HTTP server: the OpenAI API over an engine, metrics, and the page. Knows no jax."""
