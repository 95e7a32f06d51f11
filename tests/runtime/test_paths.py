"""Paths that cannot be: each is refused in one line, wherever it is given."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import qwen_jax
from convert import from_hf, to_hf
from qwen_jax import checkpoint, expand_vocab
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint import inspection
from qwen_jax.generate import __main__ as generate
from qwen_jax.runtime import caches, paths
from tests.support.conversion import GOLDEN, last_line
from train import perplexity, pretrain, sft, tokenizer
from train.run.run_folder import locked


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """A folder with a link that leads nowhere, one that leads to itself, and a good one."""
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "there").mkdir()
    (tmp_path / "good").symlink_to("there")
    return tmp_path


def save(path: Any) -> None:
    checkpoint.save(path, *([None] * 2))


BAD = [
    ("", "the path '' is empty: name a file or a folder"),
    ("a\0b", r"the path 'a\x00b' holds a zero: name a file or a folder"),
    ("{}/dangling", "is a symbolic link to gone, which leads nowhere"),
    ("{}/dangling/in/it", "dangling is a symbolic link to gone, which leads nowhere"),
    ("{}/loop", "is a symbolic link to loop, which leads nowhere"),
]


@pytest.mark.parametrize(("text", "told"), BAD)
def test_paths_that_lead_nowhere(links, text, told):
    text = text.format(links)
    for work in (
        paths.parse, qwen_jax.load, checkpoint.verify_whole, Tokenizer.from_file,
        save,
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            work(text)
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_none():
    for value in (5, b"a", None):
        with pytest.raises(ValueError, match="a path must be a str or a Path, got"):
            paths.parse(value)  # pyright: ignore[reportArgumentType]


def test_links_that_lead_somewhere(links):
    for name in ("good", "good/new", "there", "new/and/newer", "dangling/.."):
        if name != "dangling/..":
            assert paths.parse(f"{links}/{name}") == links / name
    assert paths.parse(".") == Path()


Main = Callable[[list[str]], int]
COMMANDS: list[tuple[Main, list[str]]] = [
    (from_hf.main, [str(GOLDEN), "{}"]),
    (from_hf.main, ["{}", "out"]),
    (to_hf.main, ["ckpt", "{}"]),
    (to_hf.main, ["{}", "out"]),
    (generate.main, ["--ckpt", "{}", "--prompt", "a"]),
    (inspection.main, ["inspect", "{}"]),
    (perplexity.main, ["--ckpt", "{}", "--data", "a"]),
    (sft.main, ["--ckpt", "{}", "--data", "a", "--out", "b"]),
    (pretrain.main, ["--model", "{}", "--data", "a", "--out", "b"]),
    (tokenizer.main, ["--data", "a", "--out", "{}"]),
    (expand_vocab.main, ["{}", "a", "b"]),
]


@pytest.mark.parametrize(
    ("main", "arguments"), COMMANDS, ids=[f"{m.__module__} {' '.join(a)}" for m, a in COMMANDS]
)
@pytest.mark.parametrize(("text", "told"), BAD[::2])
def test_commands_refuse_them(links, monkeypatch, capfd, main, arguments, text, told):
    monkeypatch.chdir(links)
    monkeypatch.setattr(caches, "use_compilation_cache", lambda *_, **__: None)
    given = [x.replace("{}", text.format(links)) for x in arguments]
    try:
        assert main(given) in (1, 2)
    except SystemExit as error:  # of argparse
        assert error.code == 2
    assert told in last_line(capfd)
    assert {file.name for file in links.iterdir()} == {"dangling", "loop", "there", "good"}


BACKSLASH, NOT_UTF8 = "a\\b", os.fsdecode(b"\xbe\xa8")


@pytest.mark.parametrize("name", [BACKSLASH, NOT_UTF8, f"{BACKSLASH}/in", f"{NOT_UTF8}/in"])
def test_names_that_tensorstore_cannot_open(tmp_path, golden_dir, capfd, name):
    what = "has a backslash" if "\\" in name else "is not UTF-8"
    told = f"its name {what}, which TensorStore cannot open: choose another"
    out = str(tmp_path / name)
    for main, source in ((from_hf.main, GOLDEN), (to_hf.main, golden_dir)):
        assert main([str(source), out]) == 1
        assert told in last_line(capfd)
    for work in (save, paths.kvstore, lambda path: ExitStack().enter_context(locked(path))):
        with pytest.raises(ValueError, match=told):
            work(Path(out))
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(name)
    with pytest.raises(ValueError, match=told):
        paths.check_name(tmp_path / "link")
    assert to_hf.main([str(tmp_path / "link"), str(tmp_path / "out"), "--verify"]) == 1
    assert told in last_line(capfd)


def test_a_file_that_goes_while_sizes_are_read(tmp_path, monkeypatch):
    """As the draft of another process does, which becomes a part of a token cache."""
    (tmp_path / "there").write_text("four")
    monkeypatch.setattr(os, "walk", lambda root: [(str(root), [], ["gone", "there"])])
    assert paths.sizes(tmp_path) == {"there": 4}


@pytest.mark.parametrize("name", ["gs://", "gs:///", "gs:///a/b"])
def test_a_bucket_has_a_name(name):
    """Otherwise the client asks the service again and again, for minutes."""
    with pytest.raises(ValueError, match=f"^{name}: no bucket: write gs://BUCKET/"):
        paths.parse(name)
