"""What a step trains on: conversations as ids and labels.

Control tokens are placed here; what people wrote is encoded as ordinary text, whatever it spells.
"""

from collections.abc import Mapping, Sequence

from qwen_jax.tokenizer import Tokenizer
from train.loss import IGNORED

LOSS_ON = ("qwen", "assistant")
_ROLES = ("user", "assistant")


def sft_example(
    tokenizer: Tokenizer,
    conversations: Sequence[Mapping[str, str]],
    system: str,
    max_len: int,
    loss_on: str = "qwen",
) -> tuple[list[int], list[int]]:
    """ids and labels of a conversation in ChatML, cut to `max_len`; labels are not shifted.

    conversations: turns {"from": "user" or "assistant", "value": text}; what comes before the first
    of a user is left out. loss_on: "qwen" is the choice of the original's script, which trains
    replies with their end, and of every turn the control tokens and the newline after it (not its
    injection: there, text can spell control tokens); "assistant" replies and their end alone.
    Labels that are not trained are `IGNORED`.

    Raises ValueError for another role, a turn without text, or no reply to a user.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on {loss_on!r}: allowed are {', '.join(LOSS_ON)}")
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    labels: list[int] = []

    def add(part: Sequence[int], trained: bool) -> None:
        ids.extend(part)
        labels.extend(part if trained else [IGNORED] * len(part))

    for role, text in [("system", system), *_turns(conversations)]:
        reply, all_controls = role == "assistant", loss_on == "qwen"
        add([tokenizer.im_start_id], all_controls)
        add([*tokenizer.encode(role), *newline], False)
        add(tokenizer.encode(text), reply)
        add([tokenizer.im_end_id], reply or all_controls)
        add(newline, all_controls)
    return ids[:max_len], labels[:max_len]


def _turns(conversations: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(role, text) of each turn, from the first of a user on."""
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(conversations, 1):
        role, text = turn.get("from"), turn.get("value")
        if role not in _ROLES:
            raise ValueError(f"turn {number} is from {role!r}: allowed are {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f"turn {number} has no text in 'value'")
        if turns or role == "user":
            turns.append((role, text))
    if "assistant" not in {role for role, _ in turns}:
        raise ValueError("the conversation has no reply to a user: there is nothing to learn")
    return turns
