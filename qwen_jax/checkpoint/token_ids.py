"""Checks that the token ids in a model's files belong to its vocabulary.

A qwen.tiktoken that was cut at the end of a line, as by an interrupted download, is a valid smaller
vocabulary with other ids for the control tokens. The other files of the model reveal it.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax.chat.tokenizer import PADDED, PUBLISHED_RANKS, SPECIAL_TOKENS, Tokenizer
from qwen_jax.checkpoint.directory import CONFIG, GENERATION_CONFIG, TOKENIZER, some
from qwen_jax.config import Config
from qwen_jax.runtime.texts import read_json

NO_PAD = -1  # some tools write this pad_token_id for none
_KEYS = ("eos_token_id", "pad_token_id", "stop_words_ids")
# An early token of the published vocabulary, by which even a short part of it is recognised.
_EARLY_RANK, _EARLY = 1000, b"atus"
_AGAIN = "download or copy it again"


def check_range(file: Path, vocab_size: int) -> None:
    """Raise ValueError if a generation_config.json has an id without a row in the embedding.

    file: the generation_config.json.
    vocab_size: the number of rows of the embedding.
    """
    for key, i in _ids(read_json(file)):
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"{file}: {key} {i}: ids are 0 to {vocab_size - 1} in a model of vocab_size "
                f"{vocab_size}: put the file there that came with these weights, or remove the key"
            )


def check(root: Path, tokenizer: Tokenizer, *, vocabulary: Path | None = None) -> None:
    """Check the ids in generation_config.json and config.json against the model and its tokenizer.

    root: a model directory or checkpoint folder.
    tokenizer: its tokenizer.
    vocabulary: the tokenizer's vocabulary file; by default the one in `root`.

    Raises ValueError for an id outside the model or the vocabulary. Warns if replies end at a token
    that is rarely intended to end them.
    """
    config, settings = root / CONFIG, root / GENERATION_CONFIG
    rows = Config.read(config).vocab_size
    if settings.exists():
        check_range(settings, rows)
    vocabulary = vocabulary or root / TOKENIZER
    check_whole(vocabulary, tokenizer, vocab_size=rows)
    named = list(_ids(read_json(settings))) if settings.exists() else []
    # The ids in config.json may be a library's defaults; only ids that have a row count.
    others = [(key, i) for key, i in _ids(read_json(config)) if key == "eos_token_id"]
    others = [(key, i) for key, i in others if 0 <= i < rows]
    # If the published vocabulary is complete, a padding id may also be in the rows after it.
    padding = "pad_token_id" if tokenizer.eod_id == PUBLISHED_RANKS else None
    for file, ids in ((settings, named), (config, others)):
        for key, i in ids:
            if key != padding and i not in tokenizer.id_to_bytes:
                raise ValueError(
                    f"{vocabulary} has {tokenizer.eod_id} ranks and no id {i}, which {file} has "
                    f"as {key}: the vocabulary was cut short, or is of another model: {_AGAIN}"
                )
    ends = {i for key, i in named or others if key == "eos_token_id"}
    said = [name for name, i in tokenizer.special_tokens.items() if i in ends]
    if said and not {"<|endoftext|>", "<|im_end|>"} & set(said):
        warnings.warn(
            f"{root}: eos_token_id is {', '.join(said)} of {vocabulary}: where that is not "
            f"meant, the vocabulary was cut short: {_AGAIN}",
            stacklevel=3,
        )


def check_whole(file: Path, tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Raise ValueError if the vocabulary is a truncated copy of the published one.

    file: the vocabulary file, for the message.
    tokenizer: the tokenizer with this vocabulary.
    vocab_size: the number of rows of the model's embedding.

    The vocabulary is truncated if it begins like the published vocabulary, has fewer ranks, and the
    model has rows for all published ranks.
    """
    ranks, whole = tokenizer.eod_id, PUBLISHED_RANKS + len(SPECIAL_TOKENS)
    begins = tokenizer.ranks.get(_EARLY) == _EARLY_RANK
    if begins and ranks < PUBLISHED_RANKS and vocab_size >= whole:
        raise ValueError(
            f"{file} begins as the published vocabulary of {PUBLISHED_RANKS} ranks, has {ranks}, "
            f"and the model has vocab_size {vocab_size}: it was cut short: {_AGAIN}"
        )


def check_fits(file: Path, tokenizer: Tokenizer | None, *, vocab_size: int) -> str | None:
    """Describe in one line what a vocabulary cannot do with a model; None if nothing is amiss.

    file: the vocabulary file, or where it should be.
    tokenizer: the tokenizer with this vocabulary; None if there is no file.
    vocab_size: the number of rows of the model's embedding.

    Raises ValueError if text may become ids without a row.
    """
    if tokenizer is None:
        return (
            f"{file} is not there: the model takes and gives token ids, and no text: copy the "
            "vocabulary of the checkpoint there"
        )
    largest, ids = max(tokenizer.ranks.values()), len(tokenizer)
    if largest >= vocab_size:
        raise ValueError(
            f"{file} has tokens up to id {largest}, and the model has vocab_size {vocab_size}: the "
            "vocabulary is of another model: put the file there that came with these weights"
        )
    if lost := [name for name, i in tokenizer.special_tokens.items() if i >= vocab_size]:
        return (
            f"{file} gives {some(lost)} ids that the model, of vocab_size {vocab_size}, has no "
            "rows for: prompts with them are refused, as every chat is without <|im_start|>; put "
            "the file there that came with these weights"
        )
    if -(-ids // PADDED) * PADDED < vocab_size:
        return (
            f"{file} has {ids} ids, and the model has vocab_size {vocab_size}: ids from {ids} on "
            "are never generated; if the vocabulary is of another model, put the file there that "
            "came with these weights"
        )
    return None


def _ids(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every token id in a config.json or generation_config.json, with its key.

    values: the contents of the file.

    Values that are not ids are skipped here; `GenerationConfig` refuses them.
    """
    for key in _KEYS:
        left = [values.get(key)]
        while left:
            value = left.pop(0)
            if isinstance(value, list):
                left += value
            elif type(value) is int and (key, value) != ("pad_token_id", NO_PAD):
                yield key, value
