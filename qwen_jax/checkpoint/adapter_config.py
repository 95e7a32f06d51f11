"""Reads PEFT's adapter_config.json: which modules have adapters, and their rank and scale.

The constants below sort the file's fields. Some are read. Some are ignored, as they do not change
what the adapter computes. Some are refused only if they change what this adapter computes. All
others, unknown fields included, are refused unless they are empty.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint import tensor_names
from qwen_jax.checkpoint.patterns import Patterns
from qwen_jax.runtime import texts, values
from qwen_jax.runtime.texts import read_json

SETTINGS = "adapter_config.json"
LAYER = "transformer.h.{L}."
WHOLE = {"transformer.wte": "embedding", "lm_head": "head"}  # modules that may be stored whole

# Fields whose value has no effect on the result here. They describe the machine, the training, the
# initialisation (by methods in `_ALLOWED`, which leave the base as it is), or names. PEFT reads
# megatron_core and qalora_group_size only with megatron_config and use_qalora, and fan_in_fan_out
# for no torch.nn.Linear, which all modules of this model are. An embedding that is the head is one
# leaf here, so tied weights stay tied. merge_weights is a field of PEFT 0.1 and 0.2.
INERT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    )
)
READ = frozenset(("r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora"))
# Fields that may narrow or change an adapter; they are accepted where they do neither (`_Judge`).
JUDGED = frozenset(
    ("alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern")
)
# The values that these fields may have, beside the empty ones: False, None, [] and {}. Adapters of
# another initialisation ("pissa", "olora", "corda", "loftq", "lora_ga") belong on weights that PEFT
# has changed.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
_BIASES = ("none", "all", "lora_only")
# Fields with which PEFT would compute something else: other products, other modules, or none.
REFUSED = frozenset(
    (
        *_ALLOWED,
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    )
)
_ALL_LINEAR = "all-linear"  # PEFT's word for every linear module but the head
MERGED_IN_PEFT = (
    "merge it in PEFT, PeftModel.from_pretrained(base, FOLDER).merge_and_unload(), save that with "
    "save_pretrained(NEW, safe_serialization=True), and convert NEW"
)


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """The structure of an adapter without its values.

    groups: for each adapted module of the original PyTorch model, such as "attn.c_attn", the leaves
        of a decoder block that share its matrix A.
    rank, scale: the rank of the products B A, and the factor on them.
    whole: the modules, such as "lm_head", that the adapter stores whole instead of as A and B.
    """

    groups: dict[str, tuple[str, ...]]
    _: dataclasses.KW_ONLY
    rank: int
    scale: float
    whole: tuple[str, ...] = ()


def modules() -> dict[str, tuple[str, ...]]:
    """Map each linear module of a layer, such as "attn.c_attn", to its leaves in a block."""
    found = {}
    for tensor, leaves in tensor_names.TABLE.items():
        module = tensor.removeprefix(LAYER).removesuffix(".weight")
        if tensor.startswith(LAYER) and "." in module and tensor.endswith(".weight"):
            found[module] = tuple(leaf.removeprefix("layers.{L}.") for leaf in leaves)
    return found


def targets(
    wanted: Sequence[str] | str, layers: int, *, patterns: Patterns | None = None
) -> dict[str, tuple[str, ...]]:
    """Choose the modules that get adapters, as PEFT does; return each with its leaves in a block.

    wanted: names, which choose the modules whose paths end in them; or a pattern for whole paths;
    or "all-linear" for every module. layers: the number of layers. Raises ValueError for a name
    that no module has, a module chosen in some layers only, and a pattern that `Patterns` refuses.
    """
    if isinstance(wanted, str) and wanted.lower() == _ALL_LINEAR:
        return modules()
    patterns = patterns or Patterns()
    names_wanted = [wanted] if isinstance(wanted, str) else wanted
    found, used = {}, set()
    for module, leaves in modules().items():
        by_layer = [
            _named("target_modules", wanted, path=path, patterns=patterns)
            for path in _paths([module], layers)
        ]
        if all(by_layer):
            found[module] = leaves
        elif any(by_layer):
            raise ValueError(
                f"target_modules {', '.join(names_wanted)}: chooses {module} in some layers only, "
                f"and adapters go on a module in every layer: {MERGED_IN_PEFT}"
            )
        used |= set().union(*by_layer)
    if nothing := [name for name in names_wanted if name not in used]:
        every = ", ".join(sorted({m.rpartition(".")[2] for m in modules()}))
        raise ValueError(f"no module is called {', '.join(nothing)}: there are {every}")
    return found


def _paths(groups: Sequence[str], layers: int) -> list[str]:
    """Return the paths of these modules in all layers, in PEFT's spelling."""
    return [f"{LAYER.replace('{L}', str(i))}{module}" for i in range(layers) for module in groups]


def _named(field: str, wanted: Sequence[str] | str, *, path: str, patterns: Patterns) -> set[str]:
    """Return the names that a path equals or ends in, or the pattern that matches all of it.

    wanted: the names, or a pattern. field: the field that holds them, for error messages.
    """
    if isinstance(wanted, str):
        return {wanted} if patterns.match(field, wanted, path=path, whole=True) else set()
    return {name for name in wanted if path == name or path.endswith(f".{name}")}


def read_shape(folder: Path, layers: int) -> AdapterShape:
    """Read rank, scale and modules of an adapter from PEFT's adapter_config.json.

    layers: the number of layers of the model. Raises ValueError for a bad value, and for fields
    that would change the result and are not supported; it names all of these.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(
            f"{folder} is no adapter: it has no {SETTINGS}; give the folder that PEFT's "
            "save_pretrained wrote, or RUN/adapter of a run"
        )
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type {settings.get('peft_type')!r}, only LORA is supported: "
            f"{MERGED_IN_PEFT}"
        )
    with values.named(file):
        rank = values.whole("r", settings.get("r"), least=1, most=values.INT32)
        alpha = values.number(
            "lora_alpha", settings.get("lora_alpha"), least=values.TINY, most=values.FLOAT32
        )
        stabilised = values.flag("use_rslora", settings.get("use_rslora") or False)
        if not _empty(bias := settings.get("bias")):
            values.choice("bias", bias, allowed=_BIASES)
    known = {module.rpartition(".")[2]: module for module in WHOLE}
    wanted = _list(file, settings, name="target_modules", or_pattern=True)
    saved = _list(file, settings, name="modules_to_save")
    patterns = Patterns()
    try:
        groups = targets(wanted, layers, patterns=patterns) if wanted else {}
        judge = _Judge(file, settings, _paths(list(groups), layers), patterns)
        refused = {name: value for name, value in settings.items() if judge.changes(name, value)}
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    if refused:
        said = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(refused.items()))
        raise ValueError(f"{file}: not supported: {said}: {MERGED_IN_PEFT}")
    if not wanted:
        raise ValueError(f"{file} names no target_modules: list the modules that have adapters")
    if unknown := sorted({name.rpartition(".")[2] for name in saved} - set(known)):
        raise ValueError(
            f"{file}: modules_to_save {', '.join(unknown)}: only wte and lm_head can: "
            f"{MERGED_IN_PEFT}"
        )
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    whole = dict.fromkeys(known[name.rpartition(".")[2]] for name in saved)
    return AdapterShape(groups, rank=rank, scale=scale, whole=tuple(whole))


def _list(
    file: Path, settings: Mapping[str, object], *, name: str, or_pattern: bool = False
) -> Any:
    """Return a field that holds names, or a pattern if `or_pattern`; [] if missing or null.

    Raises ValueError for any other value.
    """
    value = settings.get(name) or []
    pattern = isinstance(value, str) and or_pattern
    if not pattern and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
        hint = f", [{json.dumps(value)}]" if isinstance(value, str) else ""
        raise ValueError(f"{file}: {name} {texts.shown(value)}: must be a list of names{hint}")
    return value


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Decides whether a field of adapter_config.json changes what the adapter computes.

    settings: the contents of `file`. paths: the paths of the modules with adapters, in all layers.
    """

    file: Path
    settings: Mapping[str, Any]
    paths: list[str]
    patterns: Patterns

    def changes(self, name: str, value: object) -> bool:
        """Return whether this field changes the result, or is not known."""
        if name in INERT | READ or _empty(value) or value in _ALLOWED.get(name, ()):
            return False
        return getattr(self, f"_{name}")(value) if name in JUDGED else True

    def _exclude_modules(self, _: object) -> bool:
        """Return whether the field excludes some module that has an adapter."""
        wanted = _list(self.file, self.settings, name="exclude_modules", or_pattern=True)
        return any(
            _named("exclude_modules", wanted, path=x, patterns=self.patterns) for x in self.paths
        )

    def _rank_pattern(self, value: object) -> bool:
        """Return whether the field gives some module another rank."""
        return self._another("rank_pattern", value, common=self.settings["r"])

    def _alpha_pattern(self, value: object) -> bool:
        """Return whether the field gives some module another alpha."""
        return self._another("alpha_pattern", value, common=self.settings["lora_alpha"])

    def _another(self, field: str, value: object, *, common: float) -> bool:
        """Return whether a pattern gives some module another rank or alpha than `common`.

        value: the field's numbers by pattern. A module gets the number of the first pattern that
        matches the end of its path.
        """
        if not isinstance(value, dict):
            raise ValueError(
                f"{field} {texts.shown(value)}: must be an object of patterns and numbers"
            )
        if all(number == common for number in value.values()):
            return False
        for pattern in value:  # first without the prefix below, which a message would show
            self.patterns.match(field, pattern, path="")

        def own(path: str) -> object:
            for pattern, number in value.items():
                if self.patterns.match(field, rf"(.*\.)?({pattern})$", path=path):
                    return number
            return common

        return any(own(path) != common for path in self.paths)

    def _layers_pattern(self, _: object) -> bool:
        """Judge the field layers_to_transform, for which this one locates a layer's index."""
        return self._layers_to_transform(self.settings.get("layers_to_transform"))

    def _layers_to_transform(self, value: object) -> bool:
        """Return whether `value`, a layer's index or a list, omits the layer of some module."""
        if value is None or value == []:
            return False
        wanted = value if isinstance(value, list) else [value]
        lists = self.settings.get("layers_pattern") or r"[^.]*"
        lists = [lists] if isinstance(lists, str) else lists
        if not isinstance(lists, list) or not all(isinstance(x, str) for x in lists):
            return True

        def number(path: str) -> int | None:
            for pattern in lists:
                before = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
                if found := self.patterns.match("layers_pattern", before, path=path):
                    return int(found["idx"])
            return None

        return any(number(path) not in wanted for path in self.paths)


def _empty(value: object) -> bool:
    """Return whether a value is null, false, [] or {}. 0 is not: it may be a layer's index."""
    return value is None or value is False or value in ([], {})
