"""What requests may say: the fields of OpenAI's API, and vLLM's beside them.

A field that is not known is ignored, as vLLM does, and named once in the log. A field whose effect
cannot be had is an error unless it asks for nothing.
"""

import logging
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)

from qwen_jax.runtime import texts, values

_LOG = logging.getLogger(__name__)
_MOST_NAMED = 200  # of ignored fields that the log names
_ignored: set[str] = set()

Whole = Annotated[int, BeforeValidator(values.from_file)]  # 5.0 counts as 5
Number = Annotated[float, Field(ge=-values.FLOAT32, le=values.FLOAT32)]
Count = Annotated[Whole, Field(ge=1, le=values.INT32)]
# Lists end at their first mistake: a million of them would take gigabytes to tell.
Id = Annotated[int, Field(ge=0, le=values.INT32)]  # no Python for each of a million
Ids = Annotated[list[Id], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON object of a request, or inside one. Values are taken as they are, but for 5.0 as 5."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """Return the object as it was sent, without defaults."""
        return self.model_dump(exclude_unset=True)


_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
Content = Annotated[Any, WithJsonSchema(_CONTENT)]  # the chat format checks it
Arguments = str | dict[str, JsonValue] | None


class Call(Body):
    """The call of a function: its name, and the text of its arguments."""

    name: str = ""
    arguments: Arguments = None


class ToolCall(Body):
    """A call inside `tool_calls`."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Call


class Message(Body):
    """A message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: Call | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=20_000, fail_fast=True)]


class Function(Body):
    """A function that the model may call."""

    name: str | None = None
    description: str | None = None
    parameters: JsonValue = None  # Qwen's own tools have a list
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class NamedSchema(Body):
    """The schema of a response format."""

    name: str = ""
    json_schema: dict[str, JsonValue] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that a reply must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    """vLLM's form for replies, one of these kinds."""

    json_schema: dict[str, JsonValue] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: JsonValue = None


class StreamOptions(Body):
    """What a stream tells beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Body):
    """The fields that chats and completions have in common; null counts as absent."""

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=0, le=values.INT32)] | None = None
    n: Count | None = None
    stop: str | Texts | None = None
    seed: Annotated[Whole, Field(ge=-values.INT64 - 1, le=values.INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: Annotated[Whole, Field(ge=-1, le=values.INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, ge=values.TINY, le=values.FLOAT32)] | None = (
        None
    )
    min_tokens: Annotated[Whole, Field(ge=0, le=values.INT32)] | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Texts | None = None
    cache_salt: Annotated[str, Field(max_length=1000)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=values.INT32)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, JsonValue] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _name_ignored(self) -> "Common":
        """Name fields that are not known in the log, each once."""
        for name in (self.model_extra or {}).keys() - MEANINGLESS - UNSERVED.keys():
            if name not in _ignored and len(_ignored) < _MOST_NAMED:
                _ignored.add(name)
                _LOG.warning("requests have the field %s, which is ignored", texts.shown(name))
        return self


# Fields of OpenAI's that mean nothing to a local model of text, and vLLM's that change no token.
MEANINGLESS = frozenset(
    (
        "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "verbosity", "modalities", "audio", "prediction",
        "web_search_options", "moderation", "reasoning_effort", "priority", "request_id",
        "spaces_between_special_tokens", "add_special_tokens", "detokenize",
    )
)  # fmt: skip
# Fields whose effect cannot be had, with the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "bad_words": (None, []),
    "logprob_token_ids": (None, []),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "chat_template": (None,),
    "documents": (None, []),
    "prompt_embeds": (None,),
    "logits_processors": (None, []),
    "guided_whitespace_pattern": (None,),
    "thinking_token_budget": (None,),
}


class ChatRequest(Common):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(fail_fast=True)] | None = None
    function_call: JsonValue = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Common):
    """The body of POST /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    best_of: Count | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


class TokenizeRequest(Body):
    """The body of POST /tokenize: a prompt, or what a chat request has."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: JsonValue = None
    functions: Annotated[list[Function], Field(fail_fast=True)] | None = None
    function_call: JsonValue = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Ids
