"""Better errors for keyword arguments of other libraries: they name this library's argument.

This module knows the argument names of `load` and `LanguageModel`, but not their effects.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from qwen_jax.runtime import texts

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")  # settings of samplers


def _named(names: str, needs: str, *, hint: str) -> dict[tuple[str, str], str]:
    """Return one hint for several foreign keywords, as a dict from (keyword, argument) to hint.

    names: the foreign keywords, separated by spaces.
    needs: the argument of this library that a function must have for the hint to apply.
    hint: the advice, in which {} becomes the value that was given.
    """
    return {(name, needs): hint for name in names.split()}


# "{}" is the value that was given.
_HINTS = {
    **_named(
        "max_tokens max_length max_new max_completion_tokens max_output_tokens num_tokens n_tokens",
        "max_new_tokens",
        hint="give max_new_tokens={}",
    ),
    **_named(
        "stop_words stop_words_ids stop_strings stop_sequences stop_token_ids eos_token_id stops",
        "stop",
        hint="give stop=: token ids, or sequences of them; generate_text takes texts",
    ),
    **_named("seeds random_seed random_state generator", "seed", hint="give seed=, a whole number"),
    **_named(
        "do_sample sample", "sampler", hint="sampler=qwen_jax.Nucleus() draws, Greedy() does not"
    ),
    **_named("num_beams beam_size", "sampler", hint="there is no beam search"),
    **_named(
        "stream streamer",
        "sampler",
        hint="model.stream and model.chat_stream yield what they make as it is made",
    ),
    **_named(
        "attention_mask", "mask", hint="give mask=, 1 = real; rows of unequal length need none"
    ),
    **_named(
        "prompt prompts text texts inputs input_ids prompt_token_ids",
        "tokens",
        hint="tokens are ids, rows of any lengths; model.generate_text(prompts) takes texts",
    ),
    **_named(
        "prompt text texts inputs input_ids tokens prompt_token_ids",
        "prompts",
        hint="prompts are a text, or texts; model.generate(tokens) takes ids",
    ),
    **_named("messages", "tokens", hint="model.chat(query, history) takes them"),
    **_named("messages", "prompts", hint="model.chat(query, history) takes them"),
    **_named("messages", "query", hint="give query, the last one, and history=, those before it"),
    **_named("prompt text inputs message", "query", hint="give query="),
    **_named("system_prompt system_message", "system", hint="give system="),
    **_named(
        "n num_samples num_return_sequences",
        "tokens",
        hint="repeat the row, and give seed=range({})",
    ),
    **_named(
        "n num_samples num_return_sequences",
        "prompts",
        hint="repeat the prompt, and give seed=range({})",
    ),
    **_named("torch_dtype", "dtype", hint="give dtype={}"),
    **_named(
        "max_model_len max_seq_len max_seq_length n_ctx", "max_length", hint="give max_length={}"
    ),
    **_named("attn_implementation attention_implementation", "attention", hint="give attention="),
    **_named(
        "kv_cache_dtype use_cache_quantization", "cache_dtype", hint='give cache_dtype="int8"'
    ),
    **_named("config", "overrides", hint="give overrides=, values by their Hugging Face names"),
    **_named(
        "device device_map mesh tensor_parallel_size",
        "path",
        hint='a model is on the mesh in force: jax.set_mesh(meshes.make({{"tp": 2}}))',
    ),
    **_named(
        "lora lora_path lora_request adapter_path adapter_dir peft", "adapter", hint="give adapter="
    ),
    **_named("trust_remote_code", "path", hint="drop it: no code of a checkpoint is run"),
}


def explained(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: the TypeError for an unknown keyword then says what to pass instead."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if unknown := {name: value for name, value in kwargs.items() if name not in known}:
            raise TypeError(f"{function.__name__} has no argument {_instead(unknown, known)}")
        return function(*args, **kwargs)

    return checked


def _instead(unknown: Mapping[str, Any], known: Sequence[str]) -> str:
    """Return the end of an error message: the first unknown keyword, and what to pass instead.

    unknown: the unknown keywords with their values.
    known: the names of the function's arguments.
    """
    name, value = next(iter(unknown.items()))
    if name in _SETTINGS and "sampler" in known:
        if unknown.get("temperature") == 0:
            return f"{name!r}: give sampler=qwen_jax.Greedy(), which temperature 0 means"
        given = [f"{key}={texts.shown(unknown[key])}" for key in _SETTINGS if key in unknown]
        return f"{name!r}: give sampler=qwen_jax.Nucleus({', '.join(given)})"
    for needs in known:
        if hint := _HINTS.get((name, needs)):
            return f"{name!r}: {hint.format(texts.shown(value))}"
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"give {near[0]}=" if near else f"it has {', '.join(known)}"
    return f"{name!r}: {meant}"
