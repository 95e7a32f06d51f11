"""What the page shows when the server refuses, is busy, or goes away."""

from collections.abc import Callable
from functools import partial
from typing import Any

from playwright.sync_api import Page, Route, expect

from qwen_jax.serve.served import Limits
from tests.page.test_page import BODY, ask, bodies, say, texts

Open = Callable[..., Page]
CHAT = "**/v1/chat/completions"


def test_a_key_is_asked_for_and_kept_only_if_wanted(locked: Any, opened: Open) -> None:
    page = opened(locked)
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#models-wrong")).to_contain_text("an API key is needed")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_role("button", name="Done").click()
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("The server wants an API key")
    assert texts(page) == ["Hi"]
    page.get_by_role("button", name="Enter the key").click()
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(BODY)).to_have_text("Hello")
    stored = "JSON.stringify(localStorage) + JSON.stringify(sessionStorage)"
    assert "secret" not in page.evaluate(stored)
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#model option")).to_have_text(["tiny"])
    page.get_by_label("Keep the key in this browser").check()
    page.get_by_role("button", name="Done").click()
    page.reload()
    ask(page, "Hi")
    expect(page.locator("#settings")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Keep the key in this browser").uncheck()
    assert "secret" not in page.evaluate(stored)


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(
    own_model: Any, opened: Open
) -> None:
    page = opened(own_model)
    own_model.one.served.limits = Limits(queue=0)
    sent = bodies(page)
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("The server is busy (0 sequences wait already")
    expect(page.locator(".error")).to_contain_text("Next try in 2 s.")
    expect(page.locator(".error")).to_contain_text("Next try in 1 s.")
    own_model.one.served.limits = Limits()
    own_model.says("Hello" * 200, pause=0.002)
    expect(page.locator(BODY)).to_contain_text("Hello")
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".error")).to_have_count(0)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert len(sent) == 2 and sent[0] == sent[1]
    own_model.one.served.limits = Limits(queue=0)
    say(page, "Again")
    expect(page.locator(".error")).to_contain_text("Next try")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    expect(page.locator(".error")).to_have_count(0)


def fulfil(answer: dict[str, Any], route: Route) -> None:
    route.fulfill(**answer)


def test_a_server_is_not_asked_again_for_ever(model: Any, opened: Open) -> None:
    page = opened(model)
    sent = bodies(page)
    for after, tries in {"0": 4, "3600": 1, "Sat, 28 Nov 2026 20:00:00 GMT": 1}.items():
        headers = {"retry-after": after}
        answer = {"status": 503, "headers": headers, "json": {"error": {"message": "ending"}}}
        page.unroute(CHAT)
        page.route(CHAT, partial(fulfil, answer))
        page.get_by_role("button", name="New conversation").click()
        say(page, "Hi")
        expect(page.locator(".error p")).to_have_text(
            "The server refused the request (503): ending"
        )
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        assert len(sent) == tries
        sent.clear()


def test_an_error_without_a_time_is_told_at_once(model: Any, opened: Open) -> None:
    page = opened(model)
    page.route(CHAT, lambda route: route.fulfill(status=503, body="<html>proxy</html>"))
    say(page, "Hi")
    expect(page.locator(".error p")).to_have_text(
        "The server refused the request (503): 503 Service Unavailable"
    )
    page.unroute(CHAT)
    page.get_by_role("button", name="Settings").click()
    page.fill("#max_tokens", "1000000")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".error")).to_contain_text("(400): max_tokens: 1000000 new tokens")
    expect(page.get_by_role("status").last).to_contain_text("max_tokens")
    assert texts(page) == ["Hi"]


def test_an_engine_that_dies_in_the_middle_is_told(own_model: Any, opened: Open) -> None:
    page = opened(own_model)
    own_model.says("ab " * 1000, pause=0.003)
    say(page, "Hi")
    expect(page.locator(BODY)).to_contain_text("ab ab")
    own_model.one.engine.fail("out of memory")
    expect(page.locator(".error")).to_contain_text("out of memory")
    expect(page.locator(".message .note")).to_have_text("This reply was not finished.")
    assert texts(page)[1].startswith("ab ab")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_a_stream_that_breaks_off_is_told_and_kept(model: Any, opened: Open) -> None:
    page = opened(model)
    chunk = '{"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": null}]}'

    def half(route: Route) -> None:
        headers = {"content-type": "text/event-stream"}
        route.fulfill(
            status=200, headers=headers, body=f": ping\r\n\r\ndata: {chunk}\r\n\r\ndata: {{"
        )

    page.route(CHAT, half)
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("The connection broke off")
    assert texts(page) == ["Hi", "half"]
    page.unroute(CHAT)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(BODY)).to_have_text("Hello")
    expect(page.locator(".error")).to_have_count(0)


def test_a_server_that_is_gone_is_told(model: Any, opened: Open) -> None:
    page = opened(model)
    page.route(CHAT, lambda route: route.abort())
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("The server cannot be reached")
    page.route("**/v1/models", lambda route: route.fulfill(status=502, body=""))
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("502 Bad Gateway")


def test_a_browser_that_stores_nothing_is_told(model: Any, opened: Open) -> None:
    """And the page works as long as it is open."""
    page = opened(model)
    page.add_init_script(
        "delete IDBFactory.prototype.open;"
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})"
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("This browser does not store conversations")
    ask(page, "Hi")
    assert texts(page) == ["Hi", "Hello"]
    expect(page.locator("#list button")).to_have_text(["Hi"])
