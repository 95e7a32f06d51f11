"""The plan of an export under the names of Qwen2, and the small files of such a folder.

Programs that do not take the first generation of Qwen load the folder, and no code of its own: the
computation is that of Qwen2 up to seq_length, and the token ids are the same.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from convert.export_plan import ExportPlan
from qwen_jax import chat, checkpoint
from qwen_jax.chat import tokenizer_json
from qwen_jax.chat.prompt import DEFAULT_SYSTEM
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from qwen_jax.checkpoint import directory, token_ids
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.config import Config, qwen2_config
from qwen_jax.decoding.sampling import Nucleus
from qwen_jax.runtime import command
from qwen_jax.runtime.texts import read_json

_TOKENIZER = "tokenizer.json"
# ChatML as `chat.make_context` writes it. What it has no place for is refused, not left out.
_TEMPLATE = """
{%- if tools %}
    {{- raise_exception('this model has no place for tools: write them into the question') }}
{%- endif %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nDEFAULT_SYSTEM<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- if not (role in ('user', 'assistant') or loop.first and role == 'system') %}
        {{- raise_exception('roles are system (first only), user and assistant, not ' + role) }}
    {%- endif %}
    {{- '<|im_start|>' + role + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip().replace("DEFAULT_SYSTEM", DEFAULT_SYSTEM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Plan(ExportPlan):
    """The plan of an export under the names of Qwen2, whose input has been checked.

    documents: the contents of its small JSON files, by name.
    tokenizer: the tokenizer, for tokenizer.json; None if the source has none.
    vocab_size: the rows of the embedding.
    """

    documents: Mapping[str, Mapping[str, Any]]
    tokenizer: Tokenizer | None
    vocab_size: int
    # The others belong to the format of the source.
    carried: ClassVar[tuple[str, ...]] = ("LICENSE*", "NOTICE*")

    def begin(self) -> None:
        """Write the JSON files: config, generation settings, tokenizer and chat template."""
        for name, contents in self.documents.items():
            directory.write_json(self.target / name, contents)
        if self.tokenizer is not None:
            made = tokenizer_json.contents(self.tokenizer, self.vocab_size)
            if made["model"]["ignore_merges"]:
                command.say(
                    f"warning: no merges lead to some tokens of the vocabulary: {_TOKENIZER} says "
                    "ignore_merges for them, and programs that pass over it cut their texts "
                    "differently"
                )
            directory.write_json(self.target / _TOKENIZER, made)


def of(plan: ExportPlan, config: Config) -> Qwen2Plan:
    """Make the plan of a Qwen2 folder from a plan whose tensors have Qwen2's names.

    config: the architecture of the source. Says in lines on stderr what is lost. Raises ValueError
    for an architecture that Qwen2 cannot express, and for a vocabulary that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `inspection.vocabulary` has said them
        tokenizer = checkpoint.load_tokenizer(plan.source)
    if plan.settings is None:
        settings = checkpoint.load_generation_config(plan.source)
    else:
        settings = GenerationConfig.from_hf(read_json(plan.settings), plan.settings)
    vocabulary = plan.source / directory.TOKENIZER
    token_ids.check_fits(vocabulary, tokenizer, vocab_size=config.vocab_size)
    made = documents(config, tokenizer, settings=settings, dtype=plan.dtype)
    made[directory.CONFIG] |= plan.config
    for line in lost(config, settings):
        command.say(f"warning: {line}")
    shared: dict[str, Any] = {**vars(plan), "facts": plan.facts | {"as": "qwen2"}}
    return Qwen2Plan(**shared, documents=made, tokenizer=tokenizer, vocab_size=config.vocab_size)


def documents(
    config: Config, tokenizer: Tokenizer | None, *, settings: GenerationConfig, dtype: str
) -> dict[str, dict[str, Any]]:
    """Return the contents of the JSON files of a Qwen2 folder by name, but for tokenizer.json.

    settings: the generation settings of the source.
    dtype: the dtype of the exported tensors.

    Raises ValueError that names what Qwen2 cannot express.
    """
    made = qwen2_config.write(config)
    ids = _ids(settings, tokenizer, vocab_size=config.vocab_size)
    found = {
        directory.GENERATION_CONFIG: _generation(settings, config.vocab_size) | ids,
        directory.CONFIG: made
        | {"torch_dtype": dtype}
        | {key: i[0] if isinstance(i, list) else i for key, i in ids.items()},
    }
    if tokenizer is not None:
        found["tokenizer_config.json"] = _tokenizer_config(
            tokenizer,
            vocab_size=config.vocab_size,
            longest=made["max_position_embeddings"],
            chatml=settings.chat_format == "chatml",
        )
    return found


def lost(config: Config, settings: GenerationConfig) -> Iterator[str]:
    """Describe what a model loses in a Qwen2 folder, a line for each loss."""
    if line := qwen2_config.lost(config):
        yield line
    if several := [list(stop) for stop in settings.stops if len(stop) > 1]:
        yield (
            f"stop_words_ids {several} are left out, as a stop of generation_config.json is one "
            "token elsewhere: name these stops in requests"
        )


def _ids(
    settings: GenerationConfig, tokenizer: Tokenizer | None, *, vocab_size: int
) -> dict[str, Any]:
    """Return the ids that end a text, most usual first, and the id of padding, where known."""
    stops, pad = settings.stops, settings.pad_id
    if tokenizer is not None:
        turn = chat.stop_sequences(tokenizer, "chatml") if settings.chat_format == "chatml" else ()
        stops = (*turn, *stops, (tokenizer.eod_id,))
        pad = tokenizer.eod_id if pad is None else pad
    ends = [stop[0] for stop in dict.fromkeys(stops) if len(stop) == 1 and stop[0] < vocab_size]
    found = {"eos_token_id": ends} if ends else {}
    return found if pad is None or pad >= vocab_size else found | {"pad_token_id": pad}


def _generation(settings: GenerationConfig, vocab_size: int) -> dict[str, Any]:
    """Return the settings of a generation_config.json by the names that other programs know."""
    sampler = settings.sampler
    made: dict[str, Any] = {"do_sample": False}
    if isinstance(sampler, Nucleus):
        made = {
            "do_sample": True,
            "temperature": sampler.temperature,
            # No limit: some programs refuse 0, others -1, and without the key it is 50 in some.
            "top_k": sampler.top_k or vocab_size,
            "top_p": sampler.top_p,
        }
    return made | {
        "repetition_penalty": sampler.repetition_penalty,
        "max_new_tokens": settings.max_new_tokens,
    }


def _tokenizer_config(
    tokenizer: Tokenizer, *, vocab_size: int, longest: int, chatml: bool
) -> dict[str, Any]:
    """Return the contents of a tokenizer_config.json.

    vocab_size: the rows of the embedding. longest: the most tokens of a text. chatml: whether
    replies end at <|im_end|>.
    """
    controls = tokenizer_json.control_tokens(tokenizer, vocab_size)
    end, turn_begin, turn_end = SPECIAL_TOKENS[:3]
    chats = turn_begin in controls and turn_end in controls
    added = {
        str(i): {"content": name, **tokenizer_json.ADDED_TOKEN} for name, i in controls.items()
    }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [turn_begin, turn_end] if chats else [],
        "bos_token": None,
        "eos_token": turn_end if chatml and chats else end if end in controls else None,
        "pad_token": end if end in controls else None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": longest,
        **({"chat_template": _TEMPLATE} if chats else {}),
    }
