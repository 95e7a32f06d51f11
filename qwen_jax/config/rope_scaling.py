"""`RopeScaling`, a variant of RoPE for longer contexts, which config.json has as `rope_scaling`.

The formulas are in `model/rope.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.runtime import texts, values

YARN = ("yarn", "yarn_paper")
_TYPES = ("linear", "ntk", *YARN)
_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim")
_UNSET = (None, None, True)  # defaults of mscale, mscale_all_dim and truncate
_LEAST = {  # the smallest allowed value of each number
    "factor": 1,
    "beta_fast": values.TINY,
    "beta_slow": values.TINY,
    "attention_factor": values.TINY,
    "mscale": 0,
    "mscale_all_dim": 0,
}
# The largest allowed value of each number. No position is larger, so no factor needs to be; its
# square still fits float32.
_MOST = 2**31


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The parameters of a RoPE variant for longer contexts, other than Qwen's dynamic NTK.

    type: "linear", "ntk", "yarn" or "yarn_paper". "yarn" ramps over the index of the dimension
        pair, as Hugging Face, vLLM and checkpoints trained with it do; "yarn_paper" ramps over the
        number of rotations, as in the paper.
    factor: how many times longer the context becomes.
    original_max_position_embeddings: the context length before scaling, required for both YaRN
        types.
    beta_fast, beta_slow: the rotations within that length at the two ends of YaRN's ramp.
    attention_factor: YaRN's factor on queries and on keys; None computes it from `factor`.
    truncate: whether the ends of the ramp are rounded to whole pairs ("yarn" only).
    mscale, mscale_all_dim: determine the attention factor if both are given and `attention_factor`
        is not ("yarn" only).
    """

    type: str
    factor: float
    original_max_position_embeddings: int | None = None  # required for both kinds of YaRN
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True  # yarn: round the ends of the ramp to whole pairs
    mscale: float | None = None  # yarn: used if both are given and attention_factor is not
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.type not in _TYPES:
            raise ValueError(
                f"rope_scaling type {texts.shown(self.type)}: allowed are {', '.join(_TYPES)}"
            )
        trained = self.original_max_position_embeddings
        if trained is None and self.type in YARN:
            raise ValueError(
                f"rope_scaling of type {self.type} needs original_max_position_embeddings"
            )
        if trained is not None:
            name = "original_max_position_embeddings"
            object.__setattr__(
                self,
                name,
                values.whole(f"rope_scaling {name}", trained, least=1, most=values.INT32),
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                real = values.number(f"rope_scaling {name}", value, least=least, most=_MOST)
                object.__setattr__(self, name, real)
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                f"rope_scaling needs beta_fast > beta_slow > 0, got {self.beta_fast} and "
                f"{self.beta_slow}"
            )
        truncate = values.flag("rope_scaling truncate", self.truncate)
        object.__setattr__(self, "truncate", truncate)
        if self.type != "yarn" and (self.mscale, self.mscale_all_dim, self.truncate) != _UNSET:
            raise ValueError(
                f"rope_scaling of type {self.type} has no truncate, mscale or mscale_all_dim: "
                "leave them out, or take type yarn"
            )

    @classmethod
    def from_hf(cls, entry: Any) -> "RopeScaling | None":
        """Read the `rope_scaling` entry of a config.json; None if the entry means no scaling.

        A key whose value is null counts as absent. Raises ValueError for an unknown key or value.
        """
        if entry is None or isinstance(entry, RopeScaling):
            return entry
        known = {field.name for field in dataclasses.fields(cls)}
        given = entry if isinstance(entry, Mapping) else {}
        given = {key: value for key, value in given.items() if value is not None}
        unknown = [texts.shown(key) for key in given if key not in {*known, "rope_type"}]
        if not isinstance(entry, Mapping) or unknown:
            said = f"has {', '.join(unknown)}" if unknown else texts.shown(entry)
            raise ValueError(f"rope_scaling {said}: its keys are {', '.join(sorted(known))}")
        if "rope_type" in given:  # the later spelling of type
            later = given.pop("rope_type")
            if given.setdefault("type", later) != later:
                raise ValueError(
                    f"rope_scaling type {given['type']!r} and rope_type {later!r} disagree"
                )
        if (key := "original_max_position_embeddings") in given:
            given[key] = values.from_file(given[key])
        if not given or given.get("type") == "default":  # later generations' word for none
            return None
        if not {"type", "factor"} <= set(given):
            raise ValueError(f"rope_scaling {texts.shown(entry)} lacks type or factor")
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """Return the `rope_scaling` entry of a config.json, with the keys that this type has."""
        names = ["type", "factor", "original_max_position_embeddings"]
        names += ["beta_fast", "beta_slow", "attention_factor"] if self.type in YARN else []
        names += [] if self.truncate else ["truncate"]
        names += ["mscale", "mscale_all_dim"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
