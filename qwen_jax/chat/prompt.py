"""Prompts and replies of the two chat formats: "chatml" (chat models) and "raw" (base models).

A prompt is assembled from token ids and never by encoding the finished text: this module places the
control tokens, and encodes text of users and callers as ordinary text, even if it spells a control
token. It makes the prompt's ids, names the ids that end a reply, and decodes the reply. It knows
nothing of the model or of sampling.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

from qwen_jax.chat import stops, tools
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.runtime import texts, values

DEFAULT_SYSTEM = "You are a helpful assistant."
History = Sequence[Sequence[str]] | Sequence[Mapping[str, Any]]  # pairs, or messages
Ending = Literal["reply", "open", "closed"]  # of a prompt: see `assemble`
_ROLES = ("user", "assistant")
_PAIRS = "history must be pairs (query, reply) of text, oldest first"


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[Sequence[str]] | None = (),
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """Build the prompt of one query; returns it as text and as token ids.

    query: the user's text.
    history: pairs (query, reply), oldest first; `turns_of` makes them from messages.
    system: the text of the system message.
    max_window_size: the newest pairs are kept while the system message and the kept pairs together
        stay below this number of tokens. The query is neither counted nor cut.
    chat_format: "chatml", or "raw", whose prompt is the query alone. Any other raises
        NotImplementedError.

    Raises ValueError that names the argument if a text is not a `str` or has a lone surrogate.
    """
    values.instance("tokenizer", tokenizer, kind=Tokenizer)
    _check_format(chat_format)
    query = texts.check_whole("query", query)
    if chat_format == "raw":
        return query, tokenizer.encode(query)
    system, pairs = texts.check_whole("system", system), _pairs(history)
    values.number("max_window_size", max_window_size, least=0)
    turns = [(role, text) for pair in pairs for role, text in zip(_ROLES, pair, strict=True)]
    turns.append(("user", query))
    return assemble(tokenizer, system, turns, max_window_size=max_window_size)


def assemble(
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[tuple[str, str]],
    *,
    ending: Ending = "reply",
    max_window_size: int | None = None,
) -> tuple[str, list[int]]:
    """Build a ChatML prompt from turns; returns it as text and as token ids.

    system: the text of the system message.
    turns: pairs (role, content), oldest first.
    ending: "reply": a reply is opened after the last turn. "open": the last turn itself is left
        open, for the model to continue. "closed": the last turn is closed, and nothing follows.
    max_window_size: the newest questions, each with its replies, are kept while the system message
        and they together stay below this number of tokens. The last question, and what follows it,
        is neither counted nor cut. None keeps all turns.

    Every content is encoded alone, as ordinary text.
    """
    newline = tokenizer.encode("\n")

    def message(role: str, content: str, *, closed: bool = True) -> tuple[str, list[int]]:
        # The role, the newline and the content are encoded one by one: a content that begins
        # with a newline would otherwise merge with the one before it.
        ids = [*tokenizer.encode(role), *newline, *tokenizer.encode(content)]
        end, end_ids = ("<|im_end|>", [tokenizer.im_end_id]) if closed else ("", [])
        return f"<|im_start|>{role}\n{content}{end}", [tokenizer.im_start_id, *ids, *end_ids]

    head = message("system", system)
    tail: list[tuple[str, list[int]]] = []  # the kept turns, the newest first
    kept = 0
    for number, group in enumerate(reversed(_questions(turns))):
        last = number == 0
        said = [
            message(role, content, closed=not (last and ending == "open" and i == len(group) - 1))
            for i, (role, content) in enumerate(group)
        ]
        if not last and max_window_size is not None:
            kept += sum(len(newline) + len(ids) for _, ids in said)
            if len(head[1]) + kept >= max_window_size:
                break
        tail += reversed(said)
    parts = [head, *reversed(tail)]
    if ending == "reply":
        parts.append(message("assistant", "", closed=False))
    text = "\n".join(text for text, _ in parts)
    ids = list(head[1])
    for _, part in parts[1:]:
        ids += newline + part
    return text, ids


def _questions(turns: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Group turns: each question with the replies that follow it."""
    groups: list[list[tuple[str, str]]] = []
    for turn in turns:
        if turn[0] == "user" or not groups:
            groups.append([])
        groups[-1].append(turn)
    return groups


def turns_of(history: History | None, system: str) -> tuple[str, list[tuple[str, str]]]:
    """Convert a chat history in either form to (system message, pairs) for `make_context`.

    history: pairs (query, reply) of text, or messages {"role": ..., "content": ...} as in the
        OpenAI API, the last of which is a reply.
    system: the system message, used unless the first message has the role "system".

    Tool calls and their results become part of the reply (`tools.turns`). Raises ValueError, which
    describes a valid history, for any other value.
    """
    system = texts.check_whole("system", system)
    items = _items(history)
    if not any(isinstance(item, Mapping) for item in items):
        return system, _pairs(items)
    try:
        said, turns = tools.turns(items)
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("users and assistants take turns, and a reply is the last")
    except ValueError as error:
        raise ValueError(
            'history must be messages {"role": ..., "content": ...}, or pairs (query, reply) of '
            f"text, oldest first: {error}"
        ) from None
    spoken = [turn.text for turn in turns]
    return system if said is None else said, list(zip(spoken[::2], spoken[1::2], strict=True))


def _items(history: History | None) -> list[Any]:
    """The items of a history as a list. Raises ValueError if it is not an ordered collection."""
    if history is None:
        return []
    ordered = isinstance(history, Iterable) and isinstance(history, Sized)
    if not ordered or isinstance(history, str | bytes | Mapping | set | frozenset):
        raise ValueError(f"{_PAIRS}, got {texts.described(history)}")
    return list(history)


def _pairs(history: History | None) -> list[tuple[str, str]]:
    """Check a history of (query, reply) pairs, and return it as a list.

    Raises ValueError that names the item that is not a pair of texts.
    """
    found: list[tuple[str, str]] = []
    for number, item in enumerate(_items(history), 1):
        if isinstance(item, Mapping):
            raise ValueError(
                f"{_PAIRS}: item {number} is a message, of which `turns_of` makes pairs"
            )
        if isinstance(item, str | bytes | set | frozenset) or not isinstance(item, Iterable):
            raise ValueError(f"{_PAIRS}: item {number} is {texts.described(item)}")
        parts = list(item)
        if len(parts) != 2:
            raise ValueError(f"{_PAIRS}: item {number} has {len(parts)} parts")
        what = f"history: the {{}} of pair {number}"
        query, reply = (
            texts.check_whole(what.format(name), part)
            for name, part in zip(("query", "reply"), parts, strict=True)
        )
        found.append((query, reply))
    return found


def with_turn(history: History | None, query: str, *, reply: str) -> list[Any]:
    """Return the history with a query and its reply appended, as pairs or as messages.

    history: pairs (query, reply), or messages, which determine the form of the result.
    """
    past: list[Any] = [] if history is None else list(history)
    if any(isinstance(item, Mapping) for item in past):
        said = (("user", query), ("assistant", reply))
        return [*past, *({"role": role, "content": text} for role, text in said)]
    return [*past, (query, reply)]


def stop_sequences(tokenizer: Tokenizer, chat_format: str) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of token ids that end a reply in a chat format, "chatml" or "raw".

    Raises NotImplementedError for another format.
    """
    _check_format(chat_format)
    if chat_format == "raw":
        return tuple(tokenizer.encode("Human:")), (tokenizer.eod_id,)
    return (tokenizer.im_end_id,), (tokenizer.im_start_id,)


def decode_reply(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    *,
    chat_format: str = "chatml",
    stop: Sequence[Sequence[int]] = (),
    errors: str = "replace",
) -> str:
    """Decode a reply, and strip the white space around it.

    ids: the generated ids, without the prompt. They are cut before the first <|endoftext|>, in
        "chatml" also <|im_start|> or <|im_end|>, and before the first of the `stop` sequences.
    chat_format: "chatml" or "raw"; another raises NotImplementedError.
    stop: further sequences of ids that end the reply.
    errors: the treatment of bytes that are not UTF-8: "replace", "ignore" or "strict".
    """
    _check_format(chat_format)
    reply = values.ids("ids", ids)
    ends = [(tokenizer.eod_id,), *stops.sequences(stop)]
    if chat_format == "chatml":
        ends += stop_sequences(tokenizer, chat_format)
    for start in range(len(reply)):
        # an empty stop sequence would end every reply before it begins
        if any(end and tuple(reply[start : start + len(end)]) == end for end in ends):
            return tokenizer.decode(reply[:start], errors).strip()
    return tokenizer.decode(reply, errors).strip()


def _check_format(chat_format: str) -> None:
    if chat_format not in ("chatml", "raw"):
        raise NotImplementedError(f"chat_format must be 'chatml' or 'raw', got {chat_format!r}")
