"""Fine-tunes a Qwen model on conversations: `python train/sft.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.run import arguments

_EXAMPLES = """examples:
  python train/sft.py --ckpt DIR --data chats.jsonl --out RUN
  python train/sft.py --recipe sft_lora --ckpt DIR --data chats.json --eval-share 0.02 --out RUN
  python train/sft.py --ckpt DIR --data chats.jsonl --epochs 3 --rows 32 --out RUN
  python train/sft.py --out RUN --resume                            goes on with that run
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    about = (
        "Fine-tune a Qwen model on conversations: all of its weights (recipe sft), adapters "
        "(sft_lora), or as\nCode-Qwen-Chat and Math-Qwen-Chat were trained (code_chat, math)."
    )
    return arguments.parser("sft", "chat", about=about, examples=_EXAMPLES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return arguments.main(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
