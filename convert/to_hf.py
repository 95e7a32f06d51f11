"""Convert a model directory of qwen_jax back into a Hugging Face checkpoint folder.

SRC is a model directory, as `python convert/from_hf.py` and training write them. DST gets
safetensors files with an index, and the configuration and tokenizer that SRC carries. After an
interruption, the same command continues where it stopped. Several processes share the files if each
runs this command with its own --process, or on a cluster with --distributed; all of them must then
see DST.
"""

import argparse
import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from convert.copying import Change, Job

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from convert import export, folder, names, target
from convert.export import ExportPlan
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, inspection, store, token_ids
from qwen_jax.config import Config
from qwen_jax.runtime import command, paths, process_options, processes

EXAMPLES = """examples:
  python convert/to_hf.py models/qwen-7b ~/exported               in files of at most 5 GB
  python convert/to_hf.py SRC DST --max-shard-size 500MB --verify smaller files, then compare
  python convert/to_hf.py SRC DST --dtype float16                 cast on the way
  python convert/to_hf.py SRC DST --adapter RUN/adapter           with an adapter merged in

If the dtype is that of the checkpoint that SRC was made from, all tensors are equal to it byte for
byte. SRC and DST may be gs://BUCKET/PATH (pip install qwen-jax[gcs]).
"""


def parser() -> argparse.ArgumentParser:
    result = command.Parser(
        prog="python convert/to_hf.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add = result.add_argument
    add("src", metavar="SRC", help="model directory")
    add("dst", metavar="DST", help="folder to make; may exist if empty")
    add("--dtype", choices=folder.CODES, help="dtype to write (default: the directory's own)")
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
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def main(argv: list[str] | None = None) -> int:
    return command.run(parser(), convert, argv=argv)


def convert(args: argparse.Namespace) -> None:
    process_options.join(args)
    import jax

    jax.config.update("jax_platforms", "cpu")  # bytes are copied: an accelerator has no part in it
    plan = make_plan(args)
    with target.locked(plan.target) as check:
        copy(plan)
        if args.verify:
            verify(plan)
        check()
        if processes.index() == 0:
            check_sizes(plan)
            target.complete(plan.target)
        processes.barrier()
    command.say(f"{plan.target} is complete")


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
    directory.check_shapes(src, manifest, wanted=shapes)
    wanted = names.expected(shapes)
    dtype = args.dtype or manifest["dtype"]
    sizes = {name: math.prod(t.shape) * folder.ITEM_BYTES[dtype] for name, t in wanted.items()}
    facts = {
        "made_by": "convert/to_hf.py",
        "dtype": dtype,
        "max_shard_size": args.max_shard_size,
        "source": target.fingerprint(src / n for n in (directory.MANIFEST, directory.CONFIG)),
    }
    changes, settings = {}, None
    if args.adapter is not None:
        from convert import adapter_config, peft

        adapter = paths.parse(args.adapter)
        changes = peft.changes(adapter, shapes)
        files = [adapter / name for name in (adapter_config.SETTINGS, peft.TENSORS)]
        facts["adapter"] = target.fingerprint(files)
        if (adapter / directory.GENERATION_CONFIG).exists():
            settings = adapter / directory.GENERATION_CONFIG
            token_ids.check_range(settings, config.vocab_size)
    for line in inspection.vocabulary(src, config)["warnings"]:
        command.say(f"warning: {line}")
    leaves = store.read_leaves(src / directory.PARAMS, manifest["dtype"])
    shards = export.split(sizes, args.max_shard_size)
    return ExportPlan(
        source=src,
        target=dst,
        wanted=wanted,
        leaves=leaves,
        shards=shards,
        dtype=dtype,
        facts=facts,
        changes=changes,
        settings=settings,
    )


def copy(plan: ExportPlan) -> None:
    """Write every file of the checkpoint folder, the index last.

    With n processes, each writes every n-th safetensors file.
    """
    from convert import copying

    if processes.index() == 0:
        resumed = target.check_usable(plan.target, plan.facts)
        done, needed, _ = _all_jobs(plan, list(plan.shards), resumed=resumed)
        target.begin_or_resume(
            plan.source, plan.target, facts=plan.facts, resumed=resumed, done=done, needed=needed
        )
        with target.explained(plan.target, needed):
            export.write_config(plan)
    processes.barrier()
    if processes.index() > 0:
        target.check_shared(plan.target, plan.facts)
        resumed = True
    files = list(plan.shards)[processes.index() :: processes.count()]
    done, needed, pending = _all_jobs(plan, files, resumed=resumed)
    with target.explained(plan.target, needed):
        # One worker: a file's length tells how far it has come, so it is written front to back.
        copying.run("converting", pending, done=done, workers=1)
    processes.barrier()
    if processes.index() == 0 and len(plan.shards) > 1:
        export.write_index(plan)
    processes.barrier()


def _all_jobs(plan: ExportPlan, files: list[str], *, resumed: bool) -> tuple[int, int, "list[Job]"]:
    """Return the bytes of these files already written, the bytes left to write, and the jobs.

    files: names of safetensors files. resumed: whether the drafts of an earlier start are
    continued.
    """
    done, pending = 0, []
    for file in files:
        there, jobs = _jobs(plan, file, resumed=resumed)
        done += there
        pending += jobs
    return done, sum(size for size, _ in pending), pending


def _jobs(plan: ExportPlan, file: str, *, resumed: bool) -> tuple[int, "list[Job]"]:
    """Return the bytes of a safetensors file already written, and the jobs left, in order.

    file: the file's name. resumed: whether the draft of an earlier start is continued.
    """
    whole = plan.target / file
    # The name is the same in every process, so that a stopped export can be continued. The file is
    # never shortened, so two exports that no lock keeps apart write the same bytes.
    draft = whole.with_name(f"{file}.tmp")
    head, bands, sizes = _layout(plan, file)
    if whole.exists() and paths.size(whole) == len(head) + sum(sizes):
        return sum(sizes), []
    if paths.is_remote(whole):  # an object cannot be appended to: a file is one job
        return 0, [(sum(sizes), functools.partial(_upload, plan, whole, head=head, bands=bands))]
    written = draft.stat().st_size if resumed and draft.exists() else 0
    jobs: list[Job] = []
    if written < len(head):
        jobs.append((0, functools.partial(_write_head, draft, head)))
    done, position = 0, len(head)
    for band, size in zip(bands, sizes, strict=True):
        if position + size <= written:
            done += size
        else:
            jobs.append(
                (size, functools.partial(_append, plan, draft, position=position, band=band))
            )
        position += size
    jobs.append((0, functools.partial(_rename, draft, whole)))
    return done, jobs


def _layout(plan: ExportPlan, file: str) -> tuple[bytes, list[store.Band], list[int]]:
    """Return the layout of a safetensors file: its header, then the bands of leaves that follow it
    in order, and the size in bytes of each band.
    """
    shapes = {name: plan.wanted[name].shape for name in plan.shards[file]}
    bands = [
        band
        for name in shapes
        for part in plan.wanted[name].parts
        for band in plan.leaves[part.path].bands()
    ]
    sizes = [band.rows * band.row_elements * folder.ITEM_BYTES[plan.dtype] for band in bands]
    return folder.header(shapes, plan.dtype), bands, sizes


def check_sizes(plan: ExportPlan) -> None:
    """Raise ValueError unless every tensor file exists and has its full size."""
    wanted = {}
    for file in plan.shards:
        head, _, sizes = _layout(plan, file)
        wanted[file] = len(head) + sum(sizes)
    files = [plan.target / file for file in wanted]
    found = {file.name: paths.size(file) for file in files if file.exists()}
    if problems := directory.differences(found, wanted):
        raise ValueError(
            f"{plan.target} was not written as it should be: {problems}; write it again"
        )


def _write_head(file: Path, content: bytes) -> None:
    """Write the first bytes of a file, which need not exist."""
    file.touch()
    with open(file, "r+b") as stream:
        stream.write(content)


def _rename(draft: Path, whole: Path) -> None:
    """Give a complete draft its name."""
    draft.replace(whole)


def _upload(plan: ExportPlan, file: Path, *, head: bytes, bands: list[store.Band]) -> None:
    """Write a whole file to object storage."""
    from convert import copying

    with paths.writer(file) as stream:
        copying.write(stream, np.frombuffer(head, np.uint8))
        for band in bands:
            copying.export_band(
                band, plan.params, target=stream, dtype=plan.dtype, change=_change(plan, band)
            )


def _append(plan: ExportPlan, draft: Path, *, position: int, band: store.Band) -> None:
    """Write a band to a draft at `position`, which is the draft's end or before it."""
    from convert import copying

    with open(draft, "r+b", buffering=0) as stream:
        if stream.seek(0, os.SEEK_END) < position:
            raise ValueError(f"{draft} has been changed by someone else: remove it")
        stream.seek(position)  # a band that was cut short is written again from its beginning
        change = _change(plan, band)
        copying.export_band(
            band, plan.params, target=stream.fileno(), dtype=plan.dtype, change=change
        )


def _change(plan: ExportPlan, band: store.Band) -> "Change | None":
    """The function that merges the adapter into a band; None if the band does not change."""
    return plan.changes.get(band.leaf.path)


def verify(plan: ExportPlan) -> None:
    """Compare every tensor of the target with the source; ValueError if any differs."""
    from convert.verify import verify as compare

    tensors = folder.read(plan.target)
    compare(
        plan.params,
        plan.leaves,
        tensors=tensors,
        wanted=plan.wanted,
        exported=True,
        changes=plan.changes,
    )
    processes.barrier()
    merged = ", the adapter merged into them" if plan.changes else ""
    command.say(f"verified: all {len(plan.wanted)} tensors are the source's{merged}")


if __name__ == "__main__":
    sys.exit(main())
