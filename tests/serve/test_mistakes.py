"""What is wrong with a request is an error that names the field."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from qwen_jax.serve import protocol
from tests.support.served_app import HELLO, Served, opened

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with opened() as found:
        yield found


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"model": "gpt-4"}, "model", "model_not_found"),
    (TEXT, {"prompt": "x", "model": "gpt-4"}, "model", "model_not_found"),
    (CHAT, {"messages": []}, "messages", ""),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", ""),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", ""),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", ""),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", ""),
    (CHAT, {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
     "messages[1].role", ""),
    (TEXT, {}, "prompt", ""),
    (TEXT, {"prompt": []}, "prompt", ""),
    (TEXT, {"prompt": ["a", ""]}, "prompt[1]", ""),
    (TEXT, {"prompt": [10**6]}, "prompt", ""),
    (TEXT, {"prompt": "a" * 5000}, "prompt", "context_length_exceeded"),
    (CHAT, {"max_tokens": 5000}, "max_tokens", "context_length_exceeded"),
    (CHAT, {"max_completion_tokens": 5000}, "max_completion_tokens", "context_length_exceeded"),
    (CHAT, {"max_tokens": 0}, "max_tokens", ""),
    (CHAT, {"max_tokens": -1}, "max_tokens", ""),
    (CHAT, {"max_tokens": "5"}, "max_tokens", ""),
    (CHAT, {"max_tokens": 1.5}, "max_tokens", ""),
    (CHAT, {"max_tokens": True}, "max_tokens", ""),
    (CHAT, {"temperature": 2.1}, "temperature", ""),
    (CHAT, {"temperature": "hot"}, "temperature", ""),
    (CHAT, {"top_p": -0.1}, "top_p", ""),
    (CHAT, {"top_k": -2}, "top_k", ""),
    (CHAT, {"min_p": 1.1}, "min_p", ""),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty", ""),
    (CHAT, {"presence_penalty": 3}, "presence_penalty", ""),
    (CHAT, {"frequency_penalty": -3}, "frequency_penalty", ""),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", ""),
    (CHAT, {"logit_bias": {"9999": 1}}, "logit_bias.9999", ""),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias.1", ""),
    (CHAT, {"n": 0}, "n", ""),
    (CHAT, {"n": 1000}, "n", ""),
    (TEXT, {"prompt": ["a"] * 100, "n": 2}, "prompt", ""),
    (CHAT, {"stop": ["a"] * 17}, "stop", ""),
    (CHAT, {"stop": ["a", ""]}, "stop[1]", ""),
    (CHAT, {"stop": 3}, "stop", ""),
    (CHAT, {"stop": "a" * 257}, "stop", ""),
    (CHAT, {"messages": HELLO * 1025}, "messages", "context_length_exceeded"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", ""),
    (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", ""),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", ""),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ""),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", ""),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of", ""),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", ""),
    (CHAT, {"bad_words": ["x"]}, "bad_words", ""),
    (CHAT, {"min_tokens": 9, "max_tokens": 8}, "min_tokens", ""),
    (CHAT, {"stop_token_ids": [481]}, "stop_token_ids[0]", ""),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids[0]", ""),
    (CHAT, {"stop_token_ids": list(range(20))}, "stop_token_ids", ""),
    (CHAT, {"allowed_token_ids": []}, "allowed_token_ids", ""),
    (CHAT, {"allowed_token_ids": [999]}, "allowed_token_ids[0]", ""),
    (CHAT, {"allowed_token_ids": [479]}, "allowed_token_ids", ""),  # the model's, no token
    (CHAT, {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1},
     "allowed_token_ids", ""),
    (CHAT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ""),
    (CHAT, {"seed": 2**63}, "seed", ""),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True},
     "continue_final_message", ""),
    (CHAT, {"continue_final_message": True}, "continue_final_message", ""),
    (CHAT, {"length_penalty": 2}, "length_penalty", ""),
    ("/tokenize", {}, "prompt", ""),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt", ""),
    ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", ""),
    ("/detokenize", {"tokens": [481]}, "tokens", ""),
    ("/detokenize", {"tokens": "x"}, "tokens", ""),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "code"), WRONG)
def test_what_is_wrong_is_named(
    one: Served, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    body = {"messages": HELLO, **body} if path == CHAT else body
    status, error = one.refused(path, **body)
    assert status == (404 if code == "model_not_found" else 400)
    assert error["param"] == param, error
    assert param in error["message"] and "\n" not in error["message"]
    assert error["code"] == (code or 400)


def test_a_field_of_the_wrong_type_is_named_whichever_it_is(one: Served) -> None:
    for path, model in ((CHAT, protocol.ChatRequest), (TEXT, protocol.CompletionRequest)):
        for name in model.model_fields:
            if name in ("tool_choice", "function_call"):  # they are read after the prompt's tools
                continue
            need = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
            _, error = one.refused(path, **{**need, name: [{"what": []}]})
            assert str(error["param"]).startswith(name), error


def test_a_list_is_read_to_its_first_mistake() -> None:
    wrong: list[Any] = [{}] * 50
    lists = ("stop", "bad_words", "stop_token_ids", "allowed_token_ids", "prompt", "guided_choice")
    for name in lists:
        with pytest.raises(ValidationError) as caught:
            protocol.CompletionRequest.model_validate({"prompt": "x", name: wrong})
        assert caught.value.error_count() < 10, name
    for name in ("messages", "tools", "functions"):
        with pytest.raises(ValidationError) as caught:
            protocol.ChatRequest.model_validate({"messages": HELLO, name: [0] * 50})
        assert caught.value.error_count() < 10, name
