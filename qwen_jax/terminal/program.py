"""`python -m qwen_jax.chat`: an interactive chat with a model, in a terminal or through a pipe."""

import argparse
import io
import os
import sys
from typing import TYPE_CHECKING

from qwen_jax.chat import DEFAULT_SYSTEM
from qwen_jax.generate import from_options, generate_options
from qwen_jax.runtime import caches, command

if TYPE_CHECKING:
    from qwen_jax.terminal.screens import Screen

_SEED = 1234  # as the original's
_EXAMPLES = """examples:
  python -m qwen_jax.chat --ckpt DIR
  python -m qwen_jax.chat --ckpt DIR --system "Answer in verse." --seed 7
  python -m qwen_jax.chat --ckpt DIR < questions.txt > replies.txt
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m qwen_jax.chat`."""
    result = command.Parser(
        prog="python -m qwen_jax.chat",
        description="Chat with a model. :help lists what can be typed beside questions. In a pipe "
        "or from a file\nevery line is a question or a command; replies go to stdout, remarks to "
        "stderr.",
        epilog=_EXAMPLES,
    )
    result.add_argument(
        "--ckpt",
        required=True,
        metavar="DIR",
        help="model directory, as `python convert/from_hf.py` and training write them (required)",
    )
    generate_options.add_adapter(result)
    result.add_argument(
        "--system",
        type=command.text,
        default=DEFAULT_SYSTEM,
        metavar="TEXT",
        help="system message, which :system changes (default: %(default)s)",
    )
    result.add_argument(
        "--seed",
        type=int,
        default=_SEED,
        metavar="N",
        help="seed of every reply, which :seed changes: same seed, history and question, same "
        "reply (default: %(default)s)",
    )
    generate_options.model_options(result.add_argument_group("model"))
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def screen() -> "Screen":
    """Return the screen of this process: a terminal's, unless stdin or stdout is something else."""
    from qwen_jax.terminal import command_table, screens

    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from qwen_jax.terminal import prompting

        return prompting.TerminalScreen([f":{word}" for word in command_table.BY_WORD])
    if sys.stdin is None:  # closed
        return screens.PlainScreen(io.BytesIO())
    return screens.PlainScreen(sys.stdin.buffer, prompts=typed)


def work(args: argparse.Namespace) -> int:
    """Load the model and chat; return the exit status."""
    # Invalid arguments are found before the weights are read.
    from qwen_jax.generate import backend, description
    from qwen_jax.meshes import options
    from qwen_jax.terminal import chat_settings, replies, session

    sizes = options.mesh_sizes(args.mesh)
    backend.check_names(args.dtype, args.attention, cache_dtype=args.cache_dtype)
    shown = screen()
    about = from_options.describe(args)
    about.need_tokenizer()
    model = from_options.load(args, about, sizes=sizes)
    if model.is_base:
        command.say(f"note: {description.BASE_NOTE}")
    return session.Session(
        replies.ModelReplies(model, ntk=args.ntk),
        shown,
        settings=chat_settings.Settings.of(model.generation_config),
        system=args.system,
        seed=args.seed,
        welcome=f"Qwen, from {args.ckpt}. :help lists the commands / :help 显示帮助",
        debug=args.debug,
    ).run()


def main(argv: list[str] | None = None) -> int:
    """Run `python -m qwen_jax.chat`, and return its exit code."""
    status = 0

    def run(args: argparse.Namespace) -> None:
        nonlocal status
        status = work(args)

    return command.run(parser(), run, argv=argv) or status
