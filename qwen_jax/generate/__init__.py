"""Text generation: `load`, the language model, its benchmark, and the command line program."""
