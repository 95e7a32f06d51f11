"""Learns a vocabulary from text and writes it as a qwen.tiktoken: `python train/tokenizer.py`.

Byte-pair encoding (arXiv 1508.07909) by Hugging Face's `tokenizers`, on the pieces into which
Qwen's tokenizer cuts text. A small model then needs no vocabulary of 151 643 tokens.
"""

import argparse
import base64
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.chat.tokenizer import PATTERN, SPECIAL_TOKENS
from qwen_jax.chat.tokenizer_json import byte_letters
from qwen_jax.runtime import command, lock, paths, values
from qwen_jax.runtime.texts import check_whole, described

_EXAMPLES = """examples:
  python train/tokenizer.py --data book.txt --size 4096 --out qwen.tiktoken
"""
_BYTES, _MOST = 256, 10**7


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    result = command.Parser(
        prog="python train/tokenizer.py",
        description="Learn a vocabulary from text and write it as a qwen.tiktoken, for a model of "
        "your own, which\n`python train/pretrain.py --tokenizer FILE` trains.",
        epilog=_EXAMPLES,
    )
    add = result.add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files of text to learn from (required): JSONL, JSON, Parquet, or text, which is one "
        "document",
    )
    add(
        "--field",
        type=command.text,
        default="text",
        metavar="NAME",
        help="field of a record that holds its text (default: %(default)s)",
    )
    add(
        "--size",
        type=command.positive,
        default=4096,
        metavar="N",
        help="number of tokens to learn, with the 256 bytes and without the control tokens that "
        "come after them (default: %(default)s)",
    )
    add(
        "--out",
        type=command.path,
        required=True,
        metavar="FILE",
        help="qwen.tiktoken to write (required); must not exist yet, its folder is made",
    )
    command.add_debug(result)
    return result


def work(args: argparse.Namespace) -> None:
    """Learn a vocabulary and write it, under a lock, as the arguments say.

    Raises UsageError for a size out of range, and ValueError if the file exists.
    """
    if args.size <= _BYTES:
        raise command.UsageError(
            f"--size {args.size}: must be more than {_BYTES}, as every byte is a token"
        )
    if args.size > _MOST:
        raise command.UsageError(f"--size {args.size}: must be at most {_MOST}")
    with lock.alone(args.out, args.out.with_name(f"{args.out.name}.lock")):
        if args.out.exists():
            raise ValueError(f"{args.out} exists: give another --out, or remove it")
        _learn(args)


def _learn(args: argparse.Namespace) -> None:
    """Learn a vocabulary from the texts of all records, and write it as a qwen.tiktoken."""
    from qwen_jax.runtime import records
    from train import data

    def texts() -> Iterator[str]:
        for file in records.files(args.data):
            for record in records.read(file):
                if record.problem:
                    raise ValueError(f"{record.where}: {record.problem}")
                try:
                    yield data.text_of(record.value, args.field)
                except ValueError as error:
                    raise ValueError(f"{record.where}: {error}") from None

    ranks = learn(texts(), args.size)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    paths.write(args.out, b"".join(lines))
    controls = len(SPECIAL_TOKENS)
    command.say(
        f"{args.out}: {len(ranks)} tokens, and {controls} control tokens after them: the model's "
        f'config.json needs "vocab_size": {len(ranks) + controls}, or more'
    )


def learn(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Learn a vocabulary of `size` tokens; return the rank of each token.

    The bytes come first, then merged tokens in the order learned. Raises ValueError if the texts
    have too few different pairs, or are not strings.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts must be a list of texts, got {described(texts)}")
    size = values.whole("size", size, least=_BYTES + 1)
    import unicodedata

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    normalised = (unicodedata.normalize("NFC", check_whole("each text", text)) for text in texts)
    letters = byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(letters.values()), show_progress=False
    )
    learner.train_from_iterator(normalised, trainer)
    of_letter = {letter: byte for byte, letter in letters.items()}
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(of_letter[letter] for letter in token) for token, _ in learned]
    if len(tokens) < size:
        raise ValueError(
            f"the texts give {len(tokens)} tokens, not {size}: give more text, or a smaller --size"
        )
    ordered = [*sorted(t for t in tokens if len(t) == 1), *(t for t in tokens if len(t) > 1)]
    return {token: rank for rank, token in enumerate(ordered)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), work, argv=None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
