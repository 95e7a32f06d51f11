"""Times serving: requests that arrive by themselves, beside static batches and the decode program.

    python benchmarks/serve.py                              # an engine in this process
    python benchmarks/serve.py --ckpt DIR --rate 4 --requests 200
    python benchmarks/serve.py --url http://127.0.0.1:8000 --rate 4 --requests 200

Arrivals are a Poisson process of `--rate` requests a second (`inf`: all at once), and lengths are
lognormal, with the medians and sigmas of the options, or come from a file (`--lengths`). In this
process three things take their turn: the engine; static batches of `generate`, each of which runs
to its longest reply; and the decode program alone with all rows on, which is the most that the
engine can reach. With --url the same requests go to any server with OpenAI's completions, in token
ids, and the figures have the names of vLLM's `bench serve`.
"""

import asyncio
import dataclasses
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import section
from qwen_jax import attention, meshes, model
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.config.presets import PRESETS
from qwen_jax.engine import from_model
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.settings import Choice, Ended, Event, Settings, Started
from qwen_jax.engine.steps import FEED
from qwen_jax.generate import from_directory
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.runtime import command

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request. arrival: seconds from the start; prompt: ids; new: tokens to generate."""

    arrival: float
    prompt: list[int]
    new: int


@dataclasses.dataclass
class Times:
    """When the tokens of a request arrived, in seconds from the start of the run."""

    asked: Asked
    tokens: list[float] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> float:
        """The time to the first token, TTFT."""
        return self.tokens[0] - self.asked.arrival

    @property
    def each(self) -> float:
        """The time of each token after the first, TPOT."""
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)


def parser() -> command.Parser:
    """The options."""
    parser = command.Parser(description="Latency and throughput of serving.")
    add = parser.add_argument
    add("--url", help="a running server; default: an engine in this process")
    add("--served", default=None, help="with --url, the model's name; default: the first")
    add("--ckpt", help="a model directory; default: random weights of --model")
    add("--model", default="qwen-1.8b", choices=PRESETS, help="the sizes of random weights")
    add("--layers", type=int, default=2, help="of random weights")
    add("--vocab", type=int, default=4096, help="of random weights")
    add("--rows", type=int, default=16, help="rows of the engine, and of a static batch")
    add("--max-length", type=int, default=1024, help="tokens of a request")
    add("--requests", type=int, default=96)
    add("--rate", type=float, default=math.inf, help="requests a second")
    add("--prompt", default="64,0.6", metavar="MEDIAN,SIGMA", help="lognormal prompt tokens")
    add("--new", default="48,0.8", metavar="MEDIAN,SIGMA", help="lognormal new tokens")
    add("--lengths", type=Path, help='a JSON line {"prompt": N, "new": M} for each request')
    add("--seed", type=int, default=0)
    add("--rounds", type=int, default=3, help="runs of each, in turn")
    add("--out", type=Path, help="write a section of docs/benchmarks.md")
    return parser


def requests(args: object, vocab: int) -> list[Asked]:
    """Draw the requests. All prompts differ from their first token on, so nothing is cached."""
    rng = np.random.default_rng(args.seed)  # type: ignore[attr-defined]
    count, longest = args.requests, args.max_length  # type: ignore[attr-defined]
    gaps = rng.exponential(1 / args.rate, count)  # type: ignore[attr-defined]

    def lognormal(text: str) -> np.ndarray:
        median, sigma = map(float, text.split(","))
        return np.clip(rng.lognormal(math.log(median), sigma, count).round(), 1, longest // 2)

    if args.lengths is None:  # type: ignore[attr-defined]
        prompts, new = lognormal(args.prompt), lognormal(args.new)  # type: ignore[attr-defined]
    else:
        lines = args.lengths.read_text().splitlines()[:count]  # type: ignore[attr-defined]
        each = [json.loads(line) for line in lines]
        prompts = np.array([line["prompt"] for line in each])
        new = np.array([line["new"] for line in each])
    return [
        Asked(float(at), rng.integers(0, vocab, int(length)).tolist(), int(most))
        for at, length, most in zip(np.cumsum(gaps), prompts, new, strict=False)
    ]


def by_engine(engine: Engine, asked: Sequence[Asked]) -> tuple[list[Times], float]:
    """Send the requests to an engine as they arrive. Returns their times, and the seconds."""
    found, over, left = [Times(x) for x in asked], threading.Event(), [len(asked)]
    start = time.perf_counter()

    def listener(times: Times, event: Event) -> None:
        if isinstance(event, Choice):
            times.tokens.append(time.perf_counter() - start)
        elif isinstance(event, Ended):
            left[0] -= 1
            if not left[0]:
                over.set()

    for times in found:
        time.sleep(max(0.0, times.asked.arrival - (time.perf_counter() - start)))
        settings = Settings(max_new_tokens=times.asked.new)
        engine.submit(times.asked.prompt, settings, listener=lambda e, t=times: listener(t, e))
    over.wait()
    return found, time.perf_counter() - start


def behind(engine: Engine, rng: np.random.Generator, vocab: int) -> tuple[int, float, float]:
    """Time a short prompt that arrives while a long one is computed.

    Returns the tokens of the long one, the seconds that a chunk of it takes alone, and the short
    one's time to its first token.
    """
    long, short = min(4000, engine.longest - 1), 16

    def send(length: int) -> tuple[threading.Event, threading.Event]:
        began, over = threading.Event(), threading.Event()

        def listener(event: Event) -> None:
            (began if isinstance(event, Started) else over).set()

        prompt = rng.integers(0, vocab, length).tolist()
        engine.submit(prompt, Settings(max_new_tokens=1), listener=listener)
        return began, over

    start = time.perf_counter()
    send(long)[1].wait()
    chunk = (time.perf_counter() - start) / -(-long // engine._steps.shape.chunk)
    began, over = send(long)
    began.wait()
    start = time.perf_counter()
    send(short)[1].wait()
    first = time.perf_counter() - start
    over.wait()
    return long, chunk, first


def by_batches(loaded: LanguageModel, asked: Sequence[Asked], *, rows: int) -> float:
    """Run the requests in batches of `generate`, in their order. Returns the seconds."""
    start = time.perf_counter()
    for first in range(0, len(asked), rows):
        some = asked[first : first + rows]
        loaded.generate([x.prompt for x in some], max_new_tokens=max(x.new for x in some))
    return time.perf_counter() - start


def step_seconds(engine: Engine, context: int, steps: int = 30) -> float:
    """The seconds of a step of the decode program with every row on. context: tokens of a row."""
    programs = engine._steps
    orders = np.tile(np.array([0, -1, FEED], np.int32), (programs.shape.rows, 1))
    rows = programs._state.rows
    # Each row has pages of its own, as far as there are any: one page for all would stay on chip.
    table = 1 + np.arange(rows.table.size, dtype=np.int32) % (programs.shape.pages - 1)
    rows = dataclasses.replace(
        rows,
        table=jax.device_put(table.reshape(rows.table.shape), rows.table.sharding),
        on=jnp.ones_like(rows.on),
        limit=rows.limit + 2**30,
        written=jnp.full_like(rows.written, context),
    )
    programs._state = programs._state._replace(rows=rows)
    programs.decode(orders).block_until_ready()
    start = time.perf_counter()
    for _ in range(steps):
        told = programs.decode(orders)
    told.block_until_ready()
    return (time.perf_counter() - start) / steps


async def by_url(url: str, asked: Sequence[Asked], served: str | None) -> tuple[list[Times], float]:
    """Send the requests to a server as they arrive, and read its streams."""
    import httpx

    found = [Times(x) for x in asked]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        name = served or (await client.get("/v1/models")).json()["data"][0]["id"]
        start = time.perf_counter()

        async def one(times: Times) -> None:
            await asyncio.sleep(times.asked.arrival)
            body = {"model": name, "prompt": times.asked.prompt, "max_tokens": times.asked.new}
            body |= {"stream": True, "temperature": 0, "ignore_eos": True}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        times.tokens.append(time.perf_counter() - start)

        await asyncio.gather(*map(one, found))
        return found, time.perf_counter() - start


def figures(found: Sequence[Times], seconds: float) -> list[list[str]]:
    """The lines of a run, under the names of vLLM's `bench serve`."""
    prompt = sum(len(x.asked.prompt) for x in found)
    new = sum(len(x.tokens) for x in found)
    lines = [
        ["Request throughput (req/s)", f"{len(found) / seconds:.2f}"],
        ["Output token throughput (tok/s)", f"{new / seconds:.1f}"],
        ["Total token throughput (tok/s)", f"{(new + prompt) / seconds:.1f}"],
    ]
    for name, of in (("TTFT", "first"), ("TPOT", "each")):
        values = [1000 * getattr(x, of) for x in found if x.tokens]
        lines += [[f"P{p} {name} (ms)", f"{np.percentile(values, p):.1f}"] for p in PERCENTILES]
    return lines


def random_model(args: object) -> LanguageModel:
    """A model of random weights."""
    base = PRESETS[args.model]  # type: ignore[attr-defined]
    config = dataclasses.replace(
        base,
        num_layers=args.layers,  # type: ignore[attr-defined]
        vocab_size=args.vocab,  # type: ignore[attr-defined]
    )
    mesh = meshes.current()
    with meshes.entered(mesh):
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        decoder = model.create(config, jax.random.key(0), dtype=jnp.dtype(dtype))
    return LanguageModel(
        config=config,
        tokenizer=None,
        generation_config=GenerationConfig.from_hf({}),
        max_length=args.max_length,  # type: ignore[attr-defined]
        decoder=decoder,
        mesh=mesh,
        attend=attention.xla,
        cache_dtype=None,
    )


def main() -> None:
    """Run the command."""
    args = parser().parse_args()
    if args.url is not None:
        asked = requests(args, args.vocab)
        rows = figures(*asyncio.run(by_url(args.url, asked, args.served)))
        print("\n".join(f"{name:<36}{value:>10}" for name, value in rows))
        return
    if args.ckpt is None:
        loaded = random_model(args)
    else:
        loaded = from_directory.load(args.ckpt, max_length=args.max_length)
    asked = requests(args, loaded.config.vocab_size)
    made = from_model.make(
        loaded, rows=args.rows, report=lambda name, took: print(f"{name}: {took:.1f} s")
    )
    assert made is not None
    made.start()
    new = sum(x.new for x in asked)
    ours, theirs, runs = [], [], []
    by_engine(made, asked[: args.rows])
    by_batches(loaded, asked[: args.rows], rows=args.rows)
    for _ in range(args.rounds):
        before = made.load().steps
        found, seconds = by_engine(made, asked)
        runs.append((seconds, found, made.load().steps - before))
        ours.append(new / seconds)
        theirs.append(new / by_batches(loaded, asked, rows=args.rows))
    seconds, found, steps = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    long, chunk, first = behind(made, np.random.default_rng(args.seed), loaded.config.vocab_size)
    made.close()
    context = (sum(len(x.prompt) for x in asked) + new // 2) // len(asked)
    step = step_seconds(made, context)
    rate, in_use = args.rows / step, (new - len(asked)) / steps
    prefill = sum(-(-len(x.prompt) // made._steps.shape.chunk) for x in asked)
    lines = figures(found, seconds)
    lines += [
        ["Static batches (tok/s)", f"{statistics.median(theirs):.1f}"],
        ["Engine / static batches", f"{statistics.median(ours) / statistics.median(theirs):.2f}"],
        ["Decode program, all rows on (tok/s)", f"{rate:.1f}"],
        ["Steps; chunks of prompts among them", f"{steps}; {prefill}"],
        ["Rows in use, mean of steps", f"{in_use:.1f} of {args.rows}"],
        ["Of the decode program's rate, by steps", f"{in_use / args.rows:.0%}"],
        [f"Chunk of a prompt of {long} tokens alone (ms)", f"{1000 * chunk:.1f}"],
        ["TTFT of 16 tokens behind it (ms; chunks)", f"{1000 * first:.1f}; {first / chunk:.2f}"],
    ]
    print("\n".join(f"{name:<48}{value:>14}" for name, value in lines))
    section.write(args.out, section.title("serve.py", sys.argv[1:]), ("", "median run"), lines)


if __name__ == "__main__":
    main()
