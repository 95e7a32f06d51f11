"""The files of a model directory: their names, the manifest, and the check that it is complete.

`manifest.json` is written last and holds the size of every file under params/. A directory without
it is unfinished, whatever it contains. This module knows neither jax nor the values of the weights.
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.runtime import lock, paths
from qwen_jax.runtime.texts import read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MANIFEST = "manifest.json"
PARAMS = "params"
TOKENIZER = "qwen.tiktoken"
RUN = "run.json"  # marks the folder of a training run and its results
QUANTISATION = "quantisation"  # manifest key: what GPTQ files hold and the weights do not
QUANTIZATION = "quantization_config"  # key of config.json that says how weights are quantised
QUANTIZE_CONFIG = "quantize_config.json"  # a file that says the same
REPORT = "quantisation.json"  # what the quantiser found of the directory that it made
OF_QUANTISED = (QUANTIZE_CONFIG, REPORT)  # files that say nothing of floats
_ADAPTER_CONFIG = "adapter_config.json"  # marks an adapter in PEFT's format
_NESTED = 3  # levels above a path at which the intended model or run is looked for
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"  # OWNER/NAME of a model on the Hugging Face hub
UNFINISHED = "unfinished.json"  # exists while a conversion or a save is running
# In format 1, leaves had an axis for heads. Format 3 has quantised weights (`kinds.py`), and is
# written only for a directory that holds some; all others have format 2.
FORMATS = (2, 3)
DTYPES = ("float32", "bfloat16", "float16")  # the dtypes that plain weights can have
# Files copied beside the weights: configuration, vocabularies, licence, and the auto_map's code.
CARRIED = ("*.json", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
_NOT_CARRIED = (CONFIG, MANIFEST, UNFINISHED)
ORIGIN = "origin"  # manifest key: where the converted checkpoint came from
SAVED_BY = "qwen_jax.checkpoint.save"
QUANTISED_BY = "qwen_jax.quantise"
_MAKE_ONE = "`python convert/from_hf.py SRC DIR` makes one of a Hugging Face checkpoint"


class CheckpointError(ValueError):
    """Raised for a model directory that cannot be used; the message says what to do."""


def config_at(path: str | Path) -> Path | None:
    """Return the config.json at a path, which may name the file or its folder; None without one."""
    named = paths.parse(path)
    return next((x for x in (named / CONFIG, named) if x.is_file()), None)


def existing(path: str | Path) -> Path:
    """Return the absolute path of a model directory, checking only that it has a config.json.

    Raises CheckpointError otherwise, which says what the path is instead and which path to give.
    """
    root = paths.absolute(path)
    if not root.is_dir():
        raise CheckpointError(_instead(path, root) or _why_no_folder(path, root))
    if not (root / CONFIG).is_file():
        otherwise = f"{path} is not a model directory: it has no {CONFIG}; {_MAKE_ONE}"
        raise CheckpointError(_instead(path, root) or otherwise)
    return root


def finished(path: str | Path) -> Path:
    """Return the absolute path of a model directory, checking that it has config.json and manifest.

    No other file is looked at. Raises CheckpointError otherwise, which says what the path is
    instead and which path to give.
    """
    root = existing(path)
    if not (root / MANIFEST).exists():
        raise CheckpointError(_instead(path, root) or _why_no_manifest(root))
    return root


def verify_whole(path: str | Path) -> dict[str, Any]:
    """Check that a model directory is complete, each file with its full size; returns its manifest.

    Raises CheckpointError otherwise. The values in the files are not compared; the option
    `--verify` of convert/from_hf.py does that.
    """
    root = finished(path)
    manifest = read_manifest(root)
    if problems := differences(file_sizes(root), manifest["files"]):
        raise CheckpointError(f"{root} is damaged: {problems}; convert or copy it again")
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a model directory. No other file is looked at.

    Raises CheckpointError for a format that this version does not read, and for a damaged manifest.
    """
    file = root / MANIFEST
    manifest = read_json(file)
    if manifest.get("format") not in FORMATS:
        raise CheckpointError(
            f"{file} has format {manifest.get('format')!r}, this version of qwen_jax reads "
            f"{' and '.join(map(str, FORMATS))}: update qwen_jax or convert again"
        )
    shapes, dtype = manifest.get("shapes"), manifest.get("dtype")
    of_lengths = isinstance(shapes, dict) and all(map(_is_shape, shapes.values()))
    if not isinstance(manifest.get("files"), dict) or not of_lengths or dtype not in [*DTYPES]:
        raise CheckpointError(f"{file} is damaged: convert again")
    return manifest


def _is_shape(value: Any) -> bool:
    """Return whether a value of a JSON file is a list of lengths."""
    return isinstance(value, list) and all(type(n) is int and n > 0 for n in value)


def _why_no_manifest(root: Path) -> str:
    """Explain a directory without a manifest, for an error: what it seems to be, and what to do."""
    if (root / UNFINISHED).exists():
        made_by = read_json(root / UNFINISHED).get("made_by")
        if made_by == SAVED_BY:
            return (
                f"{root} is a save that was stopped before its end: use an earlier directory, or "
                "save it again"
            )
        if made_by == QUANTISED_BY:
            return (
                f"{root} is an unfinished quantisation: give the same command again with --resume, "
                "it continues where it stopped"
            )
        return (
            f"{root} is an unfinished conversion: give the same convert/ command again, it "
            "continues where it stopped"
        )
    return f"{root} is not a model directory: it has no {MANIFEST}; {_MAKE_ONE}"


def origin(root: Path) -> dict[str, str]:
    """Return the checkpoint that a model directory was converted from, as its manifest records it.

    The result has `name`, a folder or an id of the Hugging Face hub, and for an id its `revision`.
    It is empty if the origin is unknown, as for weights that were trained since.
    """
    found = read_json(root / MANIFEST).get(ORIGIN)
    known = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in known if isinstance(value, str)}


def _instead(path: str | Path, root: Path) -> str | None:
    """Explain what a path is instead of a model directory, for an error; None if that is unknown.

    path: the path as the user gave it.
    root: the same path, absolute.

    The explanation says which path to give. The results of a training run are recognised by the
    files in its folders, whatever their names.
    """
    adapts = (root / _ADAPTER_CONFIG).is_file()
    if not adapts and any(root.glob("*.safetensors")):
        return (
            f"{path} is a Hugging Face checkpoint: convert it with "
            f"`python convert/from_hf.py {path} DIR` and use DIR"
        )
    around = _around(root)
    whole = next((x for x in around[1:] if (x / MANIFEST).is_file()), None)
    if whole is not None and root.exists():
        return f"{path} is a part of the model directory {whole}: give {whole}"
    if run := next((x for x in around if (x / RUN).is_file()), None):
        what = "a training run" if root == run else f"of the training run {run}"
        return f"{path} is {what}, {_result_of(run)}"
    return f"{path} is an adapter, not a model: {_merging(root)}" if adapts else None


def _around(root: Path) -> list[Path]:
    """Return a folder and its parents up to `_NESTED` levels; in `gs://` only within the bucket."""
    folders = [root, *root.parents][: 1 + _NESTED]
    if paths.is_remote(root):
        return [x for x in folders if str(x).removeprefix("gs://") not in ("", str(x))]
    return folders


def _result_of(run: Path) -> str:
    """Say what to give in place of a training run's folder `run`: its model, or how to make one."""
    if model := min(run.glob(f"*/{MANIFEST}"), default=None):
        return f"not a model directory: give {model.parent}"
    facts = read_json(run / RUN)
    program = "pretrain" if facts.get("recipe", {}).get("data") == "text" else "sft"
    again = f"`python train/{program}.py --out {run} --resume{{}}`"
    if "arguments" not in facts:  # as of older runs, which kept none
        again = "its command with --resume{}"
    if adapter := min(run.glob(f"*/{_ADAPTER_CONFIG}"), default=None):
        how = _merging(adapter.parent, facts.get("arguments", {}).get("ckpt"), name=run.name)
        done = f"{again.format(' --merge')} writes {run / 'model'}"
        return f"which has an adapter and no model: {done}; or {how}"
    return f"which has not ended: {again.format('')} goes on, and writes {run / 'model'}"


def _merging(adapter: Path, base: str | None = None, *, name: str = "") -> str:
    """Say how to generate with an adapter, and how to make a model directory of it, for an error.

    adapter: the adapter's folder.
    base: the model directory that the adapter was trained on, if known.
    name: the start of the new directory's name; by default the adapter's.
    """
    unknown = "" if base else ", where CKPT is the model directory that it was trained on"
    new = f"{name or adapter.name}-merged"
    return (
        f"`--ckpt {base or 'CKPT'} --adapter {adapter}` generates with it; `python "
        f"convert/to_hf.py {base or 'CKPT'} {new}-hf --adapter {adapter}` and `python "
        f"convert/from_hf.py {new}-hf {new}` make {new} of it{unknown}"
    )


def _why_no_folder(path: str | Path, root: Path) -> str:
    """Explain why a path without a folder is no model directory, and what to do, for an error.

    path: the path as the user gave it.
    root: the same path, absolute.
    """
    if root.is_file():
        inside = root.parent if (root.parent / CONFIG).is_file() else "its folder"
        return f"{path} is a file, not a model directory: give {inside}"
    if paths.is_remote(root):
        return f"{path} is not a directory, or cannot be reached: {_MAKE_ONE}"
    if re.fullmatch(HUB_ID, str(path)):
        return (
            f"{path} is not a directory: if it is a model on the Hugging Face hub, "
            f"`python convert/from_hf.py {path} DIR` makes a model directory of it: then give DIR"
        )
    return f"{path} is not a directory: {_MAKE_ONE}"


def differences(found: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """Describe how the files in a folder differ from the wanted files; "" if they do not.

    found, wanted: the size in bytes of each file, by its name.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} does not belong there" for name in found if name not in wanted]
    problems += [
        f"{name} has {found[name]:,} bytes instead of {size:,}"
        for name, size in wanted.items()
        if found.get(name, size) != size
    ]
    return some(problems)


def some(problems: list[str]) -> str:
    """Join the first five problems for a message, and count the rest."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return f"{', '.join(problems[:5])}{more}"


def write_manifest(path: Path, shapes: Mapping[str, tuple[int, ...]], **facts: Any) -> None:
    """Write the manifest, which declares a directory complete; all its arrays must be written.

    path: the directory.
    shapes: the shape of each stored array, by its path in the tree.
    facts: further entries, such as format, dtype, mesh and source.
    """
    libraries = ("qwen-jax", "jax", "flax", "orbax-checkpoint")
    write_json(
        path / MANIFEST,
        {
            **facts,
            "versions": {name: _version(name) for name in libraries},
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "files": file_sizes(path),
        },
    )


def file_sizes(root: Path) -> dict[str, int]:
    """Return the size in bytes of every file under params/, by its path in the directory."""
    return {f"{PARAMS}/{name}": size for name, size in paths.sizes(root / PARAMS).items()}


def mismatch(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Describe how the shapes of stored leaves differ from the wanted shapes; "" if they do not.

    found, wanted: the shape of each leaf, by its path in the tree.
    """
    problems = [f"no {name}" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    return some(problems)


def carried(source: Path, patterns: Sequence[str] = CARRIED) -> list[Path]:
    """List the files of a checkpoint to copy beside its weights: tokenizer, licence and others.

    source: the checkpoint's folder. patterns: of the names.

    Raises ValueError for a dangling symbolic link, as a cache of downloads may hold.
    """
    named = (paths.parse(file) for pattern in patterns for file in source.glob(pattern))
    found = {file for file in named if file.is_file()}
    kept = {f for f in found if not f.name.endswith(".index.json") and f.name not in _NOT_CARRIED}
    return sorted(kept)


def forget_quantisation(root: Path) -> None:
    """Remove what the JSON files of a directory say of weights that were quantised elsewhere."""
    said = read_json(root / CONFIG)
    if said.pop(QUANTIZATION, None) is not None:
        write_json(root / CONFIG, said)
    for name in OF_QUANTISED:
        (root / name).unlink(missing_ok=True)


def names(folder: Path) -> set[str]:
    """Return the names of a folder's files, without its lock and drafts of interrupted writes."""
    found = {file.name for file in folder.iterdir()} if folder.exists() else set()
    left = {file.name for file in folder.glob(paths.DRAFTS)} | {f"{UNFINISHED}.tmp"}
    return found - left - {lock.NAME}


def remove_drafts(root: Path) -> None:
    """Remove the temporary files that killed writers left in a model directory."""
    if not paths.is_remote(root):
        for file in [*root.glob(paths.DRAFTS), *(root / PARAMS).rglob("*.tmp")]:
            file.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 holds lone surrogates; the escape of one is valid JSON.
    paths.write(path, text.encode("utf-8", "backslashreplace"))


def _version(library: str) -> str:
    """Return the installed version of a library, for the manifest."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
