"""The chat format of first-generation Qwen: ChatML, with tools in ReAct's text."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.chat import call_grammar, conversation, react, replies
from qwen_jax.chat.formats import Begins, MessageError, Mode, Prompt, Reply, ReplyParser
from qwen_jax.chat.prompt import DEFAULT_SYSTEM, Ending, assemble
from qwen_jax.chat.stops import stop_texts
from qwen_jax.chat.tokenizer import Tokenizer

_MODES: dict[Ending, Mode] = {"reply": "chat", "open": "completion", "closed": "closed"}


class ChatML:
    """First-generation Qwen's chat format (`formats.ChatFormat`).

    A reply makes at most one call, because Qwen was trained to wait for its result.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: str | Sequence[str] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_window_size: int | None = None,
    ) -> Prompt:
        """Return what the model is given, as the original server puts it together.

        The arguments are those of `formats.ChatFormat.prompt`. As in the original, a reply that
        comes last is continued even if that is not asked for, and a result that comes last is
        followed by the thought about it. The original's window is 6144 tokens.
        """
        opened = add_generation_prompt or continue_final_message
        said = conversation.read(messages, tools, opened=opened)
        ending: Ending = "closed"
        if opened:
            ending = "reply" if said.last == "user" else "open"
        if continue_final_message and ending != "open":
            raise MessageError(
                "continue_final_message", f"the last message has role {said.last!r}, not assistant"
            )
        text, ids = assemble(
            self._tokenizer,
            said.system,
            said.turns,
            ending=ending,
            max_window_size=max_window_size,
        )
        asked = _with_bare(_checked(stop))
        stops = [*(["<|im_end|>"] if ending == "open" else []), *asked]
        if tools and react.RESULT not in stops:
            stops.append(react.RESULT)
        begins: Begins = "reply"
        if ending == "open" and not said.calls:
            begins = "answer" if said.last == "assistant" else "thought"
        return Prompt(
            text=text,
            ids=ids,
            mode=_MODES[ending],
            begins=begins if tools else "plain",
            asked=tuple(asked),
            stops=tuple(stops),
            stop_ids=tuple(tuple(self._tokenizer.encode(x, allowed_special="all")) for x in stops),
            end_ids=(
                self._tokenizer.im_end_id,
                self._tokenizer.im_start_id,
                self._tokenizer.eod_id,
            ),
        )

    def parser(self, begins: Begins) -> ReplyParser:
        """Return a parser for text that follows a prompt, with its `begins`."""
        return replies.PlainParser() if begins == "plain" else replies.ReactParser(begins)

    def parse(self, text: str, begins: Begins) -> Reply:
        """Return a whole reply as a message."""
        return replies.parse(text, begins)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        names: Sequence[str] | None = None,
    ) -> str | None:
        """Return a grammar in llguidance's Lark that holds a reply (`formats.ChatFormat`)."""
        return call_grammar.react(tools, required=required, names=names)


def example_context(
    tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], history: Sequence[tuple[str, str]]
) -> tuple[str, list[int]]:
    """Build the prompt of the original's `examples/react_demo.py`, as text and as token ids.

    tools: objects as `react.example_instruction` takes them.
    history: pairs (question, reply), oldest first; the last reply is what the model continues, and
        may be empty. Replies are given as the model wrote them.

    Tools are described before the last question but one, or the only one.
    """
    pairs = list(history)
    if not pairs:
        raise ValueError("history must have at least one pair (question, reply)")
    turns: list[tuple[str, str]] = []
    for number, (asked, reply) in enumerate(pairs):
        if tools and number == max(len(pairs) - 2, 0):
            asked = react.question(react.example_instruction(tools), asked)
        texts = (conversation.trimmed(asked), conversation.trimmed(reply))
        turns += zip(("user", "assistant"), texts, strict=True)
    return assemble(tokenizer, DEFAULT_SYSTEM, turns, ending="open")


def _checked(stop: str | Sequence[str]) -> tuple[str, ...]:
    try:
        return stop_texts(stop)
    except ValueError as error:
        raise MessageError("stop", str(error)) from None


def _with_bare(stop: Sequence[str]) -> list[str]:
    """Return the stop texts of a request, and each again without leading newlines.

    A newline may be part of a token, whose text a stop that begins with it would not match.
    """
    found = list(stop)
    for text in stop:
        bare = text.lstrip("\n")
        if bare and bare not in found:
            found.append(bare)
    return found
