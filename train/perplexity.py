"""Measures a model's perplexity on long text, by row length and context extension, as table 3 of
Qwen's report does; prints a table and writes a plot. `python train/perplexity.py`.

Every length uses the same tokens, cut into rows of that length, so that figures differ only by the
context before each token. Each figure is reported as soon as it is measured; after an interruption
or error, the table and plot show the figures measured so far.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import caches, command, progress
from train import perplexity_figures

if TYPE_CHECKING:
    from qwen_jax.config import Config
    from qwen_jax.model import Decoder

MODES = ("plain", "ntk", "ntk+logn", "ntk+logn+window")
OWN = "own"  # as config.json says: the only mode with rope_scaling, such as YaRN
_AT_A_TIME = 4096  # tokens that are measured together, where no row is longer
_EXAMPLES = """examples:
  python train/perplexity.py --ckpt DIR --data book.txt --lengths 1024,2048,4096,8192
  python train/perplexity.py --ckpt DIR --data papers.jsonl --modes plain,ntk+logn --plot ppl.png
"""


def parser() -> argparse.ArgumentParser:
    result = command.Parser(
        prog="python train/perplexity.py",
        description="Measure how well a model predicts long text (its perplexity), for several row "
        "lengths and ways\nto extend the context. Prints a table, and writes a plot; after an "
        "interruption, of what was\nmeasured until then.",
        epilog=_EXAMPLES,
    )
    _data_options(result)
    _measure_options(result)
    _output_options(result)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def _data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="model directory (required)")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files of text to predict (required): JSONL, JSON, Parquet, or text, which is one "
        "document; documents shorter than the longest row are left out",
    )
    add(
        "--field",
        type=command.text,
        default="text",
        metavar="NAME",
        help="field of a record that holds its text (default: %(default)s)",
    )
    add(
        "--tokens",
        type=command.positive,
        default=2**18,
        metavar="N",
        help="measure N tokens, or all if there are fewer, the same ones at each length; N must be "
        "at least the longest of --lengths (default: %(default)s)",
    )


def _measure_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--lengths",
        default="1024,2048,4096,8192,16384,32768",
        metavar="N,...",
        help="tokens per row, all divisors of the longest (default: %(default)s)",
    )
    add(
        "--modes",
        default=",".join(MODES),
        metavar="NAME,...",
        help="context extensions to compare: plain (none), ntk, ntk+logn, ntk+logn+window, or own "
        "(as config.json says) (default: %(default)s)",
    )
    add(
        "--windows",
        metavar="LIST",
        help="attention windows of ntk+logn+window, in tokens: a JSON list with an entry for each "
        "layer, such as [1024, null]; null: no window (default: seq_length in the lower half of "
        "the layers, which is our choice, as Qwen has published none)",
    )
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
        help="axes data, fsdp, context and tp, such as context=8 (default: one device)",
    )


def _output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--plot",
        metavar="FILE",
        help="picture file to write the plot to; must not exist yet (default: perplexity.png, or "
        "perplexity-2.png and so on if that exists; none with --json)",
    )
    add("--json", action="store_true", help="print a JSON object in place of the table")
    add(
        "--out",
        type=command.path,
        metavar="FILE",
        help="JSON file to write the figures to, after each measurement; must not exist yet "
        "(default: none)",
    )


def work(args: argparse.Namespace) -> None:
    from qwen_jax.meshes import options

    lengths, modes, windows = _numbers(args.lengths), _modes(args), _windows(args.windows)
    if args.tokens < max(lengths):
        raise command.UsageError(
            f"--tokens {args.tokens}: must be at least {max(lengths)}, the longest of --lengths"
        )
    picture = perplexity_figures.picture(args)
    if args.out is not None:
        command.check_new("--out", args.out)
    from qwen_jax import attention, checkpoint, meshes

    attention.get(args.attention)

    sizes = options.mesh_sizes(args.mesh)
    options.virtual_cpu_devices(sizes)
    caches.use_compilation_cache(args.compilation_cache)
    import jax

    from qwen_jax.attention import prove
    from qwen_jax.generate import backend
    from train import step

    config = checkpoint.load_config(args.ckpt)
    settings = {mode: setting_of(config, mode, windows=windows) for mode in modes}
    for length in lengths:
        meshes.check({**config.sizes, "T": length}, sizes)
    ids = _ids(args, max(lengths))
    dtype = args.dtype or backend.default_dtype()
    report = perplexity_figures.reported(args, len(ids), picture=picture)
    with report as tell, meshes.entered(meshes.make(sizes)):
        decoder = jax.jit(step.stacked)(checkpoint.load(args.ckpt, dtype=dtype))
        rows = rows_at_once(max(lengths), len(ids) // max(lengths))
        calls = prove.passes(config, dtype, rows=rows, length=max(lengths))
        attend = prove.resolve(args.attention, calls)
        for mode, setting in settings.items():
            for length in lengths:
                begin = time.perf_counter()
                value = perplexity(
                    decoder, setting, ids=ids, attend=attend, dtype=dtype, length=length
                )
                tell(mode, length, value, time.perf_counter() - begin)


def setting_of(config: "Config", mode: str, *, windows: Sequence[int | None] | None) -> "Config":
    """Return the config with which a mode computes; all modes use the same weights. windows: the
    window of each layer in a mode with "window"; None: `seq_length` tokens in the lower half of the
    layers. Raises ValueError unless there is one window per layer.
    """
    if mode == OWN:
        return config
    parts = mode.split("+")
    if windows is None:
        half = config.num_layers // 2
        windows = [config.seq_length] * half + [None] * (config.num_layers - half)
    return dataclasses.replace(
        config,
        dynamic_ntk="ntk" in parts,
        logn="logn" in parts,
        rope_scaling=None,
        layer_windows=tuple(windows) if "window" in parts else None,
    )


def perplexity(
    decoder: "Decoder",
    config: "Config",
    *,
    ids: np.ndarray,
    attend: Callable[..., Any],
    dtype: Any,
    length: int,
) -> float:
    """Return the perplexity of ids, int32 [N], in rows of `length` tokens: exp of the mean
    cross-entropy of all tokens but the first of each row.

    decoder: stacked; it computes with `config` on the current mesh, in batches of `rows_at_once`,
    of which the last is padded with rows that do not count.
    """
    from qwen_jax.model import rope
    from train.data import batches
    from train.data.batch import IGNORED

    scheme = rope.from_config(config)
    rates = scheme.frequencies(scheme.alpha(np.array([length])))
    total = _total(config, attend, dtype=dtype)
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    size, entropy, done = rows_at_once(length, len(rows)), 0.0, 0
    with progress.bar(desc=f"{length} tokens", total=len(rows), unit="row", leave=False) as bar:
        for part in (rows[at : at + size] for at in range(0, len(rows), size)):
            filling = ((0, size - len(part)), (0, 0))
            labels = np.pad(part, filling, constant_values=IGNORED)
            batch = batches.place(batches.batch_of(np.pad(part, filling), labels))
            entropy += float(total(decoder, batch, rates))
            done += len(part) * (length - 1)
            bar.set_postfix(perplexity=f"{_perplexity(entropy / done):.4g}", refresh=False)
            bar.update(len(part))
    return _perplexity(entropy / done)


def rows_at_once(length: int, count: int) -> int:
    """Return how many of `count` rows to measure together, on the current mesh or on one device:
    about 4096 tokens, in equally many rows (at least one) on each device that rows are split over.
    """
    from qwen_jax.meshes import sharding

    sizes = sharding.axis_sizes()
    parts = math.prod(sizes[axis] for axis in sharding.BATCH)
    return max(1, min(_AT_A_TIME // length // parts, -(-count // parts))) * parts


def _perplexity(entropy: float) -> float:
    return math.exp(min(700, entropy))


@functools.cache
def _total(config: "Config", attend: Callable[..., Any], *, dtype: Any) -> Callable[..., Any]:
    """Build a jitted function that sums the cross-entropies of a batch's targets. Its arguments are
    decoder, batch and RoPE frequencies, float32 [1, H/2].
    """
    import jax
    import jax.numpy as jnp

    from train.data.batch import Batch
    from train.step import loss

    @jax.jit
    def total(decoder: "Decoder", batch: Batch, rates: jax.Array) -> jax.Array:
        decoder = decoder.replace(config=config)
        found, weights = loss.scores(
            decoder, batch, frequencies=rates, attend=attend, dtype=jnp.dtype(dtype)
        )
        return jnp.sum(weights * (found.lse - found.logit))

    return total


def _ids(args: argparse.Namespace, longest: int) -> np.ndarray:
    """Return ids, int32 [N], of documents of at least `longest` tokens, cut to multiples of it."""
    from qwen_jax import checkpoint
    from train import data
    from train.data import records

    tokenizer = checkpoint.load_tokenizer(args.ckpt)
    if tokenizer is None:
        raise ValueError(f"{args.ckpt} has no tokenizer: put its qwen.tiktoken there")
    kept, document = list[int](), list[int]()
    for record in (record for file in records.files(args.data) for record in records.read(file)):
        if record.problem:
            raise ValueError(f"{record.where}: {record.problem}")
        try:
            document += data.text_example(tokenizer, record.value, field=args.field, ends=False)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        # A document that is longer than all that is wanted is not read to its end.
        whole = len(document) // longest * longest
        enough = len(kept) + whole >= args.tokens
        if record.ends or enough:
            kept, document = kept + document[:whole], []
        if enough:
            break
    kept += document[: len(document) // longest * longest]
    if not kept:
        raise ValueError(
            f"no document has {longest} tokens: give longer ones, or shorter --lengths"
        )
    return np.array(kept[: args.tokens // longest * longest], np.int32)


def _modes(args: argparse.Namespace) -> list[str]:
    """The modes to measure. Raises UsageError for an unknown one, and for --windows without use."""
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in (*MODES, OWN)]:
        known = ", ".join((*MODES, OWN))
        raise command.UsageError(f"--modes {unknown[0]}: must be one or more of {known}")
    if not any("window" in mode.split("+") for mode in modes):
        how = "applies only to mode ntk+logn+window: leave it out, or add that to --modes"
        command.refuse(args, ("windows",), why=how)
    return modes


def _windows(text: str | None) -> list[int | None] | None:
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        found = text
    if found is None or isinstance(found, list):
        return found
    how = "must be a JSON list of a number or null for each layer, such as [1024, null]"
    raise command.UsageError(f"--windows {text}: {how}")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    longest = max(found, default=0)
    if not found or any(length < 2 or longest % length for length in found):
        how = "must be whole numbers from 2 on that divide the longest, such as 1024,2048"
        raise command.UsageError(f"--lengths {text}: {how}")
    return sorted(set(found))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(parser(), work, argv=None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
