"""What a checkpoint says of its tokenizer beside the vocabulary: its tokenizer_config.json.

One key is heeded, `extra_vocab_file`; what others ask for and is not done is said in one line.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax import paths
from qwen_jax.tokenizer import SPECIAL_TOKENS

# Keys that would change ids or text, and the values that mean what is done here.
_DONE: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("QWenTokenizer",),
    "errors": ("replace",),
    "do_lower_case": (False,),
    "add_bos_token": (False,),
    "add_eos_token": (False,),
    "add_prefix_space": (False,),
}
_CHATML = "<|im_start|>"


def extra_vocab_file(root: Path, values: Mapping[str, Any]) -> Path | None:
    """The expansion of the vocabulary that a directory's tokenizer_config.json names, if any.

    Raises ValueError unless it is a file of that directory: whoever made the checkpoint chose the
    name, and what lies elsewhere on this machine is not theirs to read.
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


def warn(values: Mapping[str, Any]) -> None:
    """Say in one line which keys ask for what is not done."""
    asked = [
        f"{key}={values[key]!r}"
        for key, done in _DONE.items()
        if values.get(key) is not None and values[key] not in done
    ]
    if unknown := sorted(_added(values) - set(SPECIAL_TOKENS)):
        asked.append(f"added tokens {', '.join(unknown)}")
    template = values.get("chat_template")
    if template is not None and _CHATML not in str(template):
        asked.append("chat_template, which is not ChatML")
    if asked:
        warnings.warn(
            f"tokenizer_config.json asks for what is not done: {'; '.join(asked)}", stacklevel=3
        )


def _added(values: Mapping[str, Any]) -> set[str]:
    """The text of the tokens that a library has added to the vocabulary, or means to."""
    decoder, more = values.get("added_tokens_decoder"), values.get("additional_special_tokens")
    entries = [*(decoder.values() if isinstance(decoder, dict) else ())]
    entries += more if isinstance(more, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {text for text in texts if isinstance(text, str)}
