"""Finds the markers of ReAct, such as `Action:`, in text that arrives in pieces.

A marker counts at the start of a line, and `Observation:` anywhere. Neither a code fence nor a JSON
string in arguments holds markers; but what is not closed soon is no fence and no string. Text that
may still become a marker is held back. The same markers are found however the text is cut.
"""

import re
from typing import NamedTuple

from qwen_jax.chat.react import MARKERS, RESULT

NEAR = 2000  # characters after a marker within which a fence or a string around it must be closed
_BY_LENGTH = sorted(MARKERS, key=len, reverse=True)  # a marker may begin with a shorter one
_FENCE = re.compile(r"\s*```[^`]*\n")  # a line that opens a code fence
_FENCE_END = re.compile(r"```[^\S\n]*\n")  # the end of a line that closes one
_JSON = re.compile(r'[{}\[\]"]')
_STRING = re.compile(r'(?:[^"\\\n]|\\[^\n])*')  # what stands in a JSON string
_STRING_END = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)  # with newlines, which models write


class Item(NamedTuple):
    """A part of a text: ordinary text, or a marker."""

    text: str
    marker: bool


class Markers:
    """Cuts a text that arrives in pieces into markers and the text between them."""

    def __init__(self):
        self._held = ""
        self._line = ""  # what was taken of the current line, without markers
        self._fresh = True  # whether `_held` begins a line
        self._fence = False
        self._arguments = False  # whether arguments begin here
        self._json = self._string = False
        self._depth = 0  # brackets of the JSON value that are open

    def feed(self, piece: str) -> None:
        """Add new text."""
        self._held += piece

    def begin_arguments(self) -> None:
        """Say that the arguments of a call come next."""
        self._arguments = True

    def item(self, *, last: bool) -> Item | None:
        """Return the next part of the text, or None if none is certain.

        last: whether no more text comes, so that nothing is held back.
        """
        if not self._held:
            return None
        if self._arguments:
            space = len(self._held) - len(self._held.lstrip())
            if space:
                return self._take(self._held.find("\n", 0, space) + 1 or space)
        if self._fresh:
            marker = next((m for m in _BY_LENGTH if self._held.startswith(m)), None)
            begins = any(m.startswith(self._held) for m in MARKERS)
            if marker is None and begins and not last:
                return None
            if marker is not None:
                return self._marker(marker, last=last)
        if self._arguments:
            self._arguments, self._depth = False, 0
            self._json = self._held[0] in '{["'
        if self._string:
            return self._in_string(last=last)
        if self._fence:
            return self._take(self._held.find("\n") + 1 or len(self._held))
        return self._plain(last=last)

    def _marker(self, marker: str, *, last: bool) -> Item | None:
        """Return the marker that begins the text, unless a fence or a string holds it."""
        if self._fence or self._string:
            near = self._held[:NEAR]
            last = last or len(near) == NEAR
            end = self._string_end(near) if self._string else _fence_end(near, last=last)
            if end:
                if self._string:
                    self._end_string()
                return self._take(end)
            if end is None and not last:
                return None
            self._fence = self._string = self._json = False
        self._arguments = False
        return self._take(len(marker), marker=True)

    def _string_end(self, text: str) -> int | None:
        """Return where the JSON string ends; None if it is not closed so far, 0 if it never was.

        A quote that is followed by what JSON does not allow there belongs to something else.
        """
        found = _STRING_END.match(text)
        if not found or not self._depth:
            return found and found.end()
        after = text[found.end() :].lstrip()
        if not after:
            return None
        return found.end() if after[0] in ",:}]" else 0

    def _end_string(self) -> None:
        self._string, self._json = False, self._depth > 0

    def _in_string(self, *, last: bool) -> Item | None:
        """Return text of a JSON string, up to its end or the end of the line."""
        found = _STRING.match(self._held)
        end = found.end() if found else 0
        after = self._held[end : end + 2]
        if after[:1] == '"':
            self._end_string()
        if after and (after != "\\" or last):
            end += 1
        return self._take(end) if end else None

    def _plain(self, *, last: bool) -> Item | None:
        """Return text up to the end of the line, `Observation:`, or where a JSON string begins."""
        end = self._held.find("\n") + 1 or len(self._held)
        found = self._held.find(RESULT, 0, end)
        if found == 0:
            return self._take(len(RESULT), marker=True)
        if found > 0:
            end = found
        elif not last and self._held[end - 1] != "\n":
            begun = (n for n in range(len(RESULT) - 1, 0, -1) if self._held.endswith(RESULT[:n]))
            end -= next(begun, 0)
        for sign in _JSON.finditer(self._held, 0, end) if self._json else ():
            self._string = sign[0] == '"'
            self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(sign[0], 0)
            self._json = self._string or self._depth > 0
            if self._string or not self._json:
                end = sign.end()
                break
        return self._take(end) if end else None

    def _take(self, end: int, *, marker: bool = False) -> Item:
        """Remove so many characters from the held text, and return them."""
        text, self._held = self._held[:end], self._held[end:]
        self._line = "" if marker else self._line + text
        self._fresh = text.endswith("\n")
        if self._fresh:
            if self._fence:
                self._fence = not self._line.rstrip().endswith("```")
            elif not self._json:
                self._fence = _FENCE.match(self._line) is not None
            self._line = ""
        return Item(text, marker)


def _fence_end(text: str, *, last: bool) -> int | None:
    """Return where a code fence ends; None if it is not closed so far."""
    if found := _FENCE_END.search(text):
        return found.end()
    return len(text) if last and text.rstrip().endswith("```") else None
