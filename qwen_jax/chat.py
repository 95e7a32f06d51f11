"""Prompts and replies of the two chat formats: "chatml" (chat models) and "raw" (base models).

A prompt is put together from ids, never by encoding the finished text: the control tokens are
placed here, and what users and callers wrote is encoded as ordinary text, whatever it spells.
This module knows nothing of the model or of sampling: it makes the ids that go in, says which ids
end a reply, and turns the reply's ids into text.
"""

from collections.abc import Iterable, Iterator, Sequence

from qwen_jax.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[Sequence[str]] | None = (),
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt of one query, as text and as ids.

    `history`: pairs (query, reply), oldest first. The newest pairs are kept as long as system,
    kept pairs and the next one together stay below `max_window_size` tokens; the query is never
    counted or cut. "raw" takes the query alone. Any other format is a NotImplementedError.
    """
    _check_format(chat_format)
    if chat_format == "raw":
        return query, tokenizer.encode(query)

    newline = tokenizer.encode("\n")

    def message(role: str, content: str) -> tuple[str, list[int]]:
        # The role, the newline and the content are encoded one by one: a content that begins
        # with a newline would otherwise merge with the one before it.
        ids = tokenizer.encode(role) + newline + tokenizer.encode(content)
        return (
            f"<|im_start|>{role}\n{content}<|im_end|>",
            [tokenizer.im_start_id, *ids, tokenizer.im_end_id],
        )

    head_text, head_ids = message("system", system)
    kept_text, kept_ids = "", []
    for past_query, past_reply in reversed(history or ()):
        user_text, user_ids = message("user", past_query)
        reply_text, reply_ids = message("assistant", past_reply)
        turn_ids = newline + user_ids + newline + reply_ids
        if len(head_ids) + len(turn_ids) + len(kept_ids) >= max_window_size:
            break
        kept_text = f"\n{user_text}\n{reply_text}{kept_text}"
        kept_ids = turn_ids + kept_ids

    query_text, query_ids = message("user", query)
    opening = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return (
        f"{head_text}{kept_text}\n{query_text}\n<|im_start|>assistant\n",
        head_ids + kept_ids + newline + query_ids + newline + opening,
    )


def stop_sequences(tokenizer: Tokenizer, chat_format: str) -> tuple[tuple[int, ...], ...]:
    """The id sequences that end a reply of this format.

    An unknown format is a NotImplementedError.
    """
    _check_format(chat_format)
    if chat_format == "raw":
        return tuple(tokenizer.encode("Human:")), (tokenizer.eod_id,)
    return (tokenizer.im_end_id,), (tokenizer.im_start_id,)


def until_stop(
    parts: Iterable[Iterable[int]], stops: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Ids as they are made, without the stop that ends them.

    As many ids as a stop may still turn out to begin with are held back.
    """
    ends = sorted((tuple(stop) for stop in stops if stop), key=len, reverse=True)
    longest = len(ends[0]) if ends else 1
    held: list[int] = []
    for part in parts:
        for i in part:
            held.append(int(i))
            found = next((end for end in ends if tuple(held[-len(end) :]) == end), None)
            if found is not None:
                yield held[: -len(found)]
                return
        ready = max(0, len(held) - longest + 1)
        yield held[:ready]
        held = held[ready:]
    yield held


def decode_reply(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    chat_format: str = "chatml",
    stop: Sequence[Sequence[int]] = (),
    errors: str = "replace",
) -> str:
    """Text of a reply, without the white space around it.

    `ids`: what the model generated, without the prompt. It is cut before the first
    <|endoftext|>, in "chatml" also <|im_start|> or <|im_end|>, and before the first of the `stop`
    sequences. `errors` as in `Tokenizer.decode`. An unknown format is a NotImplementedError.
    """
    _check_format(chat_format)
    reply = [int(i) for i in ids]
    ends = [(tokenizer.eod_id,), *(tuple(sequence) for sequence in stop)]
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
