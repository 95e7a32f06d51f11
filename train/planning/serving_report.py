"""Formats plans of serving engines as text for a terminal."""

from collections.abc import Sequence

from qwen_jax import meshes
from train.planning.serving import Plan


def text(x: Plan, model: str, *, by_auto: bool) -> str:
    """Format one plan. model: the name of the model. by_auto: whether "auto" chose attention."""
    shape, serving = x.engine.shape, x.serving
    count = x.topology.devices
    kind = f"{serving.cache_dtype or serving.dtype} cache"
    lines = [
        f"serving: {model} on {x.topology} ({count} device{'s' * (count != 1)}), "
        f"mesh {meshes.describe(x.mesh)}",
        f"{shape.rows} rows, requests of {serving.max_length:,} tokens at most, pages of "
        f"{shape.size}, chunks of {shape.chunk}, {serving.dtype} weights, {kind}; "
        f"{len(x.engine.runs)} programs compiled in {x.seconds:.0f} s",
        f"attention: {serving.attention}"
        + (" (what auto takes there for what proves itself; else xla)" if by_auto else ""),
        "",
        "memory of a device, GB",
    ]
    lines += [f"  {name:<12} {size / 1e9:9.3f}{_note(x, name)}" for name, size in x.parts.items()]
    state = f"fits, {(x.available - x.needed) / 1e9:.3f} GB left"
    if not x.fits:
        state = f"does not fit, {x.over / 1e9:.3f} GB over"
    lines.append(f"  {'needed':<12} {x.needed / 1e9:9.3f} of {x.available / 1e9:.3f}: {state}")
    return "\n".join([*lines, *(_tokens(x) if x.fits else []), *_programs(x)])


def _note(x: Plan, name: str) -> str:
    """Return the note beside the bytes of a kind."""
    if name == "cache":
        return f"  {x.engine.shape.pages} pages of {x.page / 1e6:.2f} MB"
    if name == "temporaries":
        return f"  of the program that needs the most: {x.largest.call} ({x.largest.name})"
    return f"  of all {len(x.engine.runs)}" if name == "program" else ""


def _tokens(x: Plan) -> list[str]:
    """Format what fits into the cache, and the times from published rates."""
    shape = x.engine.shape
    cache = x.most * x.page / 1e9
    lines = [
        "",
        f"cache: {x.tokens(shape.pages):,} tokens over all devices by default; at most "
        f"{x.tokens(x.most):,} ({x.most} pages, cache_gb {cache:.2f})",
        "",
        "requests that fit at most, and the least times from published rates, ms",
        f"  {'tokens':>8} {'requests':>9} {'rows':>6} {'step':>8} {'serial':>8} {'tokens/s':>9} "
        f"{'prompt':>9}  limit of a step; of a prompt",
    ]
    for load in x.loads():
        step, prompt = load.decoding, load.prefill
        lines.append(
            f"  {load.length:>8,} {load.fitting:>9,} {load.rows:>6} {1e3 * step.seconds:>8.2f} "
            f"{1e3 * step.serial:>8.2f} {load.tokens_per_second:>9,.0f} "
            f"{1e3 * prompt.seconds:>9.1f}  {step.limit}; {prompt.limit}"
        )
    unknown = sum(run.program.collectives is None for run in x.engine.runs)
    if unknown:
        lines.append(f"  without links: the collectives of {unknown} programs are not known")
    return lines


def _programs(x: Plan) -> list[str]:
    """Format a table of the compiled programs."""
    lines = ["", f"{'call':<22} {'program':<18} {'times':>5} {'temporaries, MB':>15} {'s':>6}"]
    for run in x.engine.runs:
        parts = run.program.memory.parts
        lines.append(
            f"{run.call:<22} {run.name:<18} {run.times:>5} {parts['temporaries'] / 1e6:>15.2f} "
            f"{run.program.seconds:>6.1f}"
        )
    return lines


def ranking(found: Sequence[Plan]) -> str:
    """Format several plans as a table, one per line: the most requests, and the bounds."""
    head = f"{'mesh':<22} {'GB':>7} {'of':>6} {'tokens':>11}"
    lengths = sorted({load.length for x in found if x.fits for load in x.loads()})
    lines = [head + "".join(f"{f'{x:,}: requests, tokens/s':>32}" for x in lengths)]
    for x in found:
        line = f"{meshes.describe(x.mesh):<22} {x.needed / 1e9:>7.2f} {x.available / 1e9:>6.1f} "
        if not x.fits:
            lines.append(f"{line}does not fit: {x.over / 1e9:.2f} GB over")
            continue
        loads = {load.length: load for load in x.loads()}
        rates = [
            f"{loads[n].fitting:,}, {loads[n].tokens_per_second:,.0f}" if n in loads else "-"
            for n in lengths
        ]
        lines.append(f"{line}{x.tokens(x.most):>11,}" + "".join(f"{rate:>32}" for rate in rates))
    return "\n".join(lines)
