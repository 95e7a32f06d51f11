"""Learn tokens for words that a vocabulary lacks, and write them as an expansion file.

    python -m qwen_jax.expand_vocab VOCAB_FILE WORDS_FILE OUT_FILE [--start-id ID]

`Tokenizer.from_file(..., extra_vocab_file=OUT_FILE)` reads the expansion file. Learning continues
from the existing merges: every given word becomes one token, and the encoding of other text changes
only where the new tokens occur. This module knows nothing of the model, whose embedding must have
rows for the new ids.
"""

import argparse
import base64
import heapq
import math
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import tiktoken

from qwen_jax.chat.tokenizer import PATTERN, Tokenizer
from qwen_jax.runtime import command, lock, paths, texts, values

_EXAMPLES = """example:
  python -m qwen_jax.expand_vocab qwen.tiktoken words.txt extra.tiktoken

Every word becomes one token, and so do the pieces from which it is merged; pieces of frequent words
are merged first. Words already in the vocabulary are skipped; words that the pre-tokenizer splits
(with a space or a digit inside, for example) are left out with a warning. The model needs a row of
its embedding for every new id: checkpoints have some to spare (see vocab_size in config.json).
"""


def read_words(path: str | Path) -> dict[str, int]:
    """Read a file of lines "word<TAB>frequency"; return the frequency of each NFC-normalised word.

    White space around a word is dropped. A frequency that is missing or not a positive integer
    counts as 1; the frequencies of repeated words add up. Raises ValueError if the file is not
    UTF-8, or if a frequency has thousands of digits.
    """
    words: Counter[str] = Counter()
    data = paths.parse(path).read_bytes()
    try:
        text = texts.decode(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a UTF-8 text file: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        word, _, frequency = line.partition("\t")
        if word := unicodedata.normalize("NFC", word.strip()):
            frequency = frequency.strip()
            try:
                words[word] += max(int(frequency), 1) if frequency.isdecimal() else 1
            except ValueError:  # Python reads no more than 4300 digits
                what = f"a frequency of {len(frequency)} digits"
                raise ValueError(f"{path}:{number}: {what}: give a smaller one") from None
    return dict(words)


def splittable(words: Iterable[str]) -> list[str]:
    """Return the words that the pre-tokenizer splits, which therefore can never be one token."""
    # A piece that is itself a token becomes that token without any merges. So if every word is a
    # token, a word is encoded as several ids only if it is split into several pieces.
    if isinstance(words, str | bytes) or not isinstance(words, Iterable):
        raise ValueError(f"words must be a list of texts, got {texts.described(words)}")
    words = [texts.check_whole("each word", word) for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    probe = tiktoken.Encoding("probe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [word for word in words if len(probe.encode_ordinary(word)) > 1]


def learn_tokens(tokenizer: Tokenizer, words: Mapping[str, int]) -> list[bytes]:
    """Learn byte-pair merges until each word is a single token; return the new tokens in id order.

    words: the positive frequency of each word (NFC text). Words that are tokens already are
        skipped.

    Each step joins the two neighbouring parts that occur together most often; ties go to the fewest
    characters, then the fewest bytes, then the smallest text. Raises ValueError for a word that the
    pre-tokenizer splits.
    """
    if not isinstance(words, Mapping):
        raise ValueError(f"words must be word to frequency, got {texts.described(words)}")
    words = {w: values.whole(f"the frequency of {w!r}", n, least=1) for w, n in words.items()}
    if refused := splittable(words):
        raise ValueError(f"the pre-tokenizer splits {refused[0]!r}: it cannot be a token")
    ranks = dict(tokenizer.ranks)
    table = tokenizer.id_to_bytes
    new = [word for word in words if word.encode() not in ranks]
    parts = [[table[i] for i in tokenizer.encode(word)] for word in new]
    counts: Counter[bytes] = Counter()
    places: defaultdict[bytes, set[int]] = defaultdict(set)  # candidate -> words it may occur in
    heap: list[tuple[int, int, int, str, bytes]] = []
    changed: set[bytes] = set()

    def count(index: int, sign: int) -> None:
        """Add (sign +1) or subtract (sign -1) the pairs of neighbouring parts of word `index`."""
        for left, right in pairwise(parts[index]):
            counts[left + right] += sign * words[new[index]]
            places[left + right].add(index)
            changed.add(left + right)

    for index in range(len(new)):
        count(index, +1)
    learned: list[bytes] = []
    while changed or heap:
        for token in changed:
            if counts[token]:
                text = token.decode("utf-8", "replace")
                heapq.heappush(heap, (-counts[token], len(text), len(token), text, token))
        changed.clear()
        if not heap:
            break
        frequency, *_, best = heapq.heappop(heap)
        if counts[best] != -frequency:  # an entry from before the count changed
            continue
        ranks[best] = len(tokenizer) + len(learned)
        learned.append(best)
        for index in places.pop(best):
            count(index, -1)
            parts[index] = _merge(parts[index], ranks)
            count(index, +1)
    return learned


def write_tokens(path: str | Path, tokens: Iterable[bytes], *, start_id: int) -> None:
    """Write tokens as a vocabulary expansion file of lines "base64 id".

    start_id: the id of the first token; the others follow it, up to the largest int32.

    Raises ValueError for other ids, FileExistsError if the file exists, and FileNotFoundError if
    its folder does not.
    """
    tokens = list(tokens)
    if wrong := [token for token in tokens if not isinstance(token, bytes)]:
        raise ValueError(f"tokens must be bytes, got {texts.described(wrong[0])}")
    most = values.INT32 + 1 - max(1, len(tokens))
    start_id = values.whole("start_id", start_id, least=0, most=most)
    lines = [
        f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens, start_id)
    ]
    path = paths.parse(path)
    _check_place(path)
    with lock.alone(path, path.with_name(f"{path.name}.lock")):
        _check_place(path)
        paths.write(path, "".join(lines).encode())


def _check_place(path: Path) -> None:
    """Raise FileExistsError or FileNotFoundError unless a new file can be created at this path."""
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name or remove it")
    if not paths.is_place(path):
        raise FileNotFoundError(f"no such folder: {path.parent}")


def _merge(parts: Sequence[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Merge neighbouring parts of a word, lowest rank first, until no two of them form a token.

    parts: the bytes of the word, in pieces.
    ranks: the rank of each token by its bytes; the lowest rank merges first.
    """
    merged = list(parts)
    while len(merged) > 1:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(merged)))
        if rank == math.inf:
            break
        merged[i : i + 2] = [merged[i] + merged[i + 1]]
    return merged


def expand(vocab_file: Path, words_file: Path, *, out_file: Path, start_id: int | None) -> None:
    """Learn tokens for the words of one file, write them to another, and print a summary.

    vocab_file: the vocabulary to expand, such as qwen.tiktoken.
    words_file: lines "word<TAB>frequency", read by `read_words`.
    out_file: the expansion file, which must not exist.
    start_id: the id of the first new token; None for the first one after the vocabulary.

    Words that the pre-tokenizer splits are skipped with a warning on stderr. Raises ValueError if
    `start_id` is taken, or if no file can be made at `out_file`.
    """
    _check_place(out_file)
    command.check_writable("OUT_FILE", out_file)
    tokenizer = Tokenizer.from_file(vocab_file)
    first = len(tokenizer) if start_id is None else start_id
    if first < len(tokenizer):
        raise ValueError(
            f"--start-id {first}: must be at least {len(tokenizer)}, as smaller ids are taken"
        )
    if first > values.INT32:
        raise ValueError(f"--start-id {first}: must be at most {values.INT32}, as ids are int32")
    words = read_words(words_file)
    for word in splittable(words):
        print(f"warning: {word!r} refused: the pre-tokenizer splits it", file=sys.stderr)
        del words[word]
    tokens = learn_tokens(tokenizer, words)
    write_tokens(out_file, tokens, start_id=first)
    known = sum(word.encode() in tokenizer.ranks for word in words)
    ids = f" (ids {first}..{first + len(tokens) - 1})" if tokens else ""
    print(
        f"{out_file}: {len(tokens)} new tokens{ids} for {len(words) - known} words; "
        f"already tokens: {known}"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m qwen_jax.expand_vocab`."""
    result = command.Parser(
        prog="python -m qwen_jax.expand_vocab",
        description="Learn tokens for the words of WORDS_FILE and write them to OUT_FILE, an "
        "expansion that is\nloaded beside the vocabulary: "
        "Tokenizer.from_file(VOCAB_FILE, extra_vocab_file=OUT_FILE).",
        epilog=_EXAMPLES,
    )
    add = result.add_argument
    add("vocab_file", metavar="VOCAB_FILE", type=command.path, help="vocabulary, a qwen.tiktoken")
    add(
        "words_file",
        metavar="WORDS_FILE",
        type=command.path,
        help="UTF-8 lines 'word<TAB>frequency'; without a frequency it is 1",
    )
    add(
        "out_file",
        metavar="OUT_FILE",
        type=command.path,
        help="expansion to write; must not exist yet",
    )
    add(
        "--start-id",
        type=int,
        metavar="N",
        help="id of the first new token (default: the first after the special tokens, "
        "151851 for qwen.tiktoken)",
    )
    command.add_debug(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m qwen_jax.expand_vocab`, and return its exit code."""

    def work(args: argparse.Namespace) -> None:
        expand(args.vocab_file, args.words_file, out_file=args.out_file, start_id=args.start_id)

    return command.run(parser(), work, argv=None if argv is None else list(argv))
