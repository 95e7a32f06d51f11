"""The scheduler of the engine: which request has which row and pages, and what each step computes.

A step runs at most two programs of fixed shape. *Prefill* writes a chunk of the prompts of a few
rows; *decode* feeds each running row one token and samples the next. The host plans a step while
devices run the one before, so a plan may depend on tokens of the step before last alone: `plan`,
then `plan`, `apply`, `plan`, `apply` and so on. Devices run steps in order, so a page that is
released after a plan may be written by the next one.

A request has the same result alone and in a crowd, to the bit, if the same programs write the same
pages: chunks begin at multiples of `chunk`, and so do prefix hits; only pages that prefill has
written are known by their prefix; and a request that had to give up its pages has its prompt
prefilled again, and is then fed its own tokens by decode.

Pure integers: knows no arrays, no texts and no sampling.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from qwen_jax.engine.pool import Pool, prefix_keys


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One sequence to generate, as the scheduler sees it.

    prompt: the ids of the prompt, at least one.
    limit: the most new tokens.
    identity: what cached keys and values depend on beside the tokens (`pool.prefix_keys`).
    scored: the index of the first prompt token whose log-probability is wanted; None for none.
    paced: whether each token must be known before the next one is chosen, as a grammar needs it.
    tokens: the new tokens that are known so far.
    cached: the number of prompt tokens that were found in the cache when it was last admitted.
    admissions: the times that it has got a row.
    keys: the keys of the prompt's full pages (`pool.prefix_keys`); None for `add` to make them.
    over: whether nothing more is wanted of it.
    """

    prompt: Sequence[int]
    limit: int
    identity: Hashable = ()
    scored: int | None = None
    paced: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached: int | None = None
    admissions: int = 0
    keys: Sequence[bytes] | None = None
    over: bool = False

    @property
    def unscored(self) -> int | None:
        """As `scored`, but None once a token is known, as the last chunk has then scored all."""
        return None if self.tokens else self.scored


@dataclasses.dataclass(eq=False, kw_only=True)
class Row:
    """A place in the batch of the decode program, while a request has it.

    index: the number of the place.
    order: the number of the admission; the row with the largest gives up its pages first.
    pages: the row's pages, in the order of its tokens; 0 for those that it no longer needs.
    filled: the prompt tokens that planned chunks have written.
    fed: the new tokens that planned decode steps have written.
    """

    index: int
    order: int
    request: Request
    pages: list[int]
    filled: int
    fed: int = 0

    @property
    def missing(self) -> int:
        """The number of prompt tokens that no planned chunk has written."""
        return len(self.request.prompt) - self.filled


class Chunk(NamedTuple):
    """A part of a prompt to prefill: the tokens from `begin`, `count` of them."""

    row: Row
    begin: int
    count: int


@dataclasses.dataclass
class Plan:
    """What a step computes, in this order.

    admitted: the rows that requests get, with the pages of their prompts. They are off as yet.
    pages: the further page, if any, that a row of `decode` gets, by the number of the row.
    decode: the rows that are fed a token, if they are on: a row may have ended by itself.
    chunks: parts of prompts to prefill, at most one of a row. The last one switches its row on.
    forced: the tokens, by row, that take the place of the chosen ones.
    emitted: the rows that choose a token, with its number among the request's new tokens.
    """

    admitted: list[tuple[Row, list[int]]] = dataclasses.field(default_factory=list)
    pages: dict[int, int] = dataclasses.field(default_factory=dict)
    decode: list[Row] = dataclasses.field(default_factory=list)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    forced: dict[int, int] = dataclasses.field(default_factory=dict)
    emitted: list[tuple[Row, int]] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decode)

    def emit(self, row: Row, number: int) -> None:
        """Have a row choose a token, or take the one that it is known to have chosen."""
        self.emitted.append((row, number))
        if number < len(row.request.tokens):
            self.forced[row.index] = row.request.tokens[number]


class Scheduler:
    """Admits requests to rows in the order of their arrival, and plans steps.

    pools: the pages of each data replica.
    rows: the number of rows, an equal share for each replica.
    size: the tokens in a page.
    chunk: the tokens in a chunk, a multiple of `size`.
    chunks: the most chunks for each replica in a step.
    width: the most pages of a row.
    reach: the most tokens, its own included, that a token attends to in any layer; None for all.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        rows: int,
        *,
        size: int,
        chunk: int,
        chunks: int,
        width: int,
        reach: int | None = None,
    ):
        if rows < 1 or rows % len(pools):
            raise ValueError(f"rows {rows}: must be a multiple of the {len(pools)} replicas")
        if chunk < 1 or chunk % size:
            raise ValueError(f"chunk {chunk}: must be a multiple of the page size {size}")
        self.pools, self.rows, self.size, self.chunk = pools, rows, size, chunk
        self.chunks, self.width, self.reach = chunks, width, reach
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Row] = {}
        self.preemptions = self._admissions = 0
        self._oldest_first = [False] * len(pools)
        self.paused = False  # whether requests that have had no row keep waiting

    @property
    def longest(self) -> int:
        """The most tokens that a request may have, prompt and new ones together."""
        return self.size * min(self.width, *(pool.pages - 1 for pool in self.pools))

    @property
    def begun(self) -> bool:
        """Whether any request that has had a row is not over."""
        return bool(self.running) or any(request.admissions for request in self.waiting)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises ValueError if it is longer than `longest`, or has no prompt or no new tokens.
        """
        if not request.prompt or request.limit < 1:
            raise ValueError("a request needs a prompt, and at least one new token")
        if len(request.prompt) + request.limit > self.longest:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.limit} new ones: at most "
                f"{self.longest} together"
            )
        if request.keys is None:
            request.keys = prefix_keys(request.prompt, self.size, identity=request.identity)
        self.waiting.append(request)

    def end(self, request: Request) -> None:
        """Take a request from its row or the queue: its text is complete, or nobody wants it."""
        request.over = True
        if request in self.waiting:
            self.waiting.remove(request)
        for row in [row for row in self.running.values() if row.request is request]:
            self._leave(row)

    def plan(self) -> Plan:
        """Plan the next step. A plan without work is False."""
        plan, preempted = Plan(), self.preemptions
        for row in sorted(self.running.values(), key=lambda row: row.order):
            if self.running.get(row.index) is row and not row.missing:
                self._feed(row, plan)
        if self.preemptions == preempted:
            self._admit(plan)
        for replica in range(len(self.pools)):
            self._prefill(replica, plan)
        return plan

    def apply(self, plan: Plan, tokens: Mapping[int, int], ended: Collection[int]) -> list[Request]:
        """Take the results of a step; return the requests that ended with it.

        tokens: the token of each row in `plan.emitted`, but for rows that were off.
        ended: the rows that the devices have switched off, by a stop id or the limit.
        """
        over = []
        for row, number in plan.emitted:
            request = row.request
            if request.over or row.index not in tokens:
                continue
            if number == len(request.tokens):
                request.tokens.append(tokens[row.index])
            if row.index in ended:
                over.append(request)
                self.end(request)
        return over

    def _replica(self, row: Row) -> int:
        return row.index * len(self.pools) // self.rows

    def _leave(self, row: Row) -> None:
        """Take a row and its pages from its request."""
        self.pools[self._replica(row)].release([page for page in row.pages if page])
        del self.running[row.index]

    def _feed(self, row: Row, plan: Plan) -> None:
        """Have a row decode one token, unless its last one is sampled or it loses its pages."""
        place = len(row.request.prompt) + row.fed
        if row.fed + 1 == row.request.limit:
            return
        if row.request.paced and row.fed == len(row.request.tokens):
            return  # the token to be fed is still on its way
        if place // self.size == len(row.pages):
            page = self._page_for(row)
            if page is None:
                return
            plan.pages[row.index] = page
            row.pages.append(page)
        row.fed += 1
        plan.decode.append(row)
        plan.emit(row, row.fed)
        self._let_go(row, place + 1)

    def _page_for(self, row: Row) -> int | None:
        """Take a page for a row, from the youngest rows if need be; None if that is the row."""
        replica = self._replica(row)
        while (taken := self.pools[replica].take(1)) is None:
            here = [other for other in self.running.values() if self._replica(other) == replica]
            youngest = max(here, key=lambda other: other.order)
            self._leave(youngest)
            self.waiting.appendleft(youngest.request)
            self.preemptions += 1
            if youngest is row:
                return None
        return taken[0]

    def _let_go(self, row: Row, written: int) -> None:
        """Release the pages that no later token of a row attends to."""
        if self.reach is None:
            return
        for number in range(max(0, written - self.reach) // self.size):
            if page := row.pages[number]:
                self.pools[self._replica(row)].release([page])
                row.pages[number] = 0

    def _admit(self, plan: Plan) -> None:
        """Give rows and pages to waiting requests, in order, until one finds no room."""
        while self.waiting and (not self.paused or self.waiting[0].admissions):
            row = self._row_for(self.waiting[0])
            if row is None:
                return
            self.waiting.popleft()
            self.running[row.index] = row
            plan.admitted.append((row, list(row.pages)))

    def _row_for(self, request: Request) -> Row | None:
        """Take a row and the pages of the whole prompt, where most of it is cached; or None."""
        found = [self._known(pool, request) for pool in self.pools]
        share = self.rows // len(self.pools)
        order = sorted(
            range(len(self.pools)), key=lambda i: (-len(found[i]), -self.pools[i].available)
        )
        for replica in order:
            free = [
                i for i in range(replica * share, (replica + 1) * share) if i not in self.running
            ]
            if not free:
                continue
            pool, pages = self.pools[replica], found[replica]
            pool.hold(pages)
            prompt = -(-len(request.prompt) // self.size)
            known = -(-(len(request.prompt) + len(request.tokens)) // self.size)
            rest = pool.take(prompt - len(pages))
            # It would soon have to give up its pages again, if those of its own tokens lacked.
            if rest is None or pool.available < known - prompt:
                pool.release([*pages, *(rest or ())])
                continue
            self._admissions += 1
            filled = len(pages) * self.size
            request.cached = filled
            request.admissions += 1
            return Row(
                index=free[0],
                order=self._admissions,
                request=request,
                pages=pages + rest,
                filled=filled,
            )
        return None

    def _known(self, pool: Pool, request: Request) -> list[int]:
        """Return the cached pages of a prompt, whole chunks of them.

        The last token is always computed, as is every one before a token that is yet to score.
        """
        most = len(request.prompt) - 1
        if request.unscored is not None:
            most = min(most, max(0, request.unscored - 1))
        found = pool.find((request.keys or ())[: most // self.size])
        pages = self.chunk // self.size
        return found[: len(found) // pages * pages]

    def _prefill(self, replica: int, plan: Plan) -> None:
        """Plan chunks: of the oldest prompt and of the shortest in turn, then of the next shortest.

        So a short prompt waits for one chunk of a long one, and a long one has half of the chunks
        however many short ones arrive.
        """
        here = [r for r in self.running.values() if self._replica(r) == replica and r.missing]
        if not here:
            return
        here.sort(key=lambda row: (row.missing, row.order))
        self._oldest_first[replica] = not self._oldest_first[replica]
        if self._oldest_first[replica]:
            oldest = min(here, key=lambda row: row.order)
            here.remove(oldest)
            here.insert(0, oldest)
        planned = []
        for row in here[: self.chunks]:
            planned.append(Chunk(row, row.filled, min(self.chunk, row.missing)))
            row.filled += planned[-1].count
            if not row.missing:
                plan.emit(row, 0)
        plan.chunks += planned
        # Rows of one program do not see each other's pages: the next step is the first that does.
        for row, begin, count in planned:
            keys = row.request.keys or ()
            for number in range(begin // self.size, (begin + count) // self.size):
                self.pools[replica].publish(row.pages[number], keys[number])
            self._let_go(row, row.filled)
