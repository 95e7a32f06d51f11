"""Measures a model's perplexity on long text, by row length and context extension, as table 3 of
Qwen's report does; prints a table and writes a plot. `python train/perplexity.py`.

Every length uses the same tokens, cut into rows of that length, so that figures differ only by the
context before each token. Each figure is reported as soon as it is measured; after an interruption
or error, the table and plot show the figures measured so far.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import caches, command, paths
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
    result = argparse.ArgumentParser(
        prog="python train/perplexity.py",
        description="Measure how well a model predicts long text (its perplexity), by row length "
        "and by what extends\nits context. Prints a table, and writes a plot; if interrupted, of "
        "what was measured until then.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--ckpt", required=True, metavar="DIR", help="model directory")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSONL, JSON, Parquet, text (one document); unused if shorter than the longest row",
    )
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
        help="what extends the context: plain (nothing), ntk, ntk+logn, ntk+logn+window, or own "
        "(what config.json sets) (default: %(default)s)",
    )
    add(
        "--windows",
        metavar="LIST",
        help="window of each layer in ntk+logn+window, such as [1024, null]; null: all tokens "
        "(default: seq_length in the lower half of the layers; none are published)",
    )
    add(
        "--tokens",
        type=command.positive,
        default=2**18,
        metavar="N",
        help="measure at most N tokens, the same at each length (default: %(default)s)",
    )
    add(
        "--field",
        type=command.text,
        default="text",
        metavar="NAME",
        help="field of a record that holds its text (default: %(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=command.DTYPE)
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help=f"implementation of attention: {command.ATTENTION}; default: auto",
    )
    add(
        "--mesh",
        metavar="SPEC",
        help="axes data, fsdp, context and tp, such as context=8 (default: one device)",
    )
    add("--plot", metavar="FILE", help="plot file (default: perplexity.png, none with --json)")
    add("--json", action="store_true", help="print JSON in place of a table")
    out = "also write the figures to FILE as JSON, after each measurement (default: none)"
    add("--out", type=command.path, metavar="FILE", help=out)
    caches.add_compilation_cache(result)
    command.add_debug(result)
    return result


def work(args: argparse.Namespace) -> None:
    from qwen_jax.meshes import options

    lengths = _numbers(args.lengths)
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in (*MODES, OWN)]:
        raise command.UsageError(f"mode {unknown[0]!r}: allowed are {', '.join((*MODES, OWN))}")
    if not any("window" in mode.split("+") for mode in modes):
        how = "is of a mode with window: add ntk+logn+window to --modes, or drop it"
        command.refuse(args, ("windows",), why=how)
    given = "perplexity.png" if args.plot is None and not args.json else args.plot
    picture = None if given is None else paths.parse(given)
    if picture:
        perplexity_figures.check_picture(picture)
    if args.out is not None and (args.out.is_dir() or not paths.is_place(args.out)):
        raise command.UsageError(f"--out {args.out}: a file in a folder that is there")
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
    windows = _windows(args.windows)
    settings = {mode: setting_of(config, mode, windows=windows) for mode in modes}
    for length in lengths:
        meshes.check({**config.sizes, "T": length}, sizes)
    ids = _ids(args, max(lengths))
    dtype = args.dtype or backend.default_dtype()
    with _told(args, len(ids), picture=picture) as tell, meshes.entered(meshes.make(sizes)):
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


@contextlib.contextmanager
def _told(
    args: argparse.Namespace, tokens: int, *, picture: Path | None
) -> Iterator[Callable[[str, int, float, float], None]]:
    """Yield a function to report each figure: mode, length, perplexity and seconds. On leaving the
    context, even by an error, the figures so far are printed as a table or JSON, and plotted.

    tokens: the number of tokens measured at each length. picture: the plot's file, or None.
    """
    found, whole = dict[str, dict[int, float]](), False

    def facts() -> str:
        return json.dumps({"tokens": tokens, "perplexity": found, "complete": whole})

    def tell(mode: str, length: int, value: float, seconds: float) -> None:
        found.setdefault(mode, {})[length] = value
        command.say(f"{mode}, {length:,} tokens: perplexity {value:.4g} ({seconds:.1f} s)")
        if args.out is not None:
            paths.write(args.out, facts().encode())

    try:
        yield tell
        whole = True
    finally:
        if found:
            print(facts() if args.json else perplexity_figures.table(found), flush=True)
            if args.out is not None:
                paths.write(args.out, facts().encode())
            if picture:
                title = perplexity_figures.title_of(args.ckpt, tokens)
                perplexity_figures.plot(found, picture, title=title)
                command.say(f"plot: {picture}")


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
    with tqdm(
        desc=f"{length} tokens", total=len(rows), unit="row", mininterval=0.5, leave=False
    ) as bar:
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
        raise ValueError(f"{args.ckpt} has no tokenizer")
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
        raise ValueError(f"no document has {longest} tokens: give longer ones or less --lengths")
    return np.array(kept[: max(1, args.tokens // longest) * longest], np.int32)


def _windows(text: str | None) -> list[int | None] | None:
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        found = text
    if found is None or isinstance(found, list):
        return found
    raise command.UsageError(f"--windows {text}: a list of widths, as [1024, null]")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    longest = max(found, default=0)
    if not found or any(length < 2 or longest % length for length in found):
        raise command.UsageError(f"--lengths {text}: whole numbers that divide the longest")
    return sorted(set(found))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(parser(), work, argv=None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
