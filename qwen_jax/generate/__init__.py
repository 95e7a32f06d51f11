"""Text out of a converted model: `load`, the language model, its rates, and the command."""
