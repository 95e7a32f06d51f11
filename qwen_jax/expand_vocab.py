"""`python -m qwen_jax.expand_vocab` learns tokens for words that a vocabulary lacks.

The command and its functions lie in `chat/expansion.py`, beside the tokenizer; this file gives them
their name.
"""

from qwen_jax.chat.expansion import (
    expand,
    learn_tokens,
    main,
    parser,
    read_words,
    splittable,
    write_tokens,
)

__all__ = [
    "expand",
    "learn_tokens",
    "main",
    "parser",
    "read_words",
    "splittable",
    "write_tokens",
]

if __name__ == "__main__":
    raise SystemExit(main())
