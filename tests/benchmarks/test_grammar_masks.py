"""benchmarks/grammar_masks.py: every mask along a text is timed, and texts must be allowed."""

import asyncio

import pytest

from benchmarks import grammar_masks
from tests.support.vocabulary import qwen_tokenizer


def test_each_grammar_is_followed_along_its_text() -> None:
    lines = asyncio.run(grammar_masks.run(151_936, 2))
    names = ["json_object", "json_schema", "regex", "regex", "choice"]
    assert [line[0].split()[0] for line in lines] == names
    for case, (_, masks, *times) in zip(grammar_masks.cases(), lines, strict=True):
        assert int(masks) == 2 * len(qwen_tokenizer().encode(case.text))
        assert 0 <= float(times[0]) <= float(times[1]) <= float(times[2])


def test_a_text_that_a_grammar_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [case._replace(text="?") for case in grammar_masks.cases()]
    monkeypatch.setattr(grammar_masks, "cases", lambda: wrong)
    with pytest.raises(ValueError, match="json_object: does not allow the token"):
        asyncio.run(grammar_masks.run(151_936, 1))
