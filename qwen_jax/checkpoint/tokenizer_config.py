"""Tokenizer settings beside the vocabulary: tokenizer_config.json, and files of added tokens.

Only the key `extra_vocab_file` has an effect. Entries of tokenizer_config.json,
special_tokens_map.json and added_tokens.json that would matter and are ignored cause a warning.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint.directory import some
from qwen_jax.runtime import paths
from qwen_jax.runtime.texts import read_json

# Keys that would change ids or text, with the values that describe this tokenizer.
_DONE: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("QWenTokenizer",),
    "errors": ("replace",),
    "do_lower_case": (False,),
    "add_bos_token": (False,),
    "add_eos_token": (False,),
    "add_prefix_space": (False,),
}
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # of special tokens in transformers
_CHATML = "<|im_start|>"


def extra_vocab_file(root: Path, values: Mapping[str, Any]) -> Path | None:
    """Return the vocabulary expansion that a directory's tokenizer_config.json names, or None.

    root: the directory.
    values: the contents of its tokenizer_config.json.

    Raises ValueError unless the expansion is a file of that directory: the checkpoint's author
    chose the name, and must not be able to have other files of this machine read.
    """
    name = values.get("extra_vocab_file")
    if name is None or name == "":
        return None
    said = f"tokenizer_config.json of {root} names the extra_vocab_file {name!r}"
    if not isinstance(name, str):
        raise ValueError(f"{said}: a file's name, or null")
    if not paths.is_within(root, name):
        raise ValueError(
            f"{said}, which is not within that directory: copy the file there and name it without "
            "a folder, or remove the key where qwen.tiktoken has the new tokens itself"
        )
    file = root / name
    if not file.is_file():
        raise ValueError(
            f"{said}, which is not there: copy it there, or remove the key where qwen.tiktoken has "
            "the new tokens itself"
        )
    return file


def warn(root: Path, values: Mapping[str, Any], *, tokenizer: Tokenizer) -> None:
    """Warn of ignored entries in the files beside the vocabulary, one line for each file.

    root: the directory of the files.
    values: the contents of tokenizer_config.json.
    tokenizer: the tokenizer, whose tokens need no warning.

    Raises ValueError for a file that is not a JSON object.
    """
    asked = [
        f"{key}={values[key]!r}"
        for key, done in _DONE.items()
        if values.get(key) is not None and values[key] not in done
    ]
    told: set[str] = set()

    def lacking(names: Iterable[str]) -> list[str]:
        """Return the tokens, sorted, that neither the vocabulary nor an earlier warning has."""
        found = sorted(name for name in {*names} - told if not _holds(tokenizer, name))
        told.update(found)
        return found

    if unknown := lacking(_added(values)):
        asked.append(f"added tokens {some(unknown)}")
    template = values.get("chat_template")
    if template is not None and _CHATML not in str(template):
        asked.append("chat_template, which is not ChatML")
    if asked:
        warnings.warn(
            f"tokenizer_config.json has entries that are ignored: {'; '.join(asked)}", stacklevel=3
        )
    for name, tokens_of in (("special_tokens_map.json", _added), ("added_tokens.json", iter)):
        file = root / name
        if file.exists() and (unknown := lacking(tokens_of(read_json(file)))):
            warnings.warn(
                f"{name} has entries that are ignored: added tokens {some(unknown)}", stacklevel=3
            )


def _holds(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether the vocabulary has a token with this text."""
    return text in tokenizer.special_tokens or text.encode("utf-8", "replace") in tokenizer.ranks


def _added(values: Mapping[str, Any]) -> set[str]:
    """Return the texts of tokens that a library has added, or would add, to the vocabulary.

    values: the contents of tokenizer_config.json or special_tokens_map.json.

    An entry may be a text, an object with the text as "content", or a list of either.
    """
    decoder, more = values.get("added_tokens_decoder"), values.get("additional_special_tokens")
    entries = [*(decoder.values() if isinstance(decoder, dict) else ())]
    entries += more if isinstance(more, list) else [more]
    entries += [values.get(f"{role}_token") for role in _ROLES]
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {text for text in texts if isinstance(text, str) and text}
