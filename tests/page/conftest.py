"""The page in Chromium: `make test-page`, in an environment of its own: the extra `page`.

Chromium is the machine's: `apt-get install chromium`, or the program that CHROMIUM names. Without
it these tests are skipped; without the packages of the extra they are not collected.
"""

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("playwright", "fastapi", "uvicorn", "httpx2")
there = all(importlib.util.find_spec(package) for package in PACKAGES)
collect_ignore_glob = [] if there else ["test_*.py"]

if there:
    from playwright import sync_api

    from tests.support.served_app import TOKENIZER, Served, listening

NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE = Path(sys.prefix) / "node_modules/axe-core/axe.min.js"


@pytest.fixture(scope="session")
def browser() -> Iterator["sync_api.Browser"]:
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.is_file():
        pytest.skip("no axe-core here: `make test-page` installs it with npm")
    return AXE.read_text()


@dataclasses.dataclass
class Model:
    """A server whose replies are written beforehand.

    reply: takes a prompt's text, and returns what the model says.
    """

    one: "Served"
    url: str
    reply: Callable[[str], str] = lambda prompt: "Hello"

    def says(self, reply: str | Callable[[str], str], *, pause: float = 0) -> None:
        """Have the model say a text, or what a function returns, with seconds between tokens."""
        self.reply = reply if callable(reply) else lambda prompt: reply
        self.one.engine.pause = pause

    @property
    def prompts(self) -> list[str]:
        """The prompts so far."""
        return [TOKENIZER.decode(prompt) for prompt, _ in self.one.engine.submitted]


def served(**settings: Any) -> Iterator[Model]:
    """A server in this process, at a port of this machine."""
    one = Served(longest=100_000, defaults={"max_new_tokens": 50_000}, **settings)
    with listening(one) as (_, url):
        model = Model(one, url)
        one.engine.script = lambda prompt, _: TOKENIZER.encode(
            model.reply(TOKENIZER.decode(prompt))
        )
        yield model


@pytest.fixture(scope="session")
def _shared() -> Iterator[Model]:
    yield from served(adapters=["poet"])


@pytest.fixture
def model(_shared: Model) -> Model:
    _shared.says("Hello")
    return _shared


@pytest.fixture
def own_model() -> Iterator[Model]:
    """A server that the test may break."""
    yield from served()


@pytest.fixture
def locked() -> Iterator[Model]:
    """A server that wants a key."""
    yield from served(keys=["secret"])


@pytest.fixture
def opened(browser: "sync_api.Browser") -> Iterator[Callable[..., "sync_api.Page"]]:
    """Opens the page of a server, in a browser that knows nothing yet.

    In the end, no script has failed, and nothing came from elsewhere.
    """
    contexts: list[sync_api.BrowserContext] = []
    faults: list[str] = []

    def console(message: "sync_api.ConsoleMessage") -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            faults.append(message.text)

    def open_page(model: Model, **options: Any) -> "sync_api.Page":
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", console)
        page.on("pageerror", lambda error: faults.append(str(error)))
        context.on(
            "request",
            lambda one: one.url.startswith((model.url, "blob:")) or faults.append(one.url),
        )
        page.goto(model.url)
        page.wait_for_selector("#model option, dialog[open]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
