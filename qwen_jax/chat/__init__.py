"""The tokenizer, chat prompts and tool calls. Nothing here needs jax."""

from qwen_jax.chat.chatml import ChatML, example_context
from qwen_jax.chat.formats import (
    ArgumentsDelta,
    Call,
    CallBegins,
    ChatFormat,
    MessageError,
    Prompt,
    Reply,
    ReplyEnds,
    ReplyEvent,
    ReplyParser,
    TextDelta,
)
from qwen_jax.chat.prompt import (
    DEFAULT_SYSTEM,
    History,
    decode_reply,
    make_context,
    stop_sequences,
    turns_of,
    with_turn,
)
from qwen_jax.chat.react import page_instruction
from qwen_jax.chat.replies import parse_reply
from qwen_jax.chat.stops import StopIds, StopText, stop_texts, until_stop

__all__ = [
    "DEFAULT_SYSTEM",
    "ArgumentsDelta",
    "Call",
    "CallBegins",
    "ChatFormat",
    "ChatML",
    "History",
    "MessageError",
    "Prompt",
    "Reply",
    "ReplyEnds",
    "ReplyEvent",
    "ReplyParser",
    "StopIds",
    "StopText",
    "TextDelta",
    "decode_reply",
    "example_context",
    "make_context",
    "page_instruction",
    "parse_reply",
    "stop_sequences",
    "stop_texts",
    "turns_of",
    "until_stop",
    "with_turn",
]
