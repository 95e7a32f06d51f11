"""Grammars that hold replies to a JSON schema, a regular expression or a context-free grammar.

llguidance compiles them in a thread beside the event loop, with limits to their size, to the work
of compiling, and to the work of each token. What it refuses is an error that names the field.
"""

import asyncio
import concurrent.futures
import decimal
import functools
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
from jaxtyping import Int32
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import fill_next_token_bitmask

from qwen_jax.chat import tokenizer
from qwen_jax.serve.refusals import Refusal, busy, invalid

# A model may write white space without end where JSON allows it: a space, or a line with indents.
_SPACE = r"(\n {0,32}| )"
_THREADS = 2  # that compile grammars
_STACK = 2**28  # bytes of a thread's stack; 64 MiB were enough for twice the most characters
_MOST_REMAINDERS = 100_000  # of `multipleOf`, which no limit of llguidance's counts: 0.2 s
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.\deE]+)')
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


def of_schema(schema: Mapping[str, Any] | str | bool) -> str:
    """Return llguidance's grammar of all JSON texts that a schema allows."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return llguidance.LLMatcher.grammar_from_json_schema(
        text, defaults={"whitespace_pattern": _SPACE}
    )


def of_regex(pattern: str) -> str:
    """Return llguidance's grammar of all texts that a regular expression matches as a whole."""
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def of_choices(choices: Sequence[str]) -> str:
    """Return llguidance's grammar of some texts."""
    return of_regex("|".join(re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", x) for x in choices))


def of_lark(text: str) -> str:
    """Return llguidance's grammar of one in its notation of Lark."""
    return llguidance.LLMatcher.grammar_from_lark(text)


def of_grammar(text: str) -> str:
    """Return llguidance's grammar of one in the notation of Lark, or in GBNF of llama.cpp."""
    return of_lark(any_to_lark(text))


def check_multiples(text: str) -> None:
    """Raise ValueError if numbers in a grammar must be multiples of too large ones.

    llguidance has a state for each remainder, and for each pair where two `multipleOf` hold at the
    same time; 2 and 5, which divide the base, add few. text: llguidance's grammar, in which parts
    in Lark may have a schema, and a key of a schema may be written in escapes.
    """
    plain, product = re.sub(r"\\u([\da-fA-F]{4})", lambda x: chr(int(x[1], 16)), text), 1
    for number in set(_MULTIPLE.findall(plain)):
        digits = decimal.Decimal(repr(float(number))).as_tuple().digits
        divisor = int("".join(map(str, digits)))
        for factor in (2, 5):
            while divisor and divisor % factor == 0:
                divisor //= factor
        product = math.lcm(product, divisor or 1)
        if product > _MOST_REMAINDERS:
            what = "least common multiple of all multipleOf, without factors 2 and 5"
            raise ValueError(f"{what}: {product} is more than {_MOST_REMAINDERS}")


class Source(NamedTuple):
    """What a request has for a grammar.

    param: the field of the request that has it, for errors.
    make: makes llguidance's grammar of it, as `of_schema` does.
    given: the argument of `make`.
    """

    param: str
    make: Callable[[Any], str]
    given: Any

    def size(self) -> int:
        """Return the characters of what is given."""
        return len(self.given if isinstance(self.given, str) else json.dumps(self.given))


class Rule:
    """A compiled grammar with its state (`engine.settings.Grammar`), for one sequence.

    words: the words of a mask.
    error: why the grammar has given up, as it grew beyond its limits; "" if it has not.
    """

    def __init__(self, matcher: llguidance.LLMatcher, *, words: int, vocab_size: int):
        self._matcher, self._words = matcher, words
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self.error = self._error()

    def mask(self) -> Int32[np.ndarray, " words"]:
        """Return the ids that may come next: bit i % 32 of word i // 32 is 1 for id i."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self.error = self._error()
        return self._bits[0, : self._words].copy()

    def advance(self, token: int) -> None:
        """Move on by a token that the last mask allowed."""
        self._matcher.consume_token(token)
        self.error = self._error()

    def _error(self) -> str:
        """Return `error`. Only the thread that moves the grammar on may ask the matcher."""
        return " ".join(self._matcher.get_error().split())

    def copy(self) -> "Rule":
        """Return the same grammar in the same state, for another sequence."""
        copied = self._matcher.deep_copy()
        return Rule(copied, words=self._words, vocab_size=32 * self._bits.shape[1])


class Grammars:
    """Compiles grammars for one tokenizer.

    vocab_size: one more than the largest id of the model.
    ends: the ids that may follow a complete text, and end it.
    size: the most characters of a grammar.
    seconds: the longest time to compile one.
    """

    def __init__(
        self,
        words: tokenizer.Tokenizer,
        *,
        vocab_size: int,
        ends: Sequence[int],
        size: int,
        seconds: float,
    ):
        self._words, self._vocab_size, self.ends = words, vocab_size, tuple(ends)
        self._size, self._seconds = size, seconds
        self._threads = _threads()
        self._free = asyncio.Semaphore(_THREADS)

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance needs it, which takes about a second to make."""
        return llguidance.LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]  # has no stub
            encoder=self._words.ranks,
            special_tokens=self._words.special_tokens,
            pattern=tokenizer.PATTERN,
            eos_token=list(self.ends),
            n_vocab=max(self._vocab_size, len(self._words)),
        )

    def prepare(self) -> None:
        """Begin to read the vocabulary, so that the first grammar does not wait for it."""
        self._threads.submit(lambda: self._tokens)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def compile(self, source: Source, *, count: int) -> list[Rule]:
        """Compile a grammar for so many sequences.

        Raises Refusal: 400 for a grammar that is wrong, unsupported, too large or too slow, and 503
        if those of others leave no thread for as long as one may take.
        """
        seconds = f"{self._seconds:g} s"
        try:
            await asyncio.wait_for(self._free.acquire(), self._seconds)
        except TimeoutError:
            why = f"other requests' grammars have been compiled for {seconds}: try later"
            raise busy(503, why, seconds=2) from None
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._compile, source, count)
        work.add_done_callback(self._end)  # also if nobody waits for it any more
        try:
            return await asyncio.wait_for(asyncio.shield(work), self._seconds)
        except TimeoutError:
            raise invalid(source.param, f"takes over {seconds} to compile") from None

    def _end(self, work: asyncio.Future[list[Rule]]) -> None:
        self._free.release()
        if not work.cancelled():
            work.exception()  # or asyncio would log one that nobody has asked for

    def _compile(self, source: Source, count: int) -> list[Rule]:
        param = source.param
        if (size := source.size()) > self._size:
            raise invalid(param, f"{size} characters: at most {self._size}")
        try:
            text = source.make(source.given)
            check_multiples(text)
        except (ValueError, RecursionError) as error:
            raise invalid(param, str(error)) from None
        except Exception as error:  # of the translation of GBNF
            raise invalid(param, f"{type(error).__name__}: {error}") from None
        matcher = llguidance.LLMatcher(self._tokens, text, log_level=0, limits=_LIMITS)
        rule = Rule(matcher, words=-(-self._vocab_size // 32), vocab_size=self._tokens.vocab_size)
        if (not rule.error and not rule.mask().any()) or rule.error.startswith("NoExtension"):
            raise invalid(param, "no text matches it")
        if rule.error:
            raise invalid(param, rule.error)
        return [rule, *(rule.copy() for _ in range(count - 1))]


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Start the threads that compile grammars.

    llguidance follows rules and references that lead to each other by recursion: a chain of them
    within the most characters overflows a common stack of 8 MiB, which would end the process.
    """
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "grammar")
    started = threading.Barrier(_THREADS)  # a thread that is idle would take the next one's part
    before = threading.stack_size(_STACK)
    try:
        for _ in range(_THREADS):
            pool.submit(started.wait)
    finally:
        threading.stack_size(before)
    return pool


def failed(rule: object) -> Refusal | None:
    """Return the error of a sequence whose grammar gave up; None if it did not."""
    if isinstance(rule, Rule) and (error := rule.error):
        return Refusal(400, f"the grammar grew too complex while it was followed: {error}")
    return None
