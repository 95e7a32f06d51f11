"""The tokenizer, chat prompts and tool calls. Nothing here needs jax."""

from qwen_jax.chat.prompt import (
    DEFAULT_SYSTEM,
    History,
    decode_reply,
    make_context,
    stop_sequences,
    turns_of,
    until_stop,
    with_turn,
)

__all__ = [
    "DEFAULT_SYSTEM",
    "History",
    "decode_reply",
    "make_context",
    "stop_sequences",
    "turns_of",
    "until_stop",
    "with_turn",
]
