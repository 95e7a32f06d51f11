"""What a user does with the page, in Chromium against the real server over a scripted model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

Open = Callable[..., Page]
BODY = ".message.assistant .body"
TOOLS = [{"name": "weather", "parameters": {"type": "object", "properties": {}}}]
CALL = 'Thought: I look it up.\nAction: weather\nAction Input: {"city": "Rome"}\nObservation:'
ANSWER = " I now know the final answer.\nFinal Answer: It is **sunny** in Rome."


def say(page: Page, text: str) -> None:
    """Send a message."""
    page.fill("#input", text)
    page.click("#send")


def ask(page: Page, text: str) -> None:
    """Send a message, and wait until the reply is complete."""
    count = page.locator(".message.assistant").count()
    say(page, text)
    expect(page.locator(".message.assistant").nth(count)).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def bodies(page: Page) -> list[dict[str, Any]]:
    """The bodies of the chat requests from now on."""
    found: list[dict[str, Any]] = []

    def sent(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            found.append(request.post_data_json)

    page.on("request", sent)
    return found


def texts(page: Page) -> list[str]:
    """The texts of the messages."""
    return page.locator(".message .body").all_inner_texts()


def test_a_reply_is_shown_as_it_comes_and_counted(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("one two three " * 20, pause=0.005)
    sent = bodies(page)
    say(page, "Count!")
    expect(page.locator(BODY)).to_contain_text("one two")
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    assert len(page.locator(BODY).inner_text()) < 200
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")
    assert texts(page) == ["Count!", ("one two three " * 20).strip()]
    figures = page.locator(".figures").inner_text()
    prompt, _ = model.one.engine.submitted[-1]
    assert re.fullmatch(
        rf"281 tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt {len(prompt)} · "
        rf"context {len(prompt) + 281} / 100000",
        figures,
    )
    assert sent == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Count!"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_reply_is_stopped_and_kept_and_continued(how: str, model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("ab " * 2000, pause=0.002)
    say(page, "Go on")
    expect(page.locator(BODY)).to_contain_text("ab ab")
    page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press(how)
    expect(page.locator(".message .note")).to_have_text("Stopped.")
    number = len(model.one.engine.submitted) - 1
    page.wait_for_timeout(100)
    assert number in model.one.engine.cancelled
    kept = texts(page)[-1]
    assert kept.startswith("ab ab") and len(kept) < 6000
    model.says("and the end")
    sent = bodies(page)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(BODY)).to_contain_text("and the end")
    assert texts(page)[-1].startswith(kept)
    assert sent[0]["continue_final_message"] and sent[0]["messages"][-1]["role"] == "assistant"
    expect(page.locator(".message .note")).to_be_hidden()
    prompt, _ = model.one.engine.submitted[-1]
    context = len(prompt) + len("and the end") + 1
    expect(page.locator(".figures")).to_contain_text(f"context {context} / 100000")


def test_a_reply_is_written_again(model: Any, opened: Open) -> None:
    page = opened(model)
    ask(page, "Hi")
    model.says("Another")
    sent = bodies(page)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(BODY)).to_have_text("Another")
    assert texts(page) == ["Hi", "Another"]
    assert [x["role"] for x in sent[0]["messages"]] == ["user"]


def test_messages_are_edited(model: Any, opened: Open) -> None:
    """A question's later messages go, and it is answered anew; a reply's text changes alone."""
    page = opened(model)
    ask(page, "First")
    ask(page, "Second")
    reply = page.locator(".message.assistant").first
    reply.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit").fill("Mended")
    page.keyboard.press("Control+Enter")
    assert texts(page) == ["First", "Mended", "Second", "Hello"]
    model.says("Anew")
    sent = bodies(page)
    second = page.locator(".message.user").nth(1)
    second.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit").fill("Third")
    page.keyboard.press("Escape")
    assert texts(page)[2] == "Second" and not sent
    expect(second.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Edit").fill("Third")
    page.get_by_role("button", name="Save and send").click()
    expect(page.locator(BODY).last).to_have_text("Anew")
    assert texts(page) == ["First", "Mended", "Third", "Anew"]
    assert [x["content"] for x in sent[0]["messages"]] == ["First", "Mended", "Third"]


def test_a_question_is_edited_while_its_reply_is_written(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("ab " * 2000, pause=0.002)
    say(page, "First")
    expect(page.locator(BODY)).to_contain_text("ab ab")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit").fill("Second")
    model.says("cd " * 100, pause=0.002)
    page.get_by_role("button", name="Save and send").click()
    expect(page.locator(BODY)).to_contain_text("cd cd")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert texts(page) == ["Second", ("cd " * 100).strip()]


def test_settings_are_sent_and_kept(model: Any, opened: Open) -> None:
    page = opened(model)
    page.get_by_role("button", name="Settings").click()
    wanted = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_tokens": 3, "repetition_penalty": 1.1,
        "seed": 7,
    }  # fmt: skip
    for name, value in wanted.items():
        page.fill(f"#{name}", str(value))
    page.get_by_label("System prompt").fill("You are a poet.")
    page.get_by_label("Model").select_option("poet")
    page.get_by_role("button", name="Done").click()
    sent = bodies(page)
    ask(page, "Hi")
    assert {name: sent[0][name] for name in wanted} == wanted
    assert sent[0]["model"] == "poet"
    assert sent[0]["messages"][0] == {"role": "system", "content": "You are a poet."}
    _, settings = model.one.engine.submitted[-1]
    assert (settings.temperature, settings.top_k, settings.seed) == (0.5, 5, 7)
    assert settings.adapter == "poet"
    expect(page.locator(".message .note")).to_contain_text("Cut off")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.input_value("#temperature") == "0.5" and page.input_value("#model") == "poet"
    page.fill("#temperature", "3")
    expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#temperature-note")).to_have_text("This value is not used: 0 to 2.")
    page.fill("#top_k", "1.5")
    expect(page.locator("#top_k-note")).to_contain_text("a whole number, 0 or more")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hi again")
    assert not {"temperature", "top_k"} & set(sent[1]) and sent[1]["top_p"] == 0.9
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Empty all fields").click()
    page.get_by_role("button", name="Done").click()
    ask(page, "And again")
    assert not set(wanted) & set(sent[2])


def test_conversations_are_kept_renamed_and_deleted(model: Any, opened: Open) -> None:
    page = opened(model)
    ask(page, "The first one")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "The second one")
    page.reload()
    items = page.locator("#list button")
    expect(items).to_have_text(["The second one", "The first one"])
    items.nth(1).click()
    assert texts(page) == ["The first one", "Hello"]
    expect(page.locator(".figures")).to_contain_text("tokens")
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Cancel").click()
    expect(items).to_have_count(2)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#ask")).to_contain_text("“Renamed” is deleted from this browser.")
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(items).to_have_text(["The second one"])
    expect(page.locator(".welcome")).to_be_visible()
    page.reload()
    expect(items).to_have_text(["The second one"])


def test_a_reply_goes_on_in_another_conversation(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("ab " * 200, pause=0.003)
    say(page, "A long one")
    expect(page.locator(BODY)).to_contain_text("ab")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.locator("#list button").click()
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")
    assert texts(page)[-1] == ("ab " * 200).strip()


def test_a_conversation_is_deleted_while_its_reply_is_written(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("ab " * 2000, pause=0.002)
    say(page, "A long one")
    expect(page.locator(BODY)).to_contain_text("ab ab")
    number = len(model.one.engine.submitted) - 1
    page.get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(page.locator(".welcome")).to_be_visible()
    page.wait_for_timeout(200)
    assert number in model.one.engine.cancelled
    page.reload()
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.locator("#list button")).to_have_count(0)


def test_a_reply_that_the_page_left_is_kept_as_unfinished(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says("ab " * 2000, pause=0.002)
    say(page, "A long one")
    expect(page.locator(BODY)).to_contain_text("ab " * 150)
    page.wait_for_timeout(1100)  # it is kept once a second
    page.reload()
    page.locator("#list button").click()
    expect(page.locator(".message .note")).to_have_text("This reply was not finished.")
    assert texts(page)[-1].startswith("ab ab ab")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_windows_tell_each_other(model: Any, opened: Open) -> None:
    page = opened(model)
    other = page.context.new_page()
    other.goto(model.url)
    expect(other.locator(".welcome")).to_be_visible()
    ask(page, "From the first window")
    other.bring_to_front()
    other.locator("#list button").click()
    expect(other.locator(BODY)).to_have_text("Hello")
    ask(other, "From the second")
    page.bring_to_front()
    expect(page.locator(".message.user").nth(1)).to_contain_text("From the second")
    page.get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(other.locator("#list button")).to_have_count(0)


def test_conversations_are_exported_and_imported(model: Any, opened: Open, tmp_path: Path) -> None:
    page = opened(model)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    ask(page, "你好 <b>")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    file = tmp_path / "one.json"
    download.value.save_as(file)
    told = json.loads(file.read_text())
    (conversation,) = told["conversations"]
    assert told["format"] == "qwen_jax conversations" and conversation["system"] == "Be brief."
    assert [(x["role"], x["content"]) for x in conversation["messages"]] == [
        ("user", "你好 <b>"), ("assistant", "Hello")
    ]  # fmt: skip
    other = opened(model)
    other.set_input_files("#file", file)
    expect(other.locator("#notice-text")).to_have_text("Conversations imported: 1")
    expect(other.locator(".message.system .body")).to_have_text("Be brief.")
    assert texts(other) == ["Be brief.", "你好 <b>", "Hello"]
    saved = tmp_path / "chat.json"  # as the chat command saves it
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    saved.write_text(json.dumps([*messages, {"role": "assistant", "content": "A"}]))
    other.set_input_files("#file", saved)
    expect(other.locator(".message .body")).to_have_text(["S", "Q", "A"])
    expect(other.locator("#list button")).to_have_count(2)
    other.reload()
    expect(other.locator("#list button")).to_have_count(2)


def test_a_file_that_is_no_conversation_is_refused(
    model: Any, opened: Open, tmp_path: Path
) -> None:
    page = opened(model)
    file = tmp_path / "bad.json"
    no_json = "it is no JSON of conversations"
    for content, message in {
        "{": no_json,
        '{"a": 1}': no_json,
        '{"messages": "x"}': no_json,
        '[{"role": "user", "content": 5}]': "messages[0].content is not as it should be",
        '[{"role": "robot", "content": ""}]': "messages[0].role is not as it should be",
        '[{"role": "system"}, {"role": "user"}, {"role": "system"}]': (
            "messages[2].role is not as it should be"
        ),
        '{"conversations": [{"messages": [null]}]}': "[0].messages[0] is not as it should be",
        '[{"role": "assistant", "tool_calls": [{"id": 1}]}]': (
            "messages[0].tool_calls[0] is not as it should be"
        ),
    }.items():
        file.write_text(content)
        page.set_input_files("#file", file)
        expect(page.locator("#notice-text")).to_have_text(f"bad.json was not imported: {message}")
    expect(page.locator("#list button")).to_have_count(0)


def test_a_tool_is_called_to_the_end(model: Any, opened: Open) -> None:
    page = opened(model)
    model.says(lambda prompt: ANSWER if prompt.endswith("Thought:") else CALL)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools (JSON)").fill("[{]")
    expect(page.locator("#tools-wrong")).to_contain_text("This is not used:")
    page.get_by_label("Tools (JSON)").fill('{"name": 1}')
    expect(page.locator("#tools-wrong")).to_contain_text("a list of objects is needed")
    page.get_by_label("Tools (JSON)").fill(json.dumps(TOOLS))
    expect(page.locator("#tools-wrong")).to_have_text("")
    page.get_by_role("button", name="Done").click()
    sent = bodies(page)
    say(page, "The weather in Rome?")
    call = page.locator(".call")
    expect(call.get_by_role("heading")).to_have_text("calls weather")
    assert json.loads(call.locator("code").inner_text()) == {"city": "Rome"}
    assert sent[0]["tools"] == [{"type": "function", "function": TOOLS[0]}]
    say(page, "Well?")  # the result comes first
    expect(page.get_by_label("Result of weather")).to_be_focused()
    expect(page.get_by_role("status").first).to_have_text(
        "First type the results of the calls above."
    )
    assert len(sent) == 1 and page.input_value("#input") == "Well?"
    page.reload()
    page.locator("#list button").click()
    page.get_by_label("Result of weather").fill("sunny")
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(BODY).last).to_have_text("It is sunny in Rome.")
    _, reply, result = sent[1]["messages"]
    assert reply["tool_calls"][0]["function"]["name"] == "weather"
    assert result == {
        "role": "tool", "content": "sunny", "tool_call_id": reply["tool_calls"][0]["id"]
    }  # fmt: skip
    expect(page.get_by_role("heading", name="Result of weather")).to_be_visible()
    assert "Observation: sunny" in model.prompts[-1]


def test_the_pages_words_are_chinese_for_a_chinese_browser(model: Any, opened: Open) -> None:
    page = opened(model, locale="zh-CN")
    expect(page.locator(".welcome h2")).to_have_text("您想了解什么？")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    say(page, "你好")
    expect(page.get_by_role("button", name="重新生成")).to_be_visible()
    page.get_by_role("button", name="设置").click()
    page.locator("#language").select_option("en")
    expect(page.locator("#settings-done")).to_have_text("Done")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.reload()
    expect(page.locator(".welcome h2")).to_have_text("What would you like to know?")
    french = opened(model, locale="fr-FR")
    expect(french.locator("html")).to_have_attribute("lang", "en")


def test_enter_chooses_characters_of_an_input_method(model: Any, opened: Open) -> None:
    page = opened(model)
    sent = bodies(page)
    page.fill("#input", "ni")
    page.evaluate(
        """() => document.getElementById("input").dispatchEvent(new KeyboardEvent(
            "keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    )
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input") == "ni\n" and not sent


def test_escape_leaves_the_input_method_not_the_edited_text(model: Any, opened: Open) -> None:
    page = opened(model)
    ask(page, "Question")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    field = page.get_by_role("textbox", name="Edit")
    field.fill("Better")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        for key in ("Escape", "Enter"):
            options = {"key": key, "ctrlKey": True, "bubbles": True, "cancelable": True, **how}
            field.evaluate("(at, o) => at.dispatchEvent(new KeyboardEvent('keydown', o))", options)
    assert field.input_value() == "Better"


def test_a_reply_stays_if_nothing_comes_in_its_place(model: Any, opened: Open) -> None:
    """And a reply that is not continued keeps its figures."""
    page = opened(model)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max new tokens").fill("3")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hi")
    expect(page.locator(".figures")).to_contain_text("3 tokens")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    for name in ("Continue", "Regenerate"):
        page.get_by_role("button", name=name).click()
        expect(page.locator(".error p")).to_contain_text("The server cannot be reached.")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        assert texts(page) == ["Hi", "Hel"]
        expect(page.locator(".figures")).to_contain_text("3 tokens")
    page.reload()
    page.locator("#list button").click()
    expect(page.locator(BODY)).to_have_text("Hel")
