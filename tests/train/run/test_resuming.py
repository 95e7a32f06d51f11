"""What run.json keeps of a command line, what a later one takes from it, and what differs."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from qwen_jax.runtime import command
from tests.support.training import CONFIG, fail, prepared
from train import pretrain, sft
from train.run import resuming, run_folder

IDENTITY: dict[str, Any] = {
    "recipe": {"name": "sft", "data": "chat", "learning_rate": 1e-5, "length": 512, "steps": 9},
    "config": {"hidden_size": 32, "rope_scaling": {"factor": 2.0}},
    "ckpt": "abc",
    "data": "123-4",
}
GIVEN = {"ckpt": "/m/a", "data": ["/d/a.jsonl", "/d/b.jsonl"], "length": 512, "steps": 9}
START = {"command": "python train/sft.py", "versions": {}, "arguments": GIVEN, "rows": 40}


def parsed(*argv: object, program: Any = sft) -> argparse.Namespace:
    return command.parse(program.parser(), [str(x) for x in argv])


def a_run(out: Path, **changes: Any) -> Path:
    out.mkdir()
    (out / "run.json").write_text(json.dumps({**IDENTITY, **START, **changes}))
    return out


def test_a_command_line_is_kept_with_what_computes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--ckpt", "m", "--data", "a b", "gs://x/y", "--out", "r", "--debug", "--rows", "4"]
    args = parsed(*argv)
    resuming.complete(args)
    kept = resuming.record(args, argv)
    assert kept["command"] == f"python train/sft.py {' '.join(argv).replace('a b', repr('a b'))}"
    data = [str(tmp_path / "a b"), "gs://x/y"]
    assert kept["arguments"] == {"ckpt": str(tmp_path / "m"), "data": data, "rows": 4}
    assert set(kept["versions"]) == {"qwen_jax", "python", "jax", "flax", "optax"}
    assert kept["versions"]["jax"] == jax.__version__


def test_a_preset_stays_a_name(tmp_path):
    args = parsed("--model", "qwen-7b", "--out", tmp_path, program=pretrain)
    resuming.complete(args)
    assert resuming.record(args, [])["arguments"] == {"model": "qwen-7b"}


def test_what_is_not_given_is_as_it_was(tmp_path):
    out = a_run(tmp_path / "run")
    args = parsed("--out", out, "--resume", "--epochs", 2, "--rows", 8)
    resuming.complete(args)
    assert (args.ckpt, args.data, args.length) == ("/m/a", GIVEN["data"], 512)
    assert (args.epochs, args.steps, args.rows) == (2, None, 8), "epochs in place of steps"
    kept = resuming.record(args, [])["arguments"]
    begun = {x: GIVEN[x] for x in ("ckpt", "data", "length")}
    assert kept == {**begun, "epochs": 2, "rows": 8}


def test_files_of_the_run_take_the_place_of_those_it_began_with(tmp_path):
    begun = {"model": "/gone/config.json", "tokenizer": "/gone/qwen.tiktoken", "data": ["/d"]}
    recipe = {**IDENTITY["recipe"], "data": "text"}
    out = a_run(tmp_path / "run", arguments=begun, recipe=recipe)
    (out / "files").mkdir()
    for name in ("config.json", "qwen.tiktoken"):
        (out / "files" / name).touch()
    args = parsed("--out", out, "--resume", program=pretrain)
    resuming.complete(args)
    assert args.model == str(out / "files" / "config.json")
    assert args.tokenizer == str(out / "files" / "qwen.tiktoken") and args.data == ["/d"]
    assert resuming.record(args, [])["arguments"] == begun


def test_a_run_from_before_arguments_were_kept(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(IDENTITY))
    line = fail(capsys, ["--out", str(out), "--resume"])
    assert (
        "a run also needs --data FILE and --ckpt DIR or --model NAME "
        f"({out} does not exist, or is no run" in line
    )
    run_folder.claim(out, IDENTITY, steps=9, resume=True, start=START)
    told = run_folder.read(out)
    resumed = {"command": START["command"], "versions": {}}
    assert told == {**IDENTITY, "arguments": GIVEN, "rows": 40, "resumed": resumed}


def test_a_run_of_another_command(tmp_path, capsys):
    out = a_run(tmp_path / "run")
    line = fail(capsys, ["--out", str(out), "--resume"], pretrain)
    assert f"{out} is a run of train/sft.py: go on with that command" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe.length": 256, "data": "9"}, "--length was 512, is 256: "),
        (
            {"data": "9", "arguments.data": ["/d/c.jsonl"]},
            "--data was /d/a.jsonl /d/b.jsonl, is /d/c.jsonl: ",
        ),
        (
            {"recipe.length": 256, "data": "9", "arguments.data": ["/d/c.jsonl"]},
            "--length was 512, is 256; --data was /d/a.jsonl /d/b.jsonl, is /d/c.jsonl: ",
        ),
        ({"data": "9", "arguments.eval_share": 0.1}, "--eval-share was none, is 0.1: "),
        ({"data": "9", "rows": 39}, "--data has changed: it made 40 rows, and makes 39: "),
        (
            {"recipe.learning_rate": 1e-4, "recipe.name": "math", "recipe.length": 64, "data": "9"},
            "--recipe was 'sft', is 'math'; --length was 512, is 64; --learning-rate was 1e-05",
        ),
        (
            {"ckpt": "d", "arguments.ckpt": "/m/b", "config.hidden_size": 64, "data": "9"},
            "--ckpt was /m/a, is /m/b; config.hidden_size was 32, is 64; ",
        ),
        ({"ckpt": "d"}, "--ckpt has another model than before: its manifest.json has changed: "),
        ({"config.rope_scaling": {"factor": 4.0}}, "config.rope_scaling.factor was 2.0, is 4.0: "),
        (
            {"recipe.b1": 1, "recipe.b2": 1, "recipe.eps": 1, "recipe.rows": 1},
            "--b1 was None, is 1; --b2 was None, is 1; --eps was None, is 1; and 1 more: ",
        ),
    ],
)
def test_what_differs_is_named_by_its_likeliest_cause(tmp_path, changes, said):
    out = a_run(tmp_path / "run")
    (out / "model").mkdir()
    now = copy.deepcopy({**IDENTITY, **START})
    for name, value in changes.items():
        place, _, key = name.rpartition(".")
        (now[place] if place else now)[key] = value
    identity, start = ({name: now[name] for name in part} for part in (IDENTITY, START))
    with pytest.raises(ValueError) as caught:
        run_folder.claim(out, identity, steps=9, resume=True, start=start)
    assert str(caught.value).startswith(f"{out} holds another run: {said}")
    assert str(caught.value).endswith(
        "alone takes what it began with; for another run give another --out"
    )
    assert run_folder.read(out) == {**IDENTITY, **START}


def test_more_steps_are_no_other_run(tmp_path):
    """And they are what the next start takes, unless it says otherwise."""
    out = a_run(tmp_path / "run")
    (out / "model").mkdir()
    longer = {**IDENTITY, "recipe": {**IDENTITY["recipe"], "steps": 20}}
    start = {**START, "command": "longer", "arguments": {**GIVEN, "steps": 20}}
    run_folder.claim(out, longer, steps=20, resume=True, start=start)
    told = run_folder.read(out)
    assert told["arguments"]["steps"] == 20 and told["command"] == START["command"]
    assert told["resumed"] == {"command": "longer", "versions": {}}


def test_files_that_a_run_has_lost_are_written_again(tmp_path):
    """And no others: those that are there stay as they are."""
    folder = prepared(tmp_path / "given")

    def write() -> Path:
        return run_folder.write_files(
            tmp_path,
            ckpt=None,
            config=CONFIG,
            tokenizer_file=folder / "qwen.tiktoken",
            end=256,
            chat_format="raw",
        )

    written = {file: file.read_bytes() for file in write().iterdir()}
    assert {"config.json", "generation_config.json", "qwen.tiktoken"} == {x.name for x in written}
    for lost in written:
        own = {file: data + b" " for file, data in written.items() if file != lost}
        for file, data in own.items():
            file.write_bytes(data)
        lost.unlink()
        write()
        assert {file: file.read_bytes() for file in written} == {**own, lost: written[lost]}
