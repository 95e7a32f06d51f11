"""The scheduler with a device of Python lists, whose tokens depend on all that a row can see."""

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine.pool import Pool
from qwen_jax.engine.scheduler import Plan, Request, Scheduler

VOCABULARY = 50
STOP = 0


def following(tokens: list[int], identity: Any) -> int:
    """The token that the model samples after these; one in fifty is the stop id."""
    text = repr((identity, tokens)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % VOCABULARY


def alone(request: Request) -> list[int]:
    """The new tokens of a request."""
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.limit:
        tokens.append(following(tokens, request.identity))
        if tokens[-1] == STOP:
            break
    return tokens[len(request.prompt) :]


@dataclasses.dataclass
class Device:
    """Pages of (token, author) and the rows that are on, as the compiled programs keep them."""

    scheduler: Scheduler
    memory: list[list[list[tuple[int, str] | None]]] = dataclasses.field(init=False)
    tables: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.scheduler
        self.memory = [[[None] * s.size for _ in range(pool.pages)] for pool in s.pools]

    def replica(self, row: int) -> list[list[tuple[int, str] | None]]:
        return self.memory[row * len(self.scheduler.pools) // self.scheduler.rows]

    def write(self, row: int, place: int, token: int, author: str) -> None:
        number, slot = divmod(place, self.scheduler.size)
        page = self.tables[row][number]
        assert page, "page 0 is nobody's"
        self.replica(row)[page][slot] = token, author

    def seen(self, row: int, count: int) -> list[tuple[int, str] | None]:
        """What a row reads of its first `count` tokens; None before its reach."""
        found, reach = [], self.scheduler.reach
        for place in range(count):
            if reach is not None and place < count - reach:
                found.append(None)
                continue
            number, slot = divmod(place, self.scheduler.size)
            found.append(self.replica(row)[self.tables[row][number]][slot])
        return found

    def run(self, plan: Plan) -> tuple[dict[int, int], set[int]]:
        tokens: dict[int, int] = {}
        ended: set[int] = set()
        for row, pages in plan.admitted:
            scored, cached = row.request.scored, row.request.cached or 0
            if scored is not None and not row.request.tokens:
                assert cached < max(1, scored), "scored tokens are computed"
            self.rows.pop(row.index, None)
            self.tables[row.index] = dict(enumerate(pages))
        for index, page in plan.pages.items():
            self.tables[index][len(self.tables[index])] = page
        fed = {row.index for row in plan.decode}
        for index in set(self.rows) - fed:  # nobody's, or waiting for a grammar
            request = self.rows[index]["request"]
            assert request.paced or index not in self.scheduler.running or request.over
        for index in sorted(fed & set(self.rows)):  # others have ended unbeknown to the host
            text = self.rows[index]["text"]
            self.write(index, len(text) - 1, text[-1], "decode")
            self.sample(index, plan, tokens, ended)
        for row, begin, count in plan.chunks:
            prompt = row.request.prompt
            assert begin % self.scheduler.chunk == 0
            assert count == min(self.scheduler.chunk, len(prompt) - begin)
            for place in range(begin, begin + count):
                self.write(row.index, place, prompt[place], "prefill")
            if begin + count == len(prompt):
                self.rows[row.index] = {"request": row.request, "text": list(prompt)}
                self.sample(row.index, plan, tokens, ended)
        return tokens, ended

    def sample(self, index: int, plan: Plan, tokens: dict[int, int], ended: set[int]) -> None:
        state = self.rows[index]
        request, text = state["request"], state["text"]
        for place, found in enumerate(self.seen(index, len(text))):
            if found is not None or self.scheduler.reach is None:
                author = "prefill" if place < len(request.prompt) else "decode"
                assert found == (text[place], author), "another row's pages"
        new = following(text, request.identity)
        number = len(text) - len(request.prompt)
        known = request.tokens[number] if number < len(request.tokens) else None
        assert not request.paced or number <= len(request.tokens), "the one before is known"
        assert plan.forced.get(index) == known, "what is known is replayed"
        text.append(new)
        tokens[index] = new
        if new == STOP or len(text) == len(request.prompt) + request.limit:
            ended.add(index)
            del self.rows[index]


def world_of(seed: int) -> dict[str, Any]:
    """Draw a world in which rows and pages are short."""
    rng = random.Random(seed)
    size, width, replicas = rng.randint(1, 4), rng.randint(3, 8), rng.choice([1, 1, 2])

    def request() -> tuple[Request, int, int | None]:
        shared = rng.randint(1, size * width // 2)
        own = [rng.randint(1, VOCABULARY - 1) for _ in range(rng.randint(0, 3))]
        new = Request(
            prompt=[*range(1, shared + 1), *own],
            limit=rng.randint(1, size * width // 2),
            identity=rng.choice("aab"),
            scored=rng.choice([None, None, rng.randint(0, 9)]),
            paced=rng.random() < 0.3,
        )
        arrival = rng.randint(0, 12)
        return new, arrival, rng.choice([None, None, arrival + rng.randint(0, 20)])

    return {
        "size": size,
        "replicas": replicas,
        "rows": replicas * rng.randint(1, 4),
        "pages": rng.randint(width, 2 * width),
        "chunk": size * rng.randint(1, 3),
        "chunks": rng.randint(1, 3),
        "width": width,
        "reach": rng.choice([None, None, rng.randint(1, 9)]),
        "requests": [request() for _ in range(rng.randint(3, 12))],
    }


def play(world: dict[str, Any]) -> tuple[Scheduler, list[Request], list[Request]]:
    """Run a world to the end, the host one step ahead. Returns all and the cancelled requests."""
    pools = [Pool(world["pages"]) for _ in range(world["replicas"])]
    names = ("size", "chunk", "chunks", "width", "reach")
    scheduler = Scheduler(pools, world["rows"], **{name: world[name] for name in names})
    device, requests = Device(scheduler), []
    arriving: dict[int, list[Request]] = {}
    leaving: dict[int, list[Request]] = {}
    for request, arrival, cancelled in world["requests"]:
        arriving.setdefault(arrival, []).append(request)
        if cancelled is not None:
            leaving.setdefault(cancelled, []).append(request)
    before: tuple[Plan, Any] | None = None
    for step in range(2000):
        for request in arriving.pop(step, ()):
            if len(request.prompt) + request.limit > scheduler.longest:
                with pytest.raises(ValueError, match="at most"):
                    scheduler.add(request)
            else:
                scheduler.add(request)
                requests.append(request)
        for request in leaving.get(step, ()):
            if request in requests:
                scheduler.end(request)
        plan = scheduler.plan()
        results = device.run(plan)  # as the device does while the host takes the step before
        for pool in pools:
            pool.check()
        if before is not None:
            scheduler.apply(before[0], *before[1])
        before = plan, results
        if not plan and not arriving and not scheduler.running and not scheduler.waiting:
            break
    else:
        pytest.fail("it never ends")
    return scheduler, requests, [x for some in leaving.values() for x in some]


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1).map(world_of))
def test_every_request_gets_what_it_gets_alone(world: dict[str, Any]) -> None:
    scheduler, requests, cancelled = play(world)
    for request in requests:
        assert request.over
        wanted = alone(request)
        complete = len(request.tokens) == len(wanted)
        assert request.tokens == wanted[: len(request.tokens)]
        assert complete or request in cancelled
    for pool in scheduler.pools:
        assert pool.available == pool.pages - 1


def idle(rows: int = 2, pages: int = 64) -> Scheduler:
    """A scheduler whose rows hold 32 tokens, in pages and chunks of 2."""
    return Scheduler([Pool(pages)], rows, size=2, chunk=2, chunks=1, width=16)


def steps_until(scheduler: Scheduler, done: Callable[[Plan], bool]) -> int:
    """The number of steps until a plan is done; devices choose token 1 all the time."""
    before: Plan | None = None
    for step in range(1, 500):
        plan = scheduler.plan()
        if done(plan):
            return step
        if before is not None:
            scheduler.apply(before, {row.index: 1 for row, _ in before.emitted}, ())
        before = plan
    pytest.fail("it never ends")


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one() -> None:
    scheduler = idle()
    long = Request(prompt=[*range(1, 29)], limit=1)
    scheduler.add(long)
    scheduler.plan()
    short = Request(prompt=[7], limit=1)
    scheduler.add(short)
    assert (
        steps_until(scheduler, lambda plan: any(r.request is short for r, _ in plan.emitted)) <= 2
    )


def test_a_long_prompt_ends_however_many_short_ones_arrive() -> None:
    scheduler = idle()
    long = Request(prompt=[*range(1, 29)], limit=1)
    scheduler.add(long)

    def done(plan: Plan) -> bool:
        scheduler.add(Request(prompt=[len(scheduler.waiting)], limit=1))
        for row, _ in plan.emitted:  # a request of one token ends with it
            scheduler.end(row.request)
        return any(row.request is long for row, _ in plan.emitted)

    assert steps_until(scheduler, done) <= 2 * 14


def test_requests_are_admitted_in_order_and_the_youngest_gives_way() -> None:
    """Three requests of 12 tokens and pages for two: the third begins where one of them ends."""
    scheduler = idle(rows=3, pages=13)
    requests = [Request(prompt=[i, 2, 3, 4], limit=8) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    before: Plan | None = None
    over: list[Request] = []
    while not all(request.over for request in requests):
        plan = scheduler.plan()
        if before is not None:
            ended = [row.index for row, number in before.emitted if number == 7]
            over += scheduler.apply(before, {row.index: 1 for row, _ in before.emitted}, ended)
        before = plan
    assert over == requests and scheduler.preemptions == 1


def test_a_preempted_request_whose_prompt_is_scored_finds_it_in_the_cache() -> None:
    scheduler = idle(rows=2, pages=10)
    requests = [Request(prompt=[i, 2, 3, 4], limit=8, scored=1) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    steps_until(scheduler, lambda plan: scheduler.preemptions > 0)
    scheduler.end(requests[0])
    assert [row.request for row, _ in scheduler.plan().admitted] == [requests[1]]
    assert requests[1].tokens and requests[1].cached == 2, "only the last token is computed"


def test_a_preempted_request_goes_on_while_new_ones_are_kept_waiting() -> None:
    scheduler = idle(rows=3, pages=13)
    requests = [Request(prompt=[i, 2, 3, 4], limit=8) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    steps_until(scheduler, lambda plan: scheduler.preemptions > 0)
    scheduler.paused = True
    new = Request(prompt=[9], limit=1)
    scheduler.add(new)
    for request in requests[:2]:
        scheduler.end(request)
    assert scheduler.begun and not scheduler.running
    assert [row.request for row, _ in scheduler.plan().admitted] == [requests[2]]
    scheduler.end(requests[2])
    assert not scheduler.begun and not scheduler.plan() and list(scheduler.waiting) == [new]
