"""Convert a Hugging Face Qwen checkpoint into a model directory of qwen_jax.

SRC is a folder with safetensors files, or the id of a model on the Hugging Face hub. DST is the
directory to make. After an interruption, the same command continues where it stopped. Several
processes share the work if each runs this command with its own --process, or on a cluster with
--distributed; all of them must then see DST.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from convert import (
    conversion,
    folder,
    gptq,
    gptq_config,
    gptq_import,
    names,
    shares,
    target,
)
from convert.import_plan import ImportPlan
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, kinds, store, token_ids
from qwen_jax.checkpoint.safetensors_header import Tensor, read_metadata
from qwen_jax.config import Config
from qwen_jax.runtime import command, paths, process_options, processes

EXAMPLES = """examples:
  python convert/from_hf.py ~/Qwen-7B models/qwen-7b             a folder
  python convert/from_hf.py Qwen/Qwen-1_8B-Chat models/chat      from the hub
  python convert/from_hf.py SRC DST --dtype float32 --verify     cast, then compare every tensor
  python convert/from_hf.py SRC DST --mesh fsdp=4,tp=2           one file for each shard of a mesh

A directory that is cut for one mesh loads on any other, but fastest on its own. SRC and DST may be
gs://BUCKET/PATH, which needs `pip install -e '.[gcs]'`, as the hub needs `-e '.[hub]'`.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    result = command.Parser(
        prog="python convert/from_hf.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add = result.add_argument
    add("src", metavar="SRC", help="folder, or model on the hub such as Qwen/Qwen-7B")
    add("dst", metavar="DST", help="model directory to make")
    add("--dtype", choices=store.DTYPES, help="dtype to store (default: the checkpoint's own)")
    add(
        "--mesh",
        metavar="SPEC",
        help="mesh whose shards get a file each: axes data, fsdp, context and tp, such as "
        "fsdp=4,tp=2 (default: one device)",
    )
    add(
        "--head",
        choices=("int8",),
        help="round the head to 8 bits: it is up to half of the bytes that a model of 4 bits reads "
        "for a token (default: keep it)",
    )
    add("--verify", action="store_true", help="at the end, compare every tensor with SRC")
    add(
        "--dequantise",
        action="store_true",
        help="write floats where SRC is quantised (default: keep its 4 or 8 bits)",
    )
    process_options.add(result)
    command.add_debug(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), convert, argv=argv)


def convert(args: argparse.Namespace) -> None:
    """Convert as the arguments say; with --verify, compare a finished target with its source."""
    conversion.join(args)
    plan = make_plan(args)
    if (plan.target / directory.MANIFEST).exists() and args.verify:
        plan.as_stored(args.dtype, cut=args.mesh is not None).verify()
        return
    conversion.run(plan, verify=args.verify)


def make_plan(args: argparse.Namespace) -> ImportPlan:
    """Check the whole input before anything is written, and plan the conversion."""
    from qwen_jax import meshes
    from qwen_jax.meshes import options

    mesh = options.mesh_sizes(args.mesh)
    dst = paths.parse(args.dst)
    source = processes.first(lambda: locate(args.src))
    target.check_apart(source, dst)
    config = read_config(source)
    directory.carried(source)  # refuses now what a load of these files would refuse
    checkpoint.load_generation_config(source)
    tokenizer = checkpoint.load_tokenizer(source)
    vocabulary = (dst if tokenizer is None else source) / directory.TOKENIZER
    if amiss := token_ids.check_fits(vocabulary, tokenizer, vocab_size=config.vocab_size):
        command.say(f"warning: {amiss}")
    if (source / "adapter_config.json").exists():
        how = f"python convert/to_hf.py {dst} NEW --adapter {source}"
        command.say(f"warning: {source} has an adapter, which is not merged: `{how}` does that")
    meshes.check(config.sizes, mesh)
    tensors = folder.read(source)
    names.check_depth(tensors, config.num_layers)
    abstract = checkpoint.abstract_leaves(config, "float32")[1]
    letters = {path: leaf.letters for path, leaf in abstract.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    wanted = names.expected(shapes)
    settings = gptq_config.read(source)
    if settings is None:
        if args.dequantise:
            raise command.UsageError(f"--dequantise: {source} is not quantised: leave it out")
        quantised = _floats(source, tensors, wanted)
    else:
        quantised = _quantised(
            tensors, wanted, settings=settings, letters=letters, dequantise=args.dequantise
        )
    if args.head is not None:
        from convert import int8_head

        int8_head.add(quantised, tensors.get(int8_head.TENSOR))
    plain = {name for name, tensor in quantised.wanted.items() if name in wanted}
    dtype = folder.dtype_of({name: tensors[name] for name in plain}, args.dtype)
    tensors = {name: tensors[name] for name in quantised.wanted}
    files = {tensor.file for tensor in tensors.values()} | {source / directory.CONFIG}
    facts = {
        "made_by": "convert/from_hf.py",
        "dtype": dtype,
        "mesh": mesh,
        "source": target.fingerprint(files),
    }
    manifest: dict[str, Any] = {}
    if quantised.kinds:
        manifest = {kinds.KINDS: quantised.kinds, directory.QUANTISATION: quantised.facts}
    if args.dequantise:
        facts["dequantise"] = True
    if args.head is not None:
        facts["head"] = args.head
    arrays = quantised.arrays | {
        path: gptq_import.Array(shape, dtype, letters[path])
        for path, shape in shapes.items()
        if path not in quantised.kinds
    }
    partitions = {
        path: _partition(array, config.sizes, mesh=mesh) for path, array in arrays.items()
    }
    return ImportPlan(
        source=source,
        target=dst,
        tensors=tensors,
        wanted=quantised.wanted,
        made=quantised.made,
        leaves=_leaves(arrays, partitions, sizes=mesh),
        partitions=partitions,
        facts=facts,
        manifest=manifest,
    )


def _floats(
    source: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, names.Expected]
) -> gptq_import.Quantised:
    """Check the tensors of a checkpoint of floats, and return what is made of them.

    tensors: the location of each tensor, by name. wanted: the tensors that it must contain.
    """
    if packed := next((name for name in tensors if name.endswith(".qweight")), None):
        raise ValueError(
            f"{source} has quantised tensors ({packed}), and neither {directory.CONFIG} nor "
            f"{directory.QUANTIZE_CONFIG} says how: put the files there that came with these "
            "weights"
        )
    _check(tensors, wanted)
    return gptq_import.Quantised(dict(wanted), {}, {}, {}, {})


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, names.Expected]) -> None:
    """Raise ValueError unless a checkpoint has the tensors that it must contain, and no others."""
    inert = [name for name in tensors if names.INERT.fullmatch(name) and name not in wanted]
    names.check({name: x.shape for name, x in tensors.items()}, wanted, inert=inert)


def _quantised(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, names.Expected],
    *,
    settings: gptq_config.Settings,
    letters: Mapping[str, str],
    dequantise: bool,
) -> gptq_import.Quantised:
    """Check the tensors of a quantised checkpoint, and return what is made of them.

    tensors: the location of each tensor, by name.
    wanted: the tensors of the same checkpoint in floats, by name.
    letters: the axis letters of each leaf, by path.
    """
    linears = gptq.linears(wanted, settings.form_of)
    if not linears:
        raise ValueError("dynamic leaves no layer quantised: remove what says that they are")
    named = gptq_import.tensors_of(wanted, linears, found=tensors)
    _check(tensors, named)
    metadata = read_metadata(next(iter(tensors.values())).file)
    values = gptq_import.read(linears, tensors, settings=settings, wanted=named, metadata=metadata)
    if dequantise:
        return gptq_import.dequantised(linears, values, tensors=tensors, wanted=named)
    return gptq_import.kept(
        linears, values, tensors=tensors, wanted=named, letters=letters, metadata=metadata
    )


def _partition(
    array: gptq_import.Array, lengths: Mapping[str, int], *, mesh: dict[str, int]
) -> shares.Partition:
    """Return the mesh axes that divide each axis of an array; none where they do not divide it.

    lengths: the lengths of axes by letter. mesh: the number of devices along each mesh axis.
    """
    from qwen_jax.meshes import sharding

    axes = map(sharding.entries, sharding.spec(array.letters, lengths, mesh=mesh))
    return tuple(
        names if n % math.prod(mesh[name] for name in names) == 0 else ()
        for n, names in zip(array.shape, axes, strict=True)
    )


def locate(src: str) -> Path:
    """Return the folder of SRC, after downloading the missing files of a model on the hub.

    Raises ValueError if SRC is neither a folder nor a model that the hub provides.
    """
    path = paths.parse(src)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(directory.HUB_ID, src):
        raise ValueError(
            f"{src} is not a folder, nor the id of a model on the hub (OWNER/NAME): give the "
            "folder that holds config.json and the weights"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{src} is no folder here; to take it from the hub: pip install -e '.[hub]'"
        ) from None
    patterns = ["*.safetensors", *directory.CARRIED]
    command.say(f"{src}: downloading from the hub what is not here yet")
    try:
        # The folders of a repository hold other formats and training state.
        endpoint = os.environ.get("HF_ENDPOINT")
        found = snapshot_download(
            src, allow_patterns=patterns, ignore_patterns="*/*", endpoint=endpoint
        )
    except Exception as error:  # an error of the hub's library, the network, or its cache
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{src} is no folder here, nor could it be had from the hub: {reason}"
        ) from error
    return Path(found)


def read_config(source: Path) -> Config:
    """Read the model's architecture from a checkpoint folder.

    Raises ValueError if the folder is a model directory or an unfinished export, or has no
    config.json.
    """
    if (source / directory.MANIFEST).exists() or (source / directory.PARAMS).is_dir():
        raise ValueError(
            f"{source} is a model directory already: `python convert/to_hf.py` is the way back"
        )
    if target.is_unfinished(source):
        raise ValueError(
            f"{source} is an unfinished export: give the `python convert/to_hf.py` command again"
        )
    if not (source / directory.CONFIG).exists():
        raise ValueError(
            f"{source} has no {directory.CONFIG}: it is not a checkpoint folder; give the "
            "one that has it beside the weights, or download it"
        )
    return Config.read(source / directory.CONFIG)


def _leaves(
    arrays: Mapping[str, gptq_import.Array],
    partitions: Mapping[str, shares.Partition],
    *,
    sizes: dict[str, int],
) -> dict[str, store.StoredLeaf]:
    """Return the layout of every array, in chunks that divide the shards of a mesh.

    arrays: the arrays, by path. partitions: for each, the mesh axes that divide each of its axes.
    sizes: the number of devices along each mesh axis.
    """
    leaves = {}
    for path, array in arrays.items():
        cuts = [math.prod(sizes[axis] for axis in axes) for axes in partitions[path]]
        shard = tuple(n // cut for n, cut in zip(array.shape, cuts, strict=True))
        chunks = store.chunk_shape(shard, store.ITEM_BYTES[array.dtype])
        leaves[path] = store.StoredLeaf(path, array.shape, chunks, array.dtype)
    return leaves


if __name__ == "__main__":
    sys.exit(main())
