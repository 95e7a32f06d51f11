"""Reads prompts from a file: one per line, or JSON Lines. No tokenizer is involved."""

import hashlib
import json
from pathlib import Path

from qwen_jax.runtime import command, processes, texts

_KEY = "prompt"  # the key of a prompt in JSON Lines


def whole(path: str | Path) -> str:
    """Read a file as one prompt, with every line ending as a single newline."""
    return texts.read(path).replace("\r\n", "\n").replace("\r", "\n")


def read(path: str | Path) -> list[str]:
    """Read the prompts of a file, and print a note of the JSON keys that are ignored.

    A prompt is a line; in a file whose name ends in .jsonl it is a JSON string, or the value of
    "prompt" in a JSON object. Blank lines are skipped. Raises ValueError, with file and line, for
    an invalid prompt, for a file without prompts, and if the processes of a run read different
    prompts.
    """
    records = str(path).lower().endswith(".jsonl")
    found: list[str] = []
    passed: dict[str, None] = {}
    for number, line in enumerate(whole(path).split("\n"), 1):
        if not line.strip():
            continue
        if records:
            line, others = _record(line, f"{path}:{number}")
            passed |= dict.fromkeys(others)
        found.append(line)
    if not found:
        raise ValueError(f"{path} has no prompts: write one on each line")
    if passed:
        others = ", ".join(passed)
        command.say(f'note: {path}: only the "{_KEY}" of each record is used, not {others}')
    digest = hashlib.sha256("\0".join(found).encode()).hexdigest()
    processes.agree("prompts", f"{len(found)} of digest {digest[:16]}")
    return found


def _record(line: str, where: str) -> tuple[str, list[str]]:
    """Parse a line of JSON into its prompt and the keys other than "prompt".

    where: the file and the number of the line, for errors.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: not valid JSON: each line of a .jsonl file must be a JSON text or object"
        ) from None
    others = []
    if isinstance(value, dict):
        if _KEY not in value:
            keys = ", ".join(map(repr, value)) or "no key at all"
            raise ValueError(f'{where}: has no "{_KEY}", but {keys}: name the prompt "{_KEY}"')
        others = [key for key in value if key != _KEY]
        value = value[_KEY]
    prompt = texts.check_whole(f"{where}: the prompt", value)
    if not prompt:
        raise ValueError(f"{where}: empty prompt: give some text")
    return prompt, others
