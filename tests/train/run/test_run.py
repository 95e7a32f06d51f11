"""Runs from beginning to end: what they leave, how they resume, and what they refuse."""

import dataclasses
import inspect
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import checkpoint, meshes
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS
from qwen_jax.checkpoint import directory
from qwen_jax.config import Config
from qwen_jax.generate import description
from qwen_jax.runtime import texts
from tests.support import launch
from tests.support.training import (
    CONFIG,
    curve,
    fail,
    fine_tuning,
    prepared,
    pretraining,
    succeed,
    weights,
)
from train import pretrain, sft, step
from train.data import packing
from train.run import advice, checkpoints, logs, loop, parameters, recipes, run_folder, task


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Path:
    """A run of 12 steps that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(pretraining(given, out, "--eval-every", 6, "--eval-data", given / "text.txt"))
    return out


def test_what_a_run_leaves(whole, given):
    losses = [figures["loss"] for figures in curve(whole).values()]
    assert list(curve(whole)) == list(range(1, 13)) and losses[-1] < losses[0] - 1
    rates = [figures["learning_rate"] for figures in curve(whole).values()]
    np.testing.assert_allclose(rates[:4], [0, 0.01 / 3, 0.02 / 3, 0.01], rtol=1e-6)
    held_out = curve(whole, "held_out")
    assert list(held_out) == [4, 6, 8, 12] and held_out[12]["loss"] < held_out[6]["loss"]
    np.testing.assert_allclose(held_out[12]["perplexity"], np.exp(held_out[12]["loss"]))
    (events,) = (whole / "events").iterdir()
    assert b"train/gradient_norm" in events.read_bytes()
    model = qwen_jax.load(whole / "model", dtype="float32")
    assert model.need_tokenizer().encode("ab")
    assert checkpoint.load_generation_config(whole / "model").chat_format == "raw"


def test_a_run_resumes_to_the_bit(whole, given, tmp_path, monkeypatch):
    """Stopped between two checkpoints, as by kill -9: what came after the last is made again, by a
    command that names the folder alone.
    """
    out = tmp_path / "run"
    log_oldest = loop.Loop._log_oldest

    def stopped(self: Any, state: Any) -> None:
        if self._in_flight[0][0] == 11:
            raise RuntimeError("stopped")
        log_oldest(self, state)

    extra = ("--eval-every", 6, "--eval-data", given / "text.txt")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_log_oldest", stopped)
        assert pretrain.main(pretraining(given, out, *extra)) == 1
    assert max(curve(out)) == 10 and not (out / "model").exists()
    monkeypatch.chdir(tmp_path)
    succeed(["--out", "run", "--resume"])
    told = json.loads((out / "run.json").read_text())
    assert told["command"].startswith("python train/pretrain.py --model ")
    assert told["resumed"]["command"] == "python train/pretrain.py --out run --resume"
    assert told["versions"]["jax"] == jax.__version__
    assert curve(out) == curve(whole) and curve(out, "held_out") == curve(whole, "held_out")
    expected = weights(whole / "model")
    for name, value in weights(out / "model").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [6, 12])
def test_an_evaluation_that_is_cut_off_is_made_up(
    whole, given, tmp_path, capsys, monkeypatch, at, number, code
):
    """At the next start, whether steps follow or it was the last thing to do."""
    evaluations = iter([4, 6, 8, 12])

    def cut_off(*args: Any) -> Any:
        if next(evaluations) == at:
            signal.raise_signal(number)
        yield from once(*args)

    once, out = loop.once, tmp_path / "run"
    options = ("--eval-every", 6, "--eval-data", given / "text.txt")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "once", cut_off)
        assert pretrain.main(pretraining(given, out, *options)) == code
    assert max(curve(out)) == at and at not in curve(out, "held_out")
    assert not (out / "model").exists()
    # Once more of a run that is done: no figure is there twice, and a line says that it is done.
    for said in (
        f"resumed from step {at}\n",
        "from step 12, the last: the run was already finished",
    ):
        succeed(pretraining(given, out, *options, "--resume"))
        assert said in capsys.readouterr().err
        assert curve(out) == curve(whole)
        assert curve(out, "held_out") == curve(whole, "held_out")
    assert (out / "model").exists()


def test_a_cut_off_evaluation_is_not_owed_without_data(given, tmp_path, monkeypatch):
    held_out = ("--eval-data", given / "text.txt", "--steps", 4)
    once = loop.once

    def cut_off(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return once(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "once", cut_off)
        succeed(pretraining(given, tmp_path / "run", *held_out))
    succeed(pretraining(given, tmp_path / "run", "--steps", 4, "--resume"))
    assert (tmp_path / "run/model").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [5, 12])
def test_a_signal_in_a_step(whole, given, tmp_path, monkeypatch, at, number, code):
    """The state is saved, and nothing else is begun, not even after the last step."""
    write, out = logs.Log.write, tmp_path / "run"

    def signalled(self: Any, step: int, *args: Any, **named: Any) -> None:
        write(self, step, *args, **named)
        if step == at:
            signal.raise_signal(number)

    options = ("--eval-every", 6, "--eval-data", given / "text.txt")
    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "write", signalled)
        assert pretrain.main(pretraining(given, out, *options)) == code
    assert not (out / "model").exists() and max(curve(out)) < at + 4
    succeed(pretraining(given, out, *options, "--resume"))
    assert curve(out) == curve(whole)
    assert curve(out, "held_out") == curve(whole, "held_out")
    assert (out / "model").exists()


def test_a_second_interrupt_ends_the_process_at_once():
    program = (
        "import signal\nfrom train.run import loop\n"
        "with loop.signals() as stop:\n"
        "    signal.raise_signal(signal.SIGINT)\n    print(stop['signal'] == signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n    print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=launch.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "True\n")
    assert done.stderr.splitlines()[-1] == "interrupted; what was not saved is lost"


def test_figures_of_the_device(given, tmp_path, monkeypatch):
    """MFU: the model's FLOPs for the tokens of a second, over the peak of all devices."""
    monkeypatch.setattr(loop, "_peak", lambda: 2e9)
    monkeypatch.setattr(loop, "_memory", lambda: 3_000_000_000)
    succeed(pretraining(given, tmp_path / "run", "--steps", 2))
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        flops = figures["tokens_per_second"] * CONFIG.flops_per_token(32)
        assert figures["mfu"] == pytest.approx(flops / 2e9) and figures["memory_gb"] == 3


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(whole, given, tmp_path):
    out = tmp_path / "run"
    succeed(pretraining(given, out, "--steps", 12, "--mesh", "fsdp=4"))
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").iterdir():
        if folder.name == "12":
            shutil.rmtree(folder)
    succeed(pretraining(given, out, "--mesh", "fsdp=2,tp=2", "--resume"))
    expected = weights(whole / "model")
    for name, value in weights(out / "model").items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    for number, figures in curve(whole).items():
        np.testing.assert_allclose(curve(out)[number]["loss"], figures["loss"], rtol=1e-5)


def test_fine_tuning_makes_a_chat_model(whole, given, tmp_path, capsys):
    out = tmp_path / "run"
    succeed(fine_tuning(given, whole / "model", out, "--eval-share", 0.1, "--eval-every", 3), sft)
    assert re.search(r"of their places used; \d+ examples held out$", capsys.readouterr().err, re.M)
    assert list(curve(out)) == list(range(1, 7)) and list(curve(out, "held_out")) == [3, 6]
    settings = checkpoint.load_generation_config(out / "model")
    assert settings.chat_format == "chatml"
    reply, history = qwen_jax.load(out / "model", dtype="float32").chat("3?", max_new_tokens=5)
    assert history == [("3?", reply)]


def test_a_number_that_is_none_stops_the_run(whole, given, tmp_path, capsys, monkeypatch):
    """At the state before it, which is saved: steps that were under way behind it take nothing. The
    run goes on from there as if the number had been one.
    """
    make, taken = step.make_step, []

    def spoiled(*args: Any, **options: Any) -> Any:
        run = make(*args, **options)

        def once(state: Any, batch: Any, *rest: Any) -> Any:
            taken.append(batch)
            bad = batch.replace(weights=batch.weights * np.nan) if len(taken) == 3 else batch
            return run(state, bad, *rest)

        return once

    out = tmp_path / "run"
    arguments = pretraining(given, out, "--save-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(step, "make_step", spoiled)
        line = fail(capsys, arguments, pretrain)
    assert len(taken) == 5, "two were under way"
    assert line.startswith("error: step 3: loss nan, gradient norm nan; the batch is in ")
    batch = np.load(out / "batch-3.npz")
    assert batch["tokens"].shape == (4, 32) and batch["weights"].all()
    assert f"the state after step 2 is in {out / 'checkpoints'}: --resume goes on from" in line
    assert line.endswith("with --on-nan skip without this batch")
    succeed([*arguments, "--resume"])
    assert "resumed from step 2" in capsys.readouterr().err
    assert curve(out) == curve(whole)


def test_a_batch_that_spoils_the_loss_is_skipped_on_request(given, tmp_path, capsys, monkeypatch):
    """The step changes nothing, and the run goes on with the next batch."""
    read = packing.Rows.__getitem__

    def spoiled(self: Any, index: int) -> Any:
        row = read(self, index)
        return row.replace(weights=row.weights * np.inf) if index == 3 else row

    monkeypatch.setattr(packing.Rows, "__getitem__", spoiled)
    out = tmp_path / "run"
    succeed(pretraining(given, out, "--on-nan", "skip"))
    bad = [number for number, x in curve(out).items() if x["loss"] is None]
    assert bad and len(bad) < 12
    assert [f"batch-{n}.npz" for n in bad] == sorted(
        (p.name for p in out.glob("batch-*.npz")), key=lambda name: int(name[6:-4])
    )
    assert f"step {bad[0]}: loss" in capsys.readouterr().err
    assert all(np.isfinite(value).all() for value in weights(out / "model").values())


def test_batches_are_not_skipped_for_ever(given, tmp_path, capsys, monkeypatch):
    """A model that is spoiled makes a number of none."""
    read = packing.Rows.__getitem__
    spoil = lambda *args: (row := read(*args)).replace(weights=row.weights * np.nan)  # noqa: E731
    monkeypatch.setattr(packing.Rows, "__getitem__", spoil)
    line = fail(capsys, pretraining(given, tmp_path / "run", "--on-nan", "skip"), pretrain)
    assert line.startswith("error: step 10: loss nan") and "as in the 9 steps before" in line
    assert len(list((tmp_path / "run").glob("batch-*.npz"))) == 10


def test_a_full_disk(given, tmp_path, capfd):
    """One line of it, although checkpoints are written by threads that all fail; a real disk that
    is full cannot be had everywhere, a limit for files can.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert pretrain.main(pretraining(given, tmp_path / "run")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("error: ") == 1
    assert "File too large" in said


def test_the_best_are_kept_over_a_restart(tmp_path):
    state = {"x": jnp.arange(3)}
    for steps, losses in (((1, 2, 3), (3, 1, 2)), ((4, 5), (5, None))):
        kept = checkpoints.Checkpoints(tmp_path / "checkpoints", last=1, best=1)
        for step_, loss in zip(steps, losses, strict=True):
            kept.save(step_, state, facts={"position": step_}, loss=loss)
        kept.wait()
        kept.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "5"}


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    kept = checkpoints.Checkpoints(tmp_path, last=1, best=1)
    for number, loss in enumerate((1.0, float("nan"), 2.0, float("inf"), 2.0), 1):
        kept.save(number, {"a": jnp.zeros(2)}, facts={}, loss=loss)
        kept.wait()
    kept.close()
    assert sorted(x.name for x in tmp_path.iterdir() if x.is_dir()) == ["1", "5"]


def test_steps_are_profiled_on_request(given, tmp_path, capsys, monkeypatch):
    """Beside what each start says."""
    out = tmp_path / "a run"
    monkeypatch.setattr(advice, "less_waste", lambda *_, **__: ["--length 1", "--rows 1"])
    succeed(pretraining(given, out, "--steps", 5, "--profile-steps", "2-3"))
    assert list((out / "profile").rglob("*.xplane.pb"))
    said = capsys.readouterr().err
    assert "less work for the same examples: --length 1; --rows 1\n" in said
    assert f"curves: tensorboard --logdir '{out}/events'\n" in said
    assert "--length 32: the model's config.json has seq_length 64; set it to 32 if" in said


def small_model() -> tuple[str, str]:
    """The section of the docs on a model of one's own, and the config.json in it."""
    page = (Path(__file__).parents[3] / "docs/training.md").read_text(encoding="utf-8")
    section = page.partition("## Small models")[2]
    (text,) = re.findall(r"^```json\n(.*?)^```", section, re.M | re.S)
    return section, text


def test_the_small_model_of_the_docs_is_whole(tmp_path):
    """Its config.json fits the commands beside it."""
    section, text = small_model()
    (file := tmp_path / "config.json").write_text(text)
    size, length = (int(re.findall(rf"--{x} (\d+)", section)[0]) for x in ("size", "length"))
    config = Config.read(file)
    assert config.vocab_size == size + len(SPECIAL_TOKENS) and config.seq_length == length
    assert f"of {config.num_params() / 1e6:.1f} million weights" in section
    assert json.loads(text).keys() >= config.to_hf().keys() - {"fp16", "bf16", "fp32"}


@pytest.mark.slow
def test_the_small_model_of_the_docs_trains(given, tmp_path):
    (file := tmp_path / "config.json").write_text(small_model()[1])
    succeed(pretraining(given, tmp_path / "run", "--model", file, "--steps", 1, "--mesh", "fsdp=1"))
    assert list(curve(tmp_path / "run")) == [1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--mesh", "fsdp=3"], "mesh fsdp=3: "),
        (["--steps", "x"], ""),
        (["--schedule", "linear"], "schedule 'linear': allowed are cosine, constant"),
        (["--source", "memoir"], "source 'memoir': allowed here are report, memo"),
        (["--accumulate", "3"], "4 rows do not fall into 3 parts"),
        (["--pack", "nope"], "pack 'nope': allowed are joined, fitted, alone"),
        (["--moments", "int8"], "moments 'int8': allowed are float32, bfloat16"),
        (["--rows", "0"], "rows 0: a number, at least 1"),
        (["--learning-rate", "nan"], "learning_rate nan: a number, at least 0"),
        (["--learning-rate", "inf"], "learning_rate inf: a number, at least 0"),
        (["--seed", "-1"], "seed -1: a number, at least 0"),
        (["--warmup", "1e30"], "warmup 1e+30: a number, at least 0, and below"),
        (["--eval-share", "nan"], "--eval-share nan: must be at least 0 and less than 1"),
        (["--b2", "0.99999999"], "b2 0.99999999: a number, at least 0, and below 1 in float32"),
        (
            ["--gradient-dtype", "float16"],
            "gradient_dtype 'float16': allowed are float32, bfloat16",
        ),
        (["--gradient-dtype", "bfloat16"], "gradient_dtype 'bfloat16' with dtype 'float32': what"),
        (["--dropout", "1"], "dropout 1.0: a number, at least 0, and below 1"),
        (["--eval-data", "x.txt", "--eval-share", "0.1"], "--eval-data and --eval-share both"),
        (["--profile-steps", "7"], "--profile-steps 7: write it as 10-12"),
        (["--profile-steps", "13-14"], "--profile-steps 13-14: the run has 12 steps"),
        (["--sequence-parallel", "--mesh", "fsdp=2"], "--sequence-parallel splits over tp, and"),
        (["--out", "s3://bucket/run"], "s3://bucket/run: only local paths and gs://BUCKET/..."),
        (["--token-cache", "s3://b/t"], "s3://b/t: only local paths and gs://BUCKET/..."),
        (["--compilation-cache", "s3://b/c"], "s3://b/c: only local paths and gs://BUCKET/..."),
        (
            ["--steps", "4", "--epochs", "1"],
            "--epochs and --steps both set the run's length: give one of them",
        ),
        (["--keep-best", "-1"], "--keep-best -1: must be 0 or more"),
        (["--lora-rank", "8", "--lora-targets", "c_atn"], "adapters go on a trained model"),
        (
            ["--merge"],
            "--merge applies only to adapters, and this run trains all weights: leave it out",
        ),
        (["--base-dtype", "int8"], "--base-dtype applies only to adapters, and this run"),
        (["--lora-rank", "4"], "adapters go on a trained model: give --ckpt"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(given, tmp_path, capsys, change, problem):
    arguments = [*pretraining(given, tmp_path / "run"), *change]
    if not problem:
        with pytest.raises(SystemExit):
            pretrain.main(arguments)
        return
    assert problem in fail(capsys, arguments, pretrain)


def test_data_that_cannot_be_learned_from(whole, given, tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    for content, problem in (
        ('{"conversations": [{"from": "user", "value": "x"}]}', "line 1: the conversation has no"),
        ('{"conversations": [{"from": "bot", "value": "x"}]}', "line 1: turn 1 is from 'bot'"),
        ('{"text": "x"}', "line 1: there are neither 'conversations' nor 'messages'"),
        ("{", "line 1: no JSON: Expecting property name enclosed in double quotes at character 2"),
    ):
        file.write_text(content + "\n")
        arguments = fine_tuning(given, whole / "model", tmp_path / "run", "--data", file)
        assert f"no example in {file}; the first: {file} {problem}" in fail(capsys, arguments)


def test_a_folder_is_refused_before_anything_is_encoded(
    whole, given, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(task, "_rows", lambda *_, **__: 1 / 0)
    assert "holds a run already" in fail(capsys, pretraining(given, whole), pretrain)
    bad = pretraining(given, tmp_path / "new", "--attention", "xxla")
    assert "attention 'xxla' is not known: choose one of auto" in fail(capsys, bad, pretrain)
    lora = ("--recipe", "sft_lora", "--lora-targets", "c_atn")
    bad = fine_tuning(given, whole / "model", tmp_path / "new", *lora)
    assert "no module is called c_atn: there are" in fail(capsys, bad)
    assert not (tmp_path / "new").exists()
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds something else" in fail(capsys, pretraining(given, tmp_path), pretrain)


def test_another_run_in_the_folder(whole, given, tmp_path, capsys):
    again = pretraining(given, whole)
    assert f"{whole} holds a run already: --resume goes on" in fail(capsys, again, pretrain)
    claimed = (whole / "run.json").read_text()
    line = fail(capsys, [*again, "--resume", "--steps", "8"], pretrain)
    assert f"{whole} is at step 12: of 8 steps it has more" in line
    assert (whole / "run.json").read_text() == claimed
    other = [*again, "--resume", "--learning-rate", "0.02"]
    line = fail(capsys, other, pretrain)
    assert "holds another run: --learning-rate was 0.01, is 0.02: --out " in line
    (tmp_path / "letter.txt").write_text("dear")
    line = fail(capsys, pretraining(given, tmp_path), pretrain)
    assert "holds something else: give --out an empty or new folder" in line
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("setting", [{}, {"sequence_parallel": False}, {"sequence_parallel": True}])
def test_a_record_with_or_without_what_changes_roundings_alone(setting, tmp_path):
    """Those settings are not part of a run; whatever a record says of them, the run goes on."""
    recipe = {"learning_rate": 0.01, "steps": 12}
    same = {"ckpt": None, "config": {}, "data": "0123"}
    directory.write_json(tmp_path / "run.json", {**same, "recipe": {**recipe, **setting}})
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    run_folder.claim(tmp_path, {**same, "recipe": recipe}, steps=12, resume=True, start={})
    assert texts.read_json(tmp_path / "run.json") == {**same, "recipe": recipe}
    with pytest.raises(ValueError, match=r"another run: --learning-rate was 0\.01"):
        other = {**same, "recipe": {**recipe, "learning_rate": 0.02}}
        run_folder.claim(tmp_path, other, steps=12, resume=True, start={})


@pytest.mark.parametrize(
    ("options", "taken", "said"),
    [
        (["--mesh", "tp=2"], True, "yes (the default where tokens divide, as 32 do over tp=2)"),
        (["--mesh", "tp=2", "--sequence-parallel"], True, "yes (as asked for)"),
        (["--mesh", "tp=2", "--no-sequence-parallel"], False, "no (as asked for)"),
        (["--mesh", "tp=2", "--length", 31], False, "no (length T = 31 is not divisible by tp=2)"),
        (["--mesh", "fsdp=2"], False, ""),
    ],
)
def test_the_residual_is_split_by_tokens_by_default(
    given, tmp_path, capsys, monkeypatch, options, taken, said
):
    """In a run's steps and its evaluation; the log says so, and why, where there is a tp."""
    seen = {}

    def made(make):
        def spied(*args, **named):
            given = inspect.signature(make).bind(*args, **named).arguments
            seen[make.__name__] = given["sequence_parallel"]
            if make is evaluation:
                raise ValueError("far enough")

        return spied

    evaluation = step.make_evaluation
    monkeypatch.setattr(step, "make_step", made(step.make_step))
    monkeypatch.setattr(step, "make_evaluation", made(evaluation))
    monkeypatch.setattr(parameters.Whole, "create_state", lambda *_, **__: None)
    assert pretrain.main(pretraining(given, tmp_path / "run", *options)) == 1
    assert seen == {"make_step": taken, "make_evaluation": taken}
    error = capsys.readouterr().err
    assert f"sequence parallel: {said}" in error if said else "sequence parallel" not in error


def test_a_run_that_was_never_saved_can_become_another(given, tmp_path, capsys, monkeypatch):
    """As when the first step takes too much memory, and the next try is of a smaller model."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "go", lambda *_, **__: 1 / 0)
        assert "ZeroDivision" in fail(capsys, pretraining(given, out), pretrain)
    smaller = tmp_path / "config.json"
    smaller.write_text(json.dumps(dataclasses.replace(CONFIG, num_layers=1).to_hf()))
    arguments = [*pretraining(given, out, "--steps", 2), "--model", str(smaller)]
    assert "--resume goes on with it" in fail(capsys, arguments, pretrain)
    succeed([*arguments, "--resume"])
    assert "was never saved: this one takes its place" in capsys.readouterr().err
    assert checkpoint.load_config(out / "model").num_layers == 1
    shutil.rmtree(out / "checkpoints")  # the model alone makes it a run
    again = pretraining(given, out, "--resume")
    assert "holds another run: config.num_hidden_layers was 1" in fail(capsys, again, pretrain)
    assert checkpoint.verify_whole(out / "model")


def test_what_cannot_be_does_not_take_the_folder(whole, given, tmp_path, capsys):
    ckpt, out = whole / "model", tmp_path / "run"
    lora = ("--recipe", "sft_lora", "--lora-rank", 4, "--steps", 1)
    wrong = (*lora, "--lora-targets", "q_proj"), (*lora, "--attention", "no")
    for options in wrong:
        fail(capsys, fine_tuning(given, ckpt, out, *options))
    succeed(fine_tuning(given, ckpt, out, *lora), sft)
    # What may be taken for the model that is wanted says where that is.
    merging = f"`python convert/to_hf.py {ckpt} run-merged-hf --adapter {out / 'adapter'}` and "
    for part in (out, out / "adapter", out / "checkpoints" / "1", out / "files"):
        with pytest.raises(checkpoint.CheckpointError, match=re.escape(merging)):
            description.read(part)
    for part in (whole, whole / "checkpoints", whole / "files", ckpt / "params"):
        with pytest.raises(checkpoint.CheckpointError, match=f": give {re.escape(str(ckpt))}$"):
            description.read(part)


def test_another_directory_of_the_same_shape_is_another(whole, given, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    lora = ("--recipe", "sft_lora", "--lora-rank", 4, "--steps", 1)
    succeed(fine_tuning(given, whole / "model", out, *lora), sft)
    with jax.set_mesh(meshes.make()):
        config, decoder = checkpoint.load_config(whole / "model"), checkpoint.load(whole / "model")
        checkpoint.save(other, config, decoder, like=whole / "model")
    again = fine_tuning(given, other, out, *lora, "--resume")
    named = f"--ckpt was {whole / 'model'}, is {other}: --out {out} --resume alone takes what it"
    assert f"holds another run: {named}" in fail(capsys, again)


def test_a_folder_in_which_a_run_was_killed_at_its_first_file_is_empty(tmp_path):
    (tmp_path / "run.json.0123abcd.tmp").touch()
    run_folder.check(tmp_path, resume=False)
    (tmp_path / "other.tmp").touch()
    with pytest.raises(ValueError, match="holds something else"):
        run_folder.check(tmp_path, resume=False)


def test_two_runs_in_one_folder_at_a_time(given, tmp_path, capsys):
    arguments = pretraining(given, tmp_path, "--steps", 1)
    with run_folder.locked(tmp_path):
        before = list(tmp_path.iterdir())
        line = fail(capsys, arguments, pretrain)
        assert f"{tmp_path}: process {os.getpid()} on {socket.gethostname()} has been at" in line
        assert list(tmp_path.iterdir()) == before
    succeed(arguments)


def test_a_file_in_place_of_the_folder(given, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    line = fail(capsys, pretraining(given, tmp_path / "run"), pretrain)
    assert line == f"error: {tmp_path / 'run'} is a file: give --out an empty or new folder"


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(whole, given, tmp_path, capsys, how):
    """With what goes on without it: the one before."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    last = out / "checkpoints" / "12"
    for file in [x for x in (last / "state").rglob("*") if x.is_file() and x.parent.name == "d"]:
        file.write_bytes(file.read_bytes()[:-40]) if how == "cut" else file.unlink()
    again = pretraining(given, out, "--eval-every", 6, "--eval-data", given / "text.txt")
    line = fail(capsys, [*again, "--resume"], pretrain)
    assert f"{last} cannot be restored: " in line
    assert "if it is damaged, remove it, and --resume goes on from step 8" in line
    shutil.rmtree(last)
    succeed([*again, "--resume"])
    assert curve(out) == curve(whole)


def test_recipes_have_the_published_values():
    """Section and table of the report at each recipe."""
    made = recipes.pretrain("qwen-7b")
    assert (made.rows * made.length, made.learning_rate, made.final) == (4_194_304, 3e-4, 0.1)
    assert (made.b1, made.b2, made.eps, made.weight_decay, made.clip_norm) == (
        0.9,
        0.95,
        1e-8,
        0.1,
        1,
    )
    assert made.steps == 572_205 and recipes.pretrain("qwen-7b", length=8192).rows == 512
    assert recipes.pretrain(source="memo").eps == 1e-6
    made = recipes.sft()
    assert (made.learning_rate, made.warmup, made.steps, made.rows) == (2e-6, 1430, 4000, 128)
    assert (made.length, made.dropout) == (2048, 0.1)
    assert recipes.sft(source="memo").learning_rate == 1e-5
    made = recipes.sft_lora()
    assert (made.lora_rank, made.lora_alpha, made.lora_dropout) == (64, 16, 0.05)
    assert (made.learning_rate, made.length, made.rows, made.epochs) == (3e-4, 512, 16, 5)
    script = recipes.sft(source="script")
    assert (script.learning_rate, script.lora_rank, script.rows) == (1e-5, 0, 16)
    assert recipes.code("qwen-14b").learning_rate == 6e-5 and recipes.code().length == 8192
    assert recipes.code_chat("qwen-14b").learning_rate == 2e-6
    made = recipes.math()
    assert (made.length, made.learning_rate, made.steps) == (1024, 2e-5, 50_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": "2048"}, "length '2048': must be a whole number"),
        ({"rows": 128.0}, "rows 128.0: must be a whole number"),
        ({"steps": "100"}, "steps '100': must be a whole number"),
        ({"steps": True}, "steps True: must be a whole number"),
        ({"seed": None}, "seed None: must be a whole number"),
        ({"learning_rate": "1e-4"}, "learning_rate '1e-4': must be a number"),
        ({"learning_rate": True}, "learning_rate True: must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate nan: a number, at least 0"),
        ({"warmup": float("inf")}, "warmup inf: a number, at least 0, and below"),
        ({"epochs": [1]}, "epochs [1]: must be a number"),
        (
            {"steps": 10**400},
            "steps 100000000000000000...0000000000000000000: a number, at least 1, and below",
        ),
        ({"b1": np.float64("nan")}, "b1 nan: a number, at least 0, and below 1"),
        ({"sequence_parallel": 1}, "sequence_parallel 1: must be true or false"),
        ({"train_embeddings": "yes"}, "train_embeddings 'yes': must be true or false"),
        ({"schedule": ["cosine"]}, "schedule must be text (str), got list"),
        ({"system": None}, "system must be text (str), got None"),
        ({"lora_targets": "c_attn"}, "lora_targets 'c_attn': must be a tuple or a list"),
        ({"lora_targets": (1,)}, "each of lora_targets must be text (str), got int 1"),
        ({"steps": None}, "steps None and epochs None: give one of them"),
        ({"data": "chats"}, "data 'chats': allowed are text, chat"),
        ({"clip_norm": 10**400}, "clip_norm 100000000000000000...0"),
    ],
)
def test_values_that_a_recipe_cannot_have(change, message):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(recipes.sft(), **change)
    assert str(caught.value).startswith(message)


def test_arguments_of_recipes():
    for length in ("2048", 2048.0, True, 0):
        with pytest.raises(ValueError, match=r"^length .*: must be a whole number of at least 2"):
            recipes.pretrain(length=length)  # pyright: ignore
    for make in recipes.RECIPES.values():
        with pytest.raises(ValueError, match=r"^source \['memo'\]: allowed here are"):
            make(source=["memo"])
    for make in (recipes.pretrain, recipes.code, recipes.code_chat):
        with pytest.raises(ValueError, match=r"^model must be text \(str\), got int 7"):
            make(7)  # pyright: ignore
    made = dataclasses.replace(
        recipes.pretrain(length=np.int64(512)),  # pyright: ignore
        seed=np.uint8(3),
        clip_norm=np.float32(0.5),
        sequence_parallel=np.bool_(True),
        lora_targets=["w1"],
    )
    plain = json.loads(json.dumps(dataclasses.asdict(made)))  # as a run keeps it
    kept = [plain[x] for x in ("length", "rows", "seed", "clip_norm", "lora_targets")]
    assert kept == [512, 8192, 3, 0.5, ["w1"]] and made.lora_targets == ("w1",)


def test_what_follows_from_a_length(capsys):
    """A batch has 4 M tokens, whatever the length of its rows."""
    assert pretrain.main(["--model", "qwen-7b", "--length", "8192", "--dry-run"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["length"], shown["rows"], shown["steps"]) == ("8192", "512", "572205")
    assert recipes.pretrain("qwen-7b", length=8192).steps == 572_205
    for name in ("math", "code_chat"):
        assert "source 'script'" in fail(capsys, ["--recipe", name, "--source", "script"])


def test_schedules():
    made = recipes.sft()
    rate = made.schedule_of(4000)
    np.testing.assert_allclose([rate(0), rate(1430), rate(4000)], [0, 2e-6, 2e-7], rtol=1e-6)
    rate = recipes.code().schedule_of(1000)
    np.testing.assert_allclose([rate(15), rate(30), rate(999)], [1.5e-5, 3e-5, 3e-5], rtol=1e-6)
    for name in ("constant", "cosine"):
        rate = dataclasses.replace(made, schedule=name, warmup=0.0).schedule_of(10)
        np.testing.assert_allclose(rate(0), 2e-6, rtol=1e-6)


def test_steps_of_epochs():
    made = dataclasses.replace(recipes.sft_lora(), epochs=1.5)
    assert task._steps(made, 33) == 4  # of 16 rows
    with pytest.raises(ValueError, match=r"1e\+30 epochs are 1\.875e\+30 steps"):
        task._steps(dataclasses.replace(made, epochs=1e30), 30)


def test_the_recipe_that_would_run_is_shown(capsys):
    assert sft.main(["--recipe", "math", "--rows", "7", "--dry-run"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["rows"], shown["length"], shown["steps"]) == ("7", "1024", "50000")
