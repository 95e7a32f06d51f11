"""Sequences that the engine generates for a request, as the event loop sees them.

The engine's thread calls a listener for each event. The loop is woken once for all events of a
step, not for each; what a request has not taken yet is kept for it up to a limit.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from qwen_jax.engine.settings import Choice, Ended, Event, Settings, Started
from qwen_jax.serve.refusals import Refusal, busy, invalid
from qwen_jax.serve.served import Served

_POLL_SECONDS = 0.25  # time between two checks of whether the engine has failed
_PARAMS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stops": "stop_token_ids",
    "allowed": "allowed_token_ids",
    "salt": "cache_salt",
    "adapter": "model",
}


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """One sequence of a request.

    index: the number of the choice that it becomes.
    after: the job whose first token it waits for, to find the prompt in the cache.
    number: the engine's number; None before it is submitted.
    waits: whether it has no row yet.
    over: whether nothing more comes.
    cached: prompt tokens that were found in the cache; None before it has a row.
    arrived, started, first, last: times of its events in seconds; 0 before them.
    tokens: new tokens so far.
    events: those that the request has not taken yet.
    """

    index: int
    prompt: Sequence[int]
    settings: Settings
    after: "Job | None" = None
    number: int | None = None
    waits: bool = True
    over: bool = False
    cached: int | None = None
    arrived: float = 0
    started: float = 0
    first: float = 0
    last: float = 0
    tokens: int = 0
    events: list[Event] = dataclasses.field(default_factory=list)


class Desk:
    """Hands jobs to the engine, and its events to the groups of jobs, in the event loop's thread.

    waiting: the jobs that have no row yet.
    groups: those whose jobs are not all over.
    """

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop):
        self.served, self.waiting = served, 0
        self.groups: set[Group] = set()
        self._loop, self._called = loop, False
        self._undelivered: deque[tuple[Callable[[Event, float], None], Event, float]] = deque()

    def check_room(self) -> None:
        """Raise Refusal if a new request has to come back later."""
        if (failure := self.served.generator.failure) is not None:
            raise Refusal(500, f"the engine has stopped: {failure}")
        if self.waiting >= self.served.limits.queue:
            raise busy(429, f"{self.waiting} sequences wait already: try later", seconds=2)

    def submit(self, job: Job, take: Callable[[Event, float], None]) -> None:
        """Queue a job. `take` is called with each event and its time. Raises Refusal."""

        def listen(event: Event) -> None:  # in the engine's thread
            self._undelivered.append((take, event, time.perf_counter()))
            if not self._called:
                self._called = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
                    self._loop.call_soon_threadsafe(self._deliver)

        try:
            generator = self.served.generator
            job.number = generator.submit(job.prompt, job.settings, listener=listen)
        except ValueError as error:
            name = str(error).split(maxsplit=1)[0].strip(":") if str(error) else ""
            param = _PARAMS.get(name, name if hasattr(job.settings, name) else None)
            raise Refusal(400, str(error), param=param) from None
        except RuntimeError as error:
            raise Refusal(500, f"the engine has stopped: {error}") from None

    async def watch(self) -> None:
        """Wait until the engine fails, and end all requests then, even if it tells them nothing."""
        while (failure := self.served.generator.failure) is None:
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.sleep(_POLL_SECONDS)  # what it still tells comes first
        self.fail(Refusal(500, f"the engine has stopped: {failure}"))

    def fail(self, refusal: Refusal) -> None:
        """End all requests with an error."""
        for group in list(self.groups):
            group.fail(refusal)

    def _deliver(self) -> None:
        self._called = False  # before events are taken, so that none stays behind
        while self._undelivered:
            take, event, at = self._undelivered.popleft()
            take(event, at)


class Group:
    """The jobs of one request. It must be closed, which ends all that still run.

    prompts: for each prompt its ids, and the settings of each of its sequences.
    bounded: whether a client has to read in time what comes, as it is streamed.
    """

    def __init__(
        self,
        desk: Desk,
        prompts: Sequence[tuple[Sequence[int], Sequence[Settings]]],
        *,
        bounded: bool,
    ):
        self._desk, self._served, self._bounded = desk, desk.served, bounded
        self._wake, self._ready = asyncio.Event(), deque[Job]()
        self._unread = 0
        self._refusal: Refusal | None = None
        self.jobs: list[Job] = []
        for ids, each in prompts:
            first: Job | None = None
            for settings in each:
                job = Job(index=len(self.jobs), prompt=ids, settings=settings, after=first)
                first = first or job
                self.jobs.append(job)

    def start(self) -> None:
        """Submit the first sequence of each prompt; the others follow. Raises Refusal."""
        limits = self._served.limits
        if len(self.jobs) > limits.n:
            what = f"{len(self.jobs)} sequences (prompts times n): at most {limits.n}"
            raise invalid("n", what)
        self._desk.check_room()
        self._desk.groups.add(self)
        now = time.perf_counter()
        for job in self.jobs:
            job.arrived = now
            self._desk.waiting += 1
            self._served.live += 1
        try:
            for job in self.jobs:
                if job.after is None:
                    self._submit(job)
        except BaseException:
            self.close()
            raise

    def _submit(self, job: Job) -> None:
        self._desk.submit(job, lambda event, at: self._take(job, event, at=at))

    def _take(self, job: Job, event: Event, *, at: float) -> None:
        """Take an event of a job, in the event loop's thread."""
        if job.over:
            return
        metrics = self._served.metrics
        if isinstance(event, Started) and job.waits:
            job.cached, job.started = event.cached, at
            self._has_row(job)
        elif isinstance(event, Choice):
            job.tokens += 1
            metrics.token(job, at)
            if not job.first:
                job.first = at
                self._follow(job)
            job.last = at
        elif isinstance(event, Ended):
            self._end(job)
            self._follow(job)
            metrics.ended(job, event.reason, at)
        if not job.events:
            self._ready.append(job)
        job.events.append(event)
        self._unread += 1
        most = self._served.limits.unread * len(self.jobs)
        if self._bounded and self._unread > most:
            self.fail(Refusal(408, "the answer was not read in time"))
        self._wake.set()

    def _has_row(self, job: Job) -> None:
        if job.waits:
            job.waits = False
            self._desk.waiting -= 1

    def _end(self, job: Job) -> None:
        if not job.over:
            job.over = True
            self._has_row(job)
            self._served.live -= 1

    def _follow(self, first: Job) -> None:
        """Submit the other sequences of a prompt, which is in the cache now."""
        for job in self.jobs:
            if job.after is first and job.number is None and not job.over:
                try:
                    self._submit(job)
                except Refusal as refusal:
                    self._take(job, Ended("failed", refusal.message), at=first.first)

    async def batches(self) -> AsyncIterator[tuple[Job, list[Event]]]:
        """Yield the jobs that have new events, with these, until all are over.

        Raises Refusal if the engine failed, or if the events were not taken in time.
        """
        while self._ready or self._refusal or not all(job.over for job in self.jobs):
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                job = self._ready.popleft()
                events, job.events = job.events, []
                self._unread -= len(events)
                end = events[-1]
                if isinstance(end, Ended) and end.reason not in ("stop", "length"):
                    raise Refusal(500, f"the engine ended the request: {end.error or end.reason}")
                yield job, events
            if self._refusal is not None:
                raise self._refusal

    def stop(self, job: Job) -> None:
        """End a job whose text is complete."""
        if not job.over:
            self._end(job)
            self._served.metrics.ended(job, "stop", time.perf_counter())
            if job.number is not None:
                self._served.generator.cancel(job.number)
            self._follow(job)
            self._wake.set()

    def fail(self, refusal: Refusal) -> None:
        """End all jobs that still run, and have `batches` raise an error."""
        if not all(job.over for job in self.jobs):
            self._refusal = refusal
            self.close()
            self._wake.set()

    def close(self) -> None:
        """End all jobs that still run, as nobody waits for them."""
        self._desk.groups.discard(self)
        for job in self.jobs:
            if not job.over:
                self._end(job)
                self._served.metrics.ended(job, "abort", time.perf_counter())
                if job.number is not None:
                    self._served.generator.cancel(job.number)
