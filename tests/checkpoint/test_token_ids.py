"""Vocabularies that were cut short, and ids that are not of a model, by what other files say."""

import base64
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import qwen_jax
from convert import from_hf, to_hf
from qwen_jax import checkpoint
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint import inspection, token_ids
from tests.support.conversion import back, edit, last_line, there
from tests.support.training import fail
from tests.support.vocabulary import qwen_vocab_path
from tests.tools.make_checkpoint import PRESETS, make_checkpoint
from train import pretrain

RANKS, ROWS = 600, 1024
AGAIN = "download or copy it again"


def vocabulary(lines: int = RANKS) -> str:
    """The first lines of a vocabulary of `RANKS` tokens."""
    tokens = [bytes([i]) for i in range(256)] + [b"%04d" % i for i in range(RANKS - 256)]
    encoded = (base64.b64encode(token).decode() for token in tokens[:lines])
    return "".join(f"{text} {rank}\n" for rank, text in enumerate(encoded))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a whole vocabulary."""
    folder = tmp_path_factory.mktemp("source")
    sizes = {"vocab_size": ROWS, "hidden_size": 16, "kv_channels": 8, "intermediate_size": 32}
    make_checkpoint(folder, PRESETS["tiny"] | sizes | {"num_hidden_layers": 1}, "float32")
    (folder / "qwen.tiktoken").write_text(vocabulary())
    edit(folder / "generation_config.json", **ENDS)
    return folder


ENDS: dict[str, Any] = {"eos_token_id": RANKS, "pad_token_id": RANKS, "stop_words_ids": [[RANKS]]}


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there(source, path)
    return path


@pytest.fixture(params=["source", "model"])
def refuses(request: Any, source: Path, model: Path, tmp_path: Path, capfd: Any) -> Any:
    """A function that writes a file of a checkpoint, or of a model directory, for the time of a
    conversion or a load, and returns what that is refused with.
    """

    def of(name: str, text: str | None) -> str:
        folder = source if request.param == "source" else model
        before = (folder / name).read_text()
        try:
            (folder / name).unlink()
            if text is not None:
                (folder / name).write_text(text)
            if request.param == "model":
                with pytest.raises(ValueError) as caught:
                    qwen_jax.load(folder)
                assert "\n" not in str(caught.value)
                return str(caught.value)
            assert from_hf.main([str(folder), str(tmp_path / "out")]) == 1
            assert not (tmp_path / "out").exists()
            return last_line(capfd)
        finally:
            (folder / name).write_text(before)

    return of


def test_a_vocabulary_that_was_cut_short_is_refused(refuses):
    said = refuses("qwen.tiktoken", vocabulary(300))
    assert "qwen.tiktoken has 300 ranks and no id 600, which " in said
    assert "generation_config.json has as eos_token_id" in said and AGAIN in said


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("eos_token_id", ROWS, f"eos_token_id {ROWS}: ids are 0 to {ROWS - 1}"),
        ("eos_token_id", [RANKS, 10**30], "eos_token_id is 10000"),
        ("stop_words_ids", [[5], [5, ROWS]], f"stop_words_ids {ROWS}: ids are"),
        ("pad_token_id", -2, "pad_token_id is -2: must be"),
        ("pad_token_id", ROWS - 1, f"no id {ROWS - 1}, which"),
    ],
)
def test_ids_that_no_row_has_are_refused(refuses, key, value, told):
    said = refuses("generation_config.json", json.dumps({key: value}))
    assert "generation_config.json" in said and told in said


def folder_of(path: Path, lines: str, config: dict[str, Any], settings: Any = None) -> Tokenizer:
    """The small files of a checkpoint, and its tokenizer."""
    sizes = {"vocab_size": ROWS, **config}
    (path / "config.json").write_text(json.dumps(PRESETS["tiny"] | sizes))
    (path / "qwen.tiktoken").write_text(lines)
    if settings is not None:
        (path / "generation_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_file(path / "qwen.tiktoken")


def test_what_config_json_says_counts_where_it_can_be(tmp_path):
    tokenizer = folder_of(tmp_path, vocabulary(300), {"eos_token_id": 600})
    with pytest.raises(ValueError, match=f"no id 600, which .*config.json has .*{AGAIN}"):
        token_ids.check(tmp_path, tokenizer)
    token_ids.check(tmp_path, folder_of(tmp_path, vocabulary(300), {"eos_token_id": 151643}))
    assert checkpoint.load_generation_config(tmp_path).stops == ()


def test_an_unused_row_is_padding(tmp_path):
    """Of a vocabulary that is known to be whole."""
    lines, config = qwen_vocab_path().read_text(), {"vocab_size": 151_936}
    tokenizer = folder_of(tmp_path, lines, config, {"pad_token_id": 151_935})
    token_ids.check(tmp_path, tokenizer)
    edit(tmp_path / "generation_config.json", eos_token_id=151_935)
    with pytest.raises(ValueError, match=r"no id 151935, which .* has as eos_token_id"):
        token_ids.check(tmp_path, tokenizer)


def test_a_few_lines_less_are_warned_of(tmp_path):
    """Replies would end at another control token, which somebody may mean."""
    for lines, name in ((RANKS - 1, "im_start"), (RANKS - 10, "extra_7")):
        tokenizer = folder_of(tmp_path, vocabulary(lines), {}, ENDS)
        with pytest.warns(UserWarning, match=rf"eos_token_id is <\|{name}\|> of .*{AGAIN}"):
            token_ids.check(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        ENDS,
        {"eos_token_id": [RANKS + 2, RANKS], "pad_token_id": RANKS + 3},
        {"eos_token_id": RANKS + 2, "stop_words_ids": [[1, 2], [RANKS + 1]]},
        {"eos_token_id": 7, "pad_token_id": None},
        {"pad_token_id": -1},
    ],
)
def test_what_is_right_is_accepted(tmp_path, settings):
    token_ids.check(tmp_path, folder_of(tmp_path, vocabulary(), {}, settings))


def test_the_beginning_of_the_published_vocabulary(tmp_path, capsys):
    lines = "".join(qwen_vocab_path().read_text().splitlines(keepends=True)[:1500])
    tokenizer = folder_of(tmp_path, lines, {"vocab_size": 151936})
    with pytest.raises(ValueError, match=rf"151643 ranks, has 1500, .*: {AGAIN}"):
        token_ids.check(tmp_path, tokenizer)
    file = str(tmp_path / "qwen.tiktoken")
    given = ["--model", "qwen-1.8b", "--tokenizer", file, "--data", file, "--out", f"{tmp_path}/r"]
    assert "ranks, has 1500," in fail(capsys, given, pretrain)
    # Small models may have small vocabularies, and large ones their own.
    token_ids.check(tmp_path, folder_of(tmp_path, lines, {"vocab_size": 2048}))
    token_ids.check(tmp_path, folder_of(tmp_path, vocabulary(), {"vocab_size": 151936}))


@pytest.mark.parametrize(
    ("lines", "rows", "told", "refused"),
    [
        (
            RANKS,
            RANKS - 1,
            f"has tokens up to id {RANKS - 1}, and the model has vocab_size 599",
            True,
        ),
        (
            RANKS,
            RANKS + 1,
            r"gives <|im_start|>, <|im_end|>, <|extra_0|>, .* and 202 more ids",
            False,
        ),
        (RANKS, RANKS + 207, "gives <|extra_204|> ids that the model, of vocab_size 807,", False),
        (RANKS, 1025, "has 808 ids, and the model has vocab_size 1025: ids from 808 on are", False),
        (None, ROWS, "is not there: the model takes and gives token ids, and no text", False),
        (RANKS, RANKS + 208, None, False),
        (RANKS, 1024, None, False),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_told_of(tmp_path, capfd, lines, rows, told, refused):
    """By both converters and by inspect, not first by generating."""
    sizes = {"vocab_size": rows, "hidden_size": 16, "kv_channels": 8, "intermediate_size": 32}
    make_checkpoint(tmp_path / "a", PRESETS["tiny"] | sizes | {"num_hidden_layers": 1}, "float32")
    (tmp_path / "a/generation_config.json").unlink()
    file = tmp_path / "a/qwen.tiktoken"
    file.unlink(missing_ok=True)
    write = lambda: lines and file.write_text(vocabulary(lines))  # noqa: E731
    if refused:
        write()
        assert from_hf.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
        assert told in last_line(capfd) and not (tmp_path / "b").exists()
        file.unlink()
        there(tmp_path / "a", tmp_path / "b")
        file = tmp_path / "b/qwen.tiktoken"  # as old directories may have it
        write()
        capfd.readouterr()
    else:
        write()
        there(tmp_path / "a", tmp_path / "b")
        assert warned(capfd, told, tmp_path / "b" if lines is None else tmp_path / "a")
    assert inspection.main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert warned(capfd, told, tmp_path / "b")
    back(tmp_path / "b", tmp_path / "c")
    assert warned(capfd, told, tmp_path / "b")
    facts = inspection.describe(str(tmp_path / "b"))
    assert facts["whole"] and facts["tokenizer"] == (lines is not None)
    assert facts["ids"] == (None if lines is None else 808)
    assert len(facts["warnings"]) == (told is not None)


def warned(capfd: Any, told: str | None, folder: Path) -> bool:
    """Whether there was one warning, and it was this of the folder's vocabulary; None: no other."""
    found = [x for x in capfd.readouterr().err.splitlines() if x.startswith("warning: ")]
    if told is None:
        return not found
    (line,) = found
    return bool(re.match(f"warning: {folder}/qwen.tiktoken {told.replace('|', '[|]')}", line))


def test_inspect_tells_what_a_load_refuses(tmp_path, model):
    """Of a vocabulary that was cut short, and of ids that no row has; the weights are whole."""
    path = Path(shutil.copytree(model, tmp_path / "m"))
    (path / "qwen.tiktoken").write_text(vocabulary(300))
    facts = inspection.describe(str(path))
    assert facts["whole"] and facts["ids"] is None and "no id 600" in facts["warnings"][0]
    assert "cannot be read" in inspection.text(facts)
    (path / "qwen.tiktoken").unlink()
    edit(path / "generation_config.json", eos_token_id=ROWS)
    assert f"eos_token_id {ROWS}: ids are 0 to" in inspection.describe(str(path))["warnings"][0]


def test_settings_that_come_with_an_adapter(tmp_path, model, capfd, monkeypatch):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ROWS}))
    monkeypatch.setattr("qwen_jax.checkpoint.peft.changes", lambda *_, **__: {})
    monkeypatch.setattr(to_hf.target, "fingerprint", lambda _: {})
    arguments = [str(model), str(tmp_path / "out"), "--adapter", str(tmp_path)]
    assert to_hf.main(arguments) == 1
    assert f"generation_config.json: eos_token_id {ROWS}: ids are" in last_line(capfd)


def test_a_model_directory_as_it_was_loads(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_generation_config(model).stops == ((RANKS,),)
        assert len(checkpoint.load_tokenizer(model) or "") == RANKS + 208
