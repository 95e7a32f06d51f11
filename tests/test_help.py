"""`--help` of every command: what each option takes, which names there are, and its default."""

import argparse
import importlib
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

import qwen_jax
from qwen_jax import attention
from qwen_jax.attention import cache
from qwen_jax.config import presets
from qwen_jax.meshes import hardware
from qwen_jax.runtime import command
from train.measuring import modes
from train.run import recipes

COMMANDS = (
    "convert.from_hf",
    "convert.to_hf",
    "qwen_jax.expand_vocab",
    "qwen_jax.generate.__main__",
    "qwen_jax.quantise.__main__",
    "qwen_jax.serve.__main__",
    "qwen_jax.checkpoint.inspection",
    "qwen_jax.attention.tuning",
    "qwen_jax.terminal.program",
    "train.perplexity",
    "train.plan",
    "train.pretrain",
    "train.sft",
    "train.tokenizer",
)
ATTENTION = {"auto", *attention.IMPLEMENTATIONS}
# Texts that are one of a few names: the help lists them all. ("cache_dtype" None: as --dtype.)
NAMES: dict[str, Any] = {
    **{name: allowed for name, allowed in recipes._ALLOWED.items() if name != "data"},
    "attention": ATTENTION,
    "kernel": attention.IMPLEMENTATIONS,
    "model": presets.PRESETS,
    "source": ("report", "memo", "script"),
    "modes": (*modes.MODES, modes.OWN),
    "cache_dtype": cache.DTYPES,
    "mesh": ("data", "fsdp", "tp"),
    "topology": hardware.CHIPS,
    "lora_targets": ("c_attn", "c_proj", "w1", "w2"),
}
# Texts that a caller makes up: paths, texts, numbers in a form of their own.
FREE = {
    *(
        "vocab_file",
        "words_file",
        "out_file",
        "ckpt",
        "adapter",
        "adapters",
        "src",
        "dst",
        "dir",
        "out",
        "data",
        "eval_data",
        "tokenizer",
        "plot",
    ),
    *(
        "prompt",
        "prompt_file",
        "prompts",
        "chat",
        "chats",
        "system",
        "stop",
        "field",
        "set",
        "bits_of",
        "requantise",
    ),
    *("host", "api_key", "api_key_file", "allow_host", "name"),
    *("token_cache", "compilation_cache", "coordinator", "lengths", "windows", "profile_steps"),
}


def parsers(module: str) -> Iterator[argparse.ArgumentParser]:
    """The parser of a command, and those of its subcommands."""
    made: list[argparse.ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run", lambda parser, *_, **__: made.append(parser) or 0)
        importlib.import_module(module).main([])
    yield from made
    for action in made[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def said(action: argparse.Action) -> str:
    """The help of an option as it is printed."""
    return " ".join((action.help or "").split()) % {"default": action.default}


def options(module: str) -> Iterator[tuple[str, argparse.Action]]:
    """The options of a command, each with the title of its group, which may say more."""
    for parser in parsers(module):
        for group in parser._action_groups:
            for action in group._group_actions:
                if not isinstance(action, argparse._SubParsersAction):
                    yield group.title or "", action


def lacks(title: str, action: argparse.Action) -> str | None:
    """What the help of an option does not say of its default."""
    text = said(action)
    if not text:
        return "any help"
    if action.nargs == 0 or not action.option_strings or action.required:
        return None
    if not re.search("default|required", text + title):
        return "the default, or that it is required"
    given = action.default
    values = given if isinstance(given, list) else [] if given is None else [given]
    unsaid = [x for x in values if not re.search(rf"default.*{re.escape(str(x))}", text)]
    return f"the default's {unsaid}" if unsaid else None


def lacks_names(action: argparse.Action) -> str | None:
    """What the help of an option does not say of the names that it takes."""
    listed = action.choices is not None and action.metavar is None  # by argparse
    if action.nargs == 0 or action.type not in (None, str, command.text, command.path) or listed:
        return None
    names = action.choices or NAMES.get(action.dest, ())
    if not names and action.dest not in FREE:
        return "what is allowed: see NAMES and FREE of this file"
    text = said(action)
    missing = [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}\b", text)]
    return f"the names {missing}" if missing else None


@pytest.mark.parametrize("module", COMMANDS)
def test_every_option_says_its_default_and_its_names(module: str) -> None:
    found = [
        f"{action.dest}: {problem}"
        for title, action in options(module)
        for problem in (lacks(title, action), lacks_names(action))
        if problem
    ]
    assert not found, "the help lacks these"


def test_names_of_the_registry_that_are_written_elsewhere_are_its_own() -> None:
    """Where --help texts and figures of chips name kernels, they import nothing that knows them."""
    listed = re.split(r", | or ", command.ATTENTION.partition(" (")[0])
    assert sorted(listed) == sorted(ATTENTION)
    kernels = {name: chip.kernel for name, chip in hardware.CHIPS.items()}
    assert set(kernels.values()) <= set(attention.IMPLEMENTATIONS), kernels
    assert {name: chip.name for name, chip in hardware.CHIPS.items()} == {n: n for n in kernels}


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_an_option_is_in_one_style(module: str) -> None:
    """A noun phrase or an imperative in lower case, without a full stop, the default at its end."""
    style = r"(?![A-Z][a-z]+\b(?!\'))(?!(?:the|a|an) )(?:(?!default:).)+(?: \(default: .+\))?"
    found = [
        (action.dest, said(action))
        for _, action in options(module)
        if not re.fullmatch(style, said(action)) or said(action).endswith(".")
    ]
    assert not found, "these are not in the style of the others"


@pytest.mark.parametrize("module", COMMANDS)
def test_every_option_says_what_it_takes(module: str) -> None:
    """Not argparse's own `--accumulate ACCUMULATE`."""
    found = [
        action.dest
        for _, action in options(module)
        if action.nargs != 0 and action.metavar is None and action.choices is None
    ]
    assert not found, "these need a metavar such as N, DIR, FILE, NAME or SPEC"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_ends_with_the_usual_use(module: str) -> None:
    for parser in parsers(module):
        assert f"  {parser.prog}" in (parser.epilog or "")


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("wrong", [["--no-such-option"], ["--debug=1"], []])
def test_a_usage_error_is_one_line(
    module: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a list of all options, which its help has: the line says how it is called."""
    for parser in parsers(module):
        if not wrong and not any(action.required for action in parser._actions):
            continue
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(wrong)
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.endswith(f" (see {parser.prog} --help)\n")
        assert err.count("\n") == 1 and not out


def test_an_option_without_them_is_found() -> None:
    parser = argparse.ArgumentParser()
    for name, settings in {
        "--rows": {},
        "--length": {"help": "tokens (default: 7)", "default": 8, "type": int},
        "--colour": {"help": "a colour (default: none)"},
        "--attention": {"help": "auto or xla (default: auto)", "default": "auto"},
        "--depth": {"choices": ("1", "2"), "metavar": "N", "help": "1 (default: 1)"},
    }.items():
        action = parser.add_argument(name, **settings)
        assert lacks("", action) or lacks_names(action), name
    assert (
        lacks("sampling (defaults: the checkpoint's)", parser.add_argument("--k", help="x")) is None
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    for parser in parsers(module):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args(["--version"])
        out = capsys.readouterr().out
        assert out.startswith(f"qwen_jax {qwen_jax.__version__} ")
        assert f"jax {metadata.version('jax')}" in out and out.count("\n") == 1
