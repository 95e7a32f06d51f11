"""The original server's prompts over `POST /tokenize`."""

import json

import pytest
from starlette.testclient import TestClient

from qwen_jax.serve.app import application
from qwen_jax.serve.served import Defaults, Name
from tests.support.fake_engine import FakeEngine
from tests.support.golden_figures import GOLDEN
from tests.support.vocabulary import qwen_tokenizer

ROWS = json.loads((GOLDEN / "serve" / "prompts.json").read_text("utf-8"))
FIELDS = ("messages", "functions", "function_call", "tools", "tool_choice")


@pytest.mark.slow
def test_prompts_match_the_original() -> None:
    tokenizer = qwen_tokenizer()
    engine = FakeEngine(lambda prompt, settings: (), vocab_size=151_936)
    app, _ = application(
        engine,
        tokenizer,
        vocab_size=151_936,
        names=[Name(name="qwen")],
        defaults=Defaults(
            temperature=0.0, max_new_tokens=9, chat_stops=(tokenizer.im_end_id,), text_stops=()
        ),
    )
    matched = 0
    with TestClient(app) as client:
        for row in ROWS:
            expected = row.get("correct", row)
            if "ids" not in expected:
                continue
            for request in filter(None, (row["request"], row.get("modern"))):
                body = {name: request[name] for name in FIELDS if name in request}
                answer = client.post("/tokenize", json=body)
                assert answer.status_code == 200, (body, answer.text)
                assert answer.json()["tokens"] == expected.get("ids_safe", expected["ids"]), body
                matched += 1
    engine.close()
    assert matched > 140
