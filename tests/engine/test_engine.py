"""The engine over compiled programs: one truth, whatever else runs."""

import dataclasses
import itertools
import os
import queue
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.engine.settings import Choice, Ended, Settings, Started
from qwen_jax.engine.steps import Steps
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.model import adapted
from tests.support.compilations import counted
from tests.support.engines import (
    ADAPTERS,
    CONFIG,
    LONGEST,
    SHAPE,
    Asked,
    Evens,
    alone,
    engine,
    events,
    programs,
    schedule,
    tokens,
)
from tests.support.tiny import (
    drawn_adapters,
    full_logits,
    on_mesh,
    tiny_config,
    tiny_decoder,
)

SEEDS = st.integers(0, 2**32 - 1)
SCHEDULES = int(os.environ.get("SCHEDULES", "40"))  # of each kind; 300 before a release

IN_WORDS = tiny_config(intermediate_size=48, dynamic_ntk=True, logn=True)  # which words divide
BFLOAT16_INT8 = {"dtype": "bfloat16", "shape": SHAPE._replace(cache_dtype="int8")}


def check(steps: Steps, requests: list[Asked]) -> int:
    """Each request of a schedule has the events that it has alone. Returns the preemptions."""
    crowd = engine(steps)
    for request, found in zip(requests, events(crowd, requests), strict=True):
        wanted = alone(steps, request)
        last = found[-1]
        assert isinstance(last, Ended)
        if last.reason == "cancelled":
            assert request.cancelled is not None
            found, wanted = found[:-1], wanted[: len(found) - 1]
        assert found == wanted
    load = crowd.load()
    assert (load.running, load.waiting, load.used) == (0, 0, 0)
    assert sum(load.step_tokens.values()) == load.steps
    counted = sum(size * steps for size, steps in load.step_tokens.items())
    told = load.prompt_tokens + load.new_tokens
    assert counted >= told if load.preemptions else counted == told
    return load.preemptions


def test_a_request_has_the_same_bits_in_a_crowd() -> None:
    """Tokens and log-probabilities; arrivals, prefix hits, preemptions, cancellations, grammars."""
    preempted: list[int] = []

    @settings(max_examples=20)
    @given(SEEDS.map(schedule))
    def run(requests: list[Asked]) -> None:
        preempted.append(check(programs(), requests))

    run()
    assert sum(preempted) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dtype": "bfloat16"},
        BFLOAT16_INT8,
        {"shape": SHAPE._replace(cache_dtype="int8", chunks=2)},
        {"config": tiny_config(layer_windows=(5, 11), num_kv_heads=2)},
        {"config": tiny_config(layer_windows=(5, 11)), **BFLOAT16_INT8},
        {
            "dtype": "bfloat16",
            "shape": SHAPE._replace(rows=8, cache_dtype="int8"),
            "sizes": (("data", 2), ("tp", 2)),
        },
        {"shape": SHAPE._replace(rows=24)},  # tokens are chosen for eight of them at a time
        {"config": IN_WORDS, "bits": 4},
        {"config": IN_WORDS, "bits": 8, **BFLOAT16_INT8},
    ],
    ids=[
        *("float32", "bfloat16", "bfloat16 int8", "int8", "windows"),
        *("windows bfloat16 int8", "mesh bfloat16 int8", "blocks of rows"),
        *("weights of 4 bits", "weights of 8 bits bfloat16 int8"),
    ],
)
def test_schedules_have_the_same_bits(how: dict[str, Any]) -> None:
    @settings(max_examples=SCHEDULES)
    @given(SEEDS.map(schedule))
    def run(requests: list[Asked]) -> None:
        check(programs(**how), requests)

    run()


def by_adapter(requests: list[Asked]) -> list[Asked]:
    """The requests of a schedule, with adapters or none in turn."""
    names = itertools.cycle((*ADAPTERS, None))
    return [
        dataclasses.replace(x, settings=x.settings | {"adapter": name})
        for x, name in zip(requests, names, strict=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        BFLOAT16_INT8,
        {"shape": SHAPE._replace(rows=8), "sizes": (("data", 2), ("tp", 2))},
        {"config": IN_WORDS, "bits": 4, "shape": SHAPE._replace(cache_dtype="int8")},
    ],
    ids=["float32", "bfloat16 int8", "mesh", "weights of 4 bits int8"],
)
def test_schedules_with_adapters_have_the_same_bits(how: dict[str, Any]) -> None:
    @settings(max_examples=SCHEDULES)
    @given(SEEDS.map(schedule))
    def run(requests: list[Asked]) -> None:
        check(programs(**how, several=True), by_adapter(requests))

    run()


@pytest.mark.slow
def test_tokens_are_those_of_the_adapter_that_was_asked_for() -> None:
    """Beside `generate` with that adapter alone, and without one."""
    steps, rng = programs(several=True), np.random.default_rng(0)
    with on_mesh():
        base = tiny_decoder(CONFIG)
        single = [adapted.attach_one(base, drawn_adapters(base, i)) for i in range(len(ADAPTERS))]
    made = {None: base, **dict(zip(ADAPTERS, single, strict=True))}
    seen = set()
    for name, decoder in made.items():
        prompt = rng.integers(0, CONFIG.vocab_size, 12).tolist()
        how = {"max_new_tokens": 12, "adapter": name}
        found = tokens(alone(steps, Asked(prompt, how, 0, None)))
        model = dataclasses.replace(language_model(steps), decoder=decoder)
        assert found == model.generate([prompt], max_new_tokens=12)[0].tolist()
        seen.add(tuple(tokens(alone(steps, Asked([1, 2, 3], how, 0, None)))))
    assert len(seen) == 3
    # A prefix that another adapter computed is not found.
    crowd = engine(steps)
    asked = [Asked(list(range(1, 17)), {"max_new_tokens": 1, "adapter": x}, i * 9, None)
             for i, x in enumerate((*made, None))]  # fmt: skip
    events(crowd, asked)
    assert crowd.load().hits == 8


def language_model(steps: Steps) -> LanguageModel:
    """The model of an engine's programs, as `load` makes it."""
    return LanguageModel(
        config=steps.decoder.config,
        tokenizer=None,
        generation_config=GenerationConfig.from_hf({}),
        max_length=LONGEST,
        decoder=steps.decoder,
        mesh=steps.mesh,
        attend=steps.attend,
        cache_dtype=None,
    )


def test_greedy_tokens_are_those_of_generate() -> None:
    """Up to the first at which the two largest logits are within 1e-4 of each other."""
    steps, rng = programs(), np.random.default_rng(0)
    model, vocab = language_model(steps), CONFIG.vocab_size
    for length in (1, 7, 8, 15, 16, 17, 33, 40):
        prompt = rng.integers(0, vocab, length).tolist()
        asked = Asked(prompt, {"max_new_tokens": 16, "allowed": list(range(vocab))}, 0, None)
        asked.settings["allowed"] = None
        found = tokens(alone(steps, asked))
        wanted = model.generate([prompt], max_new_tokens=16)[0].tolist()
        same = next((i for i in range(16) if found[i] != wanted[i]), 16)
        if same < 16:
            with on_mesh():
                text = np.array([prompt + found[:same]])
                logits = np.sort(full_logits(steps.decoder, text)[0, -1])
            assert logits[-1] - logits[-2] < 1e-4


def test_log_probabilities_are_those_of_the_model() -> None:
    steps = programs()
    prompt = list(range(2, 23))
    how = {"max_new_tokens": 4, "logprobs": 5, "prompt_logprobs": 2, "scored_from": 3}
    scores, *choices, _ = alone(steps, Asked(prompt, {**how, "temperature": 3.0}, 0, None))
    new = [x for x in choices if isinstance(x, Choice)]
    alpha = 3.0  # dynamic NTK of 21 tokens: 2^ceil(log2(21 / 16) + 1) - 1
    with on_mesh():
        text = np.array([prompt + [x.id for x in new]])
        logits = full_logits(steps.decoder, text, alpha=alpha)[0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    every = [*scores.choices, *new]  # type: ignore[union-attr]
    assert [x.id for x in every] == text[0, 3:].tolist()
    for place, choice in enumerate(every, 3):
        line = wanted[place - 1]
        np.testing.assert_allclose(choice.logprob, line[choice.id], atol=1e-4)
        ids = [i for i, _ in choice.top]
        np.testing.assert_allclose(
            [x for _, x in choice.top], np.sort(line)[::-1][: len(ids)], atol=1e-4
        )
    assert len(every[0].top) == 2 and len(every[-1].top) == 5


def test_nothing_is_compiled_after_the_start() -> None:
    steps, seed, asked = programs(), 0, 0
    with counted() as compiled:
        while asked < (2000 if SCHEDULES >= 300 else 100):
            requests = schedule(seed)
            events(engine(steps), requests)
            seed, asked = seed + 1, asked + len(requests)
    assert not compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 99}, "at most 64 fit"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"stops": tuple(range(17))}, "stops: 17 ids"),
        ({"logit_bias": {999: 1.0}}, "logit_bias: token id 999"),
        ({"adapter": "other"}, "adapter 'other'"),
        ({"allowed": []}, "allowed"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    asked = {"max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message):
        engine(programs()).submit([1], Settings(**asked), listener=print)


def test_the_thread_serves_and_closes() -> None:
    steps = programs()
    running, told = engine(steps), queue.Queue()
    running.start()
    running.submit([1, 2, 3], Settings(max_new_tokens=5), listener=told.put)
    found = [told.get(timeout=60)]
    while not isinstance(found[-1], Ended):
        found.append(told.get(timeout=60))
    assert found[-1] == Ended("length") and len(tokens(found)) == 5
    running.submit([1, 2, 3], Settings(max_new_tokens=60), listener=told.put)
    running.close()
    while not isinstance(told.get(timeout=60), Ended):
        pass
    with pytest.raises(RuntimeError, match="closing"):
        running.submit([1], Settings(max_new_tokens=1), listener=told.put)


def test_a_broken_program_ends_all_requests() -> None:
    steps, told = programs(), []
    running = engine(steps)
    running.submit([1, 2, 3], Settings(max_new_tokens=5), listener=told.append)
    running._steps = dataclasses.replace  # type: ignore[assignment]
    running._run()
    assert told == [Ended("failed", running.failure)] and running.failure


def test_a_step_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    running, told = engine(programs()), queue.Queue()
    began, goes_on = threading.Event(), threading.Event()
    step = running.step

    def hang() -> bool:
        began.set()
        goes_on.wait()
        return step()

    monkeypatch.setattr(running, "step", hang)
    running.submit([1, 2, 3], Settings(max_new_tokens=5), listener=told.put)
    running.start()
    began.wait()
    assert running.failure is None
    running._step_timeout = 0.0
    assert "hangs" in (running.failure or "")
    with pytest.raises(RuntimeError, match="hangs"):
        running.submit([1], Settings(max_new_tokens=1), listener=told.put)
    assert running._thread is not None
    with monkeypatch.context() as patch:
        patch.setattr(running._thread, "join", lambda *_: pytest.fail("it waits for the step"))
        running.close()
    goes_on.set()  # too late
    while not isinstance(end := told.get(timeout=60), Ended):
        pass
    assert end == Ended("failed", running.failure)


def test_new_weights_wait_for_running_requests_and_share_no_pages_with_old_ones() -> None:
    steps, prompt = programs(), list(range(1, 30))
    old, asked = steps.decoder, Asked(prompt, {"max_new_tokens": 8, "logprobs": 2}, 0, None)
    with on_mesh():
        new = old.replace(embedding=old.head, head=old.embedding)
    before = alone(steps, asked)
    steps.renew(new)
    after = alone(steps, asked)
    steps.renew(old)
    running, found = engine(steps), [[], [], []]
    running.submit(prompt, asked.made(), listener=found[0].append)
    for _ in range(6):
        running.step()
    running.renew(new)
    for listener in found[1:]:
        running.submit(prompt, asked.made(), listener=listener.append)
        while running.step():
            pass
    steps.renew(old)
    cached = [x.cached for some in found for x in some if isinstance(x, Started)]
    assert [some[1:] for some in found] == [before, after, after] and before != after
    assert cached == [0, 0, 24]


@pytest.mark.parametrize("prompt", [[1, 68], [-1], [2**70], []])
def test_a_prompt_of_ids_that_do_not_exist_is_refused(prompt: list[int]) -> None:
    """In the engine's thread it would end all requests."""
    with pytest.raises(ValueError, match="prompt"):
        engine(programs()).submit(prompt, Settings(max_new_tokens=1), listener=print)


class Panic(BaseException):
    """What llguidance raises where it fails within itself is no Exception."""


@dataclasses.dataclass
class Broken(Evens):
    """A grammar that fails at its third mask, or as it moves on by the third token."""

    at: str = "mask"

    def mask(self) -> np.ndarray:
        if self.at == "mask" and self.count == 2:
            raise Panic("no more")
        return super().mask()

    def advance(self, token: int) -> None:
        super().advance(token)
        if self.at == "advance" and self.count == 3:
            raise Panic("no more")


@pytest.mark.parametrize(("at", "made"), [("mask", 2), ("advance", 3)])
def test_a_grammar_that_fails_ends_its_request_alone(at: str, made: int) -> None:
    steps, other = programs(), Asked([5, 6, 7], {"max_new_tokens": 9}, 0, None)
    running, found, beside = engine(steps), [], []
    settings = Settings(max_new_tokens=9, grammar=Broken(at=at))
    running.submit([1, 2, 3], settings, listener=found.append)
    running.submit(other.prompt, other.made(), listener=beside.append)
    while running.step():
        pass
    assert found[-1] == Ended("failed", "its grammar failed: no more")
    assert len(tokens(found)) == made and beside[1:] == alone(steps, other)


def test_weights_of_other_shapes_are_refused() -> None:
    steps = programs()
    with on_mesh(), pytest.raises(ValueError, match="other names, shapes"):
        engine(steps).renew(tiny_decoder(tiny_config(num_layers=1)))


def test_the_tokens_of_each_step_are_counted() -> None:
    """Chunks of 8, 8 and 4 of one prompt; one of 3 goes first, and has its tokens beside them."""
    running = engine(programs())
    requests = [Asked(list(range(1, n)), {"max_new_tokens": 3}, 0, None) for n in (21, 4)]
    events(running, requests)
    assert running.load().step_tokens == {8: 1, 3 + 1: 1, 8 + 1: 1, 4 + 1 + 1: 1, 1: 2}


def test_new_weights_wait_for_requests_that_were_preempted() -> None:
    """Two requests of 40 tokens and pages for 32 of both: one of them gives way."""
    steps, asked = programs(), []
    old = steps.decoder
    with on_mesh():
        new = old.replace(embedding=old.head, head=old.embedding)
    for i in range(3):
        asked.append(Asked([i + 1, *range(4, 20)], {"max_new_tokens": 40}, 0, None))
    wanted = [alone(steps, each) for each in asked]
    running, found = engine(steps), [[], [], []]
    for each, listener in zip(asked, found, strict=True):
        running.submit(each.prompt, each.made(), listener=listener.append)
    while not running.load().preemptions:
        running.step()
    running.renew(new)
    assert any(not running.step() for _ in range(1000)), "it never ends"
    steps.renew(old)
    assert [[x for x in some if not isinstance(x, Started)] for some in found] == wanted


def test_a_prompt_that_is_not_finite_is_not_found_in_the_cache() -> None:
    """Its pages hold zeros for it: the next request with them would get an answer all the same."""
    steps, found = programs(), [[], []]
    old = steps.decoder
    with on_mesh():
        steps.renew(old.replace(embedding=old.embedding.at[66].set(np.nan)))
    running = engine(steps)
    for each in found:
        settings = Settings(max_new_tokens=3)
        running.submit([66, *range(1, 40)], settings, listener=each.append)
        while running.step():
            pass
    steps.renew(old)
    assert found[0] == found[1] and "NaN" in found[1][-1].error
