"""Encodes records as token ids and labels: documents, and conversations in ChatML.

Control tokens are added here only; text from a record is encoded as ordinary text, even if it
spells a control token. Knows no files and no batches.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.chat import messages, tools
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.chat.tools import Turn
from qwen_jax.runtime import texts, values

LOSS_ON = ("qwen", "assistant")
IGNORED = -100  # a label that is not trained on
_ROLES = ("user", "assistant")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Fields in which other trainers' data say how much a turn counts in the loss.
_SHARES = ("weight", "train", "trainable", "loss")


def text_example(
    tokenizer: Tokenizer, record: object, *, field: str = "text", ends: bool = True
) -> list[int]:
    """Encode a document: the ids of its text, then the end-of-document id if `ends`.

    record: the text, or an object with the text in `field`. Raises ValueError if there is no text.
    """
    text = text_of(record, field)
    return [*tokenizer.encode(text), *([tokenizer.eod_id] if ends else [])]


def text_of(record: object, field: str) -> str:
    """Return the text of a record: the record itself, or its value in `field`.

    Raises ValueError if there is no text, or an unpaired surrogate in it.
    """
    text = record.get(field) if isinstance(record, Mapping) else record
    if not isinstance(text, str) or not text:
        if text is None and isinstance(record, dict) and field not in record:
            keys = ", ".join(map(repr, record)) or "no keys"
            raise ValueError(f"no key {field!r}, but {keys[:200]}: name the one with --field")
        raise ValueError(f"there is no text in {field!r}, but {texts.described(text)}")
    return texts.check_whole(f"the text in {field!r}", text)


def chat_example(
    tokenizer: Tokenizer,
    record: object,
    *,
    system: str,
    max_len: int | None,
    loss_on: str = "qwen",
) -> tuple[list[int], list[int]]:
    """Encode a conversation as ids and labels in ChatML, from a record in either of two formats.

    record: {"conversations": [{"from", "value"}]}, the format of Qwen's own fine-tuning script; or
        {"messages": [{"role", "content"}]}, optionally with `tools` (or `functions`), a list or its
        JSON (`tools.turns`). A "system" in the record replaces `system`.
    system: the text of the system message.
    max_len: the most ids, after which the rest is cut; None for any number.
    loss_on: the tokens to train, "assistant" or "qwen" (`sft_example`).

    Raises ValueError for any other record, and for fields that other trainers use and this one
    would ignore.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a conversation is an object, not {type(record).__name__}")
    record = {**record, **{field: _offered(record, field) for field in ("tools", "functions")}}
    _check_whole(record)
    if (own := record.get("system")) is not None:
        if not isinstance(own, str):
            raise ValueError(f"'system' is no text, but {texts.described(own)}")
        system = own
    if isinstance(record.get("conversations"), list):
        return sft_example(tokenizer, record["conversations"], system, max_len, loss_on)
    if not isinstance(record.get("messages"), list):
        raise ValueError("there are neither 'conversations' nor 'messages'")
    in_messages, turns = tools.turns(record["messages"], record["tools"] or record["functions"])
    if in_messages is not None and own and in_messages != system:
        raise ValueError("'system' and a message of the system differ: leave one of them out")
    system = system if in_messages is None else in_messages
    return _encoded(tokenizer, system, turns=turns, max_len=max_len, loss_on=loss_on)


def _check_whole(record: Mapping[str, object]) -> None:
    """Raise ValueError for fields of a conversation that training would ignore, such as images."""
    for one, other in (
        ("conversations", "messages"),
        ("conversations", "tools"),
        ("conversations", "functions"),
        ("tools", "functions"),
    ):
        if messages.given(record.get(one)) and messages.given(record.get(other)):
            raise ValueError(f"{one!r} and {other!r} do not go together: leave one of them out")
    shown = {name: record[name] for name in _MEDIA if name in record}
    messages.check_read("the record", shown, read=())
    turns = record.get("conversations") or record.get("messages")
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        for name in _SHARES if isinstance(turn, Mapping) else ():
            if turn.get(name) not in (None, 1):  # True is 1
                got = texts.shown(turn[name])
                raise ValueError(
                    f"turn {number} has {name!r} {got}: every reply is trained with a weight of 1; "
                    "leave the field out, or the record"
                )


def _offered(record: Mapping[str, object], field: str) -> list[Any]:
    """Return the tools that a record describes in `field`; [] if there are none.

    The field holds a list, or the list as JSON text, because a column of a dataset has one type.
    Raises ValueError for any other value.
    """
    offered = record.get(field)
    if isinstance(offered, str) and offered:
        try:
            offered = json.loads(offered)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{field!r} is a text that is no JSON: {error}") from error
    if not messages.given(offered):
        return []
    if not isinstance(offered, list):
        raise ValueError(f"{field!r} is no list")
    return offered


def sft_example(
    tokenizer: Tokenizer,
    conversations: Sequence[Mapping[str, str]],
    system: str,
    max_len: int | None,
    loss_on: str = "qwen",
) -> tuple[list[int], list[int]]:
    """Encode a conversation as ids and labels in ChatML, cut to `max_len`; labels are not shifted.

    conversations: turns {"from": "user" or "assistant", "value": text}; turns before the first user
        turn are left out.
    system: the text of the system message.
    max_len: the most ids; None for any number.
    loss_on: the tokens to train. "assistant" trains replies and the `<|im_end|>` after each, except
        tool results within replies. "qwen" trains, as Qwen's own fine-tuning script does, whole
        replies and every turn's control tokens with the newline after it (but unlike in that
        script, text cannot inject control tokens). The labels of all other tokens are `IGNORED`.

    Raises ValueError for an unknown role, a turn without text, a key that would be ignored, or a
    conversation without a reply to a user.
    """
    values.instance("tokenizer", tokenizer, kind=Tokenizer)
    if isinstance(conversations, str | bytes | Mapping) or not isinstance(conversations, Iterable):
        got = texts.described(conversations)
        raise ValueError(f"conversations must be a list of turns, got {got}")
    turns: list[Turn] = []
    for number, turn in enumerate(conversations, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is no object")
        role = turn.get("from")
        if role not in _ROLES:
            allowed = ", ".join(_ROLES)
            raise ValueError(f"turn {number} is from {texts.shown(role)}: allowed are {allowed}")
        if not isinstance(turn.get("value"), str):
            got = texts.described(turn.get("value"))
            raise ValueError(f"turn {number} has no text in 'value', but {got}")
        messages.check_read(f"turn {number}", turn, read=("from", "value"))
        value = texts.check_whole(f"turn {number}", turn["value"])
        if turns or role == "user":
            turns.append(Turn(role, ((value, True),)))
    return _encoded(tokenizer, system, turns=turns, max_len=max_len, loss_on=loss_on)


def _encoded(
    tokenizer: Tokenizer, system: str, *, turns: Sequence[Turn], max_len: int | None, loss_on: str
) -> tuple[list[int], list[int]]:
    """Encode turns after a system message; the arguments and results are those of `sft_example`."""
    values.choice("loss_on", loss_on, allowed=LOSS_ON)
    if max_len is not None:
        max_len = values.whole("max_len", max_len, least=1)
    system = texts.check_whole("system", system)
    if "assistant" not in {turn.role for turn in turns}:
        raise ValueError("the conversation has no reply to a user: there is nothing to learn")
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    labels: list[int] = []

    def add(part: Sequence[int], trained: bool) -> None:
        ids.extend(part)
        labels.extend(part if trained else [IGNORED] * len(part))

    for turn in (Turn("system", ((system, True),)), *turns):
        reply, all_controls = turn.role == "assistant", loss_on == "qwen"
        add([tokenizer.im_start_id], all_controls)
        add([*tokenizer.encode(turn.role), *newline], False)
        for text, own in turn.spans:
            add(tokenizer.encode(text), reply and (own or all_controls))
        add([tokenizer.im_end_id], reply or all_controls)
        add(newline, all_controls)
    return ids[:max_len], labels[:max_len]
