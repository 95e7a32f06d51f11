"""Which tools a request describes to the model, and which of them it must call."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.chat import ChatFormat, MessageError
from qwen_jax.serve import grammars
from qwen_jax.serve.grammars import Source
from qwen_jax.serve.protocol import ChatRequest, TokenizeRequest
from qwen_jax.serve.refusals import Refusal, invalid


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    described: the tools that the model is told about.
    required: whether it must call one.
    older: whether the request has them in the older `functions`, as whose calls it is answered.
    """

    described: Sequence[Mapping[str, Any]] = ()
    required: bool = False
    older: bool = False

    def grammar(self, chat_format: ChatFormat) -> Source | None:
        """Return the grammar that holds a reply to the tools; None if it is free."""
        if not self.described:
            return None
        try:
            text = chat_format.grammar(self.described, required=self.required)
        except MessageError as error:
            raise refused(error, self) from None
        name = "functions" if self.older else "tools"
        return None if text is None else Source(name, grammars.of_lark, text)


def tools_of(body: ChatRequest | TokenizeRequest) -> Tools:
    """Return the tools that a request means. Raises Refusal."""
    if body.functions is not None and body.tools is not None:
        raise invalid("functions", "not with tools, which replace them")
    older = body.functions is not None
    name = "functions" if older else "tools"
    given = body.functions if older else body.tools
    if body.tools == []:
        raise invalid("tools", "is empty: leave it out if there are none")
    listed = [tool.given() for tool in given or ()]
    field = "function_call" if older else "tool_choice"
    choice = body.function_call if older else body.tool_choice
    unused = body.tool_choice if older else body.function_call
    if unused is not None and unused != "none":
        other = "tool_choice" if older else "function_call"
        raise invalid(other, f"only with {'tools' if older else 'functions'}")
    if choice is None or (choice == "none" and not listed):
        choice = "auto"
    elif not listed:
        raise invalid(field, f"only with {name}")
    mode, names = _chosen(choice, field, older=older)
    if mode == "none":
        return Tools(older=older)
    if names is not None:
        known = {_name(tool) for tool in listed}
        if missing := [one for one in names if one not in known]:
            raise invalid(field, f"{missing[0]!r} is not among {name}")
        listed = [tool for tool in listed if _name(tool) in names]
    return Tools(listed, required=mode == "required", older=older)


def _name(tool: Mapping[str, Any]) -> str:
    return tool.get("function", tool).get("name") or ""


def _chosen(choice: Any, field: str, *, older: bool) -> tuple[str, list[str] | None]:
    """Return "none", "auto" or "required", and the names of the tools; None for all of them."""
    words = ("none", "auto") if older else ("none", "auto", "required")
    if isinstance(choice, str) and choice in words:
        return choice, None
    if isinstance(choice, dict):
        if older and isinstance(choice.get("name"), str):
            return "required", [choice["name"]]
        if not older and choice.get("type") == "function":
            return "required", [_named(choice, f"{field}.function.name")]
        if not older and choice.get("type") == "allowed_tools":
            return _allowed(choice.get("allowed_tools"), f"{field}.allowed_tools")
    forms = '{"name": ...}' if older else '{"type": "function", "function": {"name": ...}}'
    raise invalid(field, f"must be {', '.join(words)} or {forms}")


def _named(choice: Any, param: str) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid(param, "is missing")
    return name


def _allowed(given: Any, param: str) -> tuple[str, list[str]]:
    """Read OpenAI's list of the tools that a reply may call."""
    mode = given.get("mode") if isinstance(given, dict) else None
    if not isinstance(given, dict) or mode not in ("auto", "required"):
        raise invalid(f"{param}.mode", "must be auto or required")
    tools = given.get("tools")
    if not isinstance(tools, list) or not tools:
        raise invalid(f"{param}.tools", "must be a list of at least one tool")
    return mode, [_named(one, f"{param}.tools[{i}].function.name") for i, one in enumerate(tools)]


def refused(error: MessageError, tools: Tools) -> Refusal:
    """Return the error of a chat format in terms of the request's fields."""
    param, message = error.param, str(error)
    if tools.older:
        renamed = param.replace("tools[", "functions[").replace(".function", "")
        param, message = renamed, message.replace(param, renamed, 1)
    return Refusal(400, message, param=param)
