"""The sampling and stopping settings of a checkpoint, from its generation_config.json.

They are read and checked once, when a model is loaded. A key whose value is null counts as absent.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint.token_ids import NO_PAD
from qwen_jax.decoding.sampling import Greedy, Nucleus
from qwen_jax.runtime import texts, values

_READ = frozenset(
    (
        "chat_format", "do_sample", "eos_token_id", "max_new_tokens", "max_window_size",
        "pad_token_id", "repetition_penalty", "stop_words_ids", "temperature", "top_k", "top_p",
    )
)  # fmt: skip
# Keys that change no token, whatever their value: bookkeeping, caches, additional outputs, and
# speculative decoding, whose drafts are verified. cache_implementation chooses where keys and
# values are kept (static, hybrid, offloaded, ...); only "quantized" rounds them, and causes a
# warning.
_INERT = frozenset(
    (
        "_commit_hash", "_from_model_config", "assistant_confidence_threshold",
        "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
        "bos_token_id", "cache_config", "cache_implementation", "compile_config",
        "continuous_batching_config", "decoder_start_token_id", "disable_compile", "is_assistant",
        "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states",
        "output_logits", "output_scores", "prefill_chunk_size", "prompt_lookup_num_tokens",
        "renormalize_logits", "return_dict_in_generate", "return_legacy_cache",
        "speculation_type", "target_lookbehind", "transformers_version", "trust_remote_code",
        "use_cache", "use_mtp",
    )
)  # fmt: skip
# Values without effect, beside null, false, 0, [] and {}: the defaults of transformers.
_OFF = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "length_penalty": 1,
    "max_length": 20,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1,
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The settings with which a checkpoint generates unless the caller chooses otherwise.

    sampler: the sampling strategy.
    stops: sequences of token ids that end a generated text.
    max_new_tokens: the largest number of tokens to generate.
    pad_id: the id of the padding token; None if the file has none.
    chat_format: the name of the chat format, such as "chatml"; None if the file has none.
    max_window_size: a chat prompt keeps the newest turns while they and the system message have
        fewer tokens than this.
    """

    sampler: Greedy | Nucleus
    stops: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    pad_id: int | None
    chat_format: str | None
    max_window_size: int

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], file: str | Path = "generation_config.json"
    ) -> "GenerationConfig":
        """Read the contents of a generation_config.json.

        hf: the contents, by key.
        file: the name of the file, for messages.

        Raises ValueError that names the file and the key with an invalid value. Warns in one line
        of settings that are ignored.
        """
        hf = values.mapping("hf (values of a generation_config.json)", hf)
        given = {key: value for key, value in hf.items() if value is not None}
        if asked := _not_done(given):
            said = ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items()))
            warnings.warn(
                f"{file} has entries that are ignored: {said}; supported are "
                f"{', '.join(sorted(_READ))}",
                stacklevel=3,
            )
        with values.named(file):
            return cls(**_fields(given))


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a generation_config.json, without null values, to the fields of `GenerationConfig`.

    Raises ValueError that names a key with an invalid value.
    """

    def whole(key: str, default: int, least: int) -> int:
        value = values.from_file(given.get(key, default))
        return values.whole(f"{key} is", value, least=least, most=values.INT64)

    def number(key: str, default: float, least: float, most: float) -> float:
        return values.number(f"{key} is", given.get(key, default), least=least, most=most)

    pad = given.get("pad_token_id", NO_PAD)
    sampler = make_sampler(
        values.flag("do_sample is", given.get("do_sample", False)),
        number("temperature", 1.0, 0, values.FLOAT32),
        top_k=max(whole("top_k", 0, -1), 0),  # -1 is vLLM's word for no limit
        top_p=number("top_p", 1.0, 0, 1),
        repetition_penalty=number("repetition_penalty", 1.0, *values.POSITIVE),
    )
    chat_format = given.get("chat_format", "")
    if not isinstance(chat_format, str):
        raise ValueError(f"chat_format is {texts.shown(chat_format)}: must be a text, or null")
    return {
        "sampler": sampler,
        "stops": _stops(given),
        "max_new_tokens": whole("max_new_tokens", 512, 1),
        "pad_id": None if pad == NO_PAD else _id("pad_token_id is", pad),
        "chat_format": chat_format or None,
        "max_window_size": whole("max_window_size", 6144, 0),
    }


def _stops(given: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The id sequences that end a generated text, without repetitions, in the order of the file."""
    eos, words = given.get("eos_token_id", []), given.get("stop_words_ids", [])
    ends = eos if isinstance(eos, list) else [eos]
    if not isinstance(words, list) or not all(isinstance(x, list) and x for x in words):
        shown = texts.shown(words)
        raise ValueError(f"stop_words_ids is {shown}: must be a list of lists of token ids")
    stops = [(_id("a stop of eos_token_id is", i),) for i in ends]
    stops += [tuple(_id("a stop of stop_words_ids is", i) for i in x) for x in words]
    return tuple(dict.fromkeys(stops))


def _id(name: str, value: Any) -> int:
    """Check that a value is a token id, and return it. `name` starts the error's message."""
    return values.whole(name, values.from_file(value), least=0, most=values.INT32)


def _not_done(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that would change generated tokens but are not supported, by key."""
    passed: set[str] = {*_READ, *_INERT}
    if "max_new_tokens" in given:  # takes precedence over max_length
        passed.add("max_length")
    if given.get("cache_implementation") == "quantized":
        passed.remove("cache_implementation")
    return {
        key: value
        for key, value in given.items()
        if key not in passed and value and value != _OFF.get(key)
    }


def make_sampler(
    draw: bool, temperature: float, *, top_k: int, top_p: float, repetition_penalty: float
) -> Greedy | Nucleus:
    """Make a `Nucleus` sampler, or a `Greedy` one if `draw` is False or the temperature is 0.

    Raises ValueError for a setting that is out of range.
    """
    sampler: Greedy | Nucleus = Greedy(repetition_penalty)
    if draw and temperature != 0:
        sampler = Nucleus(temperature, top_k, top_p, repetition_penalty)
    sampler.check()
    return sampler
