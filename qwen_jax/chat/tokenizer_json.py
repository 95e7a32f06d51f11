"""tokenizer.json, a vocabulary in the format of Hugging Face's library `tokenizers`.

That library applies a list of merges, where tiktoken needs only the ids: it merges the two
neighbours whose union has the lowest id. Both give the same ids, because within the bytes of a
token the same merges happen in the same order, whatever is around them. The file is plain JSON, and
the library, which cannot make merges of ids, is not needed to write it.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from qwen_jax.chat.tokenizer import Tokenizer

# The pre-tokenizer's pattern as Qwen publishes it, because other programs recognise the tokenizer
# by it. `tokenizer.PATTERN` matches the same pieces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def contents(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the contents of the tokenizer.json of a tokenizer.

    vocab_size: the rows of the model's embedding. Control tokens without a row are left out; in a
        text they are ordinary text.
    """
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    ids = dict(sorted(tokenizer.ranks.items(), key=lambda item: item[1]))
    vocab = {spelled(token): i for token, i in ids.items()}
    halves = (_halves(token, ids) for token in ids if len(token) > 1)
    merges = [pair and f"{spelled(pair[0])} {spelled(pair[1])}" for pair in halves]
    controls = control_tokens(tokenizer, vocab_size)
    if len(ids) > tokenizer.eod_id:
        # The library numbers tokens that the vocabulary lacks after its end, which an expansion
        # has moved.
        vocab |= controls
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **ADDED_TOKEN} for name, i in controls.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _BYTE_LEVEL,
            ],
        },
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken gives a whole piece its own token even where no merges lead to it.
            "ignore_merges": None in merges,
            "vocab": vocab,
            "merges": [merge for merge in merges if merge is not None],
        },
    }


ADDED_TOKEN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}  # how a control token is found in a text: as it stands, anywhere


def control_tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Return the ids of the control tokens that have a row in an embedding of `vocab_size` rows."""
    return {name: i for name, i in tokenizer.special_tokens.items() if i < vocab_size}


def byte_letters() -> dict[int, str]:
    """Return the letter by which `tokenizers` represents each byte.

    It is the byte's own character if that is printable, else a character from U+0100 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _halves(token: bytes, ids: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens whose merge makes a token of at least two bytes.

    None if the bytes of the token do not merge to it, lowest id first.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    merged = [ids.get(a + b, math.inf) for a, b in pairwise(parts)]  # the id of each pair
    while len(parts) > 2:
        lowest = min(merged)
        if lowest == math.inf:
            return None
        i = merged.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del merged[i]
        for j in (i - 1, i):
            if 0 <= j < len(merged):
                merged[j] = ids.get(parts[j] + parts[j + 1], math.inf)
    return parts[0], parts[1]
