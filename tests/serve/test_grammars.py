"""Replies that a grammar holds: schemas, regular expressions, choices; and what is refused."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.serve import grammars
from qwen_jax.serve.grammars import Grammars, Rule, Source
from qwen_jax.serve.refusals import Refusal
from tests.support.served_app import HELLO, TOKENIZER, VOCAB_SIZE, Served, opened
from tests.support.vocabulary import tiny_ranks

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with opened('{"wrong": [') as found:
        yield found


def text(one: Served, **body: Any) -> str:
    choice = one.chat(max_tokens=300, **body)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    return choice["message"]["content"]


def test_a_schema_holds_the_reply(one: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    for body in (
        {"response_format": form},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ):
        found = json.loads(text(one, **body))
        assert set(found) == {"a", "b"} and 0 <= found["a"] <= 99
    one.says = "{ \n\n\n\n   }"  # a model that writes white space without end
    found = text(one, response_format={"type": "json_object"})
    assert json.loads(found) == {} and "\n\n" not in found
    one.says = '{"wrong": ['


def test_other_grammars_hold_the_reply(one: Served) -> None:
    assert text(one, structured_outputs={"regex": "[0-9]{3}x?"})[:3].isdecimal()
    choices = ["你好", 'a "b" \\ {c}', "😀"]
    assert text(one, structured_outputs={"choice": choices}) in choices
    assert text(one, guided_choice=["yes"]) == "yes"
    assert text(one, structured_outputs={"grammar": 'root ::= "ab" | "cd"'}) in ("ab", "cd")
    assert text(one, structured_outputs={"grammar": 'start: "ab" | "cd"'}) in ("ab", "cd")
    assert text(one, guided_regex="q+")[0] == "q"


def test_a_completion_ends_where_its_grammar_does(one: Served) -> None:
    """Though a base model's own end is another token than the one that ends the grammar."""
    choice = one.complete(structured_outputs={"regex": "a|b"}, max_tokens=9)["choices"][0]
    assert choice["text"] in ("a", "b")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_each_of_n_replies_has_a_grammar_of_its_own(one: Served) -> None:
    found = one.chat(n=3, structured_outputs={"regex": "[ab]{9}"})["choices"]
    assert len({choice["message"]["content"] for choice in found}) == 1
    rules = [settings.grammar for _, settings in one.engine.submitted[-3:]]
    assert len(set(map(id, rules))) == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}},
         "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "http://localhost/x"}}},
         "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "[^\\s\\S]"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "root ::= " + "(" * 5000}},
         "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "structured_outputs.regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_followed_is_named(
    one: Served, body: dict[str, Any], param: str
) -> None:
    status, error = one.refused(CHAT, messages=HELLO, **body)
    assert (status, error["param"]) == (400, param), error


def doubled(depth: int, word: str) -> dict[str, Any]:
    """A schema of a few lines that spells out 2 ** depth."""
    names = {f"d{i}": {word: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": {**names, f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "bomb",
    [
        {"json": doubled(30, "anyOf")},
        {"json": doubled(18, "allOf")},
        {"json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
        {"json": {"enum": list(range(20_000))}},
        {"json": {"type": "string", "pattern": "(a+)+$"}},
        {"regex": "((a{1,100}){1,100}){1,100}b"},
        {"regex": "[abc]*a[abc]{500}c"},
    ],
)
def test_a_bomb_is_followed_or_refused(one: Served, bomb: dict[str, Any]) -> None:
    one.says = '"aaaa'
    answer = one.client.post(
        CHAT, json={"messages": HELLO, "structured_outputs": bomb, "max_tokens": 5}
    )
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(
    "bomb",
    [
        {"json": {"type": "integer", "multipleOf": 10**7 + 19}},
        {"json": '{"type": "integer", "multiple\\u004ff": 1.0000019e7}'},
        {"json": {"type": "integer", "allOf": [{"multipleOf": 1009}, {"multipleOf": 1013}]}},
        {"grammar": 'start: %json {"type": "integer", "multipleOf": 10000019}'},
    ],
)
def test_multiples_of_too_much_are_refused(one: Served, bomb: dict[str, Any]) -> None:
    """None of llguidance's limits counts them: the first takes minutes and gigabytes."""
    status, error = one.refused(CHAT, messages=HELLO, structured_outputs=bomb)
    assert status == 400 and "multiple of all multipleOf" in error["message"]


def test_multiples_of_what_schemas_have_are_taken() -> None:
    for number in ("0.01", "2.5", "86400000", "1e9", "1e-7", "313", "317"):
        grammars.check_multiples(f'{{"multipleOf" : {number}}}')
    grammars.check_multiples('{"properties": {"multipleOf": {"multipleOf": 7}}}')
    grammars.check_multiples('{"multipleOf": 0, "a": [{"multipleOf": 1e999}, {"multipleOf": 7}]}')


def chained(length: int, word: str) -> dict[str, Any]:
    """A schema whose definitions refer to each other in a chain."""
    names = {f"d{i}": {word: [{"$ref": f"#/$defs/d{i + 1}"}, {}]} for i in range(length)}
    return {"$defs": {**names, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "deep",
    [
        {"json": chained(1900, "allOf")},
        {"json": chained(1900, "anyOf")},
        {
            "grammar": "start: r0"
            + "".join(f"\nr{i}: r{i + 1}" for i in range(6500))
            + '\nr6500: "b"'
        },
    ],
)
def test_a_long_chain_of_rules_does_not_end_the_process(one: Served, deep: dict[str, Any]) -> None:
    """They are followed by recursion, which overflows a thread's usual stack."""
    assert 80_000 < len(json.dumps(*deep.values())) < 100_000
    body = {"messages": HELLO, "structured_outputs": deep, "max_tokens": 5}
    answer = one.client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text


def test_one_that_takes_too_long_is_refused() -> None:
    slowly = Source("p", lambda _: time.sleep(0.05) or "", "")

    async def slow() -> None:
        found = Grammars(TOKENIZER, vocab_size=9, ends=(0,), size=10, seconds=0.01)
        with pytest.raises(Refusal, match=r"p: takes over 0\.01 s"):
            await found.compile(slowly, count=1)
        found.close()

    asyncio.run(slow())


def test_slow_grammars_of_others_are_waited_for_or_a_reason_to_come_back() -> None:
    goes_on = threading.Event()
    slow = Source("slow", lambda _: str(goes_on.wait()), "")
    quick = Source("quick", grammars.of_regex, "a")

    async def run() -> None:
        found = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, ends=(0,), size=10, seconds=60)
        await found.compile(quick, count=1)  # which reads the vocabulary
        found._seconds = 0.1
        slow_ones = [asyncio.create_task(found.compile(slow, count=1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="grammars") as refused:
            await found.compile(quick, count=1)
        assert refused.value.status_code == 503
        for result in await asyncio.gather(*slow_ones, return_exceptions=True):
            assert "slow: takes over 0.1 s" in str(result)
        found._seconds = 60
        waiting = asyncio.create_task(found.compile(quick, count=1))
        await asyncio.sleep(0)
        goes_on.set()  # its own clock begins when it has a thread
        assert len(await waiting) == 1
        found.close()

    try:
        asyncio.run(run())
    finally:
        goes_on.set()


def test_the_size_is_looked_at_before_anything_is_made() -> None:
    made = []

    async def run(given: object) -> None:
        found = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, ends=(0,), size=10, seconds=9)
        with pytest.raises(Refusal, match="11 characters: at most 10"):
            await found.compile(Source("p", lambda x: made.append(x) or "", given), count=1)
        found.close()

    for given in ("a" * 11, ["a" * 7]):
        asyncio.run(run(given))
    assert not made


def ids(rule: Rule) -> list[int]:
    bits = np.unpackbits(rule.mask().view(np.uint8), bitorder="little")
    return bits.nonzero()[0].tolist()


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 512, 700])
def test_masks_have_a_bit_for_each_id_of_the_model(vocab_size: int) -> None:
    """Also with a tokenizer that has gaps, and rows of the model that are padding."""
    sparse = Tokenizer(tiny_ranks(), {b"hello": 500, b"abba": 470})

    async def made() -> Rule:
        ends = (sparse.im_end_id, sparse.eod_id)
        found = Grammars(sparse, vocab_size=vocab_size, ends=ends, size=10**5, seconds=10)
        (rule,) = await found.compile(Source("p", grammars.of_regex, "abba|a[x-z]"), count=1)
        found.close()
        return rule

    rule = asyncio.run(made())
    assert rule.mask().shape == (-(-vocab_size // 32),) and rule.mask().dtype == np.int32
    other = rule.copy()
    assert ids(rule) == sorted([97, sparse.ranks[b"ab"], 470])
    rule.advance(470)
    assert ids(rule) == sorted([sparse.im_end_id, sparse.eod_id]) and not rule.error
    assert 97 in ids(other)
