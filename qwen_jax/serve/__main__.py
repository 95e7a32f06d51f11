"""`python -m qwen_jax.serve`: a model behind OpenAI's API, until a signal ends it.

stdout stays empty; what happens is told on stderr. Exit codes: 0 after SIGTERM, 130 after Ctrl-C, 1
if the engine has stopped. Of several processes, the first has the server and plans all steps.
"""

import argparse
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen_jax.runtime import command, process_options, processes, texts
from qwen_jax.serve.serve_options import parser

if TYPE_CHECKING:
    from qwen_jax.engine.engine import Engine
    from qwen_jax.generate.description import Description
    from qwen_jax.generate.language_model import LanguageModel
    from qwen_jax.serve.served import Defaults, Limits, Name

_LOCAL = ("127.0.0.1", "::1", "localhost")


def keys(args: argparse.Namespace) -> list[str]:
    """Return all API keys. Raises UsageError for one that no header can have."""
    found = list(args.api_key)
    if args.api_key_file is not None:
        lines = texts.read(args.api_key_file).splitlines()
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise command.UsageError(f"--api-key-file {args.api_key_file}: has no key")
    for key in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise command.UsageError("--api-key: a key has printable ASCII without spaces")
    return found


def hosts(args: argparse.Namespace, *, with_keys: bool) -> list[str] | None:
    """Return the names that a request's header Host may have; None for any.

    Without a key, a page of any web site could use a server of this machine, by giving the site's
    name this machine's address: such a request has the site's name.
    """
    if with_keys or args.host not in _LOCAL:
        return args.allow_host or None
    return [*_LOCAL, "[::1]", args.host, *args.allow_host]


def adapters(args: argparse.Namespace) -> dict[str, str]:
    """Return the folder of each adapter, by name. Raises UsageError."""
    found: dict[str, str] = {}
    for item in args.adapters:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise command.UsageError(f"--adapter {item}: write NAME=DIR")
        if name in found or name == _name(args):
            raise command.UsageError(f"--adapter {name}: another model has this name")
        found[name] = folder
    return found


def _name(args: argparse.Namespace) -> str:
    """Return the model's name in requests."""
    return args.name or str(args.ckpt).rstrip("/").rpartition("/")[2] or "qwen"


def names(args: argparse.Namespace) -> "list[Name]":
    """Return the names that requests can choose."""
    from qwen_jax.serve.served import Name

    return [Name(name=_name(args)), *(Name(name=name, adapter=name) for name in adapters(args))]


def limits(args: argparse.Namespace) -> "Limits":
    """Return the command line's limits."""
    from qwen_jax.serve.served import Limits

    return Limits(
        body=args.max_body_mb * 2**20, queue=args.max_queue, n=args.max_n, prompt=args.max_prompt
    )


def defaults(about: "Description") -> "Defaults":
    """Return what holds for requests that do not say it, from the model's generation_config."""
    from qwen_jax.serve.served import Defaults

    config, tokenizer = about.generation_config, about.need_tokenizer()
    sampler = config.sampler
    ends = [*config.stops, (tokenizer.eod_id,)]
    if not about.is_base:
        ends += [(tokenizer.im_end_id,)]
    return Defaults(
        temperature=getattr(sampler, "temperature", 0.0),
        top_k=getattr(sampler, "top_k", 0),
        top_p=getattr(sampler, "top_p", 1.0),
        repetition_penalty=sampler.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
        chat_stops=_single(about.chat_stops()),
        text_stops=_single(ends),
        stop_texts=tuple(tokenizer.decode(ids) for ids in config.stops if len(ids) > 1),
    )


def _single(stops: "list[tuple[int, ...]] | tuple[tuple[int, ...], ...]") -> tuple[int, ...]:
    """Return the stops that are one id, each once."""
    return tuple(dict.fromkeys(ids[0] for ids in stops if len(ids) == 1))


def engine(args: argparse.Namespace, model: "LanguageModel") -> "Engine | None":
    """Make the engine, and compile its programs.

    In processes other than the first it runs them until the first one ends, and returns None.
    """
    from qwen_jax.engine import from_model

    started = time.perf_counter()

    def report(name: str, seconds: float) -> None:
        command.say(f"compiled {name} in {seconds:.1f} s")

    made = from_model.make(
        model,
        adapters=adapters(args),
        rows=args.rows,
        cache_gb=args.cache_gb,
        page=args.page,
        chunk=args.chunk,
        step_timeout=args.step_timeout,
        report=report,
    )
    command.say(f"ready to generate after {time.perf_counter() - started:.1f} s")
    return made


@contextlib.contextmanager
def running(made: "Engine") -> Iterator[None]:
    """Context manager in which the engine's thread runs."""
    made.start()
    try:
        yield
    finally:
        made.close()


def freeze() -> None:
    """Leave all objects that are there out of garbage collections, once the server is ready.

    A collection of all would walk the model's and jax's objects, hundreds of thousands which stay
    until the end, while every stream waits.
    """
    gc.collect()
    gc.freeze()


def ignore_signals() -> None:
    """Leave signals to the first process, which ends the others when it has answered everything."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def work(args: argparse.Namespace) -> None:
    """Serve the model that the command line names. What it may refuse is refused first."""
    process_options.join(args)
    given_keys, served_names = keys(args), names(args)
    from qwen_jax.generate import backend, description, from_options
    from qwen_jax.meshes import options
    from qwen_jax.serve.app import application
    from qwen_jax.serve.server import Server, address, bind

    backend.check_names(args.dtype, args.attention, cache_dtype=args.cache_dtype)
    sizes = options.mesh_sizes(args.mesh)
    about = from_options.describe(args)
    about.need_tokenizer()
    taken = bind(args.host, args.port) if processes.index() == 0 else None
    if taken is None:
        ignore_signals()
    made = engine(args, from_options.load(args, about, sizes=sizes))
    if made is None or taken is None:
        return
    app, served = application(
        made,
        about.need_tokenizer(),
        vocab_size=about.config.vocab_size,
        names=served_names,
        defaults=defaults(about),
        limits=limits(args),
        keys=given_keys,
        hosts=hosts(args, with_keys=bool(given_keys)),
    )
    server = Server(app, served, drain_seconds=args.drain_seconds)
    if about.is_base:
        command.say(f"note: {description.BASE_NOTE}")
    if args.host not in _LOCAL and not given_keys:
        command.say("note: anybody who reaches this address can use the model: see --api-key")
    freeze()
    with running(made):
        for line in greeting(args, address(taken), longest=made.longest, keyed=bool(given_keys)):
            command.say(line)
        server.serve_at(taken)
    server.raise_end()


def greeting(args: argparse.Namespace, url: str, *, longest: int, keyed: bool) -> list[str]:
    """Return the lines that tell how to reach the server."""
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    asked = '{"messages": [{"role": "user", "content": "Hello"}]}'
    served = ", ".join([_name(args), *adapters(args)])
    return [
        f"serving {served} at {url} (the page) and {url}/v1 (OpenAI's API); at most {longest} "
        "tokens a request",
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d "
        f"'{asked}'",
    ]


def main(argv: list[str] | None = None) -> int:
    """Run `python -m qwen_jax.serve`, and return its exit code."""
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
