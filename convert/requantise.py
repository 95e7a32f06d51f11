"""Merges an adapter into the floats of a model, and quantises it again, for a GPTQ checkpoint.

The model that is made lies beside the checkpoint until that is complete, so that the same command
goes on after a kill. (The quantiser: `python -m qwen_jax.quantise`.)
"""

import argparse
import collections
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import conversion, gptq_export, target
from convert.export_plan import ExportPlan
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory, kinds
from qwen_jax.runtime import command, paths, process_options

if TYPE_CHECKING:
    from qwen_jax.quantise.algorithm import Scheme


def run(args: argparse.Namespace, *, plan_of: Callable[[argparse.Namespace], ExportPlan]) -> None:
    """Quantise and export as the arguments of `to_hf` say, and say what it costs.

    plan_of: makes the plan of an export (`to_hf.make_plan`).

    Raises UsageError for options that do not fit together, and ValueError for other bad input,
    before anything is written.
    """
    _check_options(args)
    src, dst = paths.absolute(args.src), paths.absolute(args.dst)
    target.check_apart(src, dst)
    made = dst.with_name(f"{dst.name}.requantised")
    manifest = checkpoint.verify_whole(src)
    scheme, bits_of = _scheme(args, manifest)
    if args.zeros is not None and scheme.symmetric:
        raise command.UsageError(f"--zeros: {args.src} has no zeros of its own: leave it out")
    if kinds.INT8 in kinds.of_manifest(manifest).values():
        command.say(gptq_export.HEAD_NOTE)
    if not (made / directory.MANIFEST).exists():
        target.check_usable(dst, {})
    figures = _quantised(args, src, made, scheme=scheme, bits_of=bits_of)
    export = {"src": str(made), "adapter": None, "requantise": None, "bits": None}
    plan = plan_of(argparse.Namespace(**{**vars(args), **export}))
    if target.is_unfinished(dst) or plan.remaining(resumed=False).needed:
        conversion.run(plan, verify=args.verify)
    else:  # an earlier start was stopped after its end
        if args.verify:
            plan.verify()
        command.say(f"{dst} is complete")
    paths.remove_tree(made)
    _say_costs(figures)


def _check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for options that --requantise does not go with."""
    if args.adapter is None:
        raise command.UsageError(
            "--requantise: add the --adapter to merge; without one, `python -m qwen_jax.quantise` "
            "quantises a model"
        )
    if args.dequantise:
        raise command.UsageError("--requantise writes integers and --dequantise floats: choose one")
    if args.form != "qwen":
        raise command.UsageError(
            f"--as {args.form}: --requantise writes the generation of SRC: give what it writes to "
            f"from_hf, and then to_hf --as {args.form}"
        )
    several = (args.coordinator, args.processes, args.process)
    if args.distributed or several != (None, None, None):
        raise command.UsageError(
            "--requantise runs as one process: `python -m qwen_jax.quantise --adapter` takes "
            "--mesh, and to_hf exports what it makes as several"
        )
    process_options.join(args)


def _scheme(
    args: argparse.Namespace, manifest: Mapping[str, Any]
) -> "tuple[Scheme, dict[str, int]]":
    """Return how matrices are rounded, as those of SRC or with --bits, and other bits by path."""
    from qwen_jax.quantise.algorithm import Order, Scheme
    from qwen_jax.quantise.schemes import FLOAT

    found = {x: kind for x, kind in kinds.of_manifest(manifest).items() if kind in kinds.GROUPED}
    if not found:
        if args.bits is None:
            raise command.UsageError(f"--requantise: {args.src} is of floats: add --bits 4 or 8")
        return Scheme(args.bits, order=Order.GROUPS), {}
    if args.bits is not None:
        raise command.UsageError(
            f"--bits: {args.src} is quantised, and keeps its bits: leave it out, or give the "
            "floats that it was made from"
        )
    shapes = kinds.shapes(manifest)
    matrices = {x for x, shape in shapes.items() if x.startswith("layers.") and len(shape) == 2}
    fields = [kinds.fields_of(path, manifest) for path in found]
    sizes = {shapes[x][1] // each["scales"][0] for x, each in zip(found, fields, strict=True)}
    if len(sizes) > 1 and all(each["scales"][0] == 1 for each in fields):
        sizes = {-1}
    if len(sizes) > 1:
        raise ValueError(
            f"the matrices of {args.src} have groups of {' and '.join(map(str, sorted(sizes)))}: "
            "merge and quantise with `python -m qwen_jax.quantise --adapter`, which gives all the "
            "same"
        )
    ((most, _),) = collections.Counter(found.values()).most_common(1)
    bits_of = {path: kinds.GROUPED.get(found.get(path, ""), FLOAT) for path in sorted(matrices)}
    scheme = Scheme(
        kinds.GROUPED[most],
        sizes.pop(),
        symmetric=not any("zeros" in each for each in fields),
        order=Order.IMPORTANCE if any("order" in each for each in fields) else Order.GROUPS,
    )
    return scheme, {path: bits for path, bits in bits_of.items() if bits != scheme.bits}


def _quantised(
    args: argparse.Namespace, src: Path, out: Path, *, scheme: "Scheme", bits_of: dict[str, int]
) -> dict[str, Any]:
    """Make a model directory, or go on with one, and return its figures."""
    from qwen_jax import meshes
    from qwen_jax.generate import backend
    from qwen_jax.quantise import calibration
    from qwen_jax.quantise.run import Settings
    from qwen_jax.quantise.run import run as quantise

    rows, held_out = calibration.of_model(src, args.requantise)
    settings = Settings(
        ckpt=src,
        out=out,
        scheme=scheme,
        bits_of=bits_of,
        dtype=backend.default_dtype(),
        resume=True,
        adapter=paths.absolute(args.adapter),
    )
    with meshes.entered(meshes.make()):
        return quantise(settings, rows, held_out=held_out)


def _say_costs(figures: Mapping[str, Any]) -> None:
    """Say how far the quantised model is from the merged floats."""
    from qwen_jax.quantise import findings

    bits = figures["scheme"]["bits"]
    command.say(
        f"merged and quantised to {bits} bits: mean relative output error of the matrices "
        f"{findings.mean_error(figures):.4g}"
    )
    command.say(f"beside the merged floats, {findings.compared(figures)}")
