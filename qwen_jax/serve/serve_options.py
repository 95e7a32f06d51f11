"""The command line of `python -m qwen_jax.serve`."""

import argparse

from qwen_jax.generate import generate_options
from qwen_jax.runtime import caches, command, process_options

_EXAMPLES = """examples:
  python -m qwen_jax.serve --ckpt DIR
  python -m qwen_jax.serve --ckpt DIR --host 0.0.0.0 --api-key-file keys.txt --name qwen
  python -m qwen_jax.serve --ckpt DIR --adapter poet=ADAPTER_DIR --rows 32 --cache-dtype int8
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m qwen_jax.serve`."""
    result = command.Parser(
        prog="python -m qwen_jax.serve",
        description="Serve a model by OpenAI's API over HTTP, to many at once (docs/serving.md).",
        epilog=_EXAMPLES,
    )
    result.add_argument(
        "--ckpt",
        required=True,
        metavar="DIR",
        help="model directory, as `python convert/from_hf.py` and training write them (required)",
    )
    _http_options(result.add_argument_group("HTTP"))
    _limit_options(result.add_argument_group("limits"))
    _engine_options(result.add_argument_group("engine"))
    group = result.add_argument_group("model")
    generate_options.model_options(group, ntk=False, cache_dtypes=("int8",))
    process_options.add(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def _http_options(group: command.Group) -> None:
    add = group.add_argument
    add(
        "--host",
        type=command.text,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at; 0.0.0.0 for all of this machine's (default: 127.0.0.1)",
    )
    add(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen at; 0 for any that is free (default: 8000)",
    )
    add(
        "--api-key",
        type=command.text,
        action="append",
        default=[],
        metavar="KEY",
        help="answer only requests with this key; repeatable. Others on this machine can see it in "
        "its list of processes, unlike --api-key-file (default: none is needed)",
    )
    add(
        "--api-key-file",
        type=command.path,
        metavar="FILE",
        help="answer only requests with a key that is a line of this file (default: none)",
    )
    add(
        "--allow-host",
        type=command.text,
        action="append",
        default=[],
        metavar="NAME",
        help="answer for this name in the header Host as well, as a proxy on this machine may send "
        "it; repeatable (default: localhost and --host only, if --host is this machine and there "
        "is no key; else any name)",
    )
    add(
        "--name",
        type=command.text,
        metavar="NAME",
        help="name of the model in requests (default: the name of DIR)",
    )
    add(
        "--adapter",
        dest="adapters",
        type=command.text,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="serve the PEFT adapter in DIR as the model NAME; repeatable (default: none)",
    )


def _limit_options(group: command.Group) -> None:
    add = group.add_argument
    add(
        "--max-queue",
        type=command.positive,
        default=256,
        metavar="N",
        help="sequences that wait for a row, beyond which requests are told to come back, status "
        "429 (default: 256)",
    )
    add(
        "--max-n",
        type=command.positive,
        default=128,
        metavar="N",
        help="sequences of one request, its prompts times n (default: 128)",
    )
    add(
        "--max-prompt",
        type=command.positive,
        metavar="N",
        help="tokens of a prompt (default: what --max-length leaves)",
    )
    add(
        "--max-body-mb",
        type=command.positive,
        default=8,
        metavar="N",
        help="megabytes of a request (default: 8)",
    )
    add(
        "--drain-seconds",
        type=command.positive,
        default=60,
        metavar="N",
        help="time for which requests that were taken are answered after SIGTERM (default: 60)",
    )


def _engine_options(group: command.Group) -> None:
    add = group.add_argument
    add(
        "--rows",
        type=command.positive,
        metavar="R",
        help="sequences that decode at a time (default: 64 on an accelerator, 16 on a CPU, for "
        "each part into which --mesh splits a batch)",
    )
    add(
        "--cache-gb",
        type=float,
        metavar="G",
        help="GB for the pages of the KV cache on each device (default: nine tenths of what is "
        "free beside the weights, on a CPU a quarter of the memory; no more than --rows requests "
        "of --max-length tokens can use)",
    )
    add(
        "--page",
        type=command.positive,
        metavar="N",
        help="tokens in a page; a TPU has kernels for 32, 64 and multiples of 128 (default: 128 on "
        "an accelerator, 16 on a CPU)",
    )
    add(
        "--chunk",
        type=command.positive,
        metavar="N",
        help="prompt tokens computed between two decode steps, a multiple of --page (default: 512 "
        "on an accelerator, 64 on a CPU)",
    )
    add(
        "--step-timeout",
        type=command.positive,
        default=300,
        metavar="N",
        help="seconds after which a step of the engine that has not finished counts as a device or "
        "a process that hangs: requests get errors, and the server ends with exit code 1 "
        "(default: 300)",
    )
