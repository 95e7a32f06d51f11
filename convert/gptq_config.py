"""Reads how the weights of a GPTQ checkpoint folder are quantised, and refuses what is not known.

The tools write the same keys to two places, `quantization_config` of config.json and
quantize_config.json; old folders have only one of them. Keys that do not change what the tensors
mean are passed over.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.gptq import Form
from qwen_jax.checkpoint import directory
from qwen_jax.runtime import texts, values
from qwen_jax.runtime.texts import read_json

_METHOD = "gptq"
# The keys that name the format of the tensors, and its values with what they say of zeros.
_FORMAT_KEYS = ("checkpoint_format", "format")
_FORMATS = {"gptq": None, "gptq_v2": "v2"}
# Keys that must agree where both places have them.
_SHARED = ("bits", "group_size", "sym", "desc_act", "quant_method", *_FORMAT_KEYS, "dynamic")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the weights of a folder are quantised.

    form: how most layers are: 4 or 8 bits, and the number of inputs that share a scale.
    rules: what differs by layer (`dynamic`): patterns of names with the form of layers that they
        match from the beginning, or None where these are floats. The first that matches holds.
    symmetric: whether every zero is 2^(bits - 1).
    desc_act: whether inputs may be of any group (act-order).
    zeros: "v1" or "v2", how qzeros holds zeros; None if the folder does not say.
    """

    form: Form
    rules: tuple[tuple[re.Pattern[str], Form | None], ...]
    symmetric: bool
    desc_act: bool
    zeros: str | None

    def form_of(self, name: str) -> Form | None:
        """Return how a layer is quantised, by its name; None if it is not."""
        return next((form for rule, form in self.rules if rule.match(name)), self.form)


def read(source: Path) -> Settings | None:
    """Read the settings of a checkpoint folder; None if it says nothing of quantisation.

    Raises ValueError that names the key and its value for what cannot be converted, and for keys
    that differ between the two places.
    """
    config, file = source / directory.CONFIG, source / directory.QUANTIZE_CONFIG
    inside = read_json(config).get(directory.QUANTIZATION)
    found: list[tuple[Path, Mapping[str, Any]]] = []
    if inside is not None:
        if not isinstance(inside, dict):
            raise ValueError(
                f"{config}: {directory.QUANTIZATION} is {texts.shown(inside)}, not an object"
            )
        found.append((config, inside))
    if file.exists():
        found.append((file, read_json(file)))
    if not found:
        return None
    for place, said in found:
        with values.named(place):
            _refuse(said)
    for key in _SHARED:
        held = [(place, said[key]) for place, said in found if said.get(key) is not None]
        if len(held) == 2 and held[0][1] != held[1][1]:
            (first, a), (second, b) = held
            raise ValueError(
                f"{key} is {texts.shown(a)} in {first} and {texts.shown(b)} in {second}: put the "
                "two files there that came with these weights"
            )
    merged = {key: value for _, said in reversed(found) for key, value in said.items()}
    with values.named(" and ".join(str(place) for place, _ in found)):
        return _checked(merged)


def _checked(said: Mapping[str, Any]) -> Settings:
    """Return the settings in the merged contents of the two places; ValueError for others."""
    form = _form(said)
    formats = {said[key] for key in _FORMAT_KEYS if said.get(key)}
    if len(formats) > 1:
        told = " and ".join(f"{key} is {texts.shown(said[key])}" for key in _FORMAT_KEYS)
        raise ValueError(f"{told}: put the files there that came with these weights")
    return Settings(
        form=form,
        rules=tuple(_rules(said, form)),
        symmetric=_flag(said, "sym", default=True),
        desc_act=_flag(said, "desc_act", default=False),
        zeros=_FORMATS[formats.pop()] if formats else None,
    )


def _form(said: Mapping[str, Any]) -> Form:
    """Return the bits and the groups that settings name; ValueError for others than can be read."""
    bits = values.whole("bits is", values.from_file(said.get("bits")))
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}: only 4 and 8 can be read")
    per_word = 32 // bits
    size = values.whole("group_size is", values.from_file(said.get("group_size", -1)), least=-1)
    if size == 0 or (size > 0 and size % per_word):
        raise ValueError(f"group_size is {size}: must be -1 or a multiple of {per_word}")
    return Form(bits, size)


def _rules(said: Mapping[str, Any], form: Form) -> Iterator[tuple[re.Pattern[str], Form | None]]:
    """Yield the patterns of `dynamic`, each with the form of the layers that it matches.

    A pattern with the prefix "-:" names layers of floats; one with "+:", or without prefix, layers
    with other settings. form: that of the other layers.
    """
    dynamic = said.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(x, dict) for x in dynamic.values()):
        raise ValueError(f"dynamic is {texts.shown(dynamic)}: must be objects by pattern")
    for key, changes in dynamic.items():
        try:
            rule = re.compile(re.sub(r"^[+-]:", "", key))
        except re.error as error:
            raise ValueError(
                f"dynamic has {texts.shown(key)}, which is no pattern: {error}"
            ) from None
        if key.startswith("-:"):
            yield rule, None
            continue
        for name, value in changes.items():
            same = name == "sym" and value == _flag(said, "sym", default=True)
            if name not in ("bits", "group_size", "desc_act") and not same:
                raise ValueError(
                    f"dynamic has {name} {texts.shown(value)} for {texts.shown(key)}: only bits, "
                    "group_size and desc_act can differ by layer"
                )
        yield rule, _form({**form._asdict(), **changes})


def _refuse(said: Mapping[str, Any]) -> None:
    """Raise ValueError for options under which the tensors have another meaning or layout.

    said: the contents of one of the two places.
    """
    method = said.get("quant_method", _METHOD)
    if method != _METHOD:
        raise ValueError(
            f"quant_method is {texts.shown(method)}: only GPTQ checkpoints can be read; take the "
            "GPTQ version of this model, or the floats that it was made from"
        )
    for key in _FORMAT_KEYS:
        format_ = said.get(key)
        if format_ and format_ not in [*_FORMATS]:
            raise ValueError(
                f"{key} is {texts.shown(format_)}: only gptq and gptq_v2 can be read; its tool can "
                "save the model in one of them"
            )
    options = {
        "is_marlin_format": "weights packed for Marlin: save the model in the format gptq",
        "lm_head": "a quantised head",
    }
    for key, why in options.items():
        if said.get(key):
            raise ValueError(f"{key} is {texts.shown(said[key])}, {why}, which cannot be read")
    if (packed := said.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise ValueError(f"pack_dtype is {texts.shown(packed)}: only int32 can be read")


def _flag(said: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return a key's value, which must be true or false; `default` if it is absent or null."""
    value = said.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {texts.shown(value)}: must be true or false")
    return value
