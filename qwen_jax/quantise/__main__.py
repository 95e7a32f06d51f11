"""`python -m qwen_jax.quantise`: makes a model of 4 or 8 bits from one of floats (GPTQ).

The table of errors goes to stdout, progress to stderr, and `quantisation.json` in the new directory
has all figures.
"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_jax.quantise import calibration
from qwen_jax.runtime import caches, command, process_options

if TYPE_CHECKING:
    from qwen_jax.quantise.algorithm import Scheme

_EXAMPLES = """examples:
  python -m qwen_jax.quantise --ckpt DIR --data chats.jsonl --out DIR-int4 --bits 4
  python -m qwen_jax.quantise --ckpt DIR --data book.txt --out DIR-int8 --bits 8 --head int8
  python -m qwen_jax.quantise --ckpt DIR --data chats.jsonl --out DIR2 --bits 4 --group-aware --asymmetric
  python -m qwen_jax.quantise --ckpt DIR --data chats.jsonl --out DIR2 --bits 4 --bits-of "*.ffn.down=8"
  python -m qwen_jax.quantise --ckpt DIR --data chats.jsonl --out DIR2 --bits 4 --adapter RUN/adapter
  python -m qwen_jax.quantise --ckpt DIR --data chats.jsonl --out DIR2 --bits 4 --resume
"""  # noqa: E501 (a command is on one line)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    result = command.Parser(
        prog="python -m qwen_jax.quantise",
        description="Make a model directory of 4 or 8 bits from one of floats, with GPTQ: matrices "
        "are rounded so that\ntheir products with calibration data change least. It holds the "
        "weights of one block at a time.",
        epilog=_EXAMPLES,
    )
    add = result.add_argument
    add(
        "--ckpt",
        required=True,
        metavar="DIR",
        help="model directory of floats; with --adapter, also of 4 or 8 bits (required)",
    )
    add(
        "--adapter",
        metavar="DIR",
        help="adapter in PEFT's format to merge first, into the floats that the weights are or "
        "stand for (default: none)",
    )
    add(
        "--out",
        required=True,
        type=command.path,
        metavar="DIR",
        help="model directory to write (required); it must be empty, or unfinished with --resume",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the work of the same command in --out, if there is any",
    )
    _scheme_options(result.add_argument_group("rounding"))
    _data_options(result.add_argument_group("calibration data"))
    _compute_options(result.add_argument_group("computing"))
    add("--json", action="store_true", help="print a JSON object in place of the table")
    caches.add_compilation_cache(result)
    process_options.add(result)
    command.add_debug(result)
    return result


def _scheme_options(group: command.Group) -> None:
    """Add the options that say how matrices are rounded."""
    add = group.add_argument
    add("--bits", required=True, type=int, choices=(4, 8), help="bits of a weight (required)")
    add(
        "--group-size",
        type=int,
        default=128,
        metavar="N",
        help="inputs that share a scale; -1: all of them (default: %(default)s)",
    )
    order = group.add_mutually_exclusive_group().add_argument
    order(
        "--act-order",
        action="store_true",
        help="round large inputs first, and group them in that order (desc_act): the least error, "
        "but products permute their inputs",
    )
    order(
        "--group-aware",
        action="store_true",
        help="round large inputs first within groups of neighbours: less error than without, and "
        "no cost later",
    )
    add("--asymmetric", action="store_true", help="give each group a zero of its own")
    add(
        "--damp",
        type=float,
        default=0.01,
        metavar="X",
        help="share of its mean that is added to a Hessian's diagonal; it rises where that is too "
        "little (default: %(default)s)",
    )
    add(
        "--bits-of",
        type=command.text,
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="other bits for matrices whose names match, such as layers.0.*=8 or *.ffn.down=8; 16: "
        "leave them as they are; repeatable, the last one holds (default: --bits for all)",
    )
    add(
        "--head",
        choices=("int8",),
        help="round the head too, to the nearest in int8 (default: leave it as it is)",
    )


def _data_options(group: command.Group) -> None:
    """Add the options of the calibration data."""
    add = group.add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="conversations, as train/sft.py takes them, or texts: JSONL, JSON, Parquet or .txt "
        "(required)",
    )
    add(
        "--field",
        type=command.text,
        default="text",
        metavar="NAME",
        help="field of a record that holds its text; a record without it is a conversation "
        "(default: %(default)s)",
    )
    add(
        "--samples",
        type=command.positive,
        metavar="N",
        help=f"calibrate on N rows (default: all that there are, {calibration.SAMPLES} at most)",
    )
    add(
        "--held-out",
        type=int,
        metavar="N",
        help="compare the models on N other rows; 0: on those of calibration (default: an eighth "
        f"of what there is, {calibration.HELD_OUT} at most)",
    )
    add(
        "--length",
        type=command.positive,
        metavar="T",
        help=f"tokens of a row (default: {calibration.LENGTH}, or seq_length of the model if "
        "that is less)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="same seed, same rows (default: %(default)s)",
    )


def _compute_options(group: command.Group) -> None:
    """Add the options of how passes are computed."""
    add = group.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=command.DTYPE)
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help=f"implementation of attention: {command.ATTENTION} (default: %(default)s)",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp and tp, such as fsdp=4,tp=2 (default: one device)",
    )


def work(args: argparse.Namespace) -> None:
    """Quantise a model as the command line says, and print what it cost."""
    process_options.join(args)
    bits_of = _bits_of(args.bits_of)
    for option, number in (("--held-out", args.held_out), ("--seed", args.seed)):
        if number is not None and number < 0:
            raise command.UsageError(f"{option} {number}: must be at least 0")
    from qwen_jax import attention, checkpoint, meshes
    from qwen_jax.generate import backend
    from qwen_jax.meshes import options
    from qwen_jax.quantise import findings
    from qwen_jax.quantise.run import Settings, run
    from qwen_jax.runtime import paths

    attention.get(args.attention)
    scheme = _scheme(args)
    ckpt = paths.absolute(args.ckpt)
    checkpoint.verify_whole(ckpt)
    sizes = options.mesh_sizes(args.mesh)
    options.virtual_cpu_devices(sizes)
    caches.use_compilation_cache(args.compilation_cache)
    rows, held_out = calibration.of_model(
        ckpt,
        args.data,
        length=args.length,
        samples=args.samples,
        held_out=args.held_out,
        seed=args.seed,
        field=args.field,
    )
    settings = Settings(
        ckpt=ckpt,
        out=paths.absolute(args.out),
        scheme=scheme,
        bits_of=bits_of,
        int8_head=args.head == "int8",
        dtype=args.dtype or backend.default_dtype(),
        attention=args.attention,
        resume=args.resume,
        adapter=None if args.adapter is None else paths.absolute(args.adapter),
    )
    mesh = meshes.make(sizes)
    options.check_used(mesh)
    with meshes.entered(mesh):
        figures = run(settings, rows, held_out=held_out)
    print(json.dumps(figures) if args.json else findings.table(figures))
    command.say(f"{args.out} is complete")


def _bits_of(items: Sequence[str]) -> dict[str, int]:
    """Parse all `--bits-of PATTERN=BITS` options. Raises UsageError for another form."""
    found: dict[str, int] = {}
    for item in items:
        pattern, _, bits = item.rpartition("=")
        if not pattern or bits not in ("4", "8", "16"):
            raise command.UsageError(
                f"--bits-of {item}: must be PATTERN=BITS, with 4, 8 or 16 bits, such as "
                "*.ffn.down=8"
            )
        found.pop(pattern, None)  # the last one holds, also against other patterns
        found[pattern] = int(bits)
    return found


def _scheme(args: argparse.Namespace) -> "Scheme":
    """Return how matrices are rounded. Raises UsageError for sizes that are not allowed."""
    from qwen_jax.quantise.algorithm import Order, Scheme

    order = Order.FILE
    if args.act_order or args.group_aware:
        order = Order.IMPORTANCE if args.act_order else Order.GROUPS
    options = {"group_size": "group-size", "damping": "damp"}
    try:
        return Scheme(args.bits, args.group_size, not args.asymmetric, order, args.damp)
    except ValueError as error:
        field, _, rest = str(error).partition(":")
        raise command.UsageError(f"--{options.get(field, field)}:{rest}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), work, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
