"""The HTTP application over an engine that says what a test wants, in this process."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.testclient import TestClient

from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.engine.settings import Settings
from qwen_jax.serve.app import application
from qwen_jax.serve.served import Defaults, Limits, Name
from qwen_jax.serve.server import Server, address, bind
from tests.support.fake_engine import FakeEngine
from tests.support.vocabulary import tiny_ranks

TOKENIZER = Tokenizer(tiny_ranks())
VOCAB_SIZE = 480
CHAT_STOPS = (TOKENIZER.im_end_id, TOKENIZER.im_start_id, TOKENIZER.eod_id)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


class Served:
    """An application, its engine, and a client.

    says: what the engine answers every prompt with: a text, or token ids.
    """

    def __init__(
        self,
        says: str | Sequence[int] = "Hello 你好",
        *,
        keys: Sequence[str] = (),
        limits: Limits | None = None,
        adapters: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        **engine: Any,
    ):
        self.says = says
        self.engine = FakeEngine(self._script, vocab_size=VOCAB_SIZE, **engine)
        self.engine.adapters |= set(adapters)
        own: dict[str, Any] = {
            "temperature": 0.0,
            "max_new_tokens": 2000,
            "chat_stops": CHAT_STOPS,
            "text_stops": (TOKENIZER.eod_id,),
        }
        self.app, self.served = application(
            self.engine,
            TOKENIZER,
            vocab_size=VOCAB_SIZE,
            names=[Name(name="tiny"), *(Name(name=name, adapter=name) for name in adapters)],
            defaults=Defaults(**{**own, **(defaults or {})}),
            limits=limits,
            keys=keys,
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def _script(self, prompt: Sequence[int], settings: Settings) -> Sequence[int]:
        says = self.says
        return TOKENIZER.encode(says) if isinstance(says, str) else says

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that succeeds."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, **body: Any) -> dict[str, Any]:
        """The answer of the chat route."""
        return self.ask("/v1/chat/completions", **{"messages": HELLO, **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of the route for completions."""
        return self.ask("/v1/completions", **{"prompt": "Hi", **body})

    def stream(self, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
        """The payloads of a stream, which ends in [DONE]."""
        if path.endswith("chat/completions"):
            body = {"messages": HELLO, **body}
        answer = self.client.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return payloads(answer.text)

    def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that fails."""
        answer = self.client.post(path, json=body)
        assert answer.status_code >= 400, answer.text
        assert set(answer.json()) == {"error"}
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error


def payloads(text: str) -> list[dict[str, Any]]:
    """The payloads of a stream's text."""
    events = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@contextlib.contextmanager
def opened(*args: Any, **settings: Any) -> Iterator[Served]:
    """An application that is started, and ends."""
    one = Served(*args, **settings)
    try:
        with one.client:
            try:
                yield one
            except BaseException:
                one.engine.fail("the test has failed")  # so that nothing waits for it
                raise
    finally:
        one.engine.close()


@contextlib.contextmanager
def listening(one: Served, *, drain_seconds: float = 5) -> Iterator[tuple[Server, str]]:
    """The application at a port of this machine, with its address."""
    taken = bind("127.0.0.1", 0)
    server = Server(one.app, one.served, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.serve_at, args=(taken,), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server, address(taken)
    finally:
        server.should_exit = True
        thread.join()
        taken.close()
        one.engine.close()


def until(true: Any, seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not become true"
        time.sleep(0.002)
