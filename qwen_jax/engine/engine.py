"""`Engine`: requests in, tokens out. It joins the scheduler with the compiled programs.

One thread plans a step and starts it, and only then reads the results of the step before, so that
devices never wait for the host. It knows no text, and nothing of HTTP.
"""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32

from qwen_jax.engine import drawing, rows, scheduler, settings, steps
from qwen_jax.engine.pool import Pool
from qwen_jax.engine.scheduler import Plan, Row, Scheduler
from qwen_jax.engine.settings import Choice, Ended, Listener, Load, PromptScores, Settings, Started
from qwen_jax.engine.steps import Steps
from qwen_jax.model.rope import Rope

_LOG = logging.getLogger("qwen_jax")


@dataclasses.dataclass(eq=False, kw_only=True)
class _Request(scheduler.Request):
    """A request, with what the scheduler need not know of it.

    number: what `submit` has returned.
    frequencies: the RoPE frequencies of its row.
    allowed: the mask of ids that may be generated, but for a grammar.
    scores: the log-probabilities of its prompt's tokens that are known so far.
    """

    number: int
    settings: Settings
    listener: Listener
    frequencies: Float[np.ndarray, " pairs"]
    allowed: Int32[np.ndarray, " words"]
    scores: list[Choice] = dataclasses.field(default_factory=list)


class _Flight(NamedTuple):
    """A step that devices run, and the arrays of its results."""

    plan: Plan
    decode: Int32[Array, "R told"] | None
    first: Int32[Array, "n told"] | None
    scores: Int32[Array, "n C columns"] | None
    places: list[int]  # of the chunks among the n of the program


class Engine:
    """A running engine: `settings.Generator`, which says what its methods do.

    steps: the programs.
    scheme: the RoPE scheme of the model.
    known: bool [V], the ids that may be generated.
    max_length: the most tokens of a request, prompt and new ones together.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        scheme: Rope,
        known: np.ndarray,
        max_length: int,
        adapters: Mapping[str, int] | None = None,
    ):
        shape = steps.shape
        self._steps, self._scheme = steps, scheme
        self._known = rows.bits(np.flatnonzero(known), len(known))
        self._vocab = len(known)
        self._adapters = dict(adapters or {})
        reach = int(steps.decoder.windows.max())
        self._scheduler = Scheduler(
            [Pool(shape.pages) for _ in range(steps.replicas)],
            shape.rows,
            size=shape.size,
            chunk=shape.chunk,
            chunks=shape.chunks,
            width=shape.width,
            reach=reach if reach < shape.width * shape.size else None,
        )
        self._longest = min(max_length, self._scheduler.longest)
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._waker = threading.Condition()
        self._flights: collections.deque[_Flight] = collections.deque()
        self._off: set[int] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._failure: str | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def longest(self) -> int:
        """See `settings.Generator`."""
        return self._longest

    @property
    def failure(self) -> str | None:
        """See `settings.Generator`."""
        return self._failure

    def submit(self, prompt: Sequence[int], settings: Settings, *, listener: Listener) -> int:
        """See `settings.Generator`."""
        settings.check(self._vocab)
        if self._failure or self._closing:
            raise RuntimeError(self._failure or "the engine is closing")
        if settings.adapter is not None and settings.adapter not in self._adapters:
            raise ValueError(f"adapter {settings.adapter!r} is not one of {list(self._adapters)}")
        if not prompt:
            raise ValueError("the prompt is empty: a request needs at least one token")
        total = len(prompt) + settings.max_new_tokens
        if total > self.longest:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {settings.max_new_tokens} new ones are {total}: "
                f"at most {self.longest} fit"
            )
        alpha = settings.ntk_alpha
        if alpha is None:
            alpha = float(self._scheme.alpha(np.array([len(prompt)]))[0])
        request = _Request(
            prompt=list(prompt),
            limit=settings.max_new_tokens,
            identity=(alpha, settings.salt, settings.adapter),
            scored=None if settings.prompt_logprobs is None else settings.scored_from,
            paced=settings.grammar is not None,
            number=next(self._numbers),
            settings=settings,
            listener=listener,
            frequencies=self._scheme.frequencies(np.array([alpha]))[0].astype(np.float32),
            allowed=self._known & rows.bits(np.array(settings.allowed), self._vocab)
            if settings.allowed is not None
            else self._known,
        )
        self._later(lambda: self._add(request))
        return request.number

    def cancel(self, number: int) -> None:
        """See `settings.Generator`."""
        self._later(lambda: self._cancel(number))

    def load(self) -> Load:
        """See `settings.Generator`."""
        plan, counts = self._scheduler, self._counts
        pages = sum(pool.pages - 1 for pool in plan.pools)
        return Load(
            running=len(plan.running),
            waiting=len(plan.waiting),
            pages=pages,
            used=pages - sum(pool.available for pool in plan.pools),
            preemptions=plan.preemptions,
            **counts,
        )

    def _later(self, command: Callable[[], None]) -> None:
        """Have the engine's thread run a command before its next step."""
        with self._waker:
            self._inbox.append(command)
            self._waker.notify()

    def _add(self, request: _Request) -> None:
        self._requests[request.number] = request
        self._scheduler.add(request)

    def _cancel(self, number: int) -> None:
        if (request := self._requests.get(number)) is not None:
            self._scheduler.end(request)
            self._over(request, Ended("cancelled"))

    def _over(self, request: _Request, event: Ended) -> None:
        del self._requests[request.number]
        _tell(request, event)

    # The thread.

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after its next step. Requests that run end as cancelled."""
        self._closing = True
        self._later(lambda: None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                if not self.step():
                    with self._waker:
                        self._waker.wait_for(lambda: self._inbox)
            for number in list(self._requests):
                self._cancel(number)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
            _LOG.exception("the engine has stopped")
            for request in list(self._requests.values()):
                self._over(request, Ended("failed", self._failure))

    def step(self) -> bool:
        """Plan and start a step, then take the results of the one before.

        Returns whether anything is left to do. The engine's thread calls it; without a thread, a
        program that wants to see each step may.
        """
        while self._inbox:
            self._inbox.popleft()()
        plan = self._scheduler.plan()
        self._off.update(plan.off)
        if plan:
            self._flights.append(self._start(plan))
            self._counts["steps"] += 1
        if self._flights and (not plan or len(self._flights) > 1):
            self._take(self._flights.popleft())
        if not (plan or self._flights):
            for pool in self._scheduler.pools:
                pool.check()
        return bool(plan or self._flights or self._inbox)

    def _start(self, plan: Plan) -> _Flight:
        """Start a step's programs."""
        shape, every = self._steps.shape, self._steps.sizes
        for row, held in plan.admitted:
            request = _of(row)
            vector = rows.entry(
                request.settings,
                np.asarray(request.prompt),
                pages=np.array(held),
                frequencies=request.frequencies,
                allowed=request.allowed,
                adapter=self._adapters.get(request.settings.adapter or "", 0),
                sizes=every,
            )
            self._steps.admit(row.index, vector)
            self._off.discard(row.index)
            self._counts["queried"] += len(request.prompt)
            self._counts["hits"] += request.cached or 0
            _tell(request, Started(request.cached or 0))
        self._mask(plan)
        decode = first = scores = None
        if plan.decode:
            orders = np.tile(np.array([0, -1, steps.SKIP], np.int32), (shape.rows, 1))
            orders[list(self._off), 2] = steps.OFF
            self._off.clear()
            for row in plan.decode:
                orders[row.index] = (
                    plan.pages.get(row.index, 0),
                    plan.forced.get(row.index, -1),
                    steps.FEED,
                )
            decode = self._steps.decode(orders)
        places: list[int] = []
        if plan.chunks:
            first, scores, places = self._prefill(plan)
        return _Flight(plan, decode, first, scores, places)

    def _mask(self, plan: Plan) -> None:
        """Send the masks of grammars whose next token this step chooses."""
        wanted: list[tuple[int, np.ndarray]] = []
        for row, number in plan.emitted:
            request = _of(row)
            grammar = request.settings.grammar
            if grammar is not None and number == len(request.tokens):
                wanted.append((row.index, grammar.mask() & request.allowed))
        for begin in range(0, len(wanted), steps.MASKS):
            which = np.full(steps.MASKS, self._steps.shape.rows, np.int32)
            masks = np.zeros((steps.MASKS, self._steps.sizes.words), np.int32)
            for i, (row, mask) in enumerate(wanted[begin : begin + steps.MASKS]):
                which[i], masks[i] = row, mask
            self._steps.masks(which, masks)

    def _prefill(
        self, plan: Plan
    ) -> tuple[Int32[Array, "n told"] | None, Int32[Array, "n C columns"] | None, list[int]]:
        """Start the program that computes chunks. Returns its results, and each chunk's place."""
        shape, replicas = self._steps.shape, self._steps.replicas
        n, share = shape.chunks * replicas, shape.rows // replicas
        tokens = np.zeros((n, shape.chunk), np.int32)
        scored = np.full((n, shape.chunk), -1, np.int32)
        which, begins, counts, forced = (np.full(n, x, np.int32) for x in (0, 0, 0, -1))
        last = np.zeros(n, bool)
        places, used = [], [0] * replicas
        for row, begin, count in plan.chunks:
            request, replica = _of(row), row.index // share
            place = replica * shape.chunks + used[replica]
            used[replica] += 1
            places.append(place)
            prompt, end = request.prompt, begin + count
            tokens[place, :count] = prompt[begin:end]
            which[place], begins[place], counts[place] = row.index % share, begin, count
            last[place] = end == len(prompt)
            if last[place]:
                forced[place] = plan.forced.get(row.index, -1)
            if request.scored is not None:
                first = max(request.scored - 1, begin)  # the token before the first one scored
                after = prompt[first + 1 : end + 1]
                scored[place, first - begin : first - begin + len(after)] = after
            self._counts["prompt_tokens"] += count
        told, scores = self._steps.prefill(
            tokens,
            which=which,
            begin=begins,
            count=counts,
            forced=forced,
            last=last,
            scored=scored if (scored >= 0).any() else None,
        )
        return told, scores, places

    def _take(self, flight: _Flight) -> None:
        """Wait for the results of a step; tell listeners, and free the rows that have ended."""
        plan = flight.plan
        lines: dict[int, np.ndarray] = {}
        if flight.decode is not None:
            told = np.asarray(flight.decode)
            lines = {row.index: told[row.index] for row in plan.decode}
        first = None if flight.first is None else np.asarray(flight.first)
        scores = None if flight.scores is None else np.asarray(flight.scores)
        for place, chunk in zip(flight.places, plan.chunks, strict=True):
            if scores is not None:
                self._score(chunk, scores[place])
            if first is not None and first[place, 1] != drawing.NOTHING:
                lines[chunk.row.index] = first[place]
        tokens: dict[int, int] = {}
        ended: dict[int, str] = {}
        events: list[tuple[_Request, Choice]] = []
        for row, number in plan.emitted:
            request, line = _of(row), lines.get(row.index)
            if request.over or line is None or line[1] == drawing.NOTHING:
                continue
            token, code = int(line[0]), int(line[1])
            if code in drawing.FAULTS:
                self._scheduler.end(request)
                self._over(request, Ended("failed", f"new token {number + 1}: {_fault(code)}"))
                continue
            tokens[row.index] = token
            if number == len(request.tokens):
                events.append((request, _choice(line, request.settings.logprobs)))
            if code != drawing.GOES_ON:
                ended[row.index] = "stop" if code == drawing.STOP else "length"
        over = {
            request: reason
            for request, reason in (
                (_of(row), ended[row.index]) for row, _ in plan.emitted if row.index in ended
            )
        }
        self._scheduler.apply(plan, tokens, ended)
        for request, choice in events:
            self._counts["new_tokens"] += 1
            if request.settings.grammar is not None:
                request.settings.grammar.advance(choice.id)
            _tell(request, choice)
        for request, reason in over.items():
            if request.over and request.number in self._requests:
                self._over(request, Ended(reason))

    def _score(self, chunk: scheduler.Chunk, lines: np.ndarray) -> None:
        """Keep the log-probabilities of a chunk of a prompt; tell them after the last chunk."""
        request = _of(chunk.row)
        if request.scored is None or request.over or request.tokens:
            return
        end = chunk.begin + chunk.count
        for at in range(max(request.scored - 1, chunk.begin), min(end, len(request.prompt) - 1)):
            line = np.concatenate([[request.prompt[at + 1], 0], lines[at - chunk.begin]])
            choice = _choice(line.astype(np.int32), request.settings.prompt_logprobs)
            known = at + 1 - request.scored  # after a preemption they are computed again
            request.scores[known:] = [choice]
        if end == len(request.prompt):
            _tell(request, PromptScores(tuple(request.scores)))


def _of(row: Row) -> _Request:
    """Return the request of a row, as this module has made it."""
    assert isinstance(row.request, _Request)
    return row.request


def _fault(code: int) -> str:
    return f"{drawing.FAULTS[code]}, so no token can be chosen"


def _choice(line: Int32[np.ndarray, " told"], wanted: int | None) -> Choice:
    """Make the event of a token from a line of `drawing.choose`."""
    if wanted is None:
        return Choice(int(line[0]))
    most = settings.MOST_LOGPROBS
    ids, logprobs = line[3 : 3 + wanted], line[3 + most : 3 + most + wanted].view(np.float32)
    top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return Choice(int(line[0]), float(line[2:3].view(np.float32)[0]), top)


def _tell(request: _Request, event: settings.Event) -> None:
    """Call a listener. Its error is logged, as the engine has other requests to serve."""
    try:
        request.listener(event)
    except Exception:
        _LOG.exception("the listener of request %d failed", request.number)
