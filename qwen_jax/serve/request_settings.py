"""Turns the fields of a request into the engine's settings: request, then model, then OpenAI."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from qwen_jax.engine.settings import MOST_BIASES, MOST_STOPS, Settings
from qwen_jax.runtime import texts
from qwen_jax.serve import grammars
from qwen_jax.serve.grammars import Source
from qwen_jax.serve.protocol import UNSERVED, ChatRequest, Common, StructuredOutputs
from qwen_jax.serve.refusals import invalid
from qwen_jax.serve.served import Served

_OBJECT = {"type": "object"}  # the schema of any JSON object


def check(body: Common, served: Served) -> None:
    """Raise Refusal for fields that contradict each other, or whose effect cannot be had."""
    for name, nothing in UNSERVED.items():
        value = getattr(body, name, (body.model_extra or {}).get(name))
        if value not in nothing:
            raise invalid(name, "is not supported")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "only with stream")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs", "not with stream")
    if count(body) > served.limits.n:
        raise invalid("n", f"{body.n} sequences: at most {served.limits.n}")
    _check_stops(body, served)
    own = [*served.defaults.chat_stops, *served.defaults.text_stops]
    if len({*own, *(body.stop_token_ids or ())}) > MOST_STOPS:
        raise invalid("stop_token_ids", f"at most {MOST_STOPS}, with the model's own")
    for name in ("stop_token_ids", "allowed_token_ids"):
        _known(name, getattr(body, name) or (), served)
    if body.allowed_token_ids == []:
        raise invalid("allowed_token_ids", "is empty: nothing could be generated")


def _check_stops(body: Common, served: Served) -> None:
    """Raise Refusal for stop texts that end nothing, or take long to look for in each text."""
    limits, texts_given = served.limits, stops(body)
    if len(texts_given) > limits.stops:
        raise invalid("stop", f"{len(texts_given)} texts: at most {limits.stops}")
    for number, stop in enumerate(texts_given):
        param = "stop" if isinstance(body.stop, str) else f"stop[{number}]"
        if not stop:
            raise invalid(param, "is empty")
        if len(stop) > limits.stop_size:
            raise invalid(param, f"{len(stop)} characters: at most {limits.stop_size}")


def _known(name: str, ids: Sequence[int], served: Served) -> None:
    """Raise Refusal for an id that the model does not have."""
    for number, i in enumerate(ids):
        if i >= served.vocab_size:
            what = f"token id {i} is out of range: from 0 to {served.vocab_size - 1}"
            raise invalid(f"{name}[{number}]", what)


def stops(body: Common) -> list[str]:
    """Return the texts that end a reply."""
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or ())


def count(body: Common) -> int:
    """Return the number of sequences for each prompt."""
    return 1 if body.n is None else body.n


def settings(
    body: Common,
    served: Served,
    *,
    room: int,
    asked: int | None,
    default: int,
    own_stops: Sequence[int],
    adapter: str | None,
    grammar: Sequence[grammars.Rule] | None = None,
    **more: Any,
) -> list[Settings]:
    """Return the settings of each sequence of one prompt.

    room: the tokens that are left for the reply.
    asked: the most new tokens that the request wants; None takes `default`, or `room` if less.
    own_stops: the ids that end the model's texts.
    adapter: the engine's name of an adapter.
    grammar: one for each sequence.
    more: further settings.

    Raises Refusal for a reply that does not fit, and for ids that the model does not have.
    """
    name = "max_tokens"
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        name = "max_completion_tokens"
    if asked == 0:
        raise invalid(name, "must be at least 1")
    most = min(default, room) if asked is None else asked
    if most > room or most < 1:
        raise invalid(name, _too_long(served, room, most), code="context_length_exceeded")
    if body.min_tokens is not None and body.min_tokens > most:
        raise invalid("min_tokens", f"{body.min_tokens} is more than {name}, {most}")
    if grammar is not None:
        _check_with_grammar(body)
        more["stops"] = (*own_stops, *served.grammars.ends, *(body.stop_token_ids or ()))
    else:
        own = () if body.ignore_eos else own_stops
        more["stops"] = (*own, *(body.stop_token_ids or ()))
    more["stops"] = tuple(dict.fromkeys(more["stops"]))
    _check_allowed(body, served, more["stops"])
    seed = random.getrandbits(31) if body.seed is None else body.seed
    template = Settings(
        max_new_tokens=most,
        min_new_tokens=body.min_tokens or 0,
        top_k=_or(max(body.top_k, 0) if body.top_k is not None else None, served.defaults.top_k),
        top_p=_or(body.top_p, served.defaults.top_p),
        min_p=_or(body.min_p, 0.0),
        temperature=_temperature(body, served),
        repetition_penalty=_or(body.repetition_penalty, served.defaults.repetition_penalty),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_biases(body, served),
        allowed=body.allowed_token_ids,
        adapter=adapter,
        salt=body.cache_salt or "",
        **more,
    )
    return [
        dataclasses.replace(
            template, seed=(seed + i) % 2**32, grammar=None if grammar is None else grammar[i]
        )
        for i in range(count(body))
    ]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _too_long(served: Served, room: int, most: int) -> str:
    """Say that a prompt and its reply do not fit."""
    prompt = served.longest - room
    if room < 1:
        return f"the prompt of {prompt} tokens leaves no room: the model takes {served.longest}"
    return (
        f"{most} new tokens after a prompt of {prompt} do not fit: the model takes "
        f"{served.longest} together, so at most {room}"
    )


def _temperature(body: Common, served: Served) -> float:
    """Return the temperature. A request that only cuts the distribution wants to draw from it."""
    if body.temperature is not None:
        return body.temperature
    cuts = (body.top_p, body.top_k, body.min_p)
    if served.defaults.temperature == 0 and any(x is not None for x in cuts):
        return 1.0
    return served.defaults.temperature


def _biases(body: Common, served: Served) -> dict[int, float]:
    """Return logit_bias, whose ids are texts in JSON, by id. Raises Refusal."""
    given = body.logit_bias or {}
    if len(given) > MOST_BIASES:
        raise invalid("logit_bias", f"{len(given)} ids: at most {MOST_BIASES}")
    found = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise invalid("logit_bias", f"{texts.shown(key)} is no token id")
        if int(key) >= served.vocab_size:
            what = f"token id {key} is out of range: from 0 to {served.vocab_size - 1}"
            raise invalid(f"logit_bias.{key}", what)
        found[int(key)] = bias
    return found


def _check_with_grammar(body: Common) -> None:
    """Raise Refusal for a field that may leave nothing that the grammar allows."""
    for name in ("ignore_eos", "min_tokens", "allowed_token_ids"):
        if getattr(body, name):
            raise invalid(name, "not with a grammar, which decides where a reply ends")


def _check_allowed(body: Common, served: Served, stops: Sequence[int]) -> None:
    """Raise Refusal if none of `allowed_token_ids` could be the first token."""
    if body.allowed_token_ids is None:
        return
    left = set(body.allowed_token_ids) & served.tokenizer.id_to_bytes.keys()
    if not left:
        raise invalid("allowed_token_ids", "none of these ids is a token of the tokenizer")
    if body.min_tokens and left <= set(stops):
        what = f"all these ids end a text, which min_tokens, {body.min_tokens}, does not let end"
        raise invalid("allowed_token_ids", what)


def grammar_of(body: Common) -> Source | None:
    """Return the field that has the request's grammar, and what makes it; None if none has.

    Raises Refusal if there are several.
    """
    found: list[Source] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append(Source("response_format", grammars.of_schema, _OBJECT))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise invalid("response_format.json_schema", "is missing")
        schema = form.json_schema.json_schema
        if schema is None:
            raise invalid("response_format.json_schema.schema", "is missing")
        where = "response_format.json_schema.schema"
        found.append(Source(where, grammars.of_schema, schema))
    given = body.structured_outputs
    if given is not None:
        if given.structural_tag is not None:
            raise invalid("structured_outputs.structural_tag", "is not supported")
        found += _kinds(given, "structured_outputs.")
    older = StructuredOutputs(
        json=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
    )
    found += _kinds(older, "guided_")
    if len(found) > 1:
        names = " and ".join(source.param for source in found)
        raise invalid(found[1].param, f"only one grammar can be given, not {names}")
    return found[0] if found else None


def _kinds(given: StructuredOutputs, prefix: str) -> list[Source]:
    """Return the grammars among vLLM's fields."""
    kinds = [
        ("json", grammars.of_schema, given.json_schema),
        ("regex", grammars.of_regex, given.regex),
        ("choice", grammars.of_choices, given.choice),
        ("grammar", grammars.of_grammar, given.grammar),
        ("json_object", grammars.of_schema, _OBJECT if given.json_object else None),
    ]
    return [Source(prefix + name, make, x) for name, make, x in kinds if x is not None]
