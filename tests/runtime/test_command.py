"""What every command does with arguments, streams and errors: one line, and the right exit code."""

import argparse
import contextlib
import errno
import functools
import io
import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gcsfs.retry import HttpError
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import aot, device, fine_tuning, golden, kernel_cost, quantised, scaling
from benchmarks import attention as attend
from benchmarks import cache as cached
from benchmarks import train as steps
from convert import from_hf
from qwen_jax import expand_vocab
from qwen_jax.attention import tuning, verdicts
from qwen_jax.checkpoint import inspection
from qwen_jax.generate import __main__ as generate
from qwen_jax.meshes import options
from qwen_jax.runtime import caches, command, errors, paths, progress
from train import perplexity, plan, pretrain, sft
from train import tokenizer as learning
from train.data import token_cache
from train.planning import planner

NOT_UTF8 = os.fsdecode("鲸鱼".encode("gbk"))


def run(work: Callable[..., Any], options: tuple[str, ...] = ()) -> int:
    parser = command.Parser(prog="pytest")
    command.add_debug(parser)
    for option in options:
        parser.add_argument(option)
    return command.run(parser, work, argv=[])


def raising(error: BaseException) -> Callable[..., Any]:
    def work(_: Any) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "Is a directory: a (name a file"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "Permission denied: a (this user",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "No space left on device: a (free"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "File name too long: a (choose a"),
        (OSError(errno.EXDEV, "Other disk", "a", None, b"b\xbe"), "Other disk: a -> b\\udcbe"),
        (FileNotFoundError(2, "No such file", NOT_UTF8), "No such file: \\udcbe\\udca8\\udcd3"),
        (OSError("a line of ours"), "a line of ours"),
        (
            HttpError({"code": 401, "message": "Anonymous caller"}),
            "Google Cloud Storage cannot be used: Anonymous caller, 401; see to the network, and",
        ),
        (AssertionError(), "AssertionError: no message; --debug shows where"),
        (StopIteration(), "StopIteration: no message; --debug shows where"),
        (ValueError(), "ValueError: no message; --debug shows where"),
        (KeyError("layers"), "KeyError: 'layers'; --debug shows where"),
        (RecursionError("maximum"), "something is nested too deeply, such as brackets in JSON"),
        (UnicodeEncodeError("gbk", "a\ud83d", 1, 2, "no"), "'\\ud83d' cannot be written in gbk"),
        (UnicodeDecodeError("utf-8", b"a\xe9", 1, 2, "no"), "0xe9 at byte 1 is not utf-8"),
        (ModuleNotFoundError(name="pyarrow.parquet"), "pip install -e '.[train]'"),
        (ModuleNotFoundError(name="grain"), "the package grain is not installed: pip install"),
        (ModuleNotFoundError(name="gcsfs"), "pip install -e '.[gcs]'"),
        (ModuleNotFoundError(name="huggingface_hub"), "pip install -e '.[hub]'"),
        (ModuleNotFoundError(name="tiktoken"), "pip install -e '.'"),
        (ModuleNotFoundError(name="train.data"), "run this from the root of a checkout"),
        (
            ImportError("cannot import name 'peft' from 'convert'", name="convert"),
            "convert.py hides the package convert of qwen_jax: rename it, or start the command by",
        ),
        (MemoryError(), "not enough memory on this machine: lower --rows; or --remat full"),
        (
            RuntimeError(f"RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes{' x' * 9999}"),
            "not enough memory on a device: lower --rows; or --remat full (RESOURCE_EXHAUSTED: Out",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"),
            "a kernel does not fit this chip: ",
        ),
        (
            RuntimeError("INTERNAL: CUDA driver version is insufficient for CUDA runtime version"),
            "CUDA 13 needs a driver of version 580 or later",
        ),
    ],
)
def test_every_error_is_a_line_that_leads_on(error, line, capsys, monkeypatch):
    if "hides" in line:
        hiding = types.ModuleType("convert")
        hiding.__file__ = "convert.py"
        monkeypatch.setitem(sys.modules, "convert", hiding)
    assert run(raising(error), ("--rows", "--remat")) == 1
    said = capsys.readouterr().err
    assert line in said and said.startswith("error: ") and said.count("\n") == 1
    assert len(said) < 800 and said.encode()


@pytest.mark.parametrize(
    ("asked", "message", "line"),
    [
        ("cuda", "", "jax finds no CUDA device here (JAX_PLATFORMS=cuda); pip install"),
        ("gpu", "'rocm': no", "jax finds no CUDA device here (JAX_PLATFORMS=gpu): no; pip install"),
        ("tpu", "'tpu': INTERNAL: no", "jax finds no TPU here (JAX_PLATFORMS=tpu): INTERNAL: no;"),
        ("cudda", "'cudda': no", "no platform 'cudda' here (JAX_PLATFORMS=cudda): no; known"),
        (
            "",
            "'tpu': in use by process 7",
            "jax finds no TPU here: in use by process 7; on a TPU VM",
        ),
    ],
)
def test_jax_without_its_devices(asked, message, line, monkeypatch):
    """As `xla_bridge.py` reports it: in a RuntimeError, or in an assertion without a word."""
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    end = "(set JAX_PLATFORMS='' to automatically choose an available backend)"
    what = f"RuntimeError({f'Unable to initialize backend {message} {end}'!r})"
    code = f"raise {what if message else 'AssertionError()'}"
    try:
        exec(compile(code, "jax/_src/xla_bridge.py", "exec"), {})
    except Exception as error:
        said = errors.explain(error)
        assert line in said and end not in said
        assert said.endswith("; or unset JAX_PLATFORMS, to take what there is") is bool(asked)


def test_interrupted_and_usage(capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert run(raising(command.UsageError("no"))) == 2
    assert capsys.readouterr().err == "interrupted\nerror: no (see pytest --help)\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--learning_rate", "1"], "unknown: --learning_rate 1; did you mean --learning-rate?"),
        (["--bogus=1"], "unknown: --bogus=1"),
        (["--rows", "x\ny"], r"--rows: 'x\ny' is not a whole number"),
        (["--final", "a"], "--final: 'a' is not a number such as 0.5"),
        (["--keep-last", "0"], "--keep-last: '0' is not a positive whole number"),
        (["--recipe", "qwen"], "--recipe: invalid choice: 'qwen' (choose from "),
        (["--rows"], "--rows: expected one argument"),
        (["--rows=--"], "--rows: expected one argument"),
        (["--data=--"], "--data: expected one argument"),
    ],
)
def test_a_line_that_cannot_be_parsed(argv, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(argv)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    assert said.endswith(" (see python train/pretrain.py --help)\n")


def test_an_exception_of_a_type_is_a_usage_error(capsys):
    def broken(text: str) -> Any:
        raise OverflowError("too large") if text == "9" else AssertionError

    parser = command.Parser(prog="pytest")
    parser.add_argument("--size", type=broken)
    for given, said in (("9", "too large"), ("8", "AssertionError")):
        with pytest.raises(SystemExit, match="2"):
            command.run(parser, print, argv=["--size", given])
        line = f"error: --size: '{given}': {said} (see pytest --help)\n"
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "argv",
    [
        ["--rows", "9" * 5000],
        ["--rows", "x" * 5000],
        ["--rows", "x " * 5000],
        ["--learning-rate", "x" * 5000],
        ["--recipe", "x" * 5000],
        ["--" + "x" * 5000],
        ["--mesh", "x" * 5000, "--ckpt", "a", "--data", "b", "--out", "c"],
        ["--ckpt", "x" * 5000, "--data", "b", "--out", "c"],
    ],
)
def test_long_values_are_cut_in_messages(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        assert pretrain.main(argv) in (1, 2)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(line) < 2200 and "..." in line
    assert len(line) < 600 or " " in argv[1]


@pytest.mark.parametrize("errors_", ["strict", "surrogateescape", "backslashreplace"])
@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252", "utf-8"])
def test_what_stdout_cannot_say_is_replaced(encoding, errors_, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors_, newline=""))
    assert run(lambda _: print("a\U0001f40b", NOT_UTF8)) == 0
    shown = raw.getvalue().decode(encoding)
    asked = errors_ == "backslashreplace"
    assert shown.startswith("a\U0001f40b " if encoding == "utf-8" else r"a\U" if asked else "a? ")
    assert shown.endswith("\\udce3\n" if asked else "????\n")


def test_streams_that_are_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(lambda _: print("a")) == 0
    assert run(raising(ValueError("a"))) == 1


def test_a_full_disk_behind_stdout(capsys, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run(lambda _: print("a")) == 1
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == os.devnull
    assert "No space left on device: stdout (free some space" in capsys.readouterr().err


class Broken(io.StringIO):
    """A stderr whose reader has gone, or a terminal that was closed."""

    def __init__(self, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, _: str) -> int:
        raise OSError(errno.EIO, "gone") if self._terminal else BrokenPipeError(errno.EPIPE, "gone")

    flush = functools.partialmethod(write, "")


@pytest.mark.parametrize("terminal", [True, False])
def test_work_goes_on_without_a_stderr(terminal, monkeypatch):
    def work(_: Any) -> None:
        command.say("a line")
        logging.getLogger("qwen_jax").warning("a log")
        with progress.bar(total=None, mininterval=0) as bar:
            bar.update()
            bar.write("a note", file=sys.stderr)
            bar.refresh()
        print("a warning", file=sys.stderr, flush=True)
        done.append(True)

    done: list[bool] = []
    monkeypatch.setattr(sys, "stderr", Broken(terminal))
    assert run(work) == 0 and done
    assert run(raising(ValueError("a"))) == 1
    monkeypatch.setattr(sys, "stderr", Broken(terminal))  # as outside a command
    command.say("a line")
    with progress.bar(total=None) as bar:
        bar.refresh()


def test_json_is_ascii(golden_dir, tmp_path, capsys):
    assert inspection.main(["inspect", str(golden_dir), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    link = tmp_path / "鲸鱼"
    link.symlink_to(golden_dir)
    assert inspection.main(["inspect", str(link), "--json"]) == 0
    out = capsys.readouterr().out
    whole["warnings"] = [x.replace(str(golden_dir), str(link)) for x in whole["warnings"]]
    assert out.isascii() and json.loads(out) == whole | {"path": str(link)}


TEXTS = [
    (generate, ["--ckpt", "x", "--prompt"]),
    (generate, ["--ckpt", "x", "--chat"]),
    (generate, ["--ckpt", "x", "--chat", "a", "--system"]),
    (sft, ["--system"]),
    (pretrain, ["--field"]),
    (perplexity, ["--ckpt", "x", "--data", "y", "--field"]),
    (learning, ["--data", "y", "--out", "z", "--field"]),
]


@pytest.mark.parametrize(("program", "argv"), TEXTS)
def test_a_text_that_is_not_utf8_is_refused(program, argv, capsys):
    for text in (NOT_UTF8, "a\ud83d"):
        with pytest.raises(SystemExit, match="2"):
            program.main([*argv, text])
        assert f"{argv[-1]}: {text!a} is not UTF-8 text" in capsys.readouterr().err


def test_utf8_in_a_locale_without_an_encoding():
    assert command.text(os.fsdecode("鲸鱼".encode()).encode("ascii", "replace").decode()) == "??"
    escaped = "鲸鱼".encode().decode("ascii", "surrogateescape")
    assert command.text(escaped) == "鲸鱼" == command.text("鲸鱼")


CKPT = ["--ckpt", "/no/such/dir"]
DATA = ["--data", "a.txt", "--out", "b"]


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (generate, [*CKPT, "--prompt", "a", "--mesh", "tp=x"], "--mesh 'tp=x': write it as"),
        (generate, [*CKPT, "--prompt", "a", "--mesh", "a\udcffb"], r"--mesh 'a\udcffb': write it"),
        (perplexity, [*CKPT, "--data", "a", "--mesh", "tp"], "--mesh 'tp': write it as"),
        (pretrain, [*CKPT, *DATA, "--mesh", "tp=0"], "--mesh 'tp=0': write it as"),
        (from_hf, ["a", "b", "--mesh", "fsdp"], "--mesh 'fsdp': write it as"),
        (
            generate,
            [*CKPT, "--prompt", "a", "--coordinator", "x", "--processes", "2", "--process", "0"],
            "--coordinator 'x': write it as HOST:PORT",
        ),
        (
            from_hf,
            ["a", "b", "--coordinator", "x:1", "--processes", "2", "--process", "2"],
            "--process 2: must be 0 to 1, as --processes is 2",
        ),
        (
            sft,
            ["--field", "text"],
            "--field applies only to documents, and recipe sft learns from conversations: lea",
        ),
        (pretrain, ["--system", "x"], "--system applies only to conversations, and recipe"),
        (pretrain, ["--loss-on", "assistant"], "--loss-on applies only to conversations, and re"),
        (
            pretrain,
            [*CKPT, *DATA, "--keep-best", "2"],
            "--keep-best needs held-out data: add --eval-d",
        ),
        (plan, ["--model", "qwen-7b", "--topology", "v5e:4x4", "--mesh", "q"], "--mesh 'q': write"),
    ],
)
def test_usage(program, argv, message, capsys, monkeypatch):
    monkeypatch.setattr(planner, "_setting", lambda *_, **__: None)
    monkeypatch.setattr("train.planning.topology.prepare", lambda *_, **__: None)
    assert program.main(argv) == 2
    assert message in capsys.readouterr().err


def test_virtual_devices_are_announced(monkeypatch, capsys):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    given = []
    monkeypatch.setattr(jax.config, "update", lambda *what: given.append(what))
    options.virtual_cpu_devices(options.mesh_sizes("data=2,tp=2"))
    assert given == [("jax_num_cpu_devices", 4)]
    assert "--mesh: 4 virtual devices share the cores of this CPU\n" in capsys.readouterr().err
    options.virtual_cpu_devices(options.mesh_sizes(None))
    assert not capsys.readouterr().err and len(given) == 1


def test_a_mesh_that_would_take_all_memory_is_refused(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("devices are made"))
    for text, count in (("data=513", 513), ("data=999999999,tp=9", 8999999991)):
        with pytest.raises(command.UsageError, match=f"--mesh: {count} devices for a process"):
            options.virtual_cpu_devices(options.mesh_sizes(text))
    with pytest.raises(command.UsageError, match="write it as fsdp=4"):
        options.mesh_sizes(f"data={'9' * 5000}")


PLAN = ["--model", "qwen-7b", "--topology", "v5e:2x2"]
BENCH = [*CKPT, "--bench"]
READS = [*CKPT, "--data", "a", "--modes", "plain,own"]


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (generate, [*BENCH, "--seed", "0"], "--seed has no effect with --bench, which prints no"),
        (generate, [*BENCH, "--temperature", "1"], "--temperature has no effect with --bench"),
        (generate, [*BENCH, "--ntk", "prompt"], "--ntk has no effect with --bench"),
        (
            generate,
            [*BENCH, "--max-new-tokens", "1"],
            "--max-new-tokens 1: must be at least 2 with",
        ),
        (generate, [*CKPT, "--temperature", "0", "--top-p", "1"], "--top-p has no effect with"),
        (generate, [*CKPT, "--temperature", "0", "--samples", "2"], "--samples has no effect wi"),
        (generate, [*BENCH, "--stop", "a"], "--stop has no effect with --bench"),
        (generate, [*BENCH, "--prompts", "a"], "--prompts cannot be combined with --bench, whi"),
        (generate, [*CKPT, "--prompt", "a", "--batch-size", "2"], "--batch-size applies only to s"),
        (generate, [*BENCH, "--start-timeout", "9"], "--start-timeout applies only to seve"),
        (from_hf, ["a", "b", "--heartbeat-timeout", "30"], "--heartbeat-timeout applies onl"),
        (tuning, ["--show", "--dtype", "bfloat16"], "--dtype has no effect with --show"),
        (tuning, ["--forget", "--out", "a"], "--out has no effect with --forget"),
        (pretrain, ["--final", "0.1", "--schedule", "constant"], "--final applies only to --sched"),
        (sft, ["--recipe", "code_chat", "--final", "0"], "--final applies only to --sched"),
        (pretrain, ["--too-long", "cut"], "--too-long applies only where examples st"),
        (pretrain, [*CKPT, *DATA, "--eval-every", "9"], "--eval-every needs held-out data: add"),
        (perplexity, [*READS, "--windows", "[64]"], "--windows applies only to mode ntk"),
        (plan, [*PLAN, "--cache-dtype", "int8"], "--cache-dtype applies only to decoding: le"),
        (plan, [*PLAN, "--decode", "--remat", "full"], "--remat applies only to"),
        (plan, [*PLAN, "--decode", "--lora-rank", "8"], "--lora-rank applies only to"),
        (plan, [*PLAN, "--tries", "6"], "--tries applies only to a search: leav"),
        (plan, [*PLAN, "--search", "--mesh", "tp=4"], "--mesh cannot be combined with --sea"),
        (plan, [*PLAN, "--base-dtype", "same"], "--base-dtype applies only to adapters: leave"),
        (plan, [*PLAN, "--sequence-parallel", "--mesh", "fsdp=4"], "mesh fsdp=4 has none"),
        (attend, ["--list", "--quick"], "--quick has no effect with --list"),
        (golden, ["--no-kernels", "--length", "64"], "--length applies to kernels"),
        (steps, ["--model", "qwen-1.8b", "--hidden", "64"], "--hidden applies to the small model"),
        (device, ["--list", "--again"], "--again has no effect with --list"),
    ],
)
def test_what_means_nothing_beside_the_rest(program, argv, message, capsys, monkeypatch):
    """It is refused, also where it is the default."""
    monkeypatch.setattr("train.planning.topology.prepare", lambda *_, **__: None)
    assert program.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --") and message in line


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (scaling, ["--only", "qwen-7b", "qwen-8b"], "--only qwen-8b: choose from qwen-1.8b"),
        (fine_tuning, ["--only", "qwen-8b"], "invalid choice: 'qwen-8b'"),
        (quantised, ["--only", "qwen-8b"], "invalid choice: 'qwen-8b'"),
        (cached, ["--task", "train"], "invalid choice: 'train'"),
        (kernel_cost, ["flush"], "flush: choose from flash"),
        (kernel_cost, ["--only", "flash"], "--only applies to a sweep"),
        (kernel_cost, ["flash", "--sweep"], "flash: --sweep prints no table"),
        (kernel_cost, ["decode", "--length", "2048"], "--length applies to the tables flash"),
        (kernel_cost, ["gpu", "--target", "v5e"], "--target applies to TPUs"),
        (aot, ["a.py", "--target", "h100", "--trips", "1"], "apply to TPUs: name one"),
    ],
)
def test_what_means_nothing_to_a_script(program, argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert message in capsys.readouterr().err


def test_a_setting_that_is_nested_too_deeply():
    with pytest.raises(command.UsageError, match=r"^--set a=\[+\.\.\.: write KEY=VALUE"):
        command.key_value("a=" + "[" * 100_000)


def test_the_arguments_that_a_command_line_names():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", default="a")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction)
    parser.add_argument("--count", action="count", default=0)
    parser.add_argument("--size", type=int, default="7")
    args = command.parse(parser, ["--rows", "1", "--set", "b", "--set", "c", "--no-fast", "-"])
    assert args.given == ("fast", "file", "rows", "set") and args.set == ["b", "c"]
    assert (args.file, args.rows, args.fast, args.count) == ("-", 1, False, 0)
    args = command.parse(parser, [])
    assert (args.set, args.rows, args.fast, args.size) == ([], 1, None, 7)
    with pytest.raises(AttributeError):
        args.no_such_argument  # noqa: B018


@pytest.mark.parametrize(
    ("program", "does"),
    [
        (generate, "Generate text with a model"),
        (pretrain, "Train a Qwen model to continue text"),
        (sft, "Fine-tune a Qwen model on conversations"),
        (perplexity, "Measure how well a model predicts long text"),
        (learning, "Learn a vocabulary from text"),
        (plan, "Plan a run on accelerators that this machine lacks"),
    ],
)
def test_help_opens_with_what_the_command_does(program, does, capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert capsys.readouterr().out.split("\n\n")[1].startswith(does)


@pytest.mark.parametrize("home", ["file", "none"])
def test_without_a_home_that_can_be_written_to(home, tmp_path, monkeypatch):
    """One warning, and caches that go with the process."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(jax.config, "update", lambda *_, **__: None)
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", None)
    if home == "none":
        monkeypatch.setattr(paths.Path, "home", no_home)
    caches._passing_root.cache_clear()
    reason = "this user has no home" if home == "none" else f"{tmp_path}/file/.cache/qwen_jax can"
    with pytest.warns(UserWarning, match=rf"^{reason}.* are not kept after this run; set XDG") as w:
        caches.use_compilation_cache()
        folders = [verdicts.folder(), token_cache.default_home()]
    assert len(w) == 1 and all(folder.is_dir() for folder in folders)
    assert verdicts.kept() == [] and not folders[0].is_relative_to(tmp_path / "file")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_cache_that_cannot_be_written_to_is_read(fault, named, tmp_path, monkeypatch):
    """One warning, and nothing that jax writes in part; the folder may be jax's own setting."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    names = tuple(f"jax_{name}" for name in (*names, "persistent_cache_enable_xla_caches"))
    before = {name: jax.config.values[name] for name in names}
    hits = []
    heard = lambda event, **_: hits.append(event) if "cache_hits" in event else None  # noqa: E731
    monitoring.register_event_listener(heard)

    def compile_(factor):
        jax.jit(lambda x: x * factor + 1)(np.arange(7))

    try:
        caches.use_compilation_cache(str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        compile_(3)
        entries = sorted(tmp_path.iterdir())
        assert entries and not hits
        if fault == "full":
            usage = types.SimpleNamespace(free=9 * 2**20)
            monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: usage)
            reason = "9 MiB of its disk are free, at least 64 must be"
        else:
            monkeypatch.setattr(caches.os, "access", lambda *_: False)
            reason = "Permission denied"
        with pytest.warns(UserWarning, match=f"^{tmp_path}: {reason}: newly .* not kept$") as told:
            caches.use_compilation_cache(str(tmp_path) if named else None)
            compilation_cache.reset_cache()
            compile_(3)
            compile_(5)
        assert len(told) == 1 and len(hits) == 1
        assert sorted(tmp_path.iterdir()) == entries
    finally:
        monitoring.unregister_event_listener(heard)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_files_in_messages(tmp_path, capsys):
    name = str(tmp_path / NOT_UTF8)
    assert generate.main(["--ckpt", name, "--prompt-file", name]) == 1
    Path(name).mkdir()
    assert expand_vocab.main([name, name, f"{name}/out"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: No such file or directory: {tmp_path}/\\udcbe\\udca8\\udcd3\\udce3"
    assert second.startswith(f"error: {tmp_path}/\\udcbe") and " is a folder: give" in second


def test_a_real_process(golden_dir):
    """Its encoding comes from the environment, and its arguments are bytes."""
    argv = [sys.executable, "-m", "qwen_jax.checkpoint", "inspect", f"{golden_dir}/鲸鱼\U0001f40b"]
    done = subprocess.run(argv, env={**os.environ, "PYTHONIOENCODING": "gbk"}, capture_output=True)
    assert done.returncode == 1 and "鲸鱼?" in done.stdout.decode("gbk")
    assert "鲸鱼\\U0001f40b is not a directory" in done.stderr.decode("gbk")


ROOT = Path(__file__).parents[2]
SCRIPTS = ("train/pretrain.py", "train/sft.py", "train/perplexity.py", "train/tokenizer.py")
SCRIPTS += ("train/plan.py", "convert/from_hf.py", "convert/to_hf.py")
# As Python starts a file, but for all in one process: the folder of the file comes first.
START = """
import contextlib, runpy, sys
for script in sys.argv[1:]:
    sys.path[0] = script.rpartition("/")[0]
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    import convert, train  # as a command does when it works
    for name in [x for x in sys.modules if x.partition(".")[0] in ("train", "convert")]:
        del sys.modules[name]
"""


def test_commands_are_not_hidden_by_files_of_the_same_names(tmp_path):
    """Started where a train.py and a convert.py are found before what is installed."""
    for name in ("train", "convert"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('another')")
    scripts = [str(ROOT / script) for script in SCRIPTS]
    command = [sys.executable, "-c", START, *scripts]
    hiding = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=hiding, capture_output=True, text=True)
    assert done.stdout.count("usage: ") == len(SCRIPTS)


def test_commands_are_spelled_in_one_way():
    """As files, which nothing hides, wherever a command is named."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    texts += [*ROOT.glob("train/**/*.py"), *ROOT.glob("convert/**/*.py"), ROOT / "Makefile"]
    texts += [*ROOT.glob("examples/*/*.sh"), *ROOT.glob("benchmarks/*.py")]
    modules = re.compile(r"-m[\\\",\s]+(train|convert)\.")
    # A section of docs/training.md says what becomes of the other way.
    found = [f.name for f in texts if modules.search(f.read_text(encoding="utf-8"))]
    assert found == ["training.md"]


JOINS = {
    "qwen_jax.generate.__main__": "--ckpt a --prompt b",
    "qwen_jax.serve.__main__": "--ckpt a",
    "qwen_jax.quantise.__main__": "--ckpt a --data b --out c --bits 4",
    "convert.from_hf": "a b",
    "convert.to_hf": "a b",
    "train.sft": "--ckpt a --data b --out c",
    "train.pretrain": "--ckpt a --data b --out c",
}


def test_nothing_loads_jax_before_processes_are_joined():
    """jax's runtime reads how it is to report the loss of a process when it is loaded."""
    code = (
        "import importlib, sys; from qwen_jax.runtime import process_options\n"
        "process_options.join = lambda _: sys.exit(3 if 'jax' in sys.modules else 4)\n"
        "importlib.import_module(sys.argv[1]).main(sys.argv[2:])"
    )
    for module, arguments in JOINS.items():
        line = [sys.executable, "-c", code, module, *arguments.split()]
        assert subprocess.run(line, cwd=ROOT).returncode == 4, module


def test_commands_load_jax_only_to_work():
    """`--help` and usage errors come at once."""
    modules = ["perplexity", "plan", "pretrain", "sft", "tokenizer"]
    code = f"from train import {', '.join(modules)}; from convert import from_hf, to_hf; import sys"
    code += "; import qwen_jax.chat.__main__"
    line = [sys.executable, "-c", f"{code}; sys.exit('jax' in sys.modules)"]
    assert subprocess.run(line, cwd=ROOT).returncode == 0
