"""What a generation_config.json may say, and what it may not."""

import pytest

from qwen_jax.checkpoint.generation_config import GenerationConfig, make_sampler
from qwen_jax.decoding.sampling import Greedy, Nucleus

BASE = {
    "chat_format": "raw",
    "do_sample": True,
    "eos_token_id": 151643,
    "max_new_tokens": 512,
    "pad_token_id": 151643,
    "stop_words_ids": [[151643]],
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}


def test_published_file() -> None:
    config = GenerationConfig.from_hf(BASE)
    assert config.sampler == Nucleus(1.0, 0, 0.8, 1.0)
    assert config.stops == ((151643,),) and config.pad_id == 151643
    assert config.max_new_tokens == 512 and config.chat_format == "raw"


def test_what_is_absent_or_null_is_off() -> None:
    for values in ({}, dict.fromkeys(BASE), {"pad_token_id": -1}):
        config = GenerationConfig.from_hf(values)
        assert config.sampler == Greedy() and config.stops == () and config.pad_id is None
        assert config.max_new_tokens == 512 and config.max_window_size == 6144


def test_several_stops_keep_their_order() -> None:
    values = {"eos_token_id": [7, 8], "stop_words_ids": [[1, 2], [7]]}
    assert GenerationConfig.from_hf(values).stops == ((7,), (8,), (1, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": 1.5},
        {"eos_token_id": "151643"},
        {"stop_words_ids": 5},
        {"stop_words_ids": [[]]},
        {"stop_words_ids": [[-1]]},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"top_k": 1.5},
        {"top_p": 1.5},
        {"temperature": -1},
        {"temperature": "warm"},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 10**400},
        {"repetition_penalty": 0},
        {"do_sample": "yes"},
        {"pad_token_id": [1]},
        {"pad_token_id": -2},
        {"pad_token_id": 10**18},
        {"top_k": -2},
        {"max_new_tokens": 10**400},
        {"chat_format": 5},
    ],
)
def test_refused_by_name(change: dict) -> None:
    key = next(iter(change))
    told = "stop" if "id" in key and "pad" not in key else key
    with pytest.raises(ValueError, match=f"^generation_config.json: .*{told}") as caught:
        GenerationConfig.from_hf({**BASE, **change})
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match=r"^dir/other.json: "):
        GenerationConfig.from_hf({**BASE, **change}, "dir/other.json")


def test_other_words_for_the_same() -> None:
    """Whole numbers as floats, and vLLM's word for no limit."""
    config = GenerationConfig.from_hf(
        {"do_sample": True, "top_k": -1, "max_new_tokens": 512.0, "eos_token_id": 7.0}
    )
    assert config.sampler == Nucleus(1.0, 0, 1.0, 1.0) and config.stops == ((7,),)
    assert type(config.max_new_tokens) is int
    sampler = GenerationConfig.from_hf({"do_sample": True, "top_k": 50.0}).sampler
    assert isinstance(sampler, Nucleus) and sampler.top_k == 50


def test_what_is_no_mapping() -> None:
    with pytest.raises(ValueError, match=r"hf \(values of a generation_config.json\) must map"):
        GenerationConfig.from_hf("generation_config.json")  # type: ignore[arg-type]


def test_temperature_zero_is_greedy() -> None:
    assert make_sampler(True, 0, top_k=5, top_p=0.9, repetition_penalty=1.2) == Greedy(1.2)
    assert make_sampler(False, 1.0, top_k=5, top_p=0.9, repetition_penalty=1.2) == Greedy(1.2)


def test_what_is_asked_for_and_not_done_is_said_in_one_line() -> None:
    asked = {"num_beams": 4, "min_p": 0.05, "bad_words_ids": [[1]], "a_key_of_tomorrow": "x"}
    off = {"length_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "max_length": 9999}
    inert = {"use_cache": False, "trust_remote_code": True, "bos_token_id": 5}
    inert |= {"cache_implementation": "static"}
    with pytest.warns(UserWarning) as caught:
        config = GenerationConfig.from_hf({**BASE, **asked, **off, **inert, "do_sample": False})
    (line,) = [str(warning.message) for warning in caught]
    said = line.split(";")[0].partition(": ")[2]
    assert said == "a_key_of_tomorrow='x', bad_words_ids=[[1]], min_p=0.05, num_beams=4"
    assert config.sampler == Greedy()
    for asked in ({"max_length": 9999}, {"cache_implementation": "quantized"}):
        ((key, value),) = asked.items()
        with pytest.warns(UserWarning, match=f"^dir/config.json has .*{key}={value!r}"):
            GenerationConfig.from_hf(asked, "dir/config.json")
