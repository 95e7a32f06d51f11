"""What a chat does with the lines that are typed, with a stand-in for the model."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.terminal import command_table
from tests.support.golden_figures import GOLDEN
from tests.terminal.stand_ins import CONFIG, SYSTEM, Echo, Lines, chat, session

ROWS = json.loads((GOLDEN / "serve/cli.json").read_text(encoding="utf-8"))
STOPPED = "stopped: this question and its reply are not kept"
# The original's command raises these where a line is read.
RAISED = {
    "KeyboardInterrupt()": KeyboardInterrupt(),
    "EOFError()": EOFError(),
    "UnicodeDecodeError('utf-8', b'', 0, 1, 'x')": UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " | ".join(row["lines"]))
def test_the_originals_figures(row: dict[str, Any]) -> None:
    """Defects of the original that are not reproduced:

    * `:conf` changes the settings that it shows, and the model is given those of the start
      (`config_used`): here it is given what is shown.
    * `:conf` sets names that nothing reads (`a=1 b=2`): here they are refused.
    * The end of the input is an EOFError with a trace: here it ends with status 0. The rows whose
      `exit` is null had no more lines, or ended by `:exit`.
    * Each step clears the screen and prints the whole reply again (`screens_cleared`), and so does
      the start: here only `:clear` does.
    """
    lines = [RAISED.get(line, line) for line in row["lines"]]
    screen, model, status = chat(*lines, fails={"two": KeyboardInterrupt()})
    assert status == (1 if row["exit"] == 1 else 0)
    assert screen.clears == sum(line in (":cl", ":clear") for line in row["lines"])
    made = [(x.question, [list(turn) for turn in x.history], x.seed) for x in model.asked]
    assert made == [(x["query"], x["history"], x["seed"]) for x in row["chats"]]
    assert all(x.system == SYSTEM for x in model.asked)
    used = [{name: x.settings.given[name] for name in CONFIG} for x in model.asked]
    shown = [x["config_shown"] for x in row["chats"]]
    assert used == [{name: x[name] for name in CONFIG} for x in shown]


def test_every_command_has_the_originals_forms_and_a_line_of_help() -> None:
    screen, _, _ = chat(":h", ":help me")
    assert screen.shown[0] == screen.shown[1] == command_table.help_text()
    for one in command_table.COMMANDS:
        assert any(
            one.forms in line and one.chinese in line for line in screen.shown[0].split("\n")
        )
    originals = "h help q quit exit cl clear clh clear-his his history seed conf reset-conf"
    assert set(originals.split()) < set(command_table.BY_WORD)


def test_a_reply_is_shown_as_it_grows_without_white_space_around_it() -> None:
    screen, model, _ = chat("hi", "again")
    assert screen.replies == ["reply to hi\n", "reply to again\n"]
    assert model.asked[1].history == (("hi", "reply to hi"),)
    (report, _) = screen.notes[1:]
    assert report.startswith("[4 tokens, the first after 0.0") and report.endswith(" tokens/s]")


def test_history_seed_and_clearing_say_what_is_there() -> None:
    screen, _, _ = chat("hi", ":his", ":seed", ":seed 7 8", ":seed x", ":clh", ":history")
    history, seed, changed, forgotten, empty = screen.shown
    assert history.splitlines() == [
        "=========== history: 1 turn ============",
        "User[0]: hi",
        "Qwen[0]: reply to hi",
        "=" * 40,
    ]
    assert (seed, changed, forgotten) == ("seed 1234", "seed 7", "1 turn forgotten")
    assert empty.count("\n") == 1
    assert screen.notes[-1] == "error: :seed 'x': must be a whole number; it stays 7"


def test_conf_has_effect_until_it_is_reset() -> None:
    screen, model, _ = chat(
        ":conf temperature=0.5 max_new_tokens=9 stop='the end'", "a", ":reset-conf", "b", ":conf"
    )
    first, second = (x.settings for x in model.asked)
    assert first.given["temperature"] == 0.5 and first.config.max_new_tokens == 9
    assert first.stop == ("the end",) and not second.stop
    assert screen.shown[1] == screen.shown[2] == str(second)
    assert "temperature=0.5\n" in screen.shown[0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("temprature=1", "'temprature' is no setting: do_sample, temperature, top_k, top_p, repet"),
        ("top_p=0.5 a=1", "'a' is no setting"),
        ("top_p", ":conf top_p: write NAME=VALUE without spaces around ="),
        ("top_p = 0.5", ":conf top_p: write NAME=VALUE without spaces around ="),
        ("top_p=0.5 top_k=nonsense", "top_k is 'nonsense': must be a whole number from -1 to"),
        ("top_p=0.5 top_p=0.6", "top_p is given twice"),
        ("top_p=2", "top_p is 2: must be a number from 0 to 1"),
        ("top_p=nan", "top_p is nan: must be a number from 0 to 1"),
        ("top_p=None", "top_p is 'None': must be a number from 0 to 1"),
        ("top_p=null", "top_p=null: give a value; :reset-conf"),
        ("temperature=-1", "temperature is -1: must be a number from 0"),
        (
            "temperature=__import__('os').abort()",
            "temperature is '__import__(os).abort()': must be",
        ),
        ("do_sample=1", "do_sample is 1: must be true or false"),
        ("max_new_tokens=0", "max_new_tokens is 0: must be a whole number from 1"),
        ("repetition_penalty=0", "repetition_penalty is 0: must be a number from"),
        ("stop='[1]'", "each stop must be text (str), got int 1"),
        ("stop=[", "stop='[': must be a text, or a JSON list of texts"),
        ("top_p='0.5", "No closing quotation: write NAME=VALUE, NAME='A VALUE'"),
        ("top_k=" + "9" * 5000, "top_k is inf: must be a whole number"),
        ("top_k=" + "[" * 100_000, "top_k is '[[[[[[[["),
        ("x" * 100_000, "xxx: write NAME=VALUE without spaces"),
    ],
)
def test_conf_refuses_in_one_line_and_changes_nothing(given: str, line: str) -> None:
    screen, model, _ = chat(f":conf {given}", "hi")
    (said,) = (x for x in screen.notes if x.startswith("error: "))
    assert line in said and "\n" not in said and len(said) < 2000
    assert not screen.shown and model.asked[0].settings.given["top_p"] == 0.8


def test_conf_says_its_settings_in_the_form_that_it_takes() -> None:
    changes = """top_p=.25 do_sample=True top_k=50.0 stop='["a b", "\\n", "\\"q\\""]'"""
    screen, model, _ = chat(f":conf {changes}", "a", ":conf")
    again = ":conf " + screen.shown[1].replace("\n", " ")
    _, other, _ = chat(again, "a")
    assert other.asked[0].settings == model.asked[0].settings
    assert other.asked[0].settings.stop == ("a b", "\n", '"q"')
    assert model.asked[0].settings.config.sampler.top_p == 0.25


def test_a_setting_that_needs_drawing_turns_it_on() -> None:
    screen, model, _ = chat(
        ":conf do_sample=false",
        ":retry",
        "a",
        ":retry",
        ":conf top_p=0.5",
        "b",
        ":conf temperature=0",
    )
    assert [x.settings.draws for x in model.asked] == [False, False, True]
    without = [x for x in screen.notes if x.startswith("note: no token is drawn")]
    assert len(without) == 3, "for both settings without draws, and to retry with one of them"


def test_retry_asks_again_with_the_next_seed_and_replaces_the_turn() -> None:
    screen, model, _ = chat(
        "a", "b", ":retry", ":seed 5", ":retry", ":retry", ":his", fails={"x": ValueError()}
    )
    asked = [(x.question, len(x.history), x.seed) for x in model.asked]
    assert asked == [("a", 0, 1234), ("b", 1, 1234), ("b", 1, 1235), ("b", 1, 5), ("b", 1, 6)]
    assert screen.shown[-1].count("User[") == 2


def test_retry_of_a_question_without_a_kept_reply() -> None:
    """It is asked with the same seed; and a retry that is stopped leaves the turn as it was."""
    fails: dict[str, BaseException] = {"b": KeyboardInterrupt()}
    screen, model, _ = chat(":retry", "a", "b", ":retry", ":undo", ":retry", fails=fails)
    asked = [(x.question, len(x.history), x.seed) for x in model.asked]
    assert asked == [("a", 0, 1234), ("b", 1, 1234), ("b", 1, 1234)]
    assert [x for x in screen.notes if x.startswith("error")] == [
        "error: there is no question to ask again"
    ] * 2
    fails = {"a": KeyboardInterrupt()}
    screen, model = Lines(["a", ":retry", ":retry"]), Echo(fails)
    one, stream = session(screen, model), model.stream
    model.stream = lambda asked: iter(()) if asked.seed == 1234 else stream(asked)
    one.run()
    assert one.history == [("a", "")] and screen.notes.count(STOPPED) == 2
    assert screen.notes[1] == "[empty reply; no token]"
    assert [(x.history, x.seed) for x in model.asked] == [((), 1235)] * 2


def test_undo_drops_the_last_turn() -> None:
    screen, model, _ = chat("a", "b\nb", ":undo", "c", ":undo", ":undo", ":undo")
    assert model.asked[2].history == (("a", "reply to a"),)
    assert screen.shown[0] == "dropped 'b b'; 1 turn left"
    assert screen.notes[-1] == "error: there is no turn to drop"


def test_the_system_message_is_that_of_the_next_reply() -> None:
    screen, model, _ = chat(":system", ":system  In verse. ", "a", ':system ""', "b")
    assert screen.shown == [
        f"system message: {SYSTEM}",
        "system message: In verse.",
        "system message: ",
    ]
    assert [x.system for x in model.asked] == ["In verse.", ""]


def test_an_error_of_the_model_is_a_line_and_keeps_the_history() -> None:
    fails: dict[str, BaseException] = {"b": ValueError("too\nlong"), "c": RuntimeError("odd")}
    screen, model, status = chat("a", "b", "c", "d", fails=fails)
    assert status == 0 and model.asked[3].history == (("a", "reply to a"),)
    assert "error: too long" in screen.notes
    assert "error: RuntimeError: odd; --debug shows where" in screen.notes
    assert screen.replies[1] == "reply\n", "what follows begins on a line of its own"
    with pytest.raises(RuntimeError, match="odd"):
        session(Lines(["c"]), Echo(fails), debug=True).run()


def test_ctrl_c_stops_a_reply_between_two_of_its_pieces() -> None:
    """The handler is this process's own again after the reply."""
    before = signal.getsignal(signal.SIGINT)
    screen, model = Lines(["a", "b"]), Echo()
    stream, steps = model.stream, []

    def pressed(asked):
        for piece in stream(asked):
            steps.append(piece.text)
            if asked.question == "a":
                signal.raise_signal(signal.SIGINT)
            yield piece

    model.stream = pressed
    one = session(screen, model)
    assert one.run() == 0 and signal.getsignal(signal.SIGINT) is before
    assert STOPPED in screen.notes and steps[:2] == [" reply", " reply"]
    assert one.history == [("b", "reply to b")]


def test_ctrl_c_twice_stops_a_step_that_takes_long() -> None:
    screen, model, reached = Lines(["a"]), Echo(), []

    def pressed(asked):
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
        yield from ()

    model.stream = pressed
    assert session(screen, model).run() == 0
    assert reached == [1] and STOPPED in screen.notes


def test_a_process_that_ignores_ctrl_c_goes_on_to_ignore_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        screen, model = Lines(["a"]), Echo()
        stream = model.stream
        model.stream = lambda asked: (signal.raise_signal(signal.SIGINT), stream(asked))[1]
        one = session(screen, model)
        one.run()
        assert one.history
    finally:
        signal.signal(signal.SIGINT, before)


def test_half_a_character_is_refused() -> None:
    screen, model, _ = chat("a\ud83d", "b")
    assert [x.question for x in model.asked] == ["b"]
    assert "error: the question holds half a character" in screen.notes[1]


def test_tokens_says_what_is_left_and_what_the_window_drops() -> None:
    screen, _, _ = chat(":tokens", "a", ":tokens")
    assert screen.shown[0] == (
        "0 turns and the system message: a prompt of 20 tokens; 80 of 100 are left for a question "
        "and its reply"
    )
    assert "20 tokens (all turns would have 30: max_window_size is 6144); 80" in screen.shown[1]


def test_save_and_load(tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    screen, _, _ = chat(":system 短 \x1b[1m", "héllo", "b", f":save {file}", f':save "{file}"')
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert messages[0] == {"role": "system", "content": "短 \x1b[1m"}
    assert [x["role"] for x in messages[1:]] == ["user", "assistant"] * 2
    assert messages[1]["content"] == "héllo"
    assert screen.shown[-1] == f"2 turns saved to {file}, a new file"
    assert screen.notes[-1] == (
        f"error: {file}: exists already: name another file, or replace it by :save!"
    )
    screen, model, _ = chat("x", f":load {file}", "c", f":save! {file}")
    assert screen.shown[0] == (
        f"2 turns read from {file}, in place of 1 turn; the system message is the file's"
    )
    assert model.asked[1].history == (("héllo", "reply to héllo"), ("b", "reply to b"))
    assert model.asked[1].system == "短 \x1b[1m"
    assert screen.shown[1] == f"3 turns saved to {file}, the file that was there is replaced"
    assert [x.name for x in tmp_path.iterdir()] == ["a chat.json"], "no draft is left"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "must be a list of messages"),
        ('[["a", "b"]]', "must be a list of messages"),
        ('{"messages": 1}', "must be a list of messages"),
        ('[{"role": "user", "content": "a"}]', "a reply is the last"),
        ('[{"role": "user"}, {"role": "assistant", "content": "b"}]', "message 1 has no text"),
        ('[{"role": "x", "content": "a"}]', "role 'x'"),
        (b"\xff", "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_load_refuses_in_one_line_and_changes_nothing(
    content: str | bytes | None, line: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    screen, model, _ = chat("a", f":load {file}", "b")
    assert line in screen.notes[-2] and str(file) in screen.notes[-2]
    assert "\n" not in screen.notes[-2] and model.asked[1].history == (("a", "reply to a"),)


def test_load_of_other_programs_files(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    file.write_text(json.dumps({"model": "m", "messages": turns}))
    _, model, _ = chat(":system Mine.", f":load {file}", "b", f":load {file}", ":retry")
    assert model.asked[1].seed == 1235, "that of the file may be the same"
    assert model.asked[0].history == (("q", "r"),) and model.asked[0].system == "Mine."
    file.write_text('[{"role": "system", "content": "Yours."}]')
    _, model, _ = chat("a", f":load {file}", "b")
    assert model.asked[1].history == () and model.asked[1].system == "Yours."


def test_save_refuses_places_that_are_no_files(tmp_path: Path) -> None:
    screen, _, _ = chat(
        ":save", ":load", f":save! {tmp_path}", f":save {tmp_path}/none/a", ":save! /dev/null"
    )
    assert [x.startswith("error: ") for x in screen.notes[1:]] == [True] * 5
    assert "name a file: :save FILE" in screen.notes[1] and "is no file" in screen.notes[3]
    assert "No such file" in screen.notes[4] and "/dev/null: is no file" in screen.notes[5]
