"""Convert a model directory of qwen_jax back into a Hugging Face checkpoint folder.

SRC is a model directory, as `python convert/from_hf.py` and training write them. DST gets
safetensors files with an index, and the configuration and tokenizer that SRC carries. With --as
qwen2, DST is a folder of Qwen2 with the same weights and token ids, for programs that do not take
the first generation. After an interruption, the same command continues where it stopped. Several
processes share the files if each runs this command with its own --process, or on a cluster with
--distributed; all of them must then see DST.
"""

import argparse
import math
import re
import sys
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from convert import conversion, export_plan, gptq_export, gptq_settings, names, target
from convert.export_plan import ExportPlan
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, inspection, kinds, store
from qwen_jax.config import Config
from qwen_jax.runtime import command, paths, process_options

FORMS = {"qwen": names.TABLE, "qwen2": names.QWEN2}
EXAMPLES = """examples:
  python convert/to_hf.py models/qwen-7b ~/exported               in files of at most 5 GB
  python convert/to_hf.py SRC DST --max-shard-size 500MB --verify smaller files, then compare
  python convert/to_hf.py SRC DST --dtype float16                 cast on the way
  python convert/to_hf.py SRC DST --adapter RUN/adapter           with an adapter merged in
  python convert/to_hf.py SRC DST --as qwen2                      for vLLM, SGLang, llama.cpp, TRL
  python convert/to_hf.py SRC DST --dequantise --adapter DIR      of 4 bits: floats, merged
  python convert/to_hf.py SRC DST --adapter DIR --requantise chats.jsonl           4 bits again
  python convert/to_hf.py SRC DST --adapter DIR --requantise chats.jsonl --bits 4  of floats

If the dtype is that of the checkpoint that SRC was made from, all tensors are equal to it byte for
byte. SRC and DST may be gs://BUCKET/PATH (pip install -e '.[gcs]').
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    result = command.Parser(
        prog="python convert/to_hf.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add = result.add_argument
    add("src", metavar="SRC", help="model directory")
    add("dst", metavar="DST", help="folder to make; may exist if empty")
    add("--dtype", choices=store.DTYPES, help="dtype to write (default: the directory's own)")
    add(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="largest size of a file, such as 5GB or 500MB (default: %(default)s)",
    )
    add(
        "--adapter",
        metavar="DIR",
        help="adapter in PEFT's format to merge into the weights (default: none)",
    )
    add(
        "--dequantise",
        action="store_true",
        help="write floats where SRC is quantised (default: its 4 or 8 bits)",
    )
    add(
        "--requantise",
        nargs="+",
        metavar="DATA",
        help="quantise as SRC is, after --adapter is merged, on conversations or texts: JSONL, "
        "JSON, Parquet or .txt (default: do not)",
    )
    add(
        "--bits",
        type=int,
        choices=(4, 8),
        help="bits of a weight; with --requantise where SRC is of floats, and then required (a "
        "quantised SRC keeps its own)",
    )
    add(
        "--zeros",
        choices=("v1", "v2"),
        help="convention of zeros that asymmetric layers have in files: v2, which GPTQModel loads, "
        "or v1, which AutoGPTQ reads if no zero is 0 (default: as SRC came, else v2)",
    )
    add(
        "--as",
        dest="form",
        choices=FORMS,
        default="qwen",
        help="generation whose names and files to write: qwen, as SRC came, or qwen2, which has no "
        "dynamic NTK and no LogN (default: %(default)s)",
    )
    add(
        "--verify",
        action="store_true",
        help="at the end, compare every tensor with SRC (and --adapter)",
    )
    process_options.add(result)
    command.add_debug(result)
    return result


def parse_size(text: str) -> int:
    """Parse a size such as `5GB`, `500MB` or `2GiB` into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or not 0 < float(match[1]) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), convert, argv=argv)


def convert(args: argparse.Namespace) -> None:
    """Convert as the arguments say."""
    if args.requantise is not None:
        from convert import requantise

        requantise.run(args, plan_of=make_plan)
        return
    if args.bits is not None:
        raise command.UsageError("--bits applies to --requantise: add it, or leave --bits out")
    conversion.join(args)
    conversion.run(make_plan(args), verify=args.verify)


def make_plan(args: argparse.Namespace) -> ExportPlan:
    """Check the whole input before anything is written, and plan the export."""
    src, dst = paths.parse(args.src), paths.parse(args.dst)
    target.check_apart(src, dst)
    if args.verify:
        paths.check_name(src)  # verification reads it by TensorStore, which needs such a name
    manifest = checkpoint.verify_whole(src)
    config = Config.read(src / directory.CONFIG)
    abstract = checkpoint.abstract_leaves(config, manifest["dtype"])[1]
    shapes = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    kinds.check_shapes(src, manifest, wanted=shapes)
    dtype = args.dtype or manifest["dtype"]
    facts = {
        "made_by": "convert/to_hf.py",
        "dtype": dtype,
        "max_shard_size": args.max_shard_size,
        "source": target.fingerprint(src / n for n in (directory.MANIFEST, directory.CONFIG)),
    }
    changes, settings = {}, None
    if args.adapter is not None:
        adapter = paths.parse(args.adapter)
        from qwen_jax.checkpoint import peft

        changes = peft.changes(adapter, shapes)
        facts["adapter"] = target.fingerprint(peft.files(adapter))
        settings = peft.generation_config(adapter, config.vocab_size)
    _check_integers(args, set(kinds.of_manifest(manifest).values()))
    if args.dequantise:
        facts["dequantise"] = True
    leaves = store.read_leaves(src / directory.PARAMS)
    convention = gptq_settings.convention(src, manifest, asked=args.zeros)
    tensors = gptq_export.of(
        src / directory.PARAMS,
        leaves,
        manifest=manifest,
        wanted=names.expected(shapes, FORMS[args.form]),
        dtype=dtype,
        convention=convention,
        changes=changes if args.dequantise else None,
    )
    described = None
    if tensors.linears:
        facts["zeros"] = convention
        kept = src if args.form == "qwen" else None
        described = gptq_settings.described(tensors, manifest, convention=convention, source=kept)
    sizes = {
        name: math.prod(tensor.shape) * store.ITEM_BYTES[tensors.dtypes[name]]
        for name, tensor in tensors.wanted.items()
    }
    for line in inspection.vocabulary(src, config)["warnings"]:
        command.say(f"warning: {line}")
    plan = ExportPlan(
        source=src,
        target=dst,
        wanted=tensors.wanted,
        made=tensors.made,
        leaves=leaves,
        shards=export_plan.split(sizes, args.max_shard_size),
        dtype=dtype,
        dtypes=tensors.dtypes,
        config={} if described is None else {directory.QUANTIZATION: described},
        metadata={} if args.dequantise else gptq_settings.metadata(manifest),
        facts=facts,
        changes=changes,
        settings=settings,
    )
    if args.form == "qwen":
        return plan
    from convert import qwen2_plan

    return qwen2_plan.of(plan, config)


def _check_integers(args: argparse.Namespace, found: set[str]) -> None:
    """Raise UsageError for options that do not fit the kinds of quantised weights of SRC.

    found: these kinds. Says in a line what a head of 8 bits becomes.
    """
    integers = bool(found & set(kinds.GROUPED))
    if args.dequantise and not integers:
        raise command.UsageError(f"--dequantise: {args.src} is not quantised: leave it out")
    if args.zeros is not None and (args.dequantise or not integers):
        raise command.UsageError("--zeros applies to integers of 4 or 8 bits: leave it out")
    if args.adapter is not None and integers and not args.dequantise:
        raise command.UsageError(
            f"--adapter: {args.src} is quantised, and an adapter cannot be merged into integers: "
            "add --requantise DATA to write integers again, or --dequantise to write floats, or "
            "give the floats that it was made from"
        )
    if kinds.INT8 in found:
        command.say(gptq_export.HEAD_NOTE)


if __name__ == "__main__":
    sys.exit(main())
