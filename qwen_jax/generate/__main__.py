"""`python -m qwen_jax.generate`: text from a model directory, on the command line.

Defaults come from the checkpoint's generation_config, stop words included. Text goes to stdout,
everything else to stderr; with --json one object goes to stdout instead.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.runtime import caches, command, texts

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.generate.description import Description
    from qwen_jax.generate.language_model import LanguageModel

_EXAMPLES = """examples:
  python -m qwen_jax.generate --ckpt DIR --prompt "The capital of France is"
  python -m qwen_jax.generate --ckpt DIR --chat "Who are you?" --temperature 0
  python -m qwen_jax.generate --ckpt DIR --prompt-file story.txt --max-new-tokens 200 --json
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
    source = result.add_mutually_exclusive_group()
    source.add_argument("--prompt", type=command.text, metavar="TEXT", help="continue this text")
    source.add_argument("--prompt-file", metavar="FILE", help="continue this file's text (UTF-8)")
    source.add_argument(
        "--chat", type=command.text, metavar="TEXT", help="answer this, as a chat model does"
    )
    result.add_argument(
        "--bench",
        action="store_true",
        help="no text: measure prefill and decode rates, and the share of memory bandwidth, on "
        "the prompt given or on 128 random tokens",
    )
    sampling = result.add_argument_group("sampling (defaults: the checkpoint's generation_config)")
    add = sampling.add_argument
    add("--max-new-tokens", type=command.positive, metavar="N", help="most tokens to generate")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the most likely tokens that together have probability P",
    )
    add("--top-k", type=int, metavar="K", help="0 = no limit")
    add("--repetition-penalty", type=float, metavar="R", help="1 = none")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text (default 0)")
    add("--system", type=command.text, metavar="TEXT", help="system prompt of --chat")
    model = result.add_argument_group("model")
    add = model.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the backend's choice")
    add("--cache-dtype", choices=("int8", "int8_asymmetric"), help="KV cache (default: --dtype)")
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help="auto (default: kernels are proved on this device, once, and the fastest that agrees "
        "is taken), xla, pallas_tpu, pallas_triton, pallas_hopper and others, taken as they are: "
        "docs/attention.md",
    )
    add(
        "--max-length",
        type=command.positive,
        metavar="N",
        help="most prompt and new tokens of a row",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="e.g. fsdp=2,tp=4 (default: all devices that divide the model, heads first)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config value by its Hugging Face name, VALUE in JSON; repeatable",
    )
    add(
        "--ntk",
        choices=("prompt", "total"),
        default="prompt",
        help="dynamic NTK's alpha from the prompt, or from prompt and new tokens (default: prompt)",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object, no stream")
    command.add_processes(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def sampler(args: argparse.Namespace, default: Any) -> Any:
    """The checkpoint's sampler with what the command line changes, or UsageError."""
    from qwen_jax.checkpoint.generation_config import make_sampler

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    off = (1.0, 0, 1.0, 1.0)
    given = [getattr(args, name) for name in names]
    settings: list[Any] = [
        getattr(default, name, none) if value is None else value
        for name, value, none in zip(names, given, off, strict=True)
    ]
    draw = hasattr(default, "temperature") or any(value is not None for value in given[:3])
    try:
        return make_sampler(draw, *settings)
    except ValueError as error:
        raise command.UsageError(str(error)) from None


_DRAWS = ("top_k", "top_p", "seed")


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that means nothing beside the others."""
    if args.bench:
        names = ("temperature", *_DRAWS, "repetition_penalty", "ntk")
        command.refuse(args, names, "means nothing beside --bench, which draws no text: drop it")
        if args.max_new_tokens == 1:
            raise command.UsageError("--max-new-tokens 1: --bench times the tokens after the first")
    if args.temperature == 0:
        how = "means nothing beside --temperature 0, which draws nothing: drop one of them"
        command.refuse(args, _DRAWS, how)


def prompt_text(args: argparse.Namespace) -> str | None:
    """What to continue or to answer; None with --bench alone."""
    text = args.prompt if args.chat is None else args.chat
    if args.prompt_file is not None:
        text = texts.read(args.prompt_file).replace("\r\n", "\n").replace("\r", "\n")
    if text is None and not args.bench:
        raise command.UsageError("give one of --prompt, --prompt-file, --chat or --bench")
    if text is not None and not (text.strip() if args.chat is not None else text):
        raise command.UsageError("empty prompt: give some text")
    if args.system is not None and args.chat is None:
        raise command.UsageError("--system goes with --chat")
    return text


def describe(args: argparse.Namespace) -> "Description":
    """What the directory says beside its weights, with what the command line changes of it."""
    from qwen_jax.generate import description

    about = description.read(args.ckpt, command.overrides(args.set), args.max_length)
    if not about.config.dynamic_ntk:
        how = "is of dynamic NTK, which this model has not: add --set use_dynamic_ntk=true"
        command.refuse(args, ("ntk",), how)
    return about


def prompt_ids(args: argparse.Namespace, text: str, about: "Description") -> list[int]:
    """The ids of the prompt: the text itself, or with --chat in the chat format."""
    from qwen_jax import chat
    from qwen_jax.chat import DEFAULT_SYSTEM

    if args.chat is None:
        return about.need_tokenizer().encode(text)
    system = DEFAULT_SYSTEM if args.system is None else args.system
    return chat.make_context(about.need_tokenizer(), text, (), system)[1]


def load(
    args: argparse.Namespace, about: "Description", sizes: Mapping[str, int]
) -> "LanguageModel":
    """The model as the command line asks for it, on the mesh it asks for."""
    import jax

    from qwen_jax.generate import language_model

    caches.use_compilation_cache(args.compilation_cache)
    started = time.perf_counter()
    with jax.set_mesh(mesh(args, about, sizes)):
        model = language_model.with_weights(
            args.ckpt, about, args.dtype, args.attention, args.cache_dtype
        )
    seconds = time.perf_counter() - started
    command.say(f"loaded {model.config.num_params():,} weights in {seconds:.1f} s")
    return model


def mesh(args: argparse.Namespace, about: "Description", sizes: Mapping[str, int]) -> "Mesh":
    """The mesh asked for, in which every process must have a device. sizes: those of --mesh."""
    import jax

    from qwen_jax import meshes
    from qwen_jax.meshes import options
    from qwen_jax.runtime import processes

    meshes.check(about.config.sizes, sizes)
    options.virtual_cpu_devices(sizes)
    if args.mesh is None:
        here, lengths = jax.devices(), {**about.config.sizes, "B": 1}  # of one prompt
        sizes = meshes.default(lengths, len(here), slices=meshes.count_slices(here))
    made = meshes.make(sizes)
    used = {device.process_index for device in made.devices.flat}
    if idle := [str(i) for i in range(processes.count()) if i not in used]:
        raise command.UsageError(
            f"mesh {meshes.describe(sizes)} has no device of process {', '.join(idle)}: take "
            f"one of {jax.device_count()} devices"
        )
    return made


def work(args: argparse.Namespace) -> None:
    from qwen_jax.meshes import options

    command.join(args)
    _refuse_idle(args)
    text = prompt_text(args)
    sampler(args, None)
    # All that cannot be is found before the weights are read.
    sizes = options.mesh_sizes(args.mesh)
    from qwen_jax.generate import bench, language_model

    language_model.check_names(args.dtype, args.attention, args.cache_dtype)
    about = describe(args)
    ids = None if text is None else prompt_ids(args, text, about)
    asked = args.max_new_tokens or (bench.NEW if args.bench else None)
    new = about.room(bench.PROMPT if ids is None else len(ids), asked)
    choose = sampler(args, about.generation_config.sampler)
    model = load(args, about, sizes)
    loaded = time.perf_counter()
    if args.bench or ids is None:
        result = bench.run(model, new, ids)
        print(json.dumps(result) if args.json else bench.text(result))
        return
    if args.chat is not None and model.is_base:
        command.say(f"note: {language_model.BASE_NOTE}")
    stops = model.generation_config.stops if args.chat is None else model.chat_stops()
    parts = model.stream(
        np.array([ids]),
        max_new_tokens=new,
        sampler=choose,
        stop=stops,
        seed=args.seed,
        ntk=args.ntk,
    )
    made, text, times = write(parts, stops, model, quiet=args.json)
    ended = any(made[-len(stop) :] == list(stop) for stop in stops)
    report = {
        "text": text,
        "tokens": made,
        "prompt_tokens": len(ids),
        "new_tokens": len(made),
        "finish_reason": "stop" if ended else "length",
        "seconds_to_first_token": round(times[0][0] - loaded, 4),
        "decode_tokens_per_second": rate(times),
    }
    if args.json:
        print(json.dumps(report))  # in ASCII, which every encoding of stdout has
        return
    command.say(
        f"{len(ids)} prompt tokens, first token after {report['seconds_to_first_token']:.2f} s "
        f"(compilation included); {len(made)} new tokens, "
        f"{report['decode_tokens_per_second'] or '-'} tokens/s; ended by {report['finish_reason']}"
    )


def write(
    parts: Iterator[np.ndarray],
    stops: Sequence[Sequence[int]],
    model: "LanguageModel",
    quiet: bool,
) -> tuple[list[int], str, list[tuple[float, int]]]:
    """Print text as it comes. All ids, the text without the stop, and (time, ids) of each part."""
    from qwen_jax import chat
    from qwen_jax.chat.tokenizer import TextStream

    made: list[int] = []
    times: list[tuple[float, int]] = []

    def noted() -> Iterator[list[int]]:
        for part in parts:
            made.extend(part[0].tolist())
            times.append((time.perf_counter(), part.shape[1]))
            yield part[0].tolist()

    stream, text = TextStream(model.need_tokenizer(), skip_special_tokens=True), ""

    def show(piece: str) -> str:
        if not quiet:
            print(piece, end="", flush=True)
        return piece

    for ids in chat.until_stop(noted(), stops):
        text += show(stream.push(ids))
    text += show(stream.flush())
    if not quiet:
        print(flush=True)
    return made, text, times


def rate(times: list[tuple[float, int]]) -> float | None:
    """Tokens per second after the first two parts, which carry compilation; None for too few."""
    if len(times) < 3 or times[-1][0] == times[1][0]:
        return None
    return round(sum(count for _, count in times[2:]) / (times[-1][0] - times[1][0]), 2)


def main(argv: list[str] | None = None) -> int:
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
