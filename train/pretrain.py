"""Trains a Qwen model to continue text, fresh or from a model: `python train/pretrain.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.run import arguments

_EXAMPLES = """examples:
  python train/pretrain.py --model qwen-1.8b --tokenizer qwen.tiktoken --data corpus/ --out RUN
  python train/pretrain.py --ckpt DIR --data more.jsonl --steps 1000 --learning-rate 3e-5 --out RUN
  python train/pretrain.py --recipe code --model qwen-7b --dry-run
  python train/pretrain.py --out RUN --resume                       goes on with that run
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    about = "Train a Qwen model to continue text, from fresh weights or from those of a model."
    return arguments.parser("pretrain", "text", about=about, examples=_EXAMPLES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return arguments.main(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
