"""`python -m qwen_jax.generate`: the command line program that generates text.

Defaults, including stops, come from the checkpoint's generation_config. Texts, or with --json one
object per text, go to stdout, everything else to stderr. A single text is printed as it grows;
several texts are generated in batches and printed in order.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.generate import prompts
from qwen_jax.runtime import caches, command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.generate.description import Description
    from qwen_jax.generate.language_model import LanguageModel
    from qwen_jax.generate.results import TextTask

_EXAMPLES = """examples:
  python -m qwen_jax.generate --ckpt DIR --prompt "The capital of France is"
  python -m qwen_jax.generate --ckpt DIR --chat "Who are you?" --temperature 0
  python -m qwen_jax.generate --ckpt DIR --prompt-file story.txt --max-new-tokens 200 --json
  python -m qwen_jax.generate --ckpt DIR --prompt "Names for a whale:" --samples 5 --stop .
  python -m qwen_jax.generate --ckpt DIR --prompts questions.jsonl --json > answers.jsonl
  python -m qwen_jax.generate --ckpt DIR --bench --dtype bfloat16
  python -m qwen_jax.generate --ckpt DIR --prompt-file long.txt --set seq_length=2048
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m qwen_jax.generate",
        description="Generate text from a directory written by `python convert/from_hf.py`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--ckpt", required=True, metavar="DIR", help="model directory")
    source = result.add_argument_group("prompts (one is required, but not with --bench)")
    source = source.add_mutually_exclusive_group()
    source.add_argument("--prompt", type=command.text, metavar="TEXT", help="continue this text")
    source.add_argument("--prompt-file", metavar="FILE", help="continue this file's text (UTF-8)")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help='continue each line of this file; of FILE.jsonl each JSON text, or {"prompt": TEXT}',
    )
    source.add_argument(
        "--chat", type=command.text, metavar="TEXT", help="answer this, as a chat model does"
    )
    source.add_argument(
        "--chats",
        metavar="FILE",
        help="answer each line of this file, which is in the form of --prompts",
    )
    result.add_argument(
        "--bench",
        action="store_true",
        help="print no text, but the speed of prefill and decoding and the share of memory "
        "bandwidth, for the prompt or 128 random tokens",
    )
    sampling = result.add_argument_group("sampling (defaults: the checkpoint's generation_config)")
    add = sampling.add_argument
    add("--max-new-tokens", type=command.positive, metavar="N", help="make at most N tokens")
    add("--temperature", type=float, metavar="T", help="0: take the likeliest token")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the most likely tokens that together have probability P",
    )
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0: from all")
    add("--repetition-penalty", type=float, metavar="R", help="1: none; above: fewer repeats")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text (default: 0)")
    add(
        "--samples",
        type=command.positive,
        default=1,
        metavar="N",
        help="draw N texts for each prompt, with seeds S, S+1, ... (default: 1)",
    )
    add(
        "--stop",
        type=command.text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT, as well as at the checkpoint's stops; repeatable (default: none)",
    )
    add(
        "--batch-size",
        type=command.positive,
        metavar="N",
        help="generate N texts at once, which does not change any of them (default: 8)",
    )
    add(
        "--system",
        type=command.text,
        metavar="TEXT",
        help="system prompt of --chat and --chats (default: You are a helpful assistant.)",
    )
    model = result.add_argument_group("model")
    add = model.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=command.DTYPE)
    add(
        "--cache-dtype",
        choices=("int8", "int8_asymmetric"),
        help="8 bits for the KV cache, symmetric or with zero points (default: as --dtype)",
    )
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help="implementation of attention: auto tests this device's kernels once, and takes the "
        "fastest that is right; any other is taken without a test. "
        f"{command.ATTENTION}; default: auto",
    )
    add(
        "--max-length",
        type=command.positive,
        metavar="N",
        help="most tokens of a row, prompt and new ones (default: what config.json allows)",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp and tp, such as fsdp=2,tp=4 (default: as many devices as divide "
        "the model, on tp first)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config value by its Hugging Face name, VALUE in JSON; repeatable "
        "(default: as config.json has them)",
    )
    add(
        "--ntk",
        choices=("prompt", "total"),
        default="prompt",
        help="length that sets dynamic NTK's alpha: the prompt's, or the total with new tokens "
        "(default: %(default)s)",
    )
    result.add_argument("--json", action="store_true", help="print a JSON object for each text")
    command.add_processes(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def sampler(args: argparse.Namespace, default: Any) -> Any:
    """Make a sampler from the command line's settings, or else those of the sampler `default`."""
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


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that has no effect in combination with the others."""
    if args.bench:
        names = ("temperature", *_DRAWS, "repetition_penalty", "stop", "ntk")
        how = "means nothing beside --bench, which draws no text: drop it"
        command.refuse(args, names, why=how)
        how = "is of several prompts: --bench takes one, with --prompt, --prompt-file or --chat"
        command.refuse(args, ("prompts", "chats"), why=how)
        if args.max_new_tokens == 1:
            raise command.UsageError("--max-new-tokens 1: --bench times the tokens after the first")
    if args.temperature == 0:
        how = "means nothing beside --temperature 0, which draws nothing: drop one of them"
        command.refuse(args, _DRAWS, why=how)
    if args.samples == 1 and args.prompts is None and args.chats is None:
        how = "is of several texts: give --prompts, --chats or --samples"
        command.refuse(args, ("batch_size",), why=how)
    if args.system is not None and args.chat is None and args.chats is None:
        raise command.UsageError("--system goes with --chat or --chats")


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


def describe(args: argparse.Namespace) -> "Description":
    """Read the model directory without its weights, with --set and --max-length applied."""
    from qwen_jax.generate import description

    about = description.read(args.ckpt, command.overrides(args.set), max_length=args.max_length)
    if not about.config.dynamic_ntk:
        how = "is of dynamic NTK, which this model has not: add --set use_dynamic_ntk=true"
        command.refuse(args, ("ntk",), why=how)
    return about


def prompt_ids(args: argparse.Namespace, text: str, *, about: "Description") -> list[int]:
    """Encode a prompt as token ids; with --chat or --chats in the chat format."""
    from qwen_jax import chat
    from qwen_jax.chat import DEFAULT_SYSTEM

    if args.chat is None and args.chats is None:
        return about.need_tokenizer().encode(text)
    system = DEFAULT_SYSTEM if args.system is None else args.system
    return chat.make_context(about.need_tokenizer(), text, (), system)[1]


def load(
    args: argparse.Namespace, about: "Description", sizes: Mapping[str, int]
) -> "LanguageModel":
    """Load the model with the command line's dtypes and attention, on a mesh of `sizes`."""
    import jax

    from qwen_jax.generate import loading

    caches.use_compilation_cache(args.compilation_cache)
    started = time.perf_counter()
    with jax.set_mesh(mesh(args, about, sizes=sizes)):
        chosen = {name: getattr(args, name) for name in ("dtype", "attention", "cache_dtype")}
        model = loading.with_weights(args.ckpt, about, **chosen)
    took = f"{time.perf_counter() - started:.1f} s"
    command.say(f"loaded {model.config.num_params():,} weights in {took}")
    return model


def mesh(args: argparse.Namespace, about: "Description", *, sizes: Mapping[str, int]) -> "Mesh":
    """Make --mesh (`sizes`) or the default. Raises UsageError if a process has no device in it."""
    import jax

    from qwen_jax import meshes
    from qwen_jax.meshes import options
    from qwen_jax.runtime import processes

    meshes.check(about.config.sizes, sizes)
    options.virtual_cpu_devices(sizes)
    if args.mesh is None:
        here, lengths = jax.devices(), {**about.config.sizes, "B": 1}  # one prompt at a time
        sizes = meshes.default(lengths, len(here), slices=meshes.count_slices(here))
    made = meshes.make(sizes)
    used = {device.process_index for device in made.devices.flat}
    if idle := [str(i) for i in range(processes.count()) if i not in used]:
        raise command.UsageError(
            f"mesh {meshes.describe(sizes)} has no device of process {', '.join(idle)}: take "
            f"one of {jax.device_count()} devices"
        )
    return made


def tasks(
    args: argparse.Namespace, given: Sequence[str], *, about: "Description"
) -> "list[TextTask]":
    """Return a task per prompt and sample, in order. Raises ValueError for too long a prompt."""
    from qwen_jax.generate import completion
    from qwen_jax.generate.results import TextTask
    from qwen_jax.runtime import values

    found, file = [], args.prompts or args.chats
    for index, text in enumerate(given):
        ids = prompt_ids(args, text, about=about)
        with values.named(f"prompt {index + 1} of {file}" if file else "the prompt"):
            new = about.room(len(ids), args.max_new_tokens)
        for sample in range(args.samples):
            request = completion.Request(ids, args.seed + sample, new)
            found.append(TextTask(index, sample, text, request))
    return found


def work(args: argparse.Namespace) -> None:
    command.join(args)
    _refuse_idle(args)
    given = prompt_texts(args)
    sampler(args, None)
    # Invalid arguments are found before the weights are read.
    from qwen_jax import chat
    from qwen_jax.generate import backend, bench, completion, description, results
    from qwen_jax.meshes import options

    sizes = options.mesh_sizes(args.mesh)

    backend.check_names(args.dtype, args.attention, cache_dtype=args.cache_dtype)
    try:
        stop_texts = chat.stop_texts(args.stop)
    except ValueError as error:
        raise command.UsageError(f"--{error}") from None
    about = describe(args)
    if args.bench:
        ids = prompt_ids(args, given[0], about=about) if given else None
        asked = args.max_new_tokens or bench.NEW
        new = about.room(bench.PROMPT if ids is None else len(ids), asked)
        result = bench.run(load(args, about, sizes), new, ids=ids)
        print(json.dumps(result) if args.json else bench.text(result))
        return
    choose = sampler(args, about.generation_config.sampler)
    if args.samples > 1 and not hasattr(choose, "temperature"):
        raise command.UsageError(
            f"--samples {args.samples}: this checkpoint takes the most likely token, so all would "
            "be alike: give --temperature 1, for instance"
        )
    answers = args.chat is not None or args.chats is not None
    stops = about.chat_stops() if answers else about.generation_config.stops
    wanted = tasks(args, given, about=about)
    model = load(args, about, sizes)
    if answers and model.is_base:
        command.say(f"note: {description.BASE_NOTE}")
    rules = completion.TextRules(choose, stops, stop_texts, args.ntk)
    if len(wanted) == 1:
        results.write_one(model, wanted[0], rules=rules, as_json=args.json)
    else:
        width = args.batch_size or completion.BATCH_SIZE
        results.write_many(model, wanted, rules=rules, width=width, as_json=args.json)


def main(argv: list[str] | None = None) -> int:
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
