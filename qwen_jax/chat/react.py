"""The words of ReAct (arXiv 2210.03629) as Qwen was trained on them: tools, calls, answers.

A question becomes a user turn and a reply, in which thoughts, calls, their results and the answer
follow each other. Training data (`tools.turns`) and the server (`conversation`) both write with
these words. This module knows neither messages nor token ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.chat import messages

THOUGHT, ACTION, INPUT = "Thought:", "Action:", "Action Input:"
RESULT, FINAL = "Observation:", "Final Answer:"
MARKERS = (THOUGHT, ACTION, INPUT, RESULT, FINAL)

_INSTRUCTION = """Answer the following questions as best you can. You have access to the following \
{noun}:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_TOOL = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
    "{told} Parameters: {parameters}"
)
# Sentences of the original's examples after the parameters of a tool, by its `args_format`.
_FORMATS = {
    "json": " Format the arguments as a JSON object.",
    "code": " Enclose the code within triple backticks (`) at the beginning and end of the code.",
}


@dataclasses.dataclass(frozen=True)
class Described:
    """What the instruction says about a tool.

    name: the name by which it is called.
    human: the name in its description.
    told: the description.
    parameters: its parameters, as JSON text.
    """

    name: str
    human: str
    told: str
    parameters: str

    @property
    def text(self) -> str:
        """The line about the tool."""
        return _TOOL.format(**dataclasses.asdict(self))


@dataclasses.dataclass
class Step:
    """One step of a turn: a tool call with its result, or other text.

    text: the text of the step, without the result.
    id: the id of the call.
    name: the name of the called tool.
    waits: whether the call still lacks a result.
    result: the result of the call, or None.
    """

    text: str
    id: Any = None
    name: str = ""
    waits: bool = False
    result: str | None = None


def spans(steps: Sequence[Step]) -> list[tuple[str, bool]]:
    """Join the steps of a turn, each call's result after it.

    Returns pairs (text, whether the author of the turn wrote it, and not a tool).
    """
    found: list[tuple[str, bool]] = []
    for step in steps:
        found.append((f"\n{step.text}" if found else step.text, True))
        if step.result is not None:
            found.append((f"\n{RESULT} {step.result}", False))
    return found


def call(thought: str, name: str, *, arguments: str) -> str:
    """Return the text of a tool call. `thought` is the line before it, with its marker."""
    return f"{thought}\n{ACTION} {name}\n{INPUT} {arguments}"


def thought_for(name: str) -> str:
    """Return the thought before a call that has none of its own."""
    return f"{THOUGHT} I can use {name}."


def answer(text: str) -> str:
    """Return the text of an answer after tools were described."""
    return f"{THOUGHT} I now know the final answer.\n{FINAL} {text}"


def question(instruction: str, text: str) -> str:
    """Return the text of a question with the instruction before it."""
    return f"{instruction}\n\nQuestion: {text}"


def instruct(
    lines: Sequence[str], names: Sequence[str], *, noun: str = "APIs", separator: str = ", "
) -> str:
    """Return the instruction that describes tools to the model.

    lines: the line about each tool.
    names: the name of each tool.
    noun: what the instruction calls the tools.
    separator: stands between the names.
    """
    return _INSTRUCTION.format(noun=noun, tools="\n\n".join(lines), names=separator.join(names))


def example_instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the instruction of the original's `examples/react_demo.py`.

    tools: objects with name_for_model, name_for_human, description_for_model and parameters. Their
        `args_format`, "json" (also where it is absent) or "code", adds a sentence about arguments.

    Raises NotImplementedError for another `args_format`, and ValueError for other objects.
    """
    lines = []
    for number, tool in enumerate(messages.listed("tools", tools), 1):
        kind = messages.function_of(tool, f"tool {number}").get("args_format", "json")
        if kind not in _FORMATS:
            raise NotImplementedError(f"args_format must be 'json' or 'code', got {kind!r}")
        lines.append(_example(tool, number).text + _FORMATS[kind])
    return instruct(lines, [tool["name_for_model"] for tool in tools])


def page_instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the instruction of the original's `examples/react_prompt.md`, a page about prompts.

    tools: objects as `example_instruction` takes them; their `args_format` is not read.
    """
    found = [_example(tool, n) for n, tool in enumerate(messages.listed("tools", tools), 1)]
    lines = [tool.text + _FORMATS["json"] for tool in found]
    return instruct(lines, [tool.name for tool in found], noun="tools", separator=",")


def _example(tool: Mapping[str, Any], number: int) -> Described:
    """Read a tool as the original's examples spell it. Raises ValueError if a field is missing."""
    what = f"tool {number}"
    keys = ("name_for_model", "name_for_human", "description_for_model")
    for key in keys:
        if not isinstance(tool.get(key), str):
            raise ValueError(f"{what} has no text in {key!r}")
    name, human, told = (tool[key] for key in keys)
    return Described(
        name, human, told, messages.as_json(tool.get("parameters"), f"the parameters of {what}")
    )
