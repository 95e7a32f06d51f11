"""The published Qwen vocabulary for tests, from the PyPI package dashscope, and a tiny one."""

import base64
import functools
import hashlib
import importlib.util
from pathlib import Path

from qwen_jax.chat.tokenizer import Tokenizer

SIZE = 2_561_218
MD5 = "f0bffbad8c413a41d51fe6da4a7e99d7"


def qwen_vocab_path() -> Path:
    """The path of the published qwen.tiktoken. Raises RuntimeError if the file is another one."""
    spec = importlib.util.find_spec("dashscope")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "these tests need the vocabulary in the package dashscope: "
            'install the test extra, pip install -e ".[test]"'
        )
    path = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    if not path.is_file():
        raise RuntimeError(
            f'{path} is missing: install the test extra again, pip install -e ".[test]"'
        )
    data = path.read_bytes()
    if len(data) != SIZE or hashlib.md5(data, usedforsecurity=False).hexdigest() != MD5:
        raise RuntimeError(f"{path} is not the published qwen.tiktoken ({SIZE} bytes, md5 {MD5})")
    return path


@functools.cache
def qwen_tokenizer() -> Tokenizer:
    """The published tokenizer, read once per process."""
    return Tokenizer.from_file(qwen_vocab_path())


def tiny_ranks() -> dict[bytes, int]:
    """A vocabulary of 261 ranks: the 256 bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ab", b"cd", b"abcd", b"\xe4\xbd", b"\xe4\xbd\xa0"]
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiny_vocab(path: Path) -> Path:
    """Write the tiny vocabulary as a qwen.tiktoken file; with its special tokens it has 469 ids."""
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in tiny_ranks().items()]
    path.write_text("".join(lines))
    return path
