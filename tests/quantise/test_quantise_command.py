"""`python -m qwen_jax.quantise`: a chat model from end to end, and arguments that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import qwen_jax
from qwen_jax.quantise import __main__ as command
from qwen_jax.quantise import output


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about numbers, enough for 9 rows of 64 tokens."""
    said = [
        {"from": role, "value": value.format(number)}
        for number in range(6)
        for role, value in (("user", "What follows {}?"), ("assistant", "A number after {}."))
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.json"
    path.write_text(json.dumps([{"conversations": said[first:]} for first in (0, 2, 4, 6, 8)] * 3))
    return path


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits-of", "*.q"], "--bits-of *.q: must be PATTERN=BITS, with 4, 8 or 16 bits"),
        (["--bits-of", "*.q=2"], "--bits-of *.q=2: must be PATTERN=BITS"),
        (["--group-size", "0"], "--group-size: 0 must be at least 1, or -1 for all"),
        (["--damp", "1.5"], "--damp: 1.5 must lie between 0 and 1"),
        (["--held-out", "-1"], "--held-out -1: must be at least 0"),
        (["--act-order", "--group-aware"], "--group-aware: not allowed with argument --act-order"),
        (["--samples", "50", "--length", "64"], "rows of 64, and 50 full ones are needed"),
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
