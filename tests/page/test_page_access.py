"""The page by keyboard, on a phone, with a screen reader, in both schemes of colours."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.page.test_page import BODY, CALL, TOOLS, ask, say

Open = Callable[..., Page]
REPLY = """Both reverse a list `a`:

- `a[::-1]` makes a **copy**
- `a.reverse()` changes `a`

```python
def reverse(items: list[int]) -> list[int]:
    \"\"\"Return a copy.\"\"\"
    return [item for item in reversed(items) if item > 0]  # a long line
```

| way | copies |
|---|---|
| `a[::-1]` | yes |

> Quoted, with [a link](https://example.org).
"""
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


def shown(page: Page, model: Any) -> None:
    """Have the page show one of everything: a reply, a call, its form, a system prompt."""
    model.says(lambda prompt: CALL if "weather: Call this tool" in prompt else REPLY)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("You are brief.")
    page.get_by_role("button", name="Done").click()
    ask(page, "How do I reverse a list?")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools (JSON)").fill(json.dumps(TOOLS))
    page.get_by_role("button", name="Done").click()
    ask(page, "And the weather in Rome?")
    expect(page.get_by_role("button", name="Send results")).to_be_visible()


def faults(page: Page, axe: str) -> list[str]:
    """What axe finds that is serious or critical."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['html']}: {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: str, model: Any, opened: Open, axe: str) -> None:
    page = opened(model, color_scheme=scheme)
    assert faults(page, axe) == []
    shown(page, model)
    assert faults(page, axe) == []
    page.get_by_label("Result of weather").fill("sunny\n" * 100)
    page.get_by_role("button", name="Send results").click()
    expect(page.get_by_role("button", name="Send results")).to_be_visible()
    page.locator(".message.tool .body").scroll_into_view_if_needed()
    assert faults(page, axe) == []
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    assert faults(page, axe) == []
    page.get_by_role("button", name="Settings").click()
    page.fill("#temperature", "5")
    page.fill("#tools", "[")
    assert faults(page, axe) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete").click()
    assert faults(page, axe) == []
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="New conversation").click()
    say(page, "Hi")
    expect(page.locator(".error")).to_be_visible()
    assert faults(page, axe) == []


def test_axe_finds_nothing_serious_on_a_phone(model: Any, opened: Open, axe: str) -> None:
    page = opened(model, **PHONE)
    assert faults(page, axe) == []
    page.get_by_role("button", name="Conversations").click()
    assert faults(page, axe) == []


def too_wide(page: Page) -> list[str]:
    """The elements that lie outside the page's width, but for what is scrolled inside others."""
    return page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((one) => {
            const box = one.getBoundingClientRect();
            return (box.right > innerWidth + 1 || box.left < -1) && box.width > 1
                && !one.closest("pre, .wide, .unseen, [hidden], #icons");
        }).map((one) => one.outerHTML.slice(0, 80))"""
    )


def test_a_phones_width_is_enough(model: Any, opened: Open) -> None:
    page = opened(model, **PHONE)
    shown(page, model)
    model.says("x" * 300 + " " + "https://example.org/" + "y" * 300 + "\n\n| " + "wide | " * 30)
    page.get_by_label("Result of weather").fill("sunny " * 100 + "z" * 300)
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(".message.assistant").last).to_have_attribute("aria-busy", "false")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
    assert page.locator("#log").evaluate("(log) => log.scrollWidth <= log.clientWidth")
    assert too_wide(page) == []
    page.get_by_role("button", name="Settings").click()
    assert too_wide(page) == []
    assert page.locator("#settings").evaluate("(one) => one.scrollWidth <= one.clientWidth")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation").first).to_be_focused()
    assert too_wide(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("#menu")).to_be_focused()
    expect(page.locator("#side")).to_be_hidden()
    page.locator("#menu").click()
    page.locator("#list button").first.click()
    expect(page.locator("#side")).to_be_hidden()
    page.fill("#input", "a new line")
    page.press("#input", "Enter")  # a phone's keyboard has no Shift and Enter
    assert page.input_value("#input") == "a new line\n"


def test_everything_is_done_by_keyboard(model: Any, opened: Open) -> None:
    page = opened(model)
    press = page.keyboard.press
    press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    press("Enter")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("Hi")
    press("Enter")
    expect(page.locator(BODY)).to_have_text("Hello")
    expect(page.locator("#input")).to_be_focused()
    model.says("Anew")
    order = []
    for _ in range(40):
        press("Shift+Tab")
        name = page.evaluate("document.activeElement.innerText || document.activeElement.title")
        order.append(name)
        if name == "Regenerate":
            press("Enter")
            break
    expect(page.locator(BODY)).to_have_text("Anew")
    expect(page.locator("#input")).to_be_focused()
    while page.evaluate("document.activeElement.id") != "open-settings":
        press("Shift+Tab")
    press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    for _ in range(60):  # the focus stays in the dialog, or is the browser's
        press("Tab")
        inside = (
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
        assert page.evaluate(inside)
    press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()
    press("Shift+Tab")
    press("Enter")
    expect(page.locator("#ask")).to_be_visible()
    press("Tab")
    press("Escape")
    expect(page.locator("#remove")).to_be_focused()
    assert page.locator("#list button").count() == 1


def test_the_focus_stays_when_a_reply_is_complete(model: Any, opened: Open) -> None:
    """On a button of another message, and in a field that is being written."""
    page = opened(model)
    ask(page, "One")
    for name in ("Copy", "Edit"):
        model.says("ab " * 100, pause=0.003)
        say(page, "Two")
        expect(page.locator(BODY).last).to_contain_text("ab")
        page.locator(".message.user").first.get_by_role("button", name=name).focus()
        if name == "Edit":
            page.keyboard.press("Enter")
            page.keyboard.press("End")
            page.keyboard.type(" or two")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        there = "document.activeElement.innerText || document.activeElement.value"
        assert page.evaluate(there) == {"Copy": "Copy", "Edit": "One or two"}[name]


def test_a_screen_reader_is_told_of_a_reply_at_its_end(model: Any, opened: Open) -> None:
    """Not of each token: what is announced is one text, when the reply is complete."""
    page = opened(model)
    page.evaluate(
        """() => {
            window.told = [];
            const status = document.getElementById("status");
            new MutationObserver(() => told.push(status.textContent)).observe(
                status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    model.says("one two three " * 10, pause=0.003)
    ask(page, "Hi")
    told = page.evaluate("told")
    assert told == ["A reply is being written.", "Reply: " + "one two three " * 10]
    live = page.locator("[aria-live], [role=status], [role=alert], [role=log]")
    assert all(one.evaluate("(one) => !one.closest('#log')") for one in live.all())
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_role("heading", level=2)).to_have_text(["You", "tiny"])
