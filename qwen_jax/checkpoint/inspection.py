"""`python -m qwen_jax.checkpoint inspect`: shows the contents of a model directory.

It also says whether the directory is complete. It reads the small files, the vocabulary too, and
the sizes of the others, but no weights, and imports no jax. So it answers at once on any machine,
even while the accelerators are busy.
"""

import argparse
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint import directory, kinds, loading, token_ids
from qwen_jax.config import Config
from qwen_jax.config.presets import PRESETS
from qwen_jax.runtime import command

_EXAMPLES = """examples:
  python -m qwen_jax.checkpoint inspect models/qwen-7b
  python -m qwen_jax.checkpoint inspect DIR --json | jq .num_params
  python -m qwen_jax.checkpoint inspect DIR >/dev/null && echo whole

A directory is whole when its manifest.json is there, which is written last, and every file that it
lists has its full size. Values are not compared: `python convert/from_hf.py SRC DIR --verify` does
that. The line "sharding" names the mesh that the files were cut for (they load on any other), and
counts the files of params/. A vocabulary that is missing, or does not fit the model, is a warning
alone, with exit code 0: the weights are whole.

Exit codes: 0 whole, 1 not whole (the reason in one line on stderr), 2 a usage error.
"""
# The printed name of each kind of quantised weights.
_KIND_NAMES = {
    "grouped4": "4 bits with scales by group",
    "grouped8": "8 bits with scales by group",
    "int8": "8 bits with scales by row",
}
# The printed name of each size, with its field of Config.
_SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_heads",
    "kv heads": "num_kv_heads",
    "head dim": "head_dim",
    "feed-forward": "intermediate_size",
    "vocabulary": "vocab_size",
}


def parser() -> argparse.ArgumentParser:
    """Build the argument parser of `python -m qwen_jax.checkpoint`."""
    result = command.Parser(
        prog="python -m qwen_jax.checkpoint",
        description="Look at model directories. `inspect --help` says more.",
        epilog="example:\n  python -m qwen_jax.checkpoint inspect models/qwen-7b",
    )
    command.add_version(result)
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what a directory holds, and whether it is whole",
        description="Print what a model directory holds, and whether it is whole.",
        epilog=_EXAMPLES,
    )
    inspect.add_argument(
        "dir",
        metavar="DIR",
        help="model directory, as `python convert/from_hf.py` and training write them",
    )
    inspect.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )
    command.add_debug(inspect)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run `python -m qwen_jax.checkpoint`, and return its exit code."""
    return command.run(parser(), work, argv=argv)


def work(args: argparse.Namespace) -> None:
    """Print the contents of the model directory `args.dir`, as text or with --json as JSON.

    Raises CheckpointError if the directory is not complete.
    """
    facts = describe(args.dir)
    if args.json:
        print(json.dumps(facts))
    else:
        print(text(facts))
    if not facts["whole"]:
        raise directory.CheckpointError(facts["reason"])
    for line in facts["warnings"]:
        command.say(f"warning: {line}")


def describe(path: str) -> dict[str, Any]:
    """Collect the facts about a model directory: model, sizes, dtype, files, software versions.

    In the result, `whole` says whether the directory is complete, and `reason` why it is not (or
    None).
    """
    facts: dict[str, Any] = {"path": path, "whole": False, "reason": None}
    try:
        root = directory.existing(path)
        config = Config.read(root / directory.CONFIG)
        facts |= {
            "model": model_name(config),
            "sizes": {word: getattr(config, field) for word, field in _SIZES.items()},
            **vocabulary(root, config),
        }
        manifest = directory.verify_whole(root)
        files, shapes = manifest["files"], kinds.shapes(manifest)
        chunks = [size for name, size in files.items() if name.rpartition("/")[2][0].isdecimal()]
        facts |= {
            "dtype": manifest["dtype"],
            "num_params": sum(map(math.prod, shapes.values())),
            "leaves": len(shapes),
            "quantised": dict(Counter(kinds.of_manifest(manifest).values())),
            "mesh": manifest.get("mesh", {}),
            "chunk_files": len(chunks),
            "largest_chunk_bytes": max(chunks, default=0),
            "bytes": sum(files.values()),
            "made_by": manifest.get("made_by"),
            "versions": manifest.get("versions", {}),
        }
        if facts["num_params"] != config.num_params():
            raise directory.CheckpointError(
                f"the weights in {root} do not match {directory.CONFIG}: {facts['num_params']:,} "
                f"parameters instead of {config.num_params():,}; put back the config.json that "
                "they were converted with, or convert again"
            )
    except (ValueError, OSError) as error:
        return facts | {"reason": " ".join(str(error).split())}
    return facts | {"whole": True}


def vocabulary(root: Path, config: Config) -> dict[str, Any]:
    """Check the vocabulary of a model directory against its config.

    root: the directory.
    config: the architecture in its config.json.

    Returns `tokenizer`, whether there is a vocabulary file; `ids`, the number of its ids, or None
    if it cannot be read; and `warnings`, the warnings and the error that loading or generating
    would meet.
    """
    file, settings = root / directory.TOKENIZER, root / directory.GENERATION_CONFIG
    tokenizer = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if settings.exists():
                token_ids.check_range(settings, config.vocab_size)
            tokenizer = loading.load_tokenizer(root)
            problem = token_ids.check_fits(file, tokenizer, vocab_size=config.vocab_size)
        except (ValueError, OSError) as error:
            problem = str(error)
    lines = [str(warning.message) for warning in caught] + ([problem] if problem else [])
    return {
        "tokenizer": file.is_file(),
        "ids": None if tokenizer is None else len(tokenizer),
        "warnings": [" ".join(line.split()) for line in lines],
    }


def model_name(config: Config) -> str | None:
    """Return the name of the published model with these sizes, or None."""
    sizes = _SIZES.values()
    for name, preset in PRESETS.items():
        if all(getattr(preset, field) == getattr(config, field) for field in sizes):
            return name
    return None


def _counted(item: tuple[str, int]) -> str:
    """Say how many weights are of a kind of quantised weights."""
    kind, count = item
    return f"{count:,} weight{'' if count == 1 else 's'} in {_KIND_NAMES[kind]}"


def text(facts: dict[str, Any]) -> str:
    """Format the facts that `describe` collects for a terminal, one per line."""
    lines = {"directory": facts["path"]}
    if "sizes" in facts:
        sizes = ", ".join(f"{word} {size:,}" for word, size in facts["sizes"].items())
        lines["model"] = f"{facts['model'] or 'of no published size'}: {sizes}"
        ids = "cannot be read" if facts["ids"] is None else f"{facts['ids']:,} ids"
        lines["tokenizer"] = ids if facts["tokenizer"] else "none: text cannot be encoded"
    if "dtype" in facts:
        cut = ", ".join(f"{axis}={n}" for axis, n in facts["mesh"].items() if n > 1)
        lines |= {
            "dtype": ", ".join([facts["dtype"], *map(_counted, facts["quantised"].items())]),
            "parameters": f"{facts['num_params']:,} in {facts['leaves']:,} leaves",
            "sharding": f"cut for {cut or 'one device'}: {facts['chunk_files']:,} chunk files, the "
            f"largest of {command.size(facts['largest_chunk_bytes'])}",
            "size": command.size(facts["bytes"]),
            "made by": facts["made_by"],
            "versions": ", ".join(f"{name} {v}" for name, v in facts["versions"].items()),
        }
    lines["whole"] = "yes" if facts["whole"] else "no"
    return "\n".join(f"{name:<11}{value}" for name, value in lines.items())
