"""`python -m qwen_jax.quantise`: a chat model from end to end, and arguments that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_jax
from qwen_jax import quantise
from qwen_jax.quantise import __main__ as command
from qwen_jax.quantise import output
from qwen_jax.quantise.algorithm import Order, Scheme
from qwen_jax.quantise.calibration import Rows
from qwen_jax.quantise.run import Settings
from qwen_jax.runtime import processes


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about numbers, enough for 15 rows of 64 tokens."""
    said = [
        {"from": role, "value": value.format(number)}
        for number in range(6)
        for role, value in (("user", "What follows {}?"), ("assistant", "A number after {}."))
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.json"
    path.write_text(json.dumps([{"conversations": said[first:]} for first in (0, 2, 4, 6, 8)] * 3))
    return path


@pytest.mark.slow
def test_a_chat_model(
    chat_dir: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--ckpt", chat_dir, "--data", chats, "--out", out, "--bits", "8"]
    options += ["--group-size", "16", "--group-aware", "--head", "int8", "--length", "64"]
    options += ["--bits-of", "layers.1.attn.?=16", "--samples", "2", "--held-out", "2"]
    assert command.main([str(option) for option in options]) == 0
    shown = capsys.readouterr()
    assert "calibrating on 2 rows of 64 tokens (" in shown.err and "on 2 others" in shown.err
    assert "note: " in shown.err and "are fewer than the 176 inputs of a matrix" in shown.err
    assert "block 2 of 2: ffn.up 0.0" in shown.err and f"{out} is complete" in shown.err
    table = shown.out.splitlines()
    assert table[1].split() == ["block", "q", "k", "v", "o", "up", "gate", "down", "output"]
    found = json.loads((out / output.REPORT).read_text())
    rows = [line.split()[1:] for line in table[2:4]]
    for number, row in enumerate(rows):
        each = found["layers"][f"layers.{number}.ffn.down"]
        assert each["relative_output_error"] == pytest.approx(float(row[6]), rel=1e-3)
        assert found["blocks"][number] == pytest.approx(float(row[7]), rel=1e-3)
    assert float(rows[0][0]) < 0.02 and rows[1][0] == "-"
    assert f"{found['targets']:,} tokens of held-out rows: KL {found['kl']:.4g}" in table[-1]
    assert 0 < found["kl"] < 1e-3

    ids = [[1, 2, 3, 4, 5]]
    before, after = (qwen_jax.load(path, dtype="float32").logits(ids) for path in (chat_dir, out))
    difference = np.linalg.norm(np.asarray(after) - before) / np.linalg.norm(before)
    assert 1e-4 < difference < 0.1


Started = tuple[Settings, Rows, Rows | None]


@pytest.fixture
def started(
    chat_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Started]:
    """Run the command with more options, and return what it would quantise."""
    found: list[Started] = []

    def run(settings: Settings, rows: Rows, *, held_out: Rows | None) -> dict[str, Any]:
        found.append((settings, rows, held_out))
        return {}

    def start(*options: str) -> Started:
        given = ["--ckpt", chat_dir, "--data", chats, "--out", tmp_path / "out", "--json", *options]
        assert command.main([str(option) for option in given]) == 0
        return found[-1]

    monkeypatch.setattr(quantise.run, "run", run)
    return start


def test_options_are_settings(
    started: Callable[..., Started], chat_dir: Path, tmp_path: Path
) -> None:
    settings, rows, held_out = started("--bits", "4", "--length", "64")
    assert settings == Settings(chat_dir, tmp_path / "out", Scheme())
    assert held_out is not None and (len(rows), len(held_out)) == (14, 1)

    options = ["--bits", "8", "--group-size", "32", "--act-order", "--asymmetric", "--damp", "0.1"]
    options += ["--head", "int8", "--dtype", "bfloat16", "--attention", "xla", "--resume"]
    options += ["--bits-of", "*=8", "--bits-of", "*.q=4", "--bits-of", "*=16"]
    settings, rows, held_out = started(*options, "--length", "64", "--samples", "7")
    scheme = Scheme(8, 32, False, Order.IMPORTANCE, 0.1)
    assert settings == Settings(
        chat_dir, tmp_path / "out", scheme, {"*.q": 4, "*": 16}, True, "bfloat16", "xla", True
    )
    assert list(settings.bits_of) == ["*.q", "*"]
    assert held_out is not None and (len(rows), len(held_out)) == (7, 8)

    settings, rows, held_out = started(
        "--bits", "4", "--group-aware", "--held-out", "0", "--length", "100"
    )
    assert settings.scheme.order is Order.GROUPS and held_out is None and rows.length == 100
    few = ("--bits", "4", "--length", "64", "--samples", "3", "--held-out", "4")
    _, rows, held_out = started(*few)
    assert held_out is not None and (len(rows), len(held_out)) == (3, 4)
    _, both, _ = started("--bits", "4", "--length", "64", "--samples", "7", "--held-out", "0")
    assert np.array_equal(both.tokens, np.concatenate([rows.tokens, held_out.tokens]))
    assert started(*few, "--seed", "1")[1].digest() != rows.digest()


def test_processes_agree_on_the_data(
    started: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(processes, "agree", lambda *args: said.append(args))
    started("--bits", "4", "--length", "64")
    started("--bits", "4", "--length", "64", "--seed", "1")
    assert [what for what, _ in said] == ["calibration data"] * 2
    assert said[0][1].startswith("15 rows of digest ") and said[0] != said[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits-of", "*.q"], "--bits-of *.q: must be PATTERN=BITS, with 4, 8 or 16 bits"),
        (["--bits-of", "*.q=2"], "--bits-of *.q=2: must be PATTERN=BITS"),
        (["--group-size", "0"], "--group-size: 0 must be at least 1, or -1 for all"),
        (["--damp", "1.5"], "--damp: 1.5 must lie between 0 and 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--held-out", "-1"], "--held-out -1: must be at least 0"),
        (["--act-order", "--group-aware"], "--group-aware: not allowed with argument --act-order"),
        ([], "rows of 2048, and 1 full ones are needed"),
        (["--samples", "50", "--length", "64"], "rows of 64, and 50 full ones are needed"),
        (["--held-out", "40", "--length", "64"], "rows of 64, and 41 full ones are needed"),
        (["--length", "1"], "no row on which the models are compared has two tokens of one text"),
        (["--group-size", "48", "--length", "64"], "group_size: 48 does not divide the 64 inputs"),
    ],
)
def test_bad_arguments(
    options: list[str],
    message: str,
    chat_dir: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    given = ["--ckpt", chat_dir, "--data", chats, "--out", out, "--bits", "4", *options]
    try:
        code = command.main([str(option) for option in given])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and message in last
    assert not out.exists()
