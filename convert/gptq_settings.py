"""What a folder of GPTQ tensors says of itself: its settings, and the convention of its zeros."""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import gptq, gptq_config
from convert.gptq import Form
from convert.gptq_config import Settings
from convert.gptq_export import Tensors
from qwen_jax.checkpoint import directory
from qwen_jax.runtime import texts


def described(
    tensors: Tensors, manifest: Mapping[str, Any], *, convention: str, source: Path | None
) -> dict[str, Any] | None:
    """Return the `quantization_config` that an exported config.json lacks; None if it has one.

    convention: how zeros are written (`convention`).
    source: the model directory, whose config.json or quantize_config.json may have it; None if the
        new folder gets neither.

    Raises ValueError if a checkpoint cannot say how its layers are quantised, or if these files say
    something else.
    """
    names = manifest["shapes"]
    symmetric = not any(name.endswith(f".{gptq.ZEROS}") for name in names)
    said = None if source is None else gptq_config.read(source)
    if source is not None and said is not None:
        _check_said(said, tensors, symmetric=symmetric, file=source / directory.CONFIG)
        return None
    forms = {x.name: Form(x.bits, x.group_size) for x in tensors.linears}
    sizes = {form.group_size for form in forms.values()}
    if len(sizes) > 1 and all(linear.groups == 1 for linear in tensors.linears):
        forms = {name: Form(form.bits, -1) for name, form in forms.items()}
    ((most, _),) = collections.Counter(forms.values()).most_common(1)
    made = {
        **most._asdict(),
        "sym": symmetric,
        "desc_act": any(name.endswith(f".{gptq.ORDER}") for name in names),
        "quant_method": "gptq",
        "checkpoint_format": {"v1": "gptq", "v2": "gptq_v2"}[convention],
    }
    rules = {
        f"+:^{re.escape(name)}$": {
            key: value for key, value in form._asdict().items() if value != getattr(most, key)
        }
        for name, form in forms.items()
        if form != most
    }
    rules |= {f"-:^{re.escape(name)}$": {} for name in tensors.floats}
    return made | ({"dynamic": rules} if rules else {})


def _check_said(said: Settings, tensors: Tensors, *, symmetric: bool, file: Path) -> None:
    """Raise ValueError if the settings that a directory carries say something else of its layers.

    symmetric: whether no layer has zeros of its own. file: where settings are, for the message.
    """
    forms: dict[str, tuple[int, int] | None] = dict.fromkeys(tensors.floats)
    forms |= {linear.name: (linear.bits, linear.group_size) for linear in tensors.linears}
    inputs = {linear.name: linear.inputs for linear in tensors.linears}
    for name, form in forms.items():
        theirs = said.form_of(name)
        if theirs is not None and theirs.group_size == -1:
            theirs = Form(theirs.bits, inputs.get(name, -1))
        if theirs != form or said.symmetric != symmetric:
            raise ValueError(
                f"{file} says of {name} {_shown(theirs)} and sym {said.symmetric}, its weights are "
                f"of {_shown(form)} and {symmetric}: put back the file that they were converted "
                "with"
            )


def _shown(form: tuple[int, int] | None) -> str:
    """Return how a layer is quantised as text."""
    return "floats" if form is None else f"bits {form[0]}, group_size {form[1]}"


def metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes that the headers of files had when a model directory was converted."""
    return manifest.get(directory.QUANTISATION, {}).get("metadata", {})


def convention(src: Path, manifest: Mapping[str, Any], *, asked: str | None) -> str:
    """Return how the qzeros of a model directory are to hold its zeros: "v1" or "v2".

    It is what its manifest says, or the settings that it carries. Where neither says it, it is what
    is asked for, or else v2 if layers have zeros of their own, and v1 if not.

    src: the model directory. asked: "v1", "v2", or None.

    Raises ValueError for a manifest that says something else, if another one is asked for than the
    directory says, and if one is asked for that no layer has zeros for.
    """
    said = manifest.get(directory.QUANTISATION, {})
    found = said.get("zeros") if isinstance(said, dict) else said
    if found not in ["v1", "v2", None]:
        raise ValueError(
            f"{directory.MANIFEST} is damaged: its quantisation says zeros {texts.shown(found)}, "
            "which are v1 or v2; convert again"
        )
    if found is None and (settings := gptq_config.read(src)) is not None:
        found = settings.zeros or "v1"
    if found is None:
        own = any(name.endswith(f".{gptq.ZEROS}") for name in manifest["shapes"])
        if asked is not None and not own:
            raise ValueError(
                f"--zeros {asked}: no layer of {src} has zeros of its own: leave it out"
            )
        return asked or ("v2" if own else "v1")
    if asked not in (None, found):
        raise ValueError(f"--zeros {asked}: {src} says {found}, and keeps it: leave it out")
    return found
