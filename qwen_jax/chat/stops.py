"""Cuts generated token ids or text, which arrive in pieces, before the first stop.

A stop is a sequence of ids, or a text. Output that may still turn out to be the beginning of a stop
is held back, so that no part of a stop is ever shown.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qwen_jax.runtime import texts, values


def until_stop(
    parts: Iterable[Iterable[int]], stops: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Yield generated token ids up to the first stop, without the stop.

    parts: the ids in pieces, as they are generated.
    stops: the sequences of ids that end the output.

    Ids that may still turn out to begin a stop are held back.
    """
    ends = StopIds(stops)
    for part in parts:
        yield ends.push(part)
        if ends.matched is not None:
            return
    yield ends.flush()


class StopIds:
    """Cuts token ids that arrive in pieces before the first stop, which is a sequence of ids.

    matched: the stop that has ended the ids; None so far.

    Of stops that end at the same id the longest counts. Ids that a stop may begin with are held
    back until more ids decide it.
    """

    def __init__(self, stops: Sequence[Sequence[int]]):
        self._ends = sorted(filter(None, sequences(stops)), key=len, reverse=True)
        self._longest = len(self._ends[0]) if self._ends else 1
        self._held: list[int] = []
        self.matched: tuple[int, ...] | None = None

    def push(self, ids: Iterable[int]) -> list[int]:
        """Add new ids; return the ids that can no longer be part of a stop ([] after a stop)."""
        for i in ids:
            if self.matched is not None:
                return []
            self._held.append(int(i))
            self.matched = next(
                (end for end in self._ends if tuple(self._held[-len(end) :]) == end), None
            )
            if self.matched is not None:
                return self._held[: -len(self.matched)]
        ready = max(0, len(self._held) - self._longest + 1)
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def flush(self) -> list[int]:
        """Return the ids that are held back, when no more ids come. After a stop, return []."""
        rest, self._held = [] if self.matched is not None else self._held, []
        return rest


class StopText:
    """Cuts text that arrives in pieces before the first stop, which is a text.

    matched: the stop that has ended the text; None so far.

    The stop that is complete first counts, and of stops that end at the same character the longest,
    so that the result does not depend on the pieces. Raises ValueError for stops that are not text
    or are empty.
    """

    def __init__(self, stops: str | Iterable[str]):
        self._stops = stop_texts(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Add new text; return the text that can no longer be part of a stop ("" after a stop)."""
        if self.matched is not None:
            return ""
        held = self._held + piece
        places = ((held.find(stop), stop) for stop in self._stops)
        found = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return held[:start]
        most = len(held) + 1
        begun = (
            n
            for stop in self._stops
            for n in range(1, min(len(stop), most))
            if held.endswith(stop[:n])
        )
        ready = len(held) - max(begun, default=0)
        self._held = held[ready:]
        return held[:ready]

    def flush(self) -> str:
        """Return the text that is held back, when no more text comes. After a stop, return ""."""
        rest, self._held = self._held, ""
        return rest


def stop_texts(stops: str | Iterable[str]) -> tuple[str, ...]:
    """Check stop texts, given as one text or several, and return them as a tuple.

    Raises ValueError for a stop that is not text or is empty.
    """
    if isinstance(stops, str):
        stops = (stops,)
    if isinstance(stops, bytes | bytearray | Mapping) or not isinstance(stops, Iterable):
        raise ValueError(f"stop must be a text, or texts, got {texts.described(stops)}")
    found = tuple(texts.check_whole("each stop", stop) for stop in stops)
    if "" in found:
        raise ValueError("stop '': an empty text ends nothing: drop it")
    return found


def sequences(stops: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Check stops given as sequences of token ids; return each as a tuple, or raise ValueError."""
    if isinstance(stops, str | bytes) or not isinstance(stops, Iterable):
        raise ValueError(f"stop must be sequences of token ids, got {texts.described(stops)}")
    return [tuple(values.ids("each stop", sequence)) for sequence in stops]
