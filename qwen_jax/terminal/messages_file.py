"""A conversation as a JSON file: a list of messages, as in the OpenAI API."""

import json
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import chat
from qwen_jax.runtime import errors, paths, texts

_FORM = 'a list of messages {"role": ..., "content": ...}'


def write(path: Path, pairs: Sequence[tuple[str, str]], *, system: str, replace: bool) -> bool:
    """Write a conversation, completely or not at all; return whether a file was replaced.

    pairs: (question, reply), the oldest first.
    system: the text of the system message.
    replace: whether a file that is there is replaced; otherwise it is refused.

    Raises ValueError if the file cannot be written, or must not be.
    """
    messages = [{"role": "system", "content": system}]
    for question, reply in pairs:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    data = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
    try:
        there = path.exists()
        if there and not path.is_file():
            raise ValueError(f"{path}: is no file: name another place")
        if there and not replace:
            raise ValueError(f"{path}: exists already: name another file, or replace it by :save!")
        paths.write(path, data.encode())
    except Exception as error:  # of a disk, or of gs://
        raise ValueError(errors.explain(error)) from None
    return there


def read(path: Path, system: str) -> tuple[str, list[tuple[str, str]]]:
    """Read a conversation; return the text of its system message, and pairs (question, reply).

    The file is a list of messages, or an object that has such a list as "messages". Calls of tools
    and their results become part of the reply.

    system: the text of the system message where the file has none.

    Raises ValueError that names the file if it cannot be read, or is not a conversation that ends
    with a reply.
    """
    try:
        text = texts.read(path)
    except Exception as error:  # of a disk, or of gs://
        raise ValueError(errors.explain(error)) from None
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError(f"{path}: must be {_FORM}, as :save writes it")
    try:
        return chat.turns_of(messages, system)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
