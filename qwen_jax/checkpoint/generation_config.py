"""What a checkpoint says of how it wants to be sampled and stopped: its generation_config.json.

Read and checked once, when a model is loaded. A key that is null counts as absent.
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
# Keys that change no token, whatever they say: bookkeeping, caches, what else is returned, how
# drafts are made that are checked afterwards. cache_implementation chooses where keys and values
# lie (static, hybrid, offloaded, ...); "quantized" alone rounds them, and is said (`_not_done`).
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
# Values that ask for nothing, beside null, false, 0, [] and {}: the defaults of transformers.
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
    """How a checkpoint generates unless a caller says otherwise.

    stops: sequences of ids that end a row. pad_id, chat_format: None where the file names none.
    max_window_size: most tokens of a chat's prompt, beyond which old turns are left out.
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
        """Read the values of a generation_config.json. file: its name, for messages.

        Raises ValueError that names the file and the key whose value cannot be. Warns in one line
        of what is asked for and not done.
        """
        hf = values.mapping("hf (values of a generation_config.json)", hf)
        given = {key: value for key, value in hf.items() if value is not None}
        if asked := _not_done(given):
            said = ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items()))
            warnings.warn(
                f"{file} asks for what is not done: {said}; heeded are {', '.join(sorted(_READ))}",
                stacklevel=3,
            )
        with values.named(file):
            return cls(**_fields(given))


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `GenerationConfig`. ValueError that names a key whose value cannot be."""

    def whole(key: str, default: int, least: int) -> int:
        value = values.from_file(given.get(key, default))
        return values.whole(f"{key} is", value, least, values.INT64)

    def number(key: str, default: float, least: float, most: float) -> float:
        return values.number(f"{key} is", given.get(key, default), least, most)

    pad = given.get("pad_token_id", NO_PAD)
    sampler = make_sampler(
        values.flag("do_sample is", given.get("do_sample", False)),
        number("temperature", 1.0, 0, values.FLOAT32),
        max(whole("top_k", 0, -1), 0),  # -1 is vLLM's word for no limit
        number("top_p", 1.0, 0, 1),
        number("repetition_penalty", 1.0, *values.POSITIVE),
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
    """The sequences of ids that end a row, each once, in the order of the file."""
    eos, words = given.get("eos_token_id", []), given.get("stop_words_ids", [])
    ends = eos if isinstance(eos, list) else [eos]
    if not isinstance(words, list) or not all(isinstance(x, list) and x for x in words):
        shown = texts.shown(words)
        raise ValueError(f"stop_words_ids is {shown}: must be a list of lists of token ids")
    stops = [(_id("a stop of eos_token_id is", i),) for i in ends]
    stops += [tuple(_id("a stop of stop_words_ids is", i) for i in x) for x in words]
    return tuple(dict.fromkeys(stops))


def _id(name: str, value: Any) -> int:
    return values.whole(name, values.from_file(value), 0, values.INT32)


def _not_done(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that would change tokens if they were heeded, and are not."""
    passed: set[str] = {*_READ, *_INERT}
    if "max_new_tokens" in given:  # which goes before it
        passed.add("max_length")
    if given.get("cache_implementation") == "quantized":
        passed.remove("cache_implementation")
    return {
        key: value
        for key, value in given.items()
        if key not in passed and value and value != _OFF.get(key)
    }


def make_sampler(
    draw: bool, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> Greedy | Nucleus:
    """The sampler of these settings, checked; temperature 0, or draw False, is greedy."""
    sampler: Greedy | Nucleus = Greedy(repetition_penalty)
    if draw and temperature != 0:
        sampler = Nucleus(temperature, top_k, top_p, repetition_penalty)
    sampler.check()
    return sampler
