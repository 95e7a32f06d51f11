"""Helpers for tests of runs: a tiny model and data, arguments, and readers of a run's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax import checkpoint
from qwen_jax.leaves.weights import named_leaves
from tests.support.tiny import tiny_config
from tests.support.vocabulary import write_tiny_vocab
from train import pretrain, sft

CONFIG = tiny_config(vocab_size=480, seq_length=64)
TEXT = "".join(f"the {i} times {i} is {i * i} and so on.\n" for i in range(60))
SIDES = (("user", "{}?"), ("assistant", "<{}>"))
CHATS = [
    {"conversations": [{"from": side, "value": text.format(i)} for side, text in SIDES]}
    for i in range(40)
]


def prepared(folder: Path) -> Path:
    """Write config.json, qwen.tiktoken, text.txt and chats.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    write_tiny_vocab(folder / "qwen.tiktoken")
    (folder / "text.txt").write_text(TEXT)
    (folder / "chats.json").write_text(json.dumps(CHATS))
    return folder


def pretraining(folder: Path, out: Path, *options: Any) -> list[str]:
    """The arguments of `train/pretrain.py` for a run of 12 steps."""
    given = ["--model", folder / "config.json", "--tokenizer", folder / "qwen.tiktoken"]
    given += ["--data", folder / "text.txt", "--out", out, "--steps", 12, "--rows", 4]
    given += ["--length", 32, "--warmup", 3, "--learning-rate", 0.01, "--dtype", "float32"]
    return [str(x) for x in (*given, "--save-every", 4, "--eval-every", 0, *options)]


def fine_tuning(folder: Path, ckpt: Path, out: Path, *options: Any) -> list[str]:
    """The arguments of `train/sft.py` for a run of 6 steps."""
    given = ["--ckpt", ckpt, "--data", folder / "chats.json", "--out", out, "--steps", 6]
    given += ["--rows", 4, "--length", 64, "--warmup", 2, "--learning-rate", 0.01]
    return [str(x) for x in (*given, "--dtype", "float32", "--eval-every", 0, *options)]


def succeed(arguments: list[str], command: Any = pretrain) -> None:
    """Run a command that must succeed."""
    assert command.main(arguments) == 0


def fail(capsys: Any, arguments: list[str], command: Any = sft) -> str:
    """Run a command that must fail; returns its one line of error."""
    assert command.main(arguments) in (1, 2)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def curve(out: Path, of: str = "train") -> dict[int, dict[str, float]]:
    """The metrics of each step, without those that depend on time. of: "train" or another kind."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        if figures.pop("of") == of:
            step = figures.pop("step")
            assert step not in found, "a step is there once"
            timed = ("tokens_per_second", "mfu", "memory_gb")
            found[step] = {k: v for k, v in figures.items() if k not in timed}
    return found


def weights(model: Path) -> dict[str, np.ndarray]:
    """The weights of a model directory, by path."""
    leaves = named_leaves(checkpoint.load(model))
    return {name: np.asarray(leaf[...]) for name, leaf in leaves.items()}
