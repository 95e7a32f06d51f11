"""The tokenizer, chat prompts and tool calls. Nothing here needs jax."""

from qwen_jax.chat.prompt import (
    DEFAULT_SYSTEM,
    History,
    decode_reply,
    make_context,
    stop_sequences,
    turns_of,
    with_turn,
)
from qwen_jax.chat.stops import StopIds, StopText, stop_texts, until_stop

__all__ = [
    "DEFAULT_SYSTEM",
    "History",
    "StopIds",
    "StopText",
    "decode_reply",
    "make_context",
    "stop_sequences",
    "stop_texts",
    "turns_of",
    "until_stop",
    "with_turn",
]
