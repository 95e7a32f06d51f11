"""A model directory without its weights: architecture, tokenizer and generation defaults.

Reading a description takes a moment. It suffices to encode a prompt and to refuse one that does not
fit, before the weights are loaded. This module does not know meshes or attention.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax import chat, checkpoint
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint import directory
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.config import Config
from qwen_jax.runtime import values

BASE_NOTE = "this is a base checkpoint, not trained for chat: replies may not stop or make sense"


def read(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    max_length: int | None = None,
    adapter: str | Path | None = None,
) -> "Description":
    """Read everything in a model directory except its weights.

    overrides: config values by their Hugging Face names.
    max_length: the largest number of prompt and new tokens in a sequence; None for the larger of
        the config's max_position_embeddings and seq_length.
    adapter: the folder of an adapter, whose generation settings take the place of the model's.

    Raises ValueError for an incomplete directory or an argument that is not allowed.
    """
    if max_length is not None:
        max_length = values.whole("max_length", max_length, least=2, most=values.INT32)
    directory.finished(path)  # other folders may hold files with the same names
    generation_config = checkpoint.load_generation_config(path, adapter)
    tokenizer = checkpoint.load_tokenizer(path)
    config = checkpoint.load_config(path).with_overrides({} if overrides is None else overrides)
    longest = max(config.max_position_embeddings, config.seq_length)
    return Description(config, tokenizer, generation_config, max_length or longest)


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its weights.

    config: the architecture.
    tokenizer: the tokenizer; None if the directory has no vocabulary.
    generation_config: the checkpoint's settings of sampling and stopping.
    max_length: the largest number of tokens in a sequence, prompt and new tokens together.
    """

    config: Config
    tokenizer: Tokenizer | None
    generation_config: GenerationConfig
    max_length: int

    @property
    def is_base(self) -> bool:
        """Whether this is a base model: generation_config's chat_format is not "chatml"."""
        return self.generation_config.chat_format != "chatml"

    @property
    def pad_id(self) -> int:
        """The token id written after a sequence has ended, to fill its row of the batch."""
        if self.generation_config.pad_id is not None:
            return self.generation_config.pad_id
        return self.tokenizer.eod_id if self.tokenizer else 0

    def chat_stops(self) -> tuple[tuple[int, ...], ...]:
        """Return the id sequences that end a chat reply: generation_config's and ChatML's own."""
        tokenizer = self.need_tokenizer()
        turn = (*chat.stop_sequences(tokenizer, "chatml"), (tokenizer.eod_id,))
        return tuple(dict.fromkeys((*self.generation_config.stops, *turn)))

    def room(self, prompt: int, asked: int | None = None) -> int:
        """Return the number of tokens to generate after a prompt of `prompt` tokens.

        asked: the number that the caller wants; None for generation_config's max_new_tokens,
            reduced to fit into `max_length`.

        Raises ValueError if the tokens do not fit.
        """
        left = self.max_length - prompt
        if asked is None:
            new = min(self.generation_config.max_new_tokens, max(left, 1))
        else:
            new = values.whole("max_new_tokens", asked, least=1, most=values.INT32)
        if new > left:
            raise ValueError(
                f"a prompt of {prompt} tokens and {new} new ones do not fit a cache of "
                f"max_length {self.max_length}: raise max_length (--max-length) or ask for fewer"
            )
        return new

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, or raise ValueError if the directory has none."""
        if self.tokenizer is None:
            raise ValueError(
                "this model directory has no qwen.tiktoken: text cannot be encoded; copy the "
                "checkpoint's vocabulary there"
            )
        return self.tokenizer

    def known_ids(self) -> np.ndarray:
        """Return a bool array [V], True for ids that may be generated: all that can be decoded."""
        size = self.config.vocab_size
        return np.ones(size, bool) if self.tokenizer is None else self.tokenizer.known_ids(size)
