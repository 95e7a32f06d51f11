"""How replies look: Markdown, code, and what would do harm if it were more than text."""

import random
import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, expect

from tests.page.test_page import BODY, ask, say

Open = Callable[..., Page]
HARM = [
    "<script>document.title = 'harm'</script>",
    "<img src=x onerror=\"document.title='harm'\">",
    "<svg onload=\"document.title='harm'\"></svg>",
    "<iframe srcdoc=\"<script>parent.document.title='harm'</script>\"></iframe>",
    "<style>body { display: none }</style>",
    "<form action=/v1/models><button>x</button></form>",
    '<a href="javascript:document.title=1">x</a>',
    "[x](javascript:document.title='harm')",
    "[x](  java\tscript:document.title='harm')",
    "[x](data:text/html,<script>1</script>)",
    "<javascript:document.title='harm'>",
    "![x](x\" onerror=\"document.title='harm')",
    "```<img src=x onerror=\"document.title='harm'\">\ncode\n```",
    "```js\n</code></pre><script>document.title='harm'</script>\n```",
    "| <script>1</script> |\n|---|\n| <img src=x onerror=1> |",
    "&lt;script&gt;1&lt;/script&gt;",
]


def test_html_of_a_reply_is_text(model: Any, opened: Open) -> None:
    page = opened(model)
    kinds = "script, img, svg:not(button svg), iframe, style, form, input, object, [onerror]"
    for harm in HARM:
        model.says(f"before\n\n{harm}\n\nafter")
        page.get_by_role("button", name="New conversation").click()
        ask(page, f"Say {harm}")
        shown = page.locator(BODY).inner_text()
        assert shown.startswith("before") and shown.endswith("after")
        assert page.locator(f"#log :is({kinds})").count() == 0, harm
        for link in page.locator("#log a").all():
            assert (link.get_attribute("href") or "https:").startswith(("https:", "http:")), harm
        assert page.title() == f"{page.locator('#title').inner_text()} – qwen_jax", harm
        assert page.locator(".message.user .body").inner_text() == f"Say {harm}"
        if harm.startswith("<"):
            assert harm in shown


def test_markdown_is_shown(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says(
        "# Head\n\n1. **bold**\n2. `code`\n\n```python\ndef f():\n    return 1  # one\n```\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quoted\n\n[link](https://example.org) and "
        "https://example.com, not file.py\n\n![a picture](https://example.org/x.png)"
    )
    ask(page, "Hi")
    body = page.locator(BODY)
    expect(body.get_by_role("heading", level=3)).to_have_text("Head")
    expect(body.locator("ol > li")).to_have_text(["bold", "code"])
    expect(body.locator("td")).to_have_text(["1", "2"])
    aligned = "(cell) => getComputedStyle(cell).textAlign"
    assert [one.evaluate(aligned) for one in body.locator("td").all()] == ["start", "right"]
    expect(body.locator("blockquote")).to_have_text("quoted")
    expect(body.locator(".hljs-keyword")).to_have_text(["def", "return"])
    expect(body.locator(".code-head span").first).to_have_text("python")
    expect(body.locator("a")).to_have_text(["link", "https://example.com", "a picture"])
    for link in body.locator("a").all():
        assert link.get_attribute("target") == "_blank"
        assert "noopener" in (link.get_attribute("rel") or "")


def test_code_and_replies_are_copied(model: Any, opened: Open) -> None:
    page = opened(model, permissions=["clipboard-read", "clipboard-write"])
    model.says("Text\n\n```\na < b\n  c\n```")
    ask(page, "Hi")
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "a < b\n  c\n"
    page.locator(".message.assistant").get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_have_count(2)
    assert page.evaluate("navigator.clipboard.readText()") == "Text\n\n```\na < b\n  c\n```"


def test_a_code_fence_is_code_before_it_is_closed(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("Look:\n\n```python\nx = 1\n" + "y = 2  # **no**\n" * 40 + "```\n\nend", pause=0.003)
    say(page, "Hi")
    expect(page.locator(f"{BODY} pre")).to_contain_text("y = 2")
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    assert page.locator(f"{BODY} strong").count() == 0
    assert "```" not in page.locator(BODY).inner_text()
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")
    expect(page.locator(f"{BODY} .hljs-number")).to_have_count(41)
    expect(page.locator(BODY)).to_contain_text("end")


def test_blocks_that_are_complete_are_not_drawn_again(model: Any, opened: Open) -> None:
    """And what is drawn piece by piece is what is drawn at once."""
    page = opened(model)
    text = "\n\n".join(
        [
            "# One",
            "- a\n\n  b\n- c",
            "Para *x*",
            "```\nq\n\nr\n```",
            "> s\n> t",
            "1. u\n\n2. v",
            "end",
        ]
    )
    found = page.evaluate(
        """async (text) => {
            const { Rendered } = await import("./markdown.js");
            const wrong = [];
            const grown = document.createElement("div");
            const one = new Rendered(grown);
            let kept = null;
            for (let n = 1; n <= text.length; n++) {
                one.update(text.slice(0, n), false);
                const whole = document.createElement("div");
                new Rendered(whole).update(text.slice(0, n), true);
                if (whole.innerHTML !== grown.innerHTML) wrong.push(text.slice(0, n));
                if (n === 40) kept = grown.firstChild;
            }
            one.update(text, true);
            return [wrong, kept === grown.firstChild, one.kept];
        }""",
        text,
    )
    assert found == [[], True, 0]


def test_any_text_grows_to_what_it_is_at_once(model: Any, opened: Open) -> None:
    """Random documents of Markdown's signs, piece by piece."""
    page = opened(model)
    chance = random.Random(7)
    bits = [*"a *`|!\n\t字", "\n\n", "# ", "- ", "1. ", "> ", "```", "```js\n", "**", "|-|-|\n"]
    bits += ["    ", "<b>", "---", "===", "[x](", "http://a.b", ")", "&amp;", "  \n", "\r\n", "\r"]
    documents = [[chance.choice(bits) for _ in range(60)] for _ in range(60)]
    wrong = page.evaluate(
        """async (documents) => {
            const { Rendered } = await import("./markdown.js");
            return documents.filter((pieces) => {
                const [grown, whole] = [0, 1].map(() => document.createElement("div"));
                const one = new Rendered(grown);
                let text = "";
                for (const piece of pieces) one.update((text += piece), false);
                new Rendered(whole).update(text, true);
                return whole.innerHTML !== grown.innerHTML;
            });
        }""",
        documents,
    )
    assert wrong == []


HUGE = {
    "words": "word " * 100_000,
    "paragraphs": "line of text\n\n" * 10_000,
    "code": "```python\n" + "x = [1, 2]\n" * 30_000,
    "emphasis": "*a_" * 20_000,
    "brackets": "[" * 50_000,
    "quotes": "> " * 20_000,
    "list": "- a\n" * 20_000,
    "tags": "<b>" * 50_000,
    "chinese": "字" * 200_000,
}


def test_a_huge_reply_is_shown(model: Any, opened: Open) -> None:
    """Text that makes other parsers slow or lose it, in pieces as a stream brings it."""
    page = opened(model)
    for name, text in HUGE.items():
        shown = page.evaluate(
            """async (text) => {
                const { Rendered } = await import("./markdown.js");
                const place = document.createElement("div");
                const one = new Rendered(place);
                for (let n = 1; n < 5; n++) one.update(text.slice(0, (n * text.length) / 5), false);
                one.update(text, true);
                return place.textContent.length;
            }""",
            text,
        )
        assert shown >= len(text) / 4, name


def test_text_has_its_own_direction(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("English first.\n\nوهذا نص عربي.\n\n1. عربي\n\n```\nleft\n```")
    ask(page, "שלום עולם")
    blocks = page.locator(f"{BODY} > div")
    direction = "(node) => getComputedStyle(node).direction"
    assert [block.evaluate(direction) for block in blocks.all()] == ["ltr", "rtl", "rtl", "ltr"]
    assert page.locator(f"{BODY} pre").evaluate(direction) == "ltr"
    assert page.locator(".message.user .body").evaluate(direction) == "rtl"
    assert page.locator("#title").evaluate(direction) == "rtl"
    page.fill("#input", "مرحبا")
    assert page.locator("#input").evaluate(direction) == "rtl"


def test_the_end_is_followed_unless_the_reader_goes_back(model: Any, opened: Open) -> None:
    page = opened(model, viewport={"width": 900, "height": 500})
    model.says("line\n\n" * 200, pause=0.002)
    say(page, "Hi")
    expect(page.locator(f"{BODY} > div").nth(30)).to_be_attached()
    left = "(log) => log.scrollHeight - log.scrollTop - log.clientHeight"
    assert page.locator("#log").evaluate(left) < 100
    page.locator("#log").evaluate("(log) => { log.scrollTop = 0 }")
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    expect(page.locator(f"{BODY} > div").nth(90)).to_be_attached()
    assert page.locator("#log").evaluate("(log) => log.scrollTop") == 0
    page.get_by_role("button", name="To the end").click()
    expect(page.get_by_role("button", name="To the end")).to_be_hidden()
    deadline = time.monotonic() + 5
    while page.locator("#log").evaluate(left) > 100:
        assert time.monotonic() < deadline
