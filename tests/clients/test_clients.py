"""OpenAI's package, LangChain, smolagents and curl against the server, tools to the end."""

import json
import subprocess
from typing import Any

import openai
import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
            "required": ["yes", "kind"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
        yield found


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **settings})


def test_openai_chats_and_streams(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == "Hello 你好"
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > 0
    chunks = [*chat(client, stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello 你好" and chunks[-1].usage == answer.usage
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    answer = client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["Hell", "Hell"]


def test_openai_logprobs_and_n(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, logprobs=True, top_logprobs=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        content = choice.logprobs.content
        data = b"".join(bytes(token.bytes) for token in content)
        assert data.decode() == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in content)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_calls_a_tool_to_the_end(client: openai.OpenAI, stream: bool) -> None:
    settings = {"tools": [WEATHER]}
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    if stream:
        with client.chat.completions.stream(model="tiny", messages=messages, **settings) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = chat(client, messages=messages, **settings).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = chat(client, messages=messages, **settings).choices[0]
    assert answer.message.content == "It is sunny in Rome." and answer.finish_reason == "stop"


def test_openai_schemas(client: openai.OpenAI) -> None:
    answer = chat(client, response_format=SCHEMA, max_tokens=200)
    assert set(json.loads(answer.choices[0].message.content)) == {"yes", "kind"}

    class Answer(BaseModel):
        yes: bool

    parsed = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    choice = chat(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        chat(client, model="gpt-4")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, temperature=9)
    assert error.value.param == "temperature" and "temperature" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, max_tokens=10**6)
    assert error.value.code == "context_length_exceeded"


def test_langchain_calls_a_tool_to_the_end(address: str) -> None:
    @langchain_tool
    def weather(city: str) -> str:
        """Tells the weather."""
        return "sunny"

    model = ChatOpenAI(model="tiny", base_url=address, api_key="none").bind_tools([weather])
    messages: list[Any] = [("user", "What is the weather in Rome?")]
    message = model.invoke(messages)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    messages += [message, result]
    assert model.invoke(messages).content == "It is sunny in Rome."
    assert "".join(part.text for part in model.stream(messages)) == "It is sunny in Rome."
    assert OpenAI(model="tiny", base_url=address, api_key="none").invoke("x").startswith("Hello")


def test_smolagents_calls_a_tool_to_the_end(address: str) -> None:
    @tool
    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: The name of the city.
        """
        return "sunny"

    model = OpenAIServerModel(model_id="tiny", api_base=address, api_key="none")
    agent = ToolCallingAgent(tools=[weather], model=model, max_steps=4)
    assert agent.run("What is the weather in Rome?") == "It is sunny in Rome."


def test_curl_reads_a_stream(address: str) -> None:
    data = json.dumps({"messages": HELLO, "stream": True})
    command = ["curl", "--silent", "--no-buffer", f"{address}/chat/completions", "-d", data]
    text = subprocess.run(
        [*command, "-H", "Content-Type: application/json"], capture_output=True, check=True
    ).stdout.decode()
    assert text.startswith("data: {") and text.endswith("data: [DONE]\n\n")
