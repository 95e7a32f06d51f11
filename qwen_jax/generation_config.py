"""What a checkpoint says of how it wants to be sampled and stopped: its generation_config.json.

Read and checked once, when a model is loaded. A key that is null counts as absent.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from qwen_jax.sampling import Greedy, Nucleus

_READ = frozenset(
    (
        "chat_format", "do_sample", "eos_token_id", "max_new_tokens", "max_window_size",
        "pad_token_id", "repetition_penalty", "stop_words_ids", "temperature", "top_k", "top_p",
    )
)  # fmt: skip
# Keys that change no token, whatever they say: bookkeeping, caches, what else is returned, how
# drafts are made that are checked afterwards.
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
    """stops: sequences of ids that end a row; None where the file is silent."""

    sampler: Greedy | Nucleus
    stops: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    pad_id: int | None
    chat_format: str | None
    max_window_size: int

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """Raises ValueError that names the key whose value cannot be. Warns in one line of what is
        asked for and not done.
        """
        given = {key: value for key, value in values.items() if value is not None}
        if asked := _not_done(given):
            said = ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items()))
            warnings.warn(
                f"generation_config.json asks for what is not done: {said}; heeded are "
                f"{', '.join(sorted(_READ))}",
                stacklevel=3,
            )

        def read(key: str, default: Any, kind: Any, least: float | None = None) -> Any:
            value = given.get(key, default)
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if wrong or (least is not None and not value >= least):
                raise ValueError(f"generation_config {key} is {value!r}")
            return value

        number = int | float
        sampler = make_sampler(
            read("do_sample", False, bool),
            read("temperature", 1.0, number, 0),
            read("top_k", 0, int, 0),
            read("top_p", 1.0, number, 0),
            read("repetition_penalty", 1.0, number),
        )
        eos = given.get("eos_token_id", [])
        stops = [[i] for i in (eos if isinstance(eos, list) else [eos])]
        stops += read("stop_words_ids", [], list)
        for stop in stops:
            if not isinstance(stop, list) or not stop or not all(map(_is_id, stop)):
                raise ValueError(f"generation_config has a stop {stop!r}: ids are whole numbers")
        return cls(
            sampler=sampler,
            stops=tuple(dict.fromkeys(map(tuple, stops))),
            max_new_tokens=read("max_new_tokens", 512, int, 1),
            pad_id=read("pad_token_id", -1, int) if "pad_token_id" in given else None,
            chat_format=read("chat_format", "", str) or None,
            max_window_size=read("max_window_size", 6144, int, 0),
        )


def _not_done(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that would change tokens if they were heeded, and are not."""
    over = {"max_length"} if "max_new_tokens" in given else set()  # which goes before it
    return {
        key: value
        for key, value in given.items()
        if key not in _READ | _INERT | over and value and value != _OFF.get(key)
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


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
