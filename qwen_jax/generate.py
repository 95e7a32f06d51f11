"""`python -m qwen_jax.generate`: text from a model directory, on the command line.

Defaults come from the checkpoint's generation_config, stop words included. Text goes to stdout,
everything else to stderr; with --json one object goes to stdout instead.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax import command

if TYPE_CHECKING:
    from qwen_jax.language_model import LanguageModel

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
        description="Generate text from a directory written by convert/from_hf.py.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--ckpt", required=True, metavar="DIR", help="model directory")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="continue this text")
    source.add_argument("--prompt-file", metavar="FILE", help="continue this file's text (UTF-8)")
    source.add_argument("--chat", metavar="TEXT", help="answer this, as a chat model does")
    source.add_argument(
        "--bench",
        action="store_true",
        help="no text: measure prefill and decode rates, and the share of memory bandwidth",
    )
    sampling = result.add_argument_group("sampling (defaults: the checkpoint's generation_config)")
    add = sampling.add_argument
    add("--max-new-tokens", type=command.positive, metavar="N")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K", help="0 = no limit")
    add("--repetition-penalty", type=float, metavar="R", help="1 = none")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text (default 0)")
    add("--system", metavar="TEXT", help="system prompt of --chat")
    model = result.add_argument_group("model")
    add = model.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the backend's choice")
    add("--cache-dtype", choices=("int8", "int8_asymmetric"), help="KV cache (default: --dtype)")
    add("--attention", default="auto", metavar="NAME", help="attention implementation")
    add("--max-length", type=command.positive, metavar="N", help="slots of the cache for a row")
    add("--mesh", metavar="SPEC", help="e.g. fsdp=1,tp=4 (default: one device)")
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
        help="what fixes dynamic NTK's alpha",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object, no stream")
    command.add_debug(result)
    return result


def sampler(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    """The checkpoint's sampler with what the command line changes."""
    from qwen_jax.sampling import from_generation_config

    given = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if set(given) & {"temperature", "top_p", "top_k"}:
        given["do_sample"] = given.get("temperature") != 0
    chosen = from_generation_config({**config, **given})
    chosen.check()
    return chosen


def prompt_ids(args: argparse.Namespace, model: "LanguageModel") -> list[int]:
    """The prompt's ids; ValueError where there is nothing to continue."""
    from qwen_jax import chat
    from qwen_jax.language_model import DEFAULT_SYSTEM

    tokenizer = model.need_tokenizer()
    if args.chat is not None:
        if not args.chat.strip():
            raise ValueError("empty prompt: --chat needs some text")
        system = DEFAULT_SYSTEM if args.system is None else args.system
        return chat.make_context(tokenizer, args.chat, (), system)[1]
    text = args.prompt
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompt_file} is not UTF-8 text") from None
    if not text:
        raise ValueError("empty prompt: give at least one character")
    return tokenizer.encode(text)


def load(args: argparse.Namespace) -> "LanguageModel":
    """The model as the command line asks for it, on the mesh it asks for."""
    import jax

    import qwen_jax
    from qwen_jax import sharding

    sizes = sharding.parse_mesh(args.mesh)
    command.use_compilation_cache()
    command.virtual_cpu_devices(sizes)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        return qwen_jax.load(
            args.ckpt,
            dtype=args.dtype,
            overrides=dict(command.key_value(item) for item in args.set),
            attention=args.attention,
            cache_dtype=args.cache_dtype,
            max_length=args.max_length,
        )


def work(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    model = load(args)
    loaded = time.perf_counter()
    command.say(f"loaded {model.config.num_params():,} weights in {loaded - started:.1f} s")
    if args.bench:
        from qwen_jax import bench

        result = bench.run(model, args.max_new_tokens or 32)
        print(json.dumps(result) if args.json else bench.text(result))
        return
    ids = prompt_ids(args, model)
    if args.chat is not None and model.is_base:
        command.say("note: this is a base checkpoint, not trained for chat; it may not stop")
    stops = model.default_stops() if args.chat is None else model.chat_stops()
    wanted = model.room(len(ids), args.max_new_tokens)
    parts = model.stream(
        np.array([ids]),
        max_new_tokens=wanted,
        sampler=sampler(args, model.generation_config),
        stop=stops,
        seed=args.seed,
        ntk=args.ntk,
    )
    made, text, times = write(parts, model, quiet=args.json)
    ended = any(made[-len(stop) :] == list(stop) for stop in stops)
    first = times[0] - loaded
    report = {
        "text": text,
        "tokens": made,
        "prompt_tokens": len(ids),
        "new_tokens": len(made),
        "finish_reason": "stop" if ended else "length",
        "seconds_to_first_token": round(first, 4),
        "prefill_tokens_per_second": round(len(ids) / first, 2),
        "decode_tokens_per_second": rate(times),
    }
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    command.say(
        f"{len(ids)} prompt tokens, first token after {first:.2f} s (compilation included); "
        f"{len(made)} new tokens, {report['decode_tokens_per_second'] or '-'} tokens/s; "
        f"ended by {report['finish_reason']}"
    )


def write(
    parts: Iterator[np.ndarray], model: "LanguageModel", quiet: bool
) -> tuple[list[int], str, list[float]]:
    """Print text as it comes; the ids, the text, and the time each token came."""
    from qwen_jax.tokenizer import TextStream

    stream = TextStream(model.need_tokenizer(), skip_special_tokens=True)
    made: list[int] = []
    text, times = "", []
    for part in parts:
        new = [int(i) for i in part[0]]
        made += new
        times += [time.perf_counter()] * len(new)
        piece = stream.push(new)
        text += piece
        if not quiet:
            print(piece, end="", flush=True)
    piece = stream.flush()
    if not quiet:
        print(piece, flush=True)
    return made, text + piece, times


def rate(times: list[float]) -> float | None:
    """Tokens per second after the first two, which carry compilation; None for too few."""
    if len(times) < 3 or times[-1] == times[1]:
        return None
    return round((len(times) - 2) / (times[-1] - times[1]), 2)


def main(argv: list[str] | None = None) -> int:
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
