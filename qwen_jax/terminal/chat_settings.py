"""The generation settings of a chat, which `:conf` shows and changes.

They are named as in generation_config.json, and its checks are applied to them.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from qwen_jax import chat
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.decoding.sampling import Nucleus
from qwen_jax.runtime import texts, values

_DRAWN = ("temperature", "top_k", "top_p")  # of no effect unless tokens are drawn
_WORDS = {"True": "true", "False": "false"}  # Python's spelling, which the original takes


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings with which replies are generated. Made by `of` and `changed`.

    given: values of a generation_config.json by their names, checked.
    stop: texts that end a reply, besides the tokens at which the model ends it.
    """

    given: Mapping[str, Any]
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: GenerationConfig) -> "Settings":
        """Return the settings with which a checkpoint generates by itself."""
        sampler, names = config.sampler, (*_DRAWN, "repetition_penalty")
        off = Nucleus()
        return cls(
            {"do_sample": isinstance(sampler, Nucleus)}
            | {name: getattr(sampler, name, getattr(off, name)) for name in names}
            | {name: getattr(config, name) for name in ("max_new_tokens", "max_window_size")}
        )

    @property
    def config(self) -> GenerationConfig:
        """The settings as a `GenerationConfig`, which has no stops: those are the model's."""
        return GenerationConfig.from_hf(self.given, ":conf")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, so that another seed may give another reply."""
        return isinstance(self.config.sampler, Nucleus)

    def changed(self, text: str) -> "Settings":
        """Return the settings after changes written as `NAME=VALUE NAME=VALUE ...`.

        A value is JSON, or the text itself; one with spaces is quoted. A setting that matters only
        when tokens are drawn turns drawing on, unless do_sample is among the changes.

        Raises ValueError for an unknown name, a value that is not allowed, and another form.
        """
        changes = self._parsed(text)
        if changes.keys() & set(_DRAWN):
            changes.setdefault("do_sample", True)
        stop = self.stop
        if "stop" in changes:
            stop = chat.stop_texts(changes.pop("stop"))
        made = Settings({**self.given, **changes}, stop)
        _ = made.config  # checks the values
        return made

    def _parsed(self, text: str) -> dict[str, Any]:
        """Parse changes into values by name. Raises ValueError for a name that is not known."""
        try:
            items = shlex.split(text)
        except ValueError as error:
            raise ValueError(f":conf {text}: {error}: write NAME=VALUE, NAME='A VALUE'") from None
        found: dict[str, Any] = {}
        for item in items:
            name, equals, value = item.partition("=")
            known = (*self.given, "stop")
            if not equals:
                raise ValueError(
                    f":conf {item}: write NAME=VALUE without spaces around =, several separated by "
                    f"spaces; the names are {', '.join(known)}"
                )
            if name not in known:
                raise ValueError(f":conf {item}: {name!r} is no setting: {', '.join(known)} are")
            if name in found:
                raise ValueError(f":conf {item}: {name} is given twice: give it once")
            found[name] = _stops(value) if name == "stop" else _value(name, value)
        return found

    def __str__(self) -> str:
        """The settings in the form that `changed` takes, one a line."""
        shown = [f"{name}={json.dumps(value)}" for name, value in self.given.items()]
        stop = json.dumps(list(self.stop), ensure_ascii=False)
        return "\n".join([*shown, f"stop={shlex.quote(stop)}"])


def _value(name: str, text: str) -> Any:
    """Parse a value as JSON or a number; what is neither stays text, which checks then refuse."""
    try:
        value = json.loads(_WORDS.get(text, text))
    except (ValueError, RecursionError):
        try:
            return float(text)  # .5 is no JSON
        except ValueError:
            return text
    if value is None:
        raise ValueError(f":conf {name}={text}: give a value; :reset-conf restores all settings")
    return values.from_file(value)


def _stops(text: str) -> str | list[str] | tuple[()]:
    """Parse stop texts: a JSON list of them, or one text; "" is none."""
    if not text:
        return ()
    if not text.startswith("["):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        shown = texts.shown(text)
        raise ValueError(f":conf stop={shown}: must be a text, or a JSON list of texts") from None
    return found
