"""What is refused before a route sees it: keys, hosts, sizes, JSON of strangers, a full queue."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qwen_jax.serve import strict_json
from qwen_jax.serve.gate import Gate
from qwen_jax.serve.refusals import Refusal
from qwen_jax.serve.served import Limits
from tests.support.served_app import HELLO, TOKENIZER, Served, opened, until

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def test_one_of_the_keys_is_needed_but_for_health_and_the_page() -> None:
    with opened(keys=["one", "two"]) as one:
        get = one.client.get
        for key in ("one", "two"):
            assert get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for header in (None, "Bearer", "Bearer three", "Basic one", "one", "Bearer öne"):
            given = {} if header is None else {"authorization": header.encode()}
            answer = get("/v1/models", headers=given)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert "one" not in answer.text
        assert get("/health").status_code == get("/").status_code == 200
        for path in ("/metrics", "/version", "/openapi.json", "/nothing", "/load"):
            assert get(path).status_code == 401
        assert one.client.post(TEXT, json={"prompt": "x"}).status_code == 401
        assert not one.engine.submitted


def test_another_sites_name_is_no_host_of_a_local_server() -> None:
    one = Served()
    gate = Gate(one.app, served=one.served, hosts=["localhost", "127.0.0.1", "[::1]"])
    client = TestClient(gate)
    for host, status in (
        ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200),
        ("[::1]", 200), ("evil.example", 403), ("localhost.evil.example:80", 403), ("", 403),
    ):  # fmt: skip
        assert client.get("/health", headers={"host": host}).status_code == status, host
    one.engine.close()


def test_a_body_that_is_too_large_is_refused_however_it_is_sent() -> None:
    with opened(limits=Limits(body=1000)) as one:
        for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            answer = one.client.post(TEXT, content=body, headers=JSON)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == 413
        assert one.complete(prompt="x" * 900, max_tokens=1)


def test_a_prompt_and_sequences_have_limits_of_their_own() -> None:
    with opened(limits=Limits(prompt=5, n=3)) as one:
        status, error = one.refused(TEXT, prompt="x" * 6)
        assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
        assert one.refused(TEXT, prompt="x", n=4)[1]["param"] == "n"
        assert one.refused(TEXT, prompt=["x", "y"], n=2)[1]["param"] == "prompt"
        assert one.refused(CHAT, messages=HELLO)[1]["param"] == "messages"


def test_a_full_queue_tells_when_to_come_back() -> None:
    with ThreadPoolExecutor(2) as threads, opened(limits=Limits(queue=2), stepwise=True) as one:
        answers = [threads.submit(one.complete, max_tokens=1) for _ in range(2)]
        until(lambda: len(one.engine.submitted) == 2)
        answer = one.client.post(TEXT, json={"prompt": "x"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "rate_limit_error"
        one.engine.step()
        assert all(answer.result()["choices"] for answer in answers)
        assert one.served.desk is not None and one.served.desk.waiting == 0


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"\xfe\xff{\x00}", "UTF-8"),
        (b'{"prompt": "\\ud800"}', "prompt: half a character"),
        (b'{"\\ud800": 1}', "half a character"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "x", "metadata": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deeply"),
        (b'{"prompt": "x"', "not JSON"),
        (b"", "JSON object"),
        (b"[]", "dictionary or object"),
        (b"null", "JSON object"),
        (b'"x"', "dictionary or object"),
    ],
)
def test_json_of_strangers_is_refused_in_a_line(data: bytes, problem: str) -> None:
    answer = SHARED.client.post(TEXT, content=data, headers=JSON)
    assert answer.status_code == 400 and problem in answer.json()["error"]["message"]


SHARED = Served()  # no lifespan is needed to refuse


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.integers(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
        max_leaves=6,
    )
)
def test_whatever_is_json_is_read_as_it_is(value: Any) -> None:
    data = json.dumps(value, ensure_ascii=True).encode()
    assert strict_json.read(data, depth=1000) == value


def test_the_depth_that_is_allowed_is_exact() -> None:
    assert strict_json.read(b"[[[]]]", depth=3) == [[[]]]
    with pytest.raises(Refusal, match="at most 2 levels"):
        strict_json.read(b'{"a": [[]]}', depth=2)


def test_a_request_without_its_content_type_is_none_of_a_browsers() -> None:
    """A page of another site can send a form or plain text without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = SHARED.client.post(
            TEXT, content=b'{"prompt": "x"}', headers={"content-type": kind}
        )
        assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]
    answer = SHARED.client.options(TEXT, headers={"origin": "http://x", **JSON})
    assert "access-control-allow-origin" not in answer.headers


def test_a_long_text_is_encoded_beside_the_answers_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()
    encode = TOKENIZER.encode

    def waits(text: str) -> list[int]:
        assert len(text) < 5000 or go.wait(30)
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "encode", waits)
    long = "a b " * 5000
    with ThreadPoolExecutor(2) as threads, opened() as one:
        answers = [
            threads.submit(one.refused, TEXT, prompt=long),
            threads.submit(one.refused, CHAT, messages=[{"role": "user", "content": long}]),
        ]
        until(lambda: one.served.answering == 2)
        assert one.complete(max_tokens=1)["choices"] and not any(x.done() for x in answers)
        go.set()
        for answer in answers:
            status, error = answer.result()
            assert (status, error["code"]) == (400, "context_length_exceeded")
