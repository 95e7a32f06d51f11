"""The options of `python -m qwen_jax.generate`, and the checks of them that need no model."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.generate import prompts
from qwen_jax.runtime import caches, command, process_options

if TYPE_CHECKING:
    from qwen_jax.decoding.sampling import Sampler

_EXAMPLES = """examples:
  python -m qwen_jax.generate --ckpt DIR --prompt "The capital of France is"
  python -m qwen_jax.generate --ckpt DIR --chat "Who are you?" --temperature 0
  python -m qwen_jax.generate --ckpt DIR --prompt-file story.txt --max-new-tokens 200 --json
  python -m qwen_jax.generate --ckpt DIR --prompt "Names for a whale:" --samples 5 --stop .
  python -m qwen_jax.generate --ckpt DIR --prompts questions.jsonl --json > answers.jsonl
  python -m qwen_jax.generate --ckpt DIR --adapter RUN/adapter --chat "Who are you?"
  python -m qwen_jax.generate --ckpt DIR --bench --dtype bfloat16
  python -m qwen_jax.generate --ckpt DIR --prompt-file long.txt --set seq_length=2048
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m qwen_jax.generate`."""
    result = command.Parser(
        prog="python -m qwen_jax.generate",
        description="Generate text with a model: continue prompts, or answer as a chat model. "
        "Texts go to stdout,\nnotes and progress to stderr.",
        epilog=_EXAMPLES,
    )
    result.add_argument(
        "--ckpt",
        required=True,
        metavar="DIR",
        help="model directory, as `python convert/from_hf.py` and training write them (required)",
    )
    add_adapter(result)
    _prompt_options(result)
    result.add_argument(
        "--bench",
        action="store_true",
        help="print no text, but the speed of prefill and decoding, and the share of the device's "
        "memory bandwidth that decoding takes; for the prompt, or for 128 random tokens",
    )
    _sampling_options(result.add_argument_group("sampling"))
    model_options(result.add_argument_group("model"))
    result.add_argument("--json", action="store_true", help="print a JSON object for each text")
    process_options.add(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the option that puts an adapter on the model."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder of a LoRA adapter in PEFT's format, such as RUN/adapter of a training run, to "
        "put on the model without merging it (default: none)",
    )


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "prompts (one of the first five is required, but not with --bench)"
    )
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", type=command.text, metavar="TEXT", help="continue this text")
    add("--prompt-file", metavar="FILE", help="continue the text of this file (UTF-8)")
    add(
        "--prompts",
        metavar="FILE",
        help="continue each line of this file as a prompt of its own; in FILE.jsonl a line is a "
        'JSON text or {"prompt": TEXT}',
    )
    add("--chat", type=command.text, metavar="TEXT", help="answer this, as a chat model does")
    add(
        "--chats",
        metavar="FILE",
        help="answer each line of this file, which has the same form as that of --prompts",
    )
    group.add_argument(
        "--system",
        type=command.text,
        metavar="TEXT",
        help="system prompt of --chat and --chats (default: You are a helpful assistant.)",
    )


def _sampling_options(group: command.Group) -> None:
    add, own = group.add_argument, "(default: DIR's generation_config.json"
    add(
        "--max-new-tokens",
        type=command.positive,
        metavar="N",
        help=f"make at most N tokens {own}; 32 with --bench)",
    )
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="draw tokens at this temperature: below 1 likely ones more often; 0: always take the "
        f"likeliest token {own})",
    )
    add(
        "--top-p",
        type=float,
        metavar="X",
        help=f"draw from the most likely tokens that together have probability X {own})",
    )
    add(
        "--top-k",
        type=int,
        metavar="N",
        help=f"draw from the N likeliest tokens; 0: from all {own})",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"above 1: make tokens that are in the text already less likely; 1: off {own})",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text (default: 0)")
    add(
        "--samples",
        type=command.positive,
        default=1,
        metavar="N",
        help="draw N texts for each prompt, with --seed and the seeds after it (default: 1)",
    )
    add(
        "--stop",
        type=command.text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT, besides the tokens at which the model ends a text; repeatable "
        "(default: none)",
    )
    add(
        "--batch-size",
        type=command.positive,
        metavar="N",
        help="generate N texts at once, which does not change any of them (default: 8)",
    )


def model_options(
    group: command.Group,
    *,
    ntk: bool = True,
    cache_dtypes: Sequence[str] = ("int8", "int8_asymmetric"),
) -> None:
    """Add the options that say how a model is loaded, to which `from_options` turns them.

    ntk: whether the command lets its caller choose the length that sets dynamic NTK's alpha.
    cache_dtypes: the 8-bit dtypes in which the command can keep a KV cache.
    """
    add = group.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=command.DTYPE)
    add(
        "--cache-dtype",
        choices=tuple(cache_dtypes),
        help="keep the KV cache in 8 bits: int8 is symmetric"
        + (", int8_asymmetric has zero points" if "int8_asymmetric" in cache_dtypes else "")
        + " (default: as --dtype)",
    )
    add(
        "--dequantise",
        action=argparse.BooleanOptionalAction,
        help="turn the 4- or 8-bit weights of DIR into floats of --dtype, or keep them (default: "
        "on a CPU turn them, if half of its memory holds the floats; else keep them)",
    )
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help="implementation of attention: auto tests this device's kernels once, and takes the "
        "fastest correct one; any other is taken without a test. "
        f"{command.ATTENTION} (default: auto)",
    )
    add(
        "--max-length",
        type=command.positive,
        metavar="N",
        help="longest row, prompt and new tokens together (default: the larger "
        "of max_position_embeddings and seq_length in config.json)",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp and tp, such as fsdp=2,tp=4 (default: the most devices over "
        "which the model divides, of these as many on tp as do)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config value by its Hugging Face name, VALUE in JSON; repeatable "
        "(default: as config.json has them)",
    )
    if ntk:
        add(
            "--ntk",
            choices=("prompt", "total"),
            default="prompt",
            help="length that sets dynamic NTK's alpha: the prompt's, or that of prompt and "
            "the most new tokens together (default: %(default)s)",
        )


def sampler(args: argparse.Namespace, default: "Sampler | None") -> "Sampler":
    """Make the checkpoint's sampler with the command line's settings; UsageError for a bad one."""
    from qwen_jax.checkpoint.generation_config import make_sampler

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    off = (1.0, 0, 1.0, 1.0)
    given = [getattr(args, name) for name in names]
    settings: dict[str, Any] = {
        name: getattr(default, name, none) if value is None else value
        for name, value, none in zip(names, given, off, strict=True)
    }
    draw = hasattr(default, "temperature") or any(value is not None for value in given[:3])
    try:
        return make_sampler(draw, **settings)
    except ValueError as error:
        raise command.UsageError(str(error)) from None


_DRAWS = ("top_k", "top_p", "seed", "samples")


def refuse_idle(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that has no effect in combination with the others."""
    if args.bench:
        names = ("temperature", *_DRAWS, "repetition_penalty", "stop", "ntk")
        how = "has no effect with --bench, which prints no text: leave it out"
        command.refuse(args, names, why=how)
        how = "cannot be combined with --bench, which times one prompt: give --prompt, "
        command.refuse(args, ("prompts", "chats"), why=f"{how}--prompt-file or --chat instead")
        if args.max_new_tokens == 1:
            raise command.UsageError(
                "--max-new-tokens 1: must be at least 2 with --bench, which times the tokens after "
                "the first"
            )
    if args.temperature == 0:
        how = "has no effect with --temperature 0, which always takes the likeliest token: leave "
        command.refuse(args, _DRAWS, why=f"{how}out one of them")
    if args.samples == 1 and args.prompts is None and args.chats is None:
        how = "applies only to several texts: leave it out, or add --prompts FILE, --chats FILE or "
        command.refuse(args, ("batch_size",), why=f"{how}--samples N")
    if args.chat is None and args.chats is None:
        how = "applies only to chat: leave it out, or add --chat TEXT or --chats FILE"
        command.refuse(args, ("system",), why=how)


def prompt_texts(args: argparse.Namespace) -> list[str]:
    """Return the prompts to continue or answer; an empty list with --bench and no prompt."""
    if (file := args.prompts or args.chats) is not None:
        found = prompts.read(file)
    else:
        one = args.prompt if args.chat is None else args.chat
        if args.prompt_file is not None:
            one = prompts.whole(args.prompt_file)
        found = [] if one is None else [one]
    if not found and not args.bench:
        raise command.UsageError(
            "give one of --prompt, --prompt-file, --prompts, --chat, --chats or --bench"
        )
    answers = args.chat is not None or args.chats is not None
    if not all(text.strip() if answers else text for text in found):
        raise command.UsageError("empty prompt: give some text")
    return found
