"""The pool of KV cache pages: which are free, who holds which, and which hold a known prefix.

A page holds the keys and values of `size` tokens in every layer; here it is a number. Page 0 is
nobody's: rows that are off write there. Knows no arrays and no requests.
"""

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence


def prefix_keys(tokens: Sequence[int], size: int, *, identity: Hashable) -> list[bytes]:
    """Return the key of each full page of a prompt: a hash of all tokens up to the page's end.

    size: the tokens in a page.
    identity: everything else that keys and values depend on, such as the NTK factor alpha, the
        adapter, the version of the weights and the caller's salt. It is part of every key.

    The hash is SHA-256, because equal keys of different prompts would mix up their answers.
    """
    key, keys = hashlib.sha256(repr(identity).encode()).digest(), []
    for at in range(0, len(tokens) - size + 1, size):
        page = struct.pack(f"<{size}q", *tokens[at : at + size])
        key = hashlib.sha256(key + page).digest()
        keys.append(key)
    return keys


class Pool:
    """The pages of one replica of the cache.

    pages: the number of pages, page 0 included.

    A page is *held* by the rows that read it, or *kept* because its prefix may come again, or
    *blank*. Blank pages are taken first, then the kept page that was released longest ago.
    """

    def __init__(self, pages: int):
        if pages < 2:
            raise ValueError(f"pages {pages}: must be at least 2, as page 0 is nobody's")
        self.pages = pages
        self._blank = list(range(pages - 1, 0, -1))
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._holders: Counter[int] = Counter()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """The number of pages that can be taken: blank and kept ones."""
        return len(self._blank) + len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """Take pages of undefined content, held once each; None if there are not so many."""
        if count > self.available:
            return None
        taken = [self._blank.pop() if self._blank else self._oldest() for _ in range(count)]
        self._holders.update(taken)
        return taken

    def _oldest(self) -> int:
        """Forget the kept page that was released longest ago, and return it."""
        page, key = self._kept.popitem(last=False)
        del self._page_of[key], self._key_of[page]
        return page

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages of the longest known prefix. They are not held yet (`hold`)."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that `find` has returned; each holder releases them once."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Make a held page known under the key of its prefix; nothing if another page is known."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Release held pages, given in the order of their tokens.

        The last one is forgotten first, since a page is of no use without those before it.
        """
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is not held")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if (key := self._key_of.get(page)) is None:
                self._blank.append(page)
            else:
                self._kept[page] = key

    def forget(self, keys: Iterable[bytes] | None = None) -> None:
        """Forget known prefixes, as after a change of weights. Held pages stay held.

        keys: of the prefixes; None for all.
        """
        for key in list(self._page_of) if keys is None else keys:
            if (page := self._page_of.pop(key, None)) is not None:
                del self._key_of[page]
                if self._kept.pop(page, None) is not None:
                    self._blank.append(page)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, or is in two states at once."""
        held = [page for page, count in self._holders.items() if count > 0]
        states = [*self._blank, *self._kept, *held]
        assert sorted(states) == list(range(1, self.pages)), "each page is in one state"
        assert all(self._key_of[page] == key for page, key in self._kept.items())
        assert {key: page for page, key in self._key_of.items()} == self._page_of
