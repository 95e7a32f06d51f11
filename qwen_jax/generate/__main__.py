"""`python -m qwen_jax.generate`: the command line program that generates text.

Defaults, including stops, come from the checkpoint's generation_config. Texts, or with --json one
object per text, go to stdout, everything else to stderr. A single text is printed as it grows;
several texts are generated in batches and printed in order.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_jax.generate import generate_options
from qwen_jax.generate.from_options import describe, load
from qwen_jax.generate.generate_options import parser
from qwen_jax.runtime import command, process_options

if TYPE_CHECKING:
    from qwen_jax.generate.description import Description
    from qwen_jax.generate.results import TextTask


def prompt_ids(args: argparse.Namespace, text: str, *, about: "Description") -> list[int]:
    """Encode a prompt as token ids; with --chat or --chats in the chat format."""
    from qwen_jax import chat
    from qwen_jax.chat import DEFAULT_SYSTEM

    if args.chat is None and args.chats is None:
        return about.need_tokenizer().encode(text)
    system = DEFAULT_SYSTEM if args.system is None else args.system
    return chat.make_context(about.need_tokenizer(), text, (), system)[1]


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
    """Generate the texts that the command line names, and print them."""
    process_options.join(args)
    generate_options.refuse_idle(args)
    given = generate_options.prompt_texts(args)
    generate_options.sampler(args, None)
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
        result = bench.run(load(args, about, sizes=sizes), new, ids=ids)
        print(json.dumps(result) if args.json else bench.text(result))
        return
    choose = generate_options.sampler(args, about.generation_config.sampler)
    if args.samples > 1 and not hasattr(choose, "temperature"):
        raise command.UsageError(
            f"--samples {args.samples}: this checkpoint takes the most likely token, so all would "
            "be alike: give --temperature 1, for instance"
        )
    answers = args.chat is not None or args.chats is not None
    stops = about.chat_stops() if answers else about.generation_config.stops
    wanted = tasks(args, given, about=about)
    model = load(args, about, sizes=sizes)
    if answers and model.is_base:
        command.say(f"note: {description.BASE_NOTE}")
    rules = completion.TextRules(sampler=choose, stops=stops, stop_texts=stop_texts, ntk=args.ntk)
    if len(wanted) == 1:
        results.write_one(model, wanted[0], rules=rules, as_json=args.json)
    else:
        width = args.batch_size or completion.BATCH_SIZE
        results.write_many(model, wanted, rules=rules, width=width, as_json=args.json)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m qwen_jax.generate`, and return its exit code."""
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
