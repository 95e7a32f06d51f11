"""Qwen's tokenizer: byte-pair encoding over qwen.tiktoken, its 208 special tokens, and expansions.

tiktoken encodes text to ids. Ids are decoded to bytes by a table, and bytes to text only at the
end, because a token may hold part of a character; `TextStream` does this for ids that arrive one by
one. Special tokens in user text are ordinary text unless the caller allows them. This module knows
nothing of chat formats, of the model, or of the number of rows of its embedding.
"""

import binascii
import codecs
import io
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tiktoken

from qwen_jax.runtime import paths, texts, values

# White space before a word leaves its last character to the word: `\s+(?!\S)`. This alternative
# backtracks through the whole run, and tiktoken panics at a million characters. The alternative
# before it takes runs of more than 256 in chunks, possessively, and matches exactly the same text.
PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"(?:\s{256}(?=\s))++(?:\s+(?!\S))?",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
# A download that was cut at the end of a line looks like a smaller vocabulary. So the published
# vocabulary is recognised by one of its tokens, and must then have all its ranks.
PUBLISHED_RANKS = 151_643
_LANDMARK_RANK, _LANDMARK = 20_000, b"LANG"
_UNDECODABLE = b"\xff"  # a byte that never occurs in UTF-8
PADDED = 1024  # models pad the vocabulary to a multiple of at most this
Line = tuple[int, bytes, int]  # a line of a vocabulary file: its number, the token, the id


class Tokenizer:
    """Encodes text to token ids and decodes ids to text.

    ranks: the id of every regular token by its bytes, the expansion included.
    special_tokens: the id of every special token by its text.
    id_to_bytes: the bytes of every id that can be decoded, special tokens included.
    eod_id, im_start_id, im_end_id: the ids of <|endoftext|>, <|im_start|> and <|im_end|>.
    extra_ids: the ids of <|extra_0|>..<|extra_204|>.
    """

    def __init__(self, ranks: Mapping[bytes, int], extra: Mapping[bytes, int] | None = None):
        """Build a tokenizer from n regular tokens; the 208 special tokens get the ids n..n+207.

        ranks: the ids 0..n-1 of the regular tokens, by their bytes.
        extra: the tokens of an expansion, with any free ids; tokens that already exist are skipped.

        Raises ValueError if an id is taken, if the ranks lack one of the 256 bytes, or if either
        argument does not map bytes to whole numbers.
        """
        self.ranks = _ids_by_token("ranks", ranks)
        if problem := _lacks_bytes(self.ranks):
            raise ValueError(f"ranks: {problem}: give every byte a token")
        if set(self.ranks.values()) != set(range(len(ranks))):
            raise ValueError(f"ranks must be 0 to {len(ranks) - 1}, each of them once")
        self.eod_id, self.im_start_id, self.im_end_id = range(len(ranks), len(ranks) + 3)
        self._special_ids = range(len(ranks), len(ranks) + len(SPECIAL_TOKENS))
        self.extra_ids = self._special_ids[3:]
        self.special_tokens = dict(zip(SPECIAL_TOKENS, self._special_ids, strict=True))
        self.id_to_bytes = {i: token for token, i in self.ranks.items()}
        self.id_to_bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        for token, i in _ids_by_token("extra", {} if extra is None else extra).items():
            if token in self.ranks:
                continue
            if i in self.id_to_bytes:
                raise ValueError(f"id {i} of {token!r} is taken by {self.id_to_bytes[i]!r}")
            self.ranks[token] = i
            self.id_to_bytes[i] = token
        self._size = max(self.id_to_bytes) + 1
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens=self.special_tokens,
        )

    @classmethod
    def from_file(cls, path: str | Path, extra_vocab_file: str | Path | None = None) -> "Tokenizer":
        """Read a vocabulary in the format of qwen.tiktoken, and optionally an expansion of it.

        path: lines "base64 rank" with the ranks 0, 1, 2, ... in order, which include the 256 single
            bytes; it may be smaller than the published vocabulary. An expansion may follow in the
            same file, as the original tokenizer saves it, with ids after those of the special
            tokens.
        extra_vocab_file: lines "base64 id" with any free ids; tokens that already exist are
            skipped.

        Raises ValueError that names the file, the line and the problem.
        """
        ranks, own = _read_vocabulary(path)
        more = _read_lines(extra_vocab_file) if extra_vocab_file is not None else ()
        taken = {i: token for token, i in ranks.items()}
        taken |= dict(enumerate(map(str.encode, SPECIAL_TOKENS), len(ranks)))
        expansion: dict[bytes, int] = {}
        for file, lines in ((path, own), (extra_vocab_file, more)):
            for number, token, i in lines:
                if token in ranks or token in expansion:
                    continue
                if i in taken:
                    raise ValueError(
                        f"{file}:{number}: id {i} of {token!r} is taken by {taken[i]!r}: give it "
                        "one that is free"
                    )
                taken[i], expansion[token] = token, i
        return cls(ranks, expansion)

    def __len__(self) -> int:
        """One more than the largest id; with a sparse expansion, not every smaller id exists."""
        return self._size

    def encode(
        self,
        text: str,
        allowed_special: Collection[str] = frozenset(),
        disallowed_special: Collection[str] = (),
    ) -> list[int]:
        """Encode a text as token ids, after NFC normalisation.

        allowed_special: special tokens that are recognised in the text; all others are ordinary
            text.
        disallowed_special: special tokens that must not occur; "all" means all that are not
            allowed.

        Both are a set of special tokens, or "all". Raises ValueError if a name is not a special
        token, if the text contains a disallowed token, or if it is not a `str`. Lone surrogates
        become U+FFFD.
        """
        text = unicodedata.normalize("NFC", texts.check("text", text))
        allowed = self._special_set(allowed_special)
        disallowed = self._special_set(disallowed_special)
        if disallowed_special == "all":
            disallowed -= allowed
        for token in disallowed:
            if token in text:
                raise ValueError(f"the text holds the disallowed special token {token!r}")
        if not allowed:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """Decode ids to bytes.

        skip_special_tokens: drop the 208 special tokens, but not tokens of an expansion.

        Models pad their vocabulary to a multiple of at most 1024, and an id in the padding becomes
        the byte 0xff. Raises ValueError for larger ids and for anything but whole numbers.
        """
        skip = self._special_ids if skip_special_tokens else range(0)
        table = self.id_to_bytes
        numbers = values.ids("ids", ids, below=-(-self._size // PADDED) * PADDED)
        return b"".join([table.get(i, _UNDECODABLE) for i in numbers if i not in skip])

    def decode(
        self, ids: Iterable[int], errors: str = "replace", skip_special_tokens: bool = False
    ) -> str:
        """Decode ids to text.

        errors: what becomes of bytes that are not UTF-8 and of ids in a model's padding: "replace"
            (U+FFFD), "ignore" or "strict" (UnicodeDecodeError).

        Raises ValueError for ids that no model of this vocabulary has.
        """
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", _handler(errors))

    def known_ids(self, size: int) -> np.ndarray:
        """Return a bool array [size], True for ids that can be decoded, False for padding ids."""
        known = np.zeros(size, dtype=bool)
        known[[i for i in self.id_to_bytes if i < size]] = True
        return known

    def _special_set(self, names: Collection[str]) -> set[str]:
        """Check a set of names of special tokens; expand "all" to all of them."""
        if isinstance(names, str) and names == "all":
            return set(self.special_tokens)
        if isinstance(names, str | bytes) or not isinstance(names, Iterable):
            got = texts.described(names)
            raise ValueError(f"expected a set of special tokens or 'all', got {got}")
        found = list(names)
        unknown = [x for x in found if not isinstance(x, str) or x not in self.special_tokens]
        if unknown:
            names = ", ".join(sorted(map(repr, unknown)))
            raise ValueError(
                f"not special tokens: {names}; known are <|endoftext|>, <|im_start|>, <|im_end|> "
                "and <|extra_0|>..<|extra_204|>"
            )
        return set(found)


class TextStream:
    """Decodes ids that arrive in pieces; the joined results equal one `decode` of all ids."""

    def __init__(
        self, tokenizer: Tokenizer, errors: str = "replace", skip_special_tokens: bool = False
    ):
        values.instance("tokenizer", tokenizer, kind=Tokenizer)
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(_handler(errors))

    def push(self, ids: Iterable[int]) -> str:
        """Decode the next ids; bytes of an unfinished character are held back for the next call."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip))

    def flush(self) -> str:
        """Decode the bytes of an unfinished last character by `errors`, and reset the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _handler(errors: str) -> str:
    """Check the name of an error handler early; Python does so only when it meets invalid bytes."""
    try:
        codecs.lookup_error(errors)
    except (LookupError, TypeError):
        raise ValueError(f"errors {errors!r}: allowed are replace, ignore, strict") from None
    return errors


def _ids_by_token(name: str, given: Mapping[bytes, int]) -> dict[bytes, int]:
    """Check a mapping of tokens to ids, on which tiktoken would otherwise panic.

    name: the argument's name, for messages.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must map tokens (bytes) to ids, got {texts.described(given)}")
    if wrong := [token for token in given if not isinstance(token, bytes) or not token]:
        raise ValueError(f"{name}: tokens must be bytes, got {texts.described(wrong[0])}")
    return dict(zip(given, values.ids(f"{name}: ids", given.values(), below=2**31), strict=True))


def _lacks_bytes(ranks: Mapping[bytes, int]) -> str | None:
    """Describe which single bytes have no token; None if all have one."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if not missing:
        return None
    return (
        f"{len(ranks)} tokens, but none for {len(missing)} of the 256 bytes (the first: "
        f"0x{missing[0]:02x})"
    )


def _read_vocabulary(path: str | Path) -> tuple[dict[bytes, int], list[Line]]:
    """Read a vocabulary file: return the rank of each token, and the lines of its expansion.

    An expansion may follow the vocabulary in the same file. Raises ValueError for an invalid line,
    and for a truncated file.
    """
    ranks: dict[bytes, int] = {}
    expansion: list[Line] = []
    seen: dict[bytes, int] = {}
    for number, token, rank in _read_lines(path):
        if token in seen:
            raise ValueError(f"{path}:{number}: {token!r} already has rank {seen[token]}")
        seen[token] = rank
        if expansion or _begins_expansion(ranks, rank):
            expansion.append((number, token, rank))
        elif rank != len(ranks):
            raise ValueError(f"{path}:{number}: expected rank {len(ranks)}, found {rank}")
        else:
            ranks[token] = rank
            if _is_published(ranks) and len(ranks) > PUBLISHED_RANKS:
                raise ValueError(
                    f"{path}:{number}: the published vocabulary of {PUBLISHED_RANKS} tokens, but "
                    f"has {len(ranks)}: {rank} is the id of {SPECIAL_TOKENS[0]}, an expansion "
                    f"begins at {PUBLISHED_RANKS + len(SPECIAL_TOKENS)}"
                )
    if problem := _lacks_bytes(ranks):
        raise ValueError(f"{path}: {problem}: truncated, or not a vocabulary")
    if _is_published(ranks) and len(ranks) < PUBLISHED_RANKS:
        raise ValueError(
            f"{path}: begins as the published vocabulary of {PUBLISHED_RANKS} tokens, but "
            f"has {len(ranks)}: truncated, download or copy it again"
        )
    return ranks, expansion


def _is_published(ranks: Mapping[bytes, int]) -> bool:
    """Whether the ranks begin like the published Qwen vocabulary, judged by one of its tokens."""
    return ranks.get(_LANDMARK) == _LANDMARK_RANK


def _begins_expansion(ranks: Mapping[bytes, int], rank: int) -> bool:
    """Return whether the line with this rank is the first of an expansion.

    ranks: the tokens of the lines before it.

    The ids of an expansion follow the special tokens. Unless the vocabulary is the published one,
    whose end is known, only exactly the first of these ids counts: any other is a gap.
    """
    first = len(ranks) + len(SPECIAL_TOKENS)
    if _is_published(ranks):
        return len(ranks) == PUBLISHED_RANKS and rank >= first
    return rank == first


def _read_lines(path: str | Path) -> Iterator[Line]:
    """Yield line number, token and id of each line "base64 id" that is not blank."""
    file = paths.parse(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder: give the vocabulary in it, such as qwen.tiktoken")
    if not file.exists():
        raise ValueError(f"{path} does not exist: give the qwen.tiktoken of a checkpoint")
    # Read at once: reading a remote file line by line takes a minute for a vocabulary.
    data = file.read_bytes()
    if problem := texts.foreign(data):
        raise ValueError(f"{path} is not UTF-8 text: {problem}")
    with io.BytesIO(texts.unmarked(data)) as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields:
                continue
            try:
                encoded, digits = fields
                token = binascii.a2b_base64(encoded, strict_mode=True)
                # Even in strict mode it accepts stray bits before the padding, which no encoder
                # writes.
                whole = binascii.b2a_base64(token, newline=False) == encoded
                # int() alone would accept signs and underscores; ids are int32 everywhere else.
                if not token or not whole or not digits.isdigit() or int(digits) >= 2**31:
                    raise ValueError
            except ValueError:
                shown = line[:40].decode("utf-8", "replace").strip()
                raise ValueError(
                    f"{path}:{number}: expected 'base64 id', found {shown!r}"
                ) from None
            yield number, token, int(digits)
