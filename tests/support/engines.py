"""Engines over tiny decoders, random requests, and schedules in which they come and go."""

import dataclasses
import functools
import random
from typing import Any

import numpy as np

from qwen_jax import Config, attention, meshes
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.settings import Choice, Event, Settings, Started
from qwen_jax.engine.steps import Shape, Steps
from qwen_jax.model import adapted, rope
from tests.support import integers
from tests.support.tiny import drawn_adapters, tiny_config, tiny_decoder

SHAPE = Shape(rows=4, width=16, pages=33, size=4, chunk=8, chunks=1)
LONGEST = SHAPE.width * SHAPE.size
ADAPTERS = ("first", "second")
CONFIG = tiny_config(dynamic_ntk=True, logn=True)  # alpha changes at 16 and 32 tokens


@functools.cache
def programs(
    config: Config = CONFIG,
    dtype: str = "float32",
    shape: Shape = SHAPE,
    sizes: tuple[tuple[str, int], ...] = (),
    several: bool = False,
    bits: int | None = None,
) -> Steps:
    """Compiled programs, which engines take in turn: a new engine forgets what the last one did.

    several: with the two adapters of `drawn_adapters`, ADAPTERS by name.
    bits: of the weights of layers; None for floats.
    """
    mesh = meshes.make(dict(sizes))
    with meshes.entered(mesh):
        decoder = tiny_decoder(config, dtype)
        if bits is not None:
            decoder = integers.decoder_of(decoder, bits=bits)
        if several:
            adapters = [drawn_adapters(decoder, number) for number in range(len(ADAPTERS))]
            decoder = adapted.attach_several(decoder, adapters)
    steps = Steps(decoder, attention.xla, mesh=mesh, shape=shape)
    steps.compile(lambda name, seconds: None)
    return steps


def engine(steps: Steps) -> Engine:
    """An engine without a thread."""
    config = steps.decoder.config
    return Engine(
        steps,
        scheme=rope.from_config(config),
        known=np.arange(config.vocab_size) < config.vocab_size - 1,
        max_length=steps.shape.width * steps.shape.size,
        adapters={name: number for number, name in enumerate(ADAPTERS, 1)},
    )


@dataclasses.dataclass
class Evens:
    """A grammar: even and odd ids in turn, and id 7 after eight of them."""

    count: int = 0

    def mask(self) -> np.ndarray:
        word = 0x5555_5555 << (self.count % 2) if self.count < 8 else 1 << 7
        words = np.zeros(-(-CONFIG.vocab_size // 32), np.int64)
        words[:] = word if self.count < 8 else 0
        words[0] = word
        return words.astype(np.uint32).view(np.int32)

    def advance(self, token: int) -> None:
        assert token == 7 if self.count >= 8 else token % 2 == self.count % 2
        self.count += 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of a schedule: it arrives at a step, and may be cancelled at another."""

    prompt: list[int]
    settings: dict[str, Any]
    arrival: int
    cancelled: int | None

    def made(self) -> Settings:
        grammar = {"grammar": Evens()} if self.settings.get("grammar") else {}
        return Settings(**{**self.settings, "grammar": None, **grammar})


def asked(rng: random.Random, vocab: int) -> Asked:
    """Draw a request. Prompts share beginnings, so that some are found in the cache."""
    length = rng.randint(1, LONGEST - 4)
    shared = rng.choice([0, length // 2, length])
    own = [rng.randrange(vocab) for _ in range(length - shared)]
    arrival = rng.randint(0, 25)
    settings = {
        "max_new_tokens": rng.randint(1, LONGEST - length),
        "min_new_tokens": rng.choice([0, 0, 4]),
        "seed": rng.randrange(1000),
        "temperature": rng.choice([0, 0, 0.7, 2.0]),
        "top_k": rng.choice([0, 0, 5]),
        "top_p": rng.choice([1, 1, 0.8]),
        "min_p": rng.choice([0, 0, 0.1]),
        "repetition_penalty": rng.choice([1, 1, 1.3]),
        "presence_penalty": rng.choice([0, 0.5]),
        "frequency_penalty": rng.choice([0, 0.5]),
        "logit_bias": rng.choice([{}, {3: 4.0, 9: -100.0}]),
        "allowed": rng.choice([None, None, None, list(range(1, 40))]),
        "stops": rng.choice([(), (3,), (5, 9)]),
        "logprobs": rng.choice([None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, None, 2]),
        "scored_from": rng.randint(1, length),
        "ntk_alpha": rng.choice([None, None, 3.0]),
        "salt": rng.choice(["", "", "salt"]),
        "grammar": rng.random() < 0.2,
    }
    if settings["grammar"]:
        settings |= {"allowed": None, "stops": (7,), "min_new_tokens": 0}
    return Asked([*range(1, shared + 1), *own], settings, arrival, None)


def schedule(seed: int, vocab: int = CONFIG.vocab_size) -> list[Asked]:
    """Draw the requests of a schedule, of which one in six is cancelled."""
    rng = random.Random(seed)
    drawn = [asked(rng, vocab) for _ in range(rng.randint(2, 9))]
    return [
        dataclasses.replace(x, cancelled=x.arrival + rng.randint(1, 25))
        if rng.random() < 1 / 6
        else x
        for x in drawn
    ]


def events(engine: Engine, requests: list[Asked]) -> list[list[Event]]:
    """Run a schedule to its end. Returns the events of each request, but for `Started`."""
    found: list[list[Event]] = [[] for _ in requests]
    numbers: dict[int, int] = {}
    step = 0
    while True:
        for i, request in enumerate(requests):
            if request.arrival == step:
                numbers[i] = engine.submit(request.prompt, request.made(), listener=found[i].append)
            if request.cancelled == step:
                engine.cancel(numbers[i])
        busy = engine.step()
        step += 1
        if not busy and all(request.arrival < step for request in requests):
            return [[x for x in some if not isinstance(x, Started)] for some in found]
        assert step < 3000, "it never ends"


def tokens(some: list[Event]) -> list[int]:
    """The new tokens among the events of a request."""
    return [x.id for x in some if isinstance(x, Choice)]


def alone(steps: Steps, request: Asked) -> list[Event]:
    """The events of a request that nothing else runs beside."""
    lone = dataclasses.replace(request, arrival=0, cancelled=None)
    return events(engine(steps), [lone])[0]
