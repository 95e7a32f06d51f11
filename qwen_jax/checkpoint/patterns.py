"""Matches the regular expressions of adapter files, which may come from anyone."""

import time

import regex

# The processor time for matching all patterns of a file; a pattern in use takes microseconds.
MATCHING_SECONDS = 1.0
LONGEST_PATTERN = 50_000  # characters


class Patterns:
    """Matches regular expressions from untrusted adapter files, with a limit on the total time.

    Uses the library regex, which supports the syntax of the `re` that PEFT uses (also negative
    look-ahead, by which frameworks exclude the head) and, unlike `re`, a timeout. Raises ValueError
    naming the field for an invalid pattern, and once all matching has taken `MATCHING_SECONDS`.
    """

    def __init__(self) -> None:
        self._end = time.process_time() + MATCHING_SECONDS

    def match(
        self, field: str, pattern: str, *, path: str, whole: bool = False
    ) -> regex.Match[str] | None:
        """Match a pattern with a module's path from its start, or with all of it if `whole`.

        field: the field that holds the pattern, for errors. Returns the match, or None.
        """
        left = max(self._end - time.process_time(), 1e-3)
        shown = repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
        if len(pattern) > LONGEST_PATTERN:  # compiling a pattern cannot be given a time limit
            raise ValueError(
                f"{field} {shown}: {len(pattern):,} characters, {LONGEST_PATTERN:,} at most: name "
                "the modules in a list instead"
            )
        try:
            compiled = regex.compile(pattern)
            return (compiled.fullmatch if whole else compiled.match)(path, timeout=left)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{field} {shown}: no pattern: {error}") from None
        except TimeoutError:
            raise ValueError(
                f"{field} {shown}: no end of matching it with {path}: name the modules in a "
                "list instead"
            ) from None
