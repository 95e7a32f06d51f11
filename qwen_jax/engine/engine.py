"""`Engine`: requests in, tokens out. It joins the scheduler with the compiled programs.

One thread plans a step and starts it, and only then reads the results of the step before, so that
devices never wait for the host. It knows no text, and nothing of HTTP.
"""

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32

from qwen_jax.engine import drawing, orders, outcomes, rows, running_request, steps
from qwen_jax.engine.pool import Pool
from qwen_jax.engine.running_request import GrammarError, Running, of_row
from qwen_jax.engine.scheduler import Plan, Scheduler
from qwen_jax.engine.settings import Choice, Ended, Listener, Load, Settings, Started
from qwen_jax.engine.steps import Steps
from qwen_jax.model import Decoder
from qwen_jax.model.rope import Rope

_LOG = logging.getLogger("qwen_jax")
_PATIENCE = 60.0  # seconds for the last step
_STUCK = "a step has not finished within {:g} s: a device or another process hangs"


class _Flight(NamedTuple):
    """A step that devices run, and the arrays of its results."""

    plan: Plan
    decode: Int32[Array, "R line"] | None
    first: Int32[Array, "n line"] | None
    scores: Int32[Array, "n C columns"] | None
    places: list[int]  # of the chunks among the n of the program


class Engine:
    """A running engine: `settings.Generator`, which says what its methods do.

    steps: the programs.
    scheme: the RoPE scheme of the model.
    known: bool [V], the ids that may be generated.
    max_length: the most tokens of a request, prompt and new ones together.
    step_timeout: the seconds after which a step that has not finished counts as a failure.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        scheme: Rope,
        known: np.ndarray,
        max_length: int,
        adapters: Mapping[str, int] | None = None,
        step_timeout: float = float("inf"),
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
        self._requests: dict[int, Running] = {}
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._waker = threading.Condition()
        self._flights: collections.deque[_Flight] = collections.deque()
        self._counts: collections.Counter[str] = collections.Counter()
        self._sizes: collections.Counter[int] = collections.Counter()  # steps by their tokens
        self._failure: str | None = None
        self._step_timeout, self._begun = step_timeout, float("inf")  # when a step began
        self._renewal: Decoder | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def longest(self) -> int:
        """See `settings.Generator`."""
        return self._longest

    @property
    def failure(self) -> str | None:
        """See `settings.Generator`."""
        if self._failure is None and time.monotonic() - self._begun > self._step_timeout:
            self._failure, self._closing = _STUCK.format(self._step_timeout), True
        return self._failure

    def submit(self, prompt: Sequence[int], settings: Settings, *, listener: Listener) -> int:
        """See `settings.Generator`."""
        if settings.adapter is not None and settings.adapter not in self._adapters:
            raise ValueError(f"adapter {settings.adapter!r} is not one of {list(self._adapters)}")
        request = running_request.checked(
            prompt,
            settings,
            listener=listener,
            number=next(self._numbers),
            scheme=self._scheme,
            known=self._known,
            vocab=self._vocab,
            longest=self.longest,
            size=self._scheduler.size,
        )
        self._later(lambda: self._add(request))
        return request.number

    def cancel(self, number: int) -> None:
        """See `settings.Generator`."""
        with contextlib.suppress(RuntimeError):  # it has ended with the engine
            self._later(lambda: self._cancel(number))

    def renew(self, decoder: Decoder) -> None:
        """Take other weights of the same shapes for all requests that have had no row yet.

        They wait until no other request is left, and find nothing that the old weights have cached.
        Raises ValueError for other shapes, and NotImplementedError on several processes.
        """
        self._steps.check(decoder)
        self._later(lambda: setattr(self, "_renewal", decoder))

    def load(self) -> Load:
        """See `settings.Generator`."""
        now = self._scheduler
        pages = sum(pool.pages - 1 for pool in now.pools)
        return Load(
            running=len(now.running),
            waiting=len(now.waiting),
            pages=pages,
            used=pages - sum(pool.available for pool in now.pools),
            preemptions=now.preemptions,
            step_tokens=self._sizes.copy(),
            **self._counts,
        )

    def _later(self, command: Callable[[], None]) -> None:
        """Have the engine's thread run a command. Raises RuntimeError if it takes no more steps."""
        with self._waker:
            if self._closing:
                raise RuntimeError(self.failure or "the engine is closing")
            self._inbox.append(command)
            self._waker.notify()

    def _add(self, request: Running) -> None:
        self._requests[request.number] = request
        self._scheduler.add(request)

    def _cancel(self, number: int) -> None:
        if (request := self._requests.get(number)) is not None:
            self._scheduler.end(request)
            self._over(request, Ended("cancelled"))

    def _fail(self, request: Running, error: str) -> None:
        self._scheduler.end(request)
        self._over(request, Ended("failed", error))

    def _over(self, request: Running, event: Ended) -> None:
        del self._requests[request.number]
        request.tell(event)

    # The thread.

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after its next step. Requests that run end as cancelled."""
        with self._waker:
            self._closing = True
            self._waker.notify()
        if self._thread is not None and self.failure is None:
            self._thread.join(_PATIENCE)  # longer only if devices hang
        self._steps.close()

    def _run(self) -> None:
        """Run steps until the engine is closed or fails, then end all requests."""
        try:
            while not self._closing:
                self._begun = time.monotonic()
                busy = self.step()
                self._begun = float("inf")
                if not busy:
                    with self._waker:
                        self._waker.wait_for(lambda: self._inbox or self._closing)
        except BaseException as error:  # nobody else would tell those who wait
            _LOG.exception("the engine has stopped")
            self._failure = self._failure or f"{type(error).__name__}: {error}".splitlines()[0]
        with self._waker:
            self._closing = True
        while self._inbox:
            with contextlib.suppress(Exception):  # what has failed may fail again
                self._inbox.popleft()()
        failure = self._failure
        for request in list(self._requests.values()):
            self._over(request, Ended("failed", failure) if failure else Ended("cancelled"))

    def step(self) -> bool:
        """Plan and start a step, then take the results of the one before.

        Returns whether anything is left to do. The engine's thread calls it; without a thread, a
        program that wants to see each step may.
        """
        while self._inbox:
            self._inbox.popleft()()
        if self._renewal is not None:
            self._take_weights(self._renewal)
        plan = self._scheduler.plan()
        if plan:
            self._flights.append(self._start(plan))
            self._counts["steps"] += 1
        if self._flights and (not plan or len(self._flights) > 1):
            self._take(self._flights.popleft())
        busy = self._flights or self._inbox or self._scheduler.running or self._scheduler.waiting
        if not busy:
            for pool in self._scheduler.pools:
                pool.check()
        return bool(busy)

    def _take_weights(self, decoder: Decoder) -> None:
        """Exchange the weights if no request runs; until then no request gets a row."""
        self._scheduler.paused = self._scheduler.begun
        if self._scheduler.paused:
            return
        self._steps.renew(decoder)
        for pool in self._scheduler.pools:
            pool.forget()
        self._renewal = None

    def _start(self, plan: Plan) -> _Flight:
        """Start a step's programs."""
        shape, every = self._steps.shape, self._steps.sizes
        for row, held in plan.admitted:
            request = of_row(row)
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
            if request.admissions == 1:
                self._counts["queried"] += len(request.prompt)
                self._counts["hits"] += request.cached or 0
            request.tell(Started(request.cached or 0))
        self._mask(plan)
        decode = first = scores = None
        if plan.decode:
            decode = self._steps.decode(orders.of_rows(plan, shape.rows))
        places: list[int] = []
        if plan.chunks:
            chunks, places = orders.of_chunks(plan, shape, replicas=self._steps.replicas)
            first, scores = self._steps.prefill(**chunks._asdict())
            self._counts["prompt_tokens"] += int(chunks.count.sum())
        return _Flight(plan, decode, first, scores, places)

    def _mask(self, plan: Plan) -> None:
        """Send the masks of grammars whose next token this step chooses."""
        wanted: list[tuple[int, np.ndarray]] = []
        for row, number in plan.emitted:
            request = of_row(row)
            if request.paced and not request.over and number == len(request.tokens):
                try:
                    wanted.append((row.index, request.mask()))
                except GrammarError as error:
                    self._fail(request, str(error))
        for begin in range(0, len(wanted), steps.MASKS):
            which = np.full(steps.MASKS, self._steps.shape.rows, np.int32)
            masks = np.zeros((steps.MASKS, self._steps.sizes.words), np.int32)
            for i, (row, mask) in enumerate(wanted[begin : begin + steps.MASKS]):
                which[i], masks[i] = row, mask
            self._steps.masks(which, masks)

    def _take(self, flight: _Flight) -> None:
        """Wait for the results of a step; tell listeners, and free the rows that have ended."""
        plan = flight.plan
        lines: dict[int, np.ndarray] = {}
        if flight.decode is not None:
            every = np.asarray(flight.decode)
            lines = {row.index: every[row.index] for row in plan.decode}
        first = None if flight.first is None else np.asarray(flight.first)
        scores = None if flight.scores is None else np.asarray(flight.scores)
        for place, chunk in zip(flight.places, plan.chunks, strict=True):
            request, told = of_row(chunk.row), None if scores is None else scores[place]
            request.score(chunk.begin, chunk.count, lines=told)
            if first is not None and first[place, 1] != drawing.NOTHING:
                lines[chunk.row.index] = first[place]
        tokens: dict[int, int] = {}
        ended: dict[int, str] = {}
        events: list[tuple[Running, Choice]] = []
        for row, number in plan.emitted:
            request, line = of_row(row), lines.get(row.index)
            if request.over or line is None or line[1] == drawing.NOTHING:
                continue
            token, code = int(line[0]), int(line[1])
            if code in drawing.FAULTS:
                self._fail(request, f"new token {number + 1}: {outcomes.fault(code)}")
                if code == drawing.BROKEN:  # its pages hold zeros where values were not finite
                    for pool in self._scheduler.pools:
                        pool.forget(request.keys)
                continue
            tokens[row.index] = token
            if number == len(request.tokens):
                events.append((request, outcomes.choice(line, request.settings.logprobs)))
            if code != drawing.GOES_ON:
                ended[row.index] = "stop" if code == drawing.STOP else "length"
        self._sizes[sum(chunk.count for chunk in plan.chunks) + len(tokens)] += 1
        over = {of_row(row): ended[row.index] for row, _ in plan.emitted if row.index in ended}
        self._scheduler.apply(plan, tokens, ended)
        for request, choice in events:
            self._counts["new_tokens"] += 1
            request.tell(choice)
            try:
                request.advance(choice.id)
            except GrammarError as error:
                self._fail(request, str(error))
        for request, reason in over.items():
            if request.over and request.number in self._requests:
                self._over(request, Ended(reason))
