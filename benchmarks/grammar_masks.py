"""Times the masks of grammars, which the engine's thread computes before each token of such a row.

    JAX_PLATFORMS=cpu python benchmarks/grammar_masks.py

A mask is what `Running.mask` makes in a step: llguidance's, and the ids that the tokenizer has. The
grammars are compiled as the server does, and moved on along texts that models write; each round
compiles them again, so that no state is left of the last. The vocabulary is the published one, in
the package dashscope of the extra `test`. Times are CPU times of the thread.
"""

import asyncio
import contextlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import section
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.engine import rows
from qwen_jax.runtime import command
from qwen_jax.serve import grammars
from qwen_jax.serve.grammars import Grammars, Source
from qwen_jax.serve.served import Limits
from tests.support.vocabulary import qwen_tokenizer

ENTRIES = [
    {"name": "Pequod", "port": "Nantucket", "tons": 240 + i, "fast": i % 2 == 0, "crew": ["Ahab"]}
    for i in range(8)
]
SHIP = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "port": {"enum": ["Nantucket", "New Bedford"]},
        "tons": {"type": "integer", "minimum": 0, "maximum": 999},
        "fast": {"type": "boolean"},
        "crew": {"type": "array", "items": {"type": "string"}, "maxItems": 30},
    },
    "required": ["name", "port", "tons", "fast", "crew"],
    "additionalProperties": False,
}
FLEET = {
    "type": "object",
    "properties": {"ships": {"type": "array", "items": SHIP}},
    "required": ["ships"],
    "additionalProperties": False,
}
DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}: [A-Za-z ,]"
CHOICES = ["positive", "negative", "neutral", "not certain"]


class Case(NamedTuple):
    """A grammar, and a text that it allows."""

    name: str
    source: Source
    text: str


def cases() -> list[Case]:
    """The grammars."""
    note = {"title": "A whale", "text": "Call me Ishmael. Some years ago - never mind. " * 5}
    ship = json.dumps({"ships": ENTRIES})
    dated = "1851-10-18: Published in London, in three volumes, and later in New York"
    return [
        Case("json_object", _source(grammars.of_schema, {"type": "object"}), json.dumps(note)),
        Case("json_schema", _source(grammars.of_schema, FLEET), ship),
        Case("regex that ends in +", _source(grammars.of_regex, f"{DATE}+"), dated),
        Case("regex that ends in {1,80}", _source(grammars.of_regex, DATE + "{1,80}"), dated),
        Case("choice", _source(grammars.of_choices, CHOICES), "not certain"),
    ]


def _source(make: object, given: object) -> Source:
    return Source("benchmark", make, given)  # type: ignore[arg-type]


def parser() -> command.Parser:
    """The options."""
    parser = command.Parser(description="CPU time of a grammar's mask.")
    parser.add_argument("--vocab", type=int, default=151_936, help="ids of the model, V")
    parser.add_argument("--rounds", type=int, default=20, help="times that each text is followed")
    parser.add_argument("--out", type=Path, help="write a section of docs/benchmarks.md")
    return parser


async def measure(
    made: Grammars, case: Case, words: Tokenizer, *, vocab: int, rounds: int
) -> np.ndarray:
    """The CPU microseconds of this thread for each mask along the text of a case.

    vocab: V. Raises ValueError if the grammar does not allow the text.
    """
    known = rows.bits(np.arange(len(words)), vocab)
    found = []
    for _ in range(rounds):
        (rule,) = await made.compile(case.source, count=1)
        for token in words.encode(case.text):
            start = time.thread_time()
            mask = rule.mask() & known
            found.append(1e6 * (time.thread_time() - start))
            if not mask[token // 32] >> (token % 32) & 1:
                raise ValueError(f"{case.name}: does not allow the token {token} of its text")
            rule.advance(token)
    return np.array(found)


async def run(vocab: int, rounds: int) -> list[list[str]]:
    """The lines of the table. vocab: V."""
    words, limits = qwen_tokenizer(), Limits()
    ends = (words.im_end_id, words.eod_id)
    made = Grammars(
        words, vocab_size=vocab, ends=ends, size=limits.grammar, seconds=limits.grammar_seconds
    )
    lines = []
    with contextlib.closing(made):
        for case in cases():
            found = await measure(made, case, words, vocab=vocab, rounds=rounds)
            each = (f"{x:.0f}" for x in (np.median(found), np.quantile(found, 0.99), found.max()))
            lines.append([case.name, str(len(found)), *each])
    return lines


def main() -> None:
    """Run the command."""
    args = parser().parse_args()
    lines = asyncio.run(run(args.vocab, args.rounds))
    title = f"llguidance {metadata.version('llguidance')}, "
    title += section.title("grammar_masks.py", sys.argv[1:])
    columns = ("CPU microseconds of a mask", "masks", "median", "99 %", "most")
    print(section.text(title, columns, lines))
    section.write(args.out, title, columns, lines)


if __name__ == "__main__":
    main()
