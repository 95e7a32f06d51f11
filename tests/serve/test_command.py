"""`python -m qwen_jax.serve`: its options, what it says, and the model behind it."""

import argparse
import gc
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.generate import from_options
from qwen_jax.generate.description import Description
from qwen_jax.runtime import command
from qwen_jax.serve import __main__ as program
from qwen_jax.serve import app
from qwen_jax.serve.serve_options import parser
from tests.support.fake_engine import FakeEngine
from tests.support.served_app import CHAT_STOPS, TOKENIZER, VOCAB_SIZE, until
from tests.support.tiny import tiny_config

CHAT = {"chat_format": "chatml", "do_sample": True, "top_p": 0.8, "eos_token_id": TOKENIZER.eod_id}
RAW = {"chat_format": "raw", "stop_words_ids": [[97, 98]], "max_new_tokens": 7}


def about(settings: dict[str, Any]) -> Description:
    config = tiny_config(vocab_size=VOCAB_SIZE)
    return Description(config, TOKENIZER, GenerationConfig.from_hf(settings), 64)


def options(*given: str) -> argparse.Namespace:
    return command.parse(parser(), ["--ckpt", "models/small", *given])


class StartedEngine(FakeEngine):
    """An engine that is started already."""

    def start(self) -> None:
        """Do nothing."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartedEngine]:
    """The engine that the command gets in place of a model's."""
    made = StartedEngine(lambda *_: TOKENIZER.encode("abc"), vocab_size=VOCAB_SIZE, longest=64)
    made.adapters.add("poet")
    monkeypatch.setattr(from_options, "describe", lambda _: about(CHAT))
    monkeypatch.setattr(from_options, "load", lambda *_, **__: None)
    monkeypatch.setattr(program, "engine", lambda *_: made)
    yield made
    made.close()


def served(argv: list[str], meanwhile: Callable[[str], object], *, said: list[str]) -> int:
    """The exit code of the command, which a thread talks to and then ends by SIGTERM."""

    def url() -> str:
        lines = [line for line in said if line.startswith("try: curl ")]
        return lines[0].split()[2].partition("/v1/")[0] if lines else ""

    def act() -> None:
        try:
            until(lambda: url() and answers(url()), 120)
            meanwhile(url())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as thread:
        acted = thread.submit(act)
        code = program.main(argv)
        gc.unfreeze()
        acted.result()
    return code


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the command says."""
    lines: list[str] = []
    monkeypatch.setattr(command, "say", lines.append)
    return lines


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        return bool(urllib.request.urlopen(f"{url}/health").close() is None)
    except OSError:
        return False


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_the_command_serves_until_sigterm(
    engine: StartedEngine, said: list[str], tmp_path: Path
) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("other\nsecret\n")
    found: list[dict[str, Any]] = []

    def talk(url: str) -> None:
        found.append(post(url, "/v1/completions", prompt="x", model="poet", max_tokens=1))

    argv = ["--ckpt", "models/small", "--port", "0", "--adapter", "poet=folder"]
    assert served([*argv, "--api-key-file", str(key_file)], talk, said=said) == 0
    assert found[0]["model"] == engine.submitted[0][1].adapter == "poet"
    assert found[0]["choices"][0]["text"] == "ab"
    assert said[0].startswith("serving small, poet at http://127.0.0.1:")
    assert "-H 'Authorization: Bearer KEY'" in said[1]


def test_garbage_collections_leave_out_what_is_there_once_the_server_is_ready(
    engine: StartedEngine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return call(*args, **kwargs)

        return act

    monkeypatch.setattr(program, "engine", noted("engine", program.engine))
    monkeypatch.setattr(app, "application", noted("application", app.application))
    monkeypatch.setattr(engine, "start", noted("start", engine.start))
    for name in ("collect", "freeze"):
        monkeypatch.setattr(gc, name, noted(name, getattr(gc, name)))

    def look(_: str) -> None:
        done.append(f"frozen: {gc.get_freeze_count() > 0}")

    assert served(["--ckpt", "models/small", "--port", "0"], look, said=said) == 0
    assert done == ["engine", "application", "collect", "freeze", "start", "frozen: True"]


def test_what_is_wrong_with_the_command_line_is_told(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for given, problem in (
        (["--adapter", "poet"], "write NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "another model has this name"),
        (["--adapter", "small=x"], "another model has this name"),
        (["--name", "q", "--adapter", "q=x"], "another model has this name"),
    ):
        with pytest.raises(command.UsageError, match=problem):
            program.names(options(*given))
    for given, problem in (
        (["--api-key", ""], "printable ASCII"),
        (["--api-key", "ö"], "printable ASCII"),
        (["--api-key", "a b"], "printable ASCII"),
        (["--api-key-file", str(empty)], "has no key"),
    ):
        with pytest.raises(command.UsageError, match=problem):
            program.keys(options(*given))


def test_a_cache_that_pages_cannot_have_is_refused_by_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert options("--cache-dtype", "int8").cache_dtype == "int8"
    with pytest.raises(SystemExit, match="2"):
        options("--cache-dtype", "int8_asymmetric")
    assert "--cache-dtype: invalid choice" in capsys.readouterr().err


def test_a_local_server_answers_for_names_of_this_machine() -> None:
    def hosts(*given: str, keyed: bool = False) -> list[str] | None:
        return program.hosts(options(*given), with_keys=keyed)

    assert {"localhost", "127.0.0.1", "[::1]"} <= set(hosts() or ())
    assert "me.example" in (hosts("--allow-host", "me.example") or ())
    assert hosts(keyed=True) is None and hosts("--host", "0.0.0.0") is None
    assert hosts("--host", "0.0.0.0", "--allow-host", "me.example") == ["me.example"]


def test_names_and_defaults_are_the_directorys() -> None:
    assert [name.name for name in program.names(options())] == ["small"]
    found = program.defaults(about(CHAT))
    assert (found.temperature, found.top_p, found.max_new_tokens) == (1.0, 0.8, 512)
    assert set(found.chat_stops) == set(CHAT_STOPS)
    assert set(found.text_stops) == {TOKENIZER.eod_id, TOKENIZER.im_end_id}
    found = program.defaults(about(RAW))
    assert (found.temperature, found.max_new_tokens, found.stop_texts) == (0.0, 7, ("ab",))
    assert found.text_stops == (TOKENIZER.eod_id,)


@pytest.mark.slow
def test_a_model_is_served(chat_dir: Path, said: list[str]) -> None:
    """Through the real engine: a reply, a call that is required, scores, and the same by seed."""
    found: dict[str, Any] = {}
    hello = [{"role": "user", "content": "Hello"}]
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    tool = {"name": "f", "parameters": {**schema, "additionalProperties": False}, "strict": True}

    def talk(url: str) -> None:
        drawn = {"temperature": 1, "seed": 3, "max_tokens": 8, "messages": hello}
        found["one"] = post(url, "/v1/chat/completions", **drawn)
        found["two"] = post(url, "/v1/chat/completions", **drawn, n=2)
        tools = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
        found["call"] = post(url, "/v1/chat/completions", messages=hello, max_tokens=400, **tools)
        found["scores"] = post(
            url, "/v1/completions", prompt="a b c", echo=True, logprobs=1, max_tokens=0
        )

    argv = ["--ckpt", str(chat_dir), "--port", "0", "--rows", "4", "--cache-gb", "0.1"]
    assert served([*argv, "--max-length", "768"], talk, said=said) == 0
    texts = [choice["message"]["content"] for choice in found["two"]["choices"]]
    assert found["one"]["choices"][0]["message"]["content"] == texts[0]
    choice = found["call"]["choices"][0]
    if (
        choice["finish_reason"] == "tool_calls"
    ):  # the weights are random: it may write until the end
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    told = found["scores"]["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] is None and all(x < 0 for x in told["token_logprobs"][1:])
