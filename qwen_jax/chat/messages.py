"""Checks messages of the OpenAI API, and reads their parts, for training data and for the server.

This module knows neither the format in which a model reads a conversation, nor token ids.
"""

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qwen_jax.runtime import texts

# Keys of metadata, which the model does not see. The last four weight a message in the loss, which
# the training recipe decides.
_NOTES = frozenset(
    (
        "id", "uuid", "message_id", "parent_id", "index", "turn", "turn_id",
        "created", "created_at", "updated_at", "timestamp", "time", "date",
        "lang", "language", "model", "source", "metadata", "meta", "cache_control",
        "annotations", "logprobs", "finish_reason", "usage", "token_count", "score", "rating",
        "weight", "train", "trainable", "loss",
    )
)  # fmt: skip
# Keys with content for a model, which Qwen's text format has no place for.
_CONTENT = frozenset(
    (
        "reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts",
        "refusal", "image", "images", "image_url", "video", "videos", "audio", "audios", "file",
        "files", "attachments", "parts", "name", "prefix", "tool_calls", "tool_call_id",
        "function_call",
    )
)  # fmt: skip


def check_read(what: str, message: Mapping[str, Any], *, read: Collection[str]) -> None:
    """Raise ValueError if a message has content in a key that the caller does not read.

    what: the name of the message, for errors.
    read: the keys that the caller reads.

    Without the error the content would be lost. A key that is entirely unknown only causes a
    warning; metadata and empty values are ignored.
    """
    for key, value in message.items():
        if key in read or key in _NOTES or not given(value):
            continue
        if key in _CONTENT:
            raise ValueError(
                f"{what} has {texts.shown(key)} {texts.shown(value)}, which is not read there: "
                "leave the field out, or say it in the text"
            )
        warnings.warn(  # Python shows each distinct text once
            f"messages have {texts.shown(key)}, which is not known and not read", stacklevel=2
        )


def given(value: object) -> bool:
    """Return whether a value is more than null, NaN, false, 0, "", or nested containers of these.

    Parquet and pandas fill fields with such values where other records have more.
    """
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            left += part.values()
        elif to_list := getattr(part, "tolist", None):  # a numpy array or scalar
            left.append(to_list())
        elif isinstance(part, Iterable) and not isinstance(part, str | bytes):
            left += part
        elif part and part == part:
            return True
    return False


def function_of(value: object, what: str) -> Mapping[str, Any]:
    """The function in a tool or call: the value of its key "function", or the object itself."""
    function = value.get("function") if isinstance(value, Mapping) else None
    function = function if given(function) else value
    if not isinstance(function, Mapping):
        raise ValueError(f"{what} is no object that holds a function")
    return function


def as_json(value: object, what: str) -> str:
    """Format a value as JSON. Raises ValueError that starts with `what`, the value's name."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # such as a date out of Parquet
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def text_of(content: object, *, what: str, needed: bool = True) -> str:
    """Return the text of a message's content; content parts of type "text" are joined.

    what: the name of the message, for errors.
    needed: whether a null content raises ValueError; otherwise it is "".
    """
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        found = [part.get("text") for part in parts if part.get("type") == "text"]
        content = [text for text in found if isinstance(text, str)]
        if len(content) < len(parts):
            raise ValueError(f'{what} has parts that are no text: {{"type": "text", "text": ...}}')
        content = "".join(content)
    if content is None and not needed:
        return ""
    if not isinstance(content, str):
        got = texts.described(content)
        raise ValueError(f"{what} has no text in 'content', but {got}")
    return texts.check_whole(what, content)


def listed(name: str, values: object) -> list[Any]:
    """Return a list or other iterable of objects as a list. Raises ValueError for other values."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of objects, got {texts.described(values)}")
    return list(values)
