"""What a checkpoint says of how it wants to be sampled and stopped: its generation_config.json.

Read and checked once, when a model is loaded. A key that is null counts as absent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.sampling import Greedy, Nucleus


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
        """Raises ValueError that names the key whose value cannot be."""
        given = {key: value for key, value in values.items() if value is not None}

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


def make_sampler(
    draw: bool, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> Greedy | Nucleus:
    """The sampler of these settings, checked; temperature 0, or draw False, is greedy."""
    sampler: Greedy | Nucleus = Greedy(float(repetition_penalty))
    if draw and temperature != 0:
        penalty = float(repetition_penalty)
        sampler = Nucleus(float(temperature), int(top_k), float(top_p), penalty)
    sampler.check()
    return sampler


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
