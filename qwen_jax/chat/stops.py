"""Where a reply ends: ids, and text, that arrive in pieces are cut before a stop.

A stop is a sequence of ids, or a text. What may still turn out to be the beginning of one is held
back, so that what is shown never has a part of a stop in it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qwen_jax.runtime import texts, values


def until_stop(
    parts: Iterable[Iterable[int]], stops: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Ids as they are made, without the stop that ends them.

    As many ids as a stop may still turn out to begin with are held back.
    """
    ends = StopIds(stops)
    for part in parts:
        yield ends.push(part)
        if ends.matched is not None:
            return
    yield ends.flush()


class StopIds:
    """Ids that arrive in pieces, cut before the first stop, which is a sequence of ids.

    `matched`: the stop that has ended them, None while none has. Of stops that end at the same id
    the longest counts. Ids that a stop may begin with are held back until it is known.
    """

    def __init__(self, stops: Sequence[Sequence[int]]):
        self._ends = sorted(filter(None, sequences(stops)), key=len, reverse=True)
        self._longest = len(self._ends[0]) if self._ends else 1
        self._held: list[int] = []
        self.matched: tuple[int, ...] | None = None

    def push(self, ids: Iterable[int]) -> list[int]:
        """The ids that are known to come before a stop; after one, none."""
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
        """What is held back, when no more ids come; nothing after a stop."""
        rest, self._held = [] if self.matched is not None else self._held, []
        return rest


class StopText:
    """Text that arrives in pieces, cut before the first stop, which is a text.

    `matched`: the stop that has ended it, None while none has. The stop that is complete first
    counts, the longest of those that end at the same character, so that the text is the same in
    whatever pieces it arrives. ValueError for stops that are no texts, or empty.
    """

    def __init__(self, stops: str | Iterable[str]):
        self._stops = stop_texts(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is known to come before a stop; after one, none."""
        if self.matched is not None:
            return ""
        held = self._held + piece
        places = ((held.find(stop), stop) for stop in self._stops)
        found = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return held[:start]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        ready = len(held) - max(begun, default=0)
        self._held = held[ready:]
        return held[:ready]

    def flush(self) -> str:
        """What is held back, when no more text comes; nothing after a stop."""
        rest, self._held = self._held, ""
        return rest


def stop_texts(stops: str | Iterable[str]) -> tuple[str, ...]:
    """Texts that end a row, given as one or several. ValueError for what is none, or empty."""
    if isinstance(stops, str):
        stops = (stops,)
    if isinstance(stops, bytes | bytearray | Mapping) or not isinstance(stops, Iterable):
        raise ValueError(f"stop must be a text, or texts, got {texts.described(stops)}")
    found = tuple(texts.check_whole("each stop", stop) for stop in stops)
    if "" in found:
        raise ValueError("stop '': an empty text ends nothing: drop it")
    return found


def sequences(stops: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Stops as tuples of ids. ValueError for what is no sequences of ids."""
    if isinstance(stops, str | bytes) or not isinstance(stops, Iterable):
        raise ValueError(f"stop must be sequences of token ids, got {texts.described(stops)}")
    return [tuple(values.ids("each stop", sequence)) for sequence in stops]
