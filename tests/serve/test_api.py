"""Routes, request fields and answers of the OpenAI API, over an engine that says what is asked."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen_jax.engine.settings import Settings, Started
from tests.support.served_app import CHAT_STOPS, HELLO, TOKENIZER, Served, opened, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with opened(adapters=["poet"]) as one:
        yield one


@pytest.fixture
def one(shared: Served) -> Served:
    shared.says = "Hello 你好"
    return shared


def last(one: Served) -> Settings:
    """The settings of the newest request that the engine got."""
    return one.engine.submitted[-1][1]


def test_a_chat_is_answered_in_openais_shape(one: Served) -> None:
    found = one.chat(model="tiny")
    assert found["id"].startswith("chatcmpl-") and found["object"] == "chat.completion"
    assert isinstance(found["created"], int) and found["model"] == "tiny"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello 你好", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt, _ = one.engine.submitted[-1]
    new = len(TOKENIZER.encode("Hello 你好")) + 1  # <|im_end|>
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": new,
        "total_tokens": len(prompt) + new,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_tokenize_gives_the_prompt_that_the_chat_runs(one: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for body in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        told = one.ask("/tokenize", messages=HELLO, **body, return_token_strs=True)
        one.chat(**body)
        assert told["tokens"] == one.engine.submitted[-1][0]
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    text = one.ask("/tokenize", prompt="<|im_end|> 你")["tokens"]
    assert TOKENIZER.im_end_id not in text
    assert one.ask("/detokenize", tokens=text) == {"prompt": "<|im_end|> 你"}


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_a_prompt_may_be_a_text_or_ids_one_or_several(one: Served, prompt: Any) -> None:
    found = one.complete(prompt=prompt, max_tokens=3)
    assert [choice["text"] for choice in found["choices"]] == ["Hel"]
    several = one.complete(prompt=["a", "b"], max_tokens=2, n=2, temperature=1, seed=5)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    asked = one.engine.submitted[-4:]
    assert sorted((ids, x.seed) for ids, x in asked) == [
        ([97], 5), ([97], 6), ([98], 5), ([98], 6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "setting", "wanted"),
    [
        ("max_tokens", 7, "max_new_tokens", 7),
        ("max_tokens", 7.0, "max_new_tokens", 7),
        ("max_completion_tokens", 8, "max_new_tokens", 8),
        ("temperature", 0.5, "temperature", 0.5),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", -1, "top_k", 0),
        ("top_k", 4, "top_k", 4),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", -2, "presence_penalty", -2),
        ("frequency_penalty", 1.5, "frequency_penalty", 1.5),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("logit_bias", {"5": -100, "7": 1.5}, "logit_bias", {5: -100, 7: 1.5}),
        ("min_tokens", 3, "min_new_tokens", 3),
        ("stop_token_ids", [9], "stops", (*CHAT_STOPS, 9)),
        ("ignore_eos", True, "stops", ()),
        ("allowed_token_ids", [5, 6], "allowed", [5, 6]),
        ("cache_salt", "me", "salt", "me"),
        ("seed", 11, "seed", 11),
        ("seed", -1, "seed", 2**32 - 1),
        ("logprobs", True, "logprobs", 0),
        ("prompt_logprobs", 3, "prompt_logprobs", 3),
        ("model", "poet", "adapter", "poet"),
    ],
)
def test_a_field_becomes_a_setting(
    one: Served, field: str, value: Any, setting: str, wanted: Any
) -> None:
    one.chat(**{"max_tokens": 5, field: value})
    assert getattr(last(one), setting) == wanted


def test_defaults_are_the_models_then_openais() -> None:
    own = {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.1}
    with opened("x", defaults={**own, "max_new_tokens": 9}) as one:
        one.chat()
        for name, value in {**own, "max_new_tokens": 9, "stops": CHAT_STOPS}.items():
            assert getattr(last(one), name) == value
        one.complete()
        assert last(one).max_new_tokens == 16 and last(one).stops == (TOKENIZER.eod_id,)
    with opened("x") as one:  # a model that takes the most likely token
        one.chat(seed=3)
        assert last(one).temperature == 0
        one.chat(top_p=0.5)
        assert last(one).temperature == 1


def test_n_replies_have_seeds_and_the_later_ones_wait_for_the_first(one: Served) -> None:
    found = one.chat(n=3, seed=2**32 - 1, temperature=1)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [x.seed for _, x in one.engine.submitted[-3:]] == [2**32 - 1, 0, 1]
    with ThreadPoolExecutor(1) as thread, opened("abc", stepwise=True) as slow:
        asked = slow.engine.submitted
        answer = thread.submit(slow.chat, n=3)
        until(lambda: len(asked) == 1)
        slow.engine.step()
        until(lambda: len(asked) == 3)
        for _ in range(5):
            slow.engine.step()
        assert len(answer.result()["choices"]) == 3


def test_stop_texts_cut_the_reply(one: Served) -> None:
    one.says = "one two three"
    found = one.chat(stop=[" thr", "zzz"])["choices"][0]
    assert found["message"]["content"] == "one two"
    assert found["finish_reason"] == "stop" and found["stop_reason"] == " thr"
    kept = one.chat(stop=" thr", include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == "one two thr"
    late = one.chat(stop="one", min_tokens=4, max_tokens=20)["choices"][0]
    assert late["message"]["content"] == "one two three"
    one.says = [97, 98, 99, 99]
    found = one.complete(stop_token_ids=[98])["choices"][0]
    assert (found["text"], found["stop_reason"], found["finish_reason"]) == ("a", 98, "stop")
    assert one.complete(max_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_what_comes_after_a_stop_is_not_generated() -> None:
    with opened("one two" + "y" * 1500, pause=0.001) as one:
        one.chat(stop="tw")
        one.stream(stop="tw")
        until(lambda: one.engine.cancelled == [0, 1])


def test_tokens_of_a_prompt_that_were_cached_are_counted_once() -> None:
    with opened("abc", cached=3) as one:
        usage = one.chat(n=2)["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
        usage = one.complete(prompt=["abcd", "efgh"])["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


def test_control_tokens_are_left_out_of_text_unless_asked_for(one: Served) -> None:
    one.says = [97, TOKENIZER.extra_ids[0], 98]
    assert one.chat()["choices"][0]["message"]["content"] == "ab"
    shown = one.chat(skip_special_tokens=False)["choices"][0]["message"]["content"]
    assert shown == "a<|extra_0|>b"


def test_logprobs_of_a_chat_hold_its_bytes_and_alternatives(one: Served) -> None:
    one.says = "a你😀"
    found = one.chat(logprobs=True, top_logprobs=2)["choices"][0]
    entries = found["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "a你😀"
    assert entries[0] == {
        "token": "a",
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -1.0, "bytes": [97]},
            {"token": "b", "logprob": -2.0, "bytes": [98]},
        ],
    }
    assert [entry["token"] for entry in entries[2:]] == ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    cut = one.chat(logprobs=True, stop="你")["choices"][0]
    assert [entry["token"] for entry in cut["logprobs"]["content"]] == ["a"]
    named = one.chat(logprobs=True, return_tokens_as_token_ids=True)["choices"][0]
    assert named["logprobs"]["content"][0]["token"] == "token_id:97"


def test_completions_score_the_prompt_as_lm_eval_asks(one: Served) -> None:
    """echo, logprobs and max_tokens 1, or 0; the last token is there even if it is a stop."""
    one.says = [TOKENIZER.eod_id]
    found = one.complete(prompt=[97, 98, 99], echo=True, logprobs=1, max_tokens=1)["choices"][0]
    told = found["logprobs"]
    assert told["tokens"] == ["a", "b", "c", "<|endoftext|>"]
    assert told["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert told["text_offset"] == [0, 1, 2, 3] and found["text"] == "abc"
    assert told["top_logprobs"][:2] == [None, {"b": -1.0}]
    only = one.complete(prompt="abc", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert only["text"] == "abc" and only["logprobs"]["token_logprobs"] == [None, -1.0]
    assert only["finish_reason"] == "length"


def test_scores_are_told_though_a_row_was_had_before() -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 1}
    with ThreadPoolExecutor(1) as thread, opened("x", stepwise=True) as slow:
        answer = thread.submit(slow.complete, **body)
        until(lambda: slow.engine.submitted)
        slow.engine._live[0].listener(Started(0))
        assert slow.served.desk is not None
        until(lambda: slow.served.desk.waiting == 0)
        until(
            lambda: not any(job.events for group in slow.served.desk.groups for job in group.jobs)
        )
        slow.engine.step()
        told = answer.result()["choices"][0]["logprobs"]
        assert told["token_logprobs"] == [None, -1.0, -1.0]


def test_prompt_logprobs_and_ids_are_vllms(one: Served) -> None:
    found = one.complete(prompt="ab你", prompt_logprobs=2, return_token_ids=True)["choices"][0]
    told = found["prompt_logprobs"]
    first, second = TOKENIZER.encode("ab你")
    assert told == [
        None,
        {
            str(second): {"logprob": -1.0, "rank": 1, "decoded_token": "你"},
            str(second + 1): {"logprob": -2.0, "rank": 2, "decoded_token": "<|endoftext|>"},
        },
    ]
    assert found["prompt_token_ids"] == [first, second]
    assert found["token_ids"] == [*TOKENIZER.encode("Hello 你好"), TOKENIZER.eod_id]


def test_a_prompt_is_cut_where_asked(one: Served) -> None:
    one.complete(prompt="0123456789", truncate_prompt_tokens=3)
    assert one.engine.submitted[-1][0] == TOKENIZER.encode("789")


def test_a_reply_continues_the_last_message(one: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        found = one.chat(messages=messages, echo=True, **more)["choices"][0]["message"]
        assert found["content"] == "Well, Hello 你好"
        assert TOKENIZER.decode(one.engine.submitted[-1][0]).endswith("assistant\nWell,")
    assert one.chat(messages=messages)["choices"][0]["message"]["content"] == "Hello 你好"


def test_models_are_listed_with_adapters(one: Served) -> None:
    listed = one.client.get("/v1/models").json()
    assert [(x["id"], x["parent"], x["object"]) for x in listed["data"]] == [
        ("tiny", None, "model"), ("poet", "tiny", "model")
    ]  # fmt: skip
    assert one.client.get("/v1/models/poet").json() == listed["data"][1]
    assert one.client.get("/v1/models/none").status_code == 404
    assert one.client.get("/version").json() and one.client.get("/load").json() == {
        "server_load": 0
    }
    assert one.client.get("/health").text == ""


def test_a_field_that_is_not_known_is_ignored_and_named_once(
    one: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        one.chat(metadata={"a": 1}, no_such_field=2)
    one.refused(CHAT, messages=HELLO, length_penalty=2)  # refused, so not ignored
    assert [record.args for record in caplog.records] == [("'no_such_field'",)]


def test_what_takes_long_to_encode_or_decode_is_beside_the_event_loop(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set[int]()

    def seen(made: Any) -> Any:
        def told(*args: Any, **more: Any) -> Any:
            threads.add(threading.get_ident())
            return made(*args, **more)

        return told

    async def here() -> int:
        return threading.get_ident()

    assert one.client.portal is not None
    loop = one.client.portal.call(here)
    tool = {"name": "f", "description": "x" * 5000}
    monkeypatch.setattr(one.served.chat_format, "prompt", seen(one.served.chat_format.prompt))
    monkeypatch.setattr(one.served.tokenizer, "decode", seen(one.served.tokenizer.decode))
    one.refused(CHAT, messages=HELLO, functions=[tool] * 2)
    call = {"name": "f", "arguments": "x" * 5000}
    reply = {"role": "assistant", "content": None, "function_call": call}
    one.refused(CHAT, messages=[*HELLO, reply])
    one.ask("/detokenize", tokens=[5] * 5000)
    assert threads and loop not in threads


def test_paths_and_methods_that_are_not_there_have_openais_errors(one: Served) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404), ("POST", "/nothing", 404), ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405), ("POST", "/", 405),
    ):  # fmt: skip
        answer = one.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


def test_the_description_has_what_routes_answer(one: Served) -> None:
    told = one.client.get("/openapi.json").json()
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert path.startswith(("/health", "/metrics")) or operation["responses"]["200"]
    assert not [name for name in told["components"]["schemas"] if "Validation" in name]


def test_the_page_loads_nothing_from_elsewhere(one: Served) -> None:
    answer = one.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
