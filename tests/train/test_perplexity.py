"""The table of long context: figures, plot, and what it refuses."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import qwen_jax
from qwen_jax import attention, model
from qwen_jax.config import RopeScaling
from qwen_jax.runtime import paths
from tests.support import compilations
from tests.support.conversion import back, there
from tests.support.tiny import on_mesh, tiny_config, tiny_decoder, tiny_tokens
from tests.support.training import TEXT, fail, prepared, pretraining, succeed
from train import perplexity
from train.measuring import figures, measure, modes
from train.step import loss


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model that has learned a little at 32 tokens; 64 are its `seq_length`."""
    folder = prepared(tmp_path_factory.mktemp("given"))
    succeed(pretraining(folder, folder / "run", "--mesh", "fsdp=1"))
    return folder


def command(given: Path, *options: object) -> list[str]:
    arguments = ["--ckpt", given / "run" / "model", "--data", given / "text.txt"]
    return [str(x) for x in (*arguments, "--lengths", "64,128,256", "--dtype", "float32", *options)]


def by_hand(given: Path, length: int, **overrides: object) -> float:
    """From the logits of every row, with the alpha of its length."""
    model = qwen_jax.load(given / "run" / "model", dtype="float32", overrides=overrides)
    ids = np.array(model.need_tokenizer().encode(TEXT))
    rows = ids[: len(ids) // 256 * 256].reshape(-1, length)
    scores = np.asarray(model.logits(rows), np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    found = np.take_along_axis(scores[:, :-1], rows[:, 1:, None], -1)
    return float(np.exp(-found.mean()))


def test_rows_are_measured_together(monkeypatch):
    """As one by one, although the last batch is not full; measuring again compiles nothing."""
    config, ids = tiny_config(), tiny_tokens(1, 80)[0]

    def found(at_a_time: int) -> float:
        monkeypatch.setattr(measure, "_AT_A_TIME", at_a_time)
        return measure.perplexity(
            decoder, config, ids=ids, attend=attention.xla, dtype="float32", length=16
        )

    with on_mesh(fsdp=4):
        assert [measure.rows_at_once(16, count) for count in (1, 5, 999)] == [4, 8, 256]
    with on_mesh():
        decoder = model.stack(tiny_decoder(config))
        assert [measure.rows_at_once(16, count) for count in (1, 5, 999)] == [1, 5, 256]
        one = found(16)
        np.testing.assert_allclose(found(32), one, rtol=1e-6)
        with compilations.counted() as programs:
            assert found(16) == one
    assert programs == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_was_measured_before_an_interruption(given, tmp_path, capsys, monkeypatch, error):
    """Is told as it comes, and printed at the end: a table, JSON, a file of JSON, and the plot."""

    def measured(*arguments: object, **named: object) -> float:
        if not values:
            raise error
        told.append(capsys.readouterr().err)
        return values.pop(0)

    monkeypatch.setattr(measure, "perplexity", measured)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    out, picture = tmp_path / "x.json", tmp_path / "x.png"
    for options in ((), ("--json",)):
        values, told = [9.0, 8.0, 7.0, 6.0], []
        options = (*options, "--modes", "plain,ntk", "--out", out, "--plot", picture)
        assert perplexity.main(command(given, *options)) == code
        assert "plain, 64 tokens: perplexity 9 (" in told[1]
        found = json.loads(out.read_text())
        assert found["perplexity"] == {"plain": {"64": 9, "128": 8, "256": 7}, "ntk": {"64": 6}}
        assert found["complete"] is False and picture.exists()
        picture.unlink()
        out.unlink()
        printed = capsys.readouterr().out
        if "--json" in options:
            assert json.loads(printed) == found
        else:
            assert [line.split() for line in printed.splitlines()] == [
                ["64", "128", "256"],
                ["plain", "9.00", "8.00", "7.00"],
                ["ntk", "6.00"],
            ]


@pytest.mark.parametrize("values", [[4.1, 4.4, 4.8], [7, 70, 3000], [5]])
def test_a_plot_has_numbers_on_its_axes_and_a_title(values, tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    found = {"plain": dict(zip((1024, 2048, 32768), values, strict=False))}
    title = figures.title_of("models/a$b$_鲸", 4096)
    figures.plot(found, tmp_path / "x.png", title=title)
    (figure,) = drawn
    (axes,) = figure.axes
    shown = [
        [
            text.get_text()
            for x, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            if low <= x <= high
        ]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
    ]
    assert shown[0] == ["1,024", "2,048", "32,768"][: len(values)]
    assert len([text for text in shown[1] if float(text.replace(",", "")) > 0]) >= 3
    assert axes.get_title() == "Perplexity of models/a$b$_鲸 over 4,096 tokens"


@pytest.mark.slow
def test_the_table_is_that_of_the_logits(given, tmp_path, capsys):
    assert perplexity.main(command(given, "--json", "--plot", tmp_path / "x.png")) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    settings = {
        "plain": {"use_dynamic_ntk": False, "use_logn_attn": False},
        "ntk": {"use_dynamic_ntk": True, "use_logn_attn": False},
        "ntk+logn": {"use_dynamic_ntk": True, "use_logn_attn": True},
        "ntk+logn+window": {
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "layer_windows": [64, None],
        },
    }
    assert list(found) == list(settings)
    for mode, overrides in settings.items():
        for length in (64, 128, 256):
            expected = by_hand(given, length, **overrides)
            np.testing.assert_allclose(found[mode][str(length)], expected, rtol=1e-4)
    assert len({round(found[mode]["256"], 3) for mode in found}) == 4, "modes differ"
    assert found["plain"]["64"] == pytest.approx(found["ntk"]["64"]), "nothing to extend"
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_the_table_and_its_plot(given, tmp_path, capsys, monkeypatch):
    """A plot with the default name gets a number rather than replace another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perplexity.png").touch()
    (tmp_path / "perplexity-2.png").symlink_to("/nowhere")
    assert perplexity.main(command(given, "--modes", "plain", "--tokens", 256)) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["64", "128", "256"] and line.split()[0] == "plain"
    sizes = [x.lstat().st_size for x in sorted(tmp_path.glob("*.png"))]
    assert sizes[:1] == [8] and sizes[1] > 8 and sizes[2] == 0, "perplexity-2, -3, and without"


@pytest.mark.slow
def test_a_head_in_int8(given, tmp_path, capsys):
    """It predicts nearly as the one of floats does."""
    back(given / "run" / "model", tmp_path / "floats")
    there(tmp_path / "floats", tmp_path / "model", "--head", "int8")
    found = []
    for ckpt in (given / "run" / "model", tmp_path / "model"):
        args = ["--ckpt", str(ckpt), "--modes", "plain", "--json"]
        assert perplexity.main([*command(given), *args]) == 0
        found.append(json.loads(capsys.readouterr().out))
    floats, rounded = (list(x["perplexity"]["plain"].values()) for x in found)
    assert floats != rounded and rounded == pytest.approx(floats, rel=0.01)


def reported(tmp_path: Path, values: dict[int, float], **options: Any) -> argparse.Namespace:
    """Report perplexities by length into x.json and x.png, as `measure.run` does."""
    args = argparse.Namespace(ckpt="model", json=False, out=tmp_path / "x.json")
    vars(args).update(options)
    with figures.reported(args, 64, picture=tmp_path / "x.png") as tell:
        for length, value in values.items():
            tell("plain", length, value, 0.0)
    return args


def test_a_broken_output_loses_no_other(tmp_path, monkeypatch):
    """Neither a full stdout the files, nor a file that cannot be written the plot."""
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left on device: 'stdout'"):
            reported(tmp_path, {16: 9.0})
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is True
    (picture := tmp_path / "x.png").unlink()
    write, written = paths.write, []

    def once(path: Path, data: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)
        written.append(path)

    monkeypatch.setattr(paths, "write", once)
    with pytest.raises(OSError, match="No space left"):
        reported(tmp_path, {16: 9.0})
    assert picture.exists()


def test_figures_that_are_no_numbers(tmp_path, capsys):
    """NaN and what no float holds are told as they are, in narrow cells; in JSON they are null."""
    values = {at: loss.perplexity(x) for at, x in ((8, math.nan), (16, 9e9), (32, 700), (64, 0))}
    reported(tmp_path, values)
    table = capsys.readouterr().out.splitlines()[1]
    assert table.split() == ["plain", "nan", "inf", "1.01e+304", "1.00"] and len(table) == 56
    found = json.loads((tmp_path / "x.json").read_text())["perplexity"]["plain"]
    assert [found[at] for at in ("8", "16", "64")] == [None, None, 1]
    (tmp_path / "x.png").unlink()
    reported(tmp_path, {8: math.nan}, json=True)
    assert json.loads(capsys.readouterr().out)["perplexity"] == {"plain": {"8": None}}


def test_rope_scaling_is_of_the_directorys_own_mode():
    """So that what is called plain is, and dynamic NTK can be compared with YaRN."""
    yarn = tiny_config(rope_scaling=RopeScaling("yarn", 4.0, 16))
    assert modes.setting_of(yarn, "own", windows=None) == yarn
    assert modes.setting_of(yarn, "plain", windows=None) == tiny_config()
    assert modes.setting_of(yarn, "ntk", windows=None) == tiny_config(dynamic_ntk=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            ["--lengths", "64,100"],
            "--lengths 64,100: must be whole numbers from 2 on that divide the longest",
        ),
        (["--lengths", "64,x"], "--lengths 64,x: must be whole numbers"),
        (
            ["--windows", "[64"],
            "--windows [64: must be a JSON list of a number or null for each layer",
        ),
        (["--windows", ""], "--windows : must be a JSON list of a number or null for each layer"),
        (["--windows", "[64]"], "layer_windows"),
        (["--out", "none/x.json"], "--out none/x.json: the folder none does not exist"),
        (["--plot", "."], "--plot .: is a folder; name a file"),
        (["--plot", "none/x.png"], "--plot none/x.png: the folder none does not exist"),
        (["--plot", "/proc/x.png"], "--plot /proc/x.png: no file can be made there: No such file"),
        (["--out", "/proc/x.json"], "--out /proc/x.json: no file can be made there: No such file"),
        (["--plot", "x.pgf"], "--plot x.pgf: its suffix must be one of "),
        (["--plot", "x.jpq"], "--plot x.jpq: its suffix must be one of "),
        (["--attention", "xxla"], "attention 'xxla' is not known: choose one of auto"),
        (["--modes", "yarn"], "--modes yarn: must be one or more of plain, ntk"),
        (["--lengths", "65536"], "no document has 65536 tokens"),
        (["--tokens", "100"], "--tokens 100: must be at least 256, the longest of --lengths"),
        (["--lengths", "300", "--tokens", "100"], "--tokens 100: must be at least 300, the lon"),
        (["--plot", __file__], f"--plot {__file__}: exists already; name another file, or"),
        (["--plot", "a.svg", "--out", "./a.svg"], "--out a.svg: is the file of the plot: name"),
        (["--out", "perplexity.png"], "--out perplexity.png: is the file of the plot: name"),
        (["--out", __file__], f"--out {__file__}: exists already; name another file, or"),
    ],
)
def test_what_cannot_be(given, capsys, monkeypatch, change, problem):
    """Said before anything is measured, and but for the data before that is encoded."""
    monkeypatch.setattr(measure, "perplexity", lambda *_, **__: pytest.fail("it is measured"))
    if "no document" not in problem:
        monkeypatch.setattr(measure, "read_ids", lambda *_, **__: pytest.fail("it is encoded"))
    assert problem in fail(capsys, command(given, *change), perplexity)
