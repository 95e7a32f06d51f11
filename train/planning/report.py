"""Formats estimates as text for a terminal, and shows what is compiled while they are made."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

from qwen_jax import meshes
from qwen_jax.runtime import progress
from train.planning import collectives
from train.planning.bounds import Term
from train.planning.estimate import Estimate
from train.planning.programs import Setting
from train.planning.topology import Topology

_WITHOUT_LINKS = (
    "  so the times below lack that of the links, and that of HBM for what is gathered over them:\n"
    "  a run may take longer than both bound and serial, by a time that is not known"
)
_UNIT = {"training": "a step", "decoding": "a token of each row", "prefill": "the prompts"}


@contextlib.contextmanager
def waiting(what: str, every: float = 1.0) -> Iterator[None]:
    """Show on stderr what the program is doing, and for how long, until the context is left.

    what: the line to show. every: the seconds after which the time is shown anew.
    """
    ended = threading.Event()
    with progress.bar(desc=what, bar_format="{desc}: {elapsed}") as bar:

        def show() -> None:
            while not ended.wait(every):
                bar.refresh()

        shown = threading.Thread(target=show, daemon=True)
        shown.start()
        try:
            yield
        finally:
            ended.set()
            shown.join()


def program(task: str, setting: Setting, *, topology: Topology, sizes: Mapping[str, int]) -> str:
    """Describe the program that is being compiled, in one line.

    task: "training", "prefill" or "decoding". sizes: the number of devices along each mesh axis.
    """
    remat = f", remat {setting.remat}" if task == "training" else ""
    return (
        f"compiling for {topology}: {task}, {setting.batch} rows of {setting.length} tokens"
        f"{remat}, mesh {meshes.describe(sizes)}, attention {setting.attention}"
    )


def _devices(count: int) -> str:
    """Return "1 device", or the number of several."""
    return f"{count} device{'s' * (count != 1)}"


def text(x: Estimate, model: str) -> str:
    """Format one estimate in about 30 lines. model: the name of the model."""
    memory, setting = x.program.memory, x.setting
    lines = [
        f"{x.task}: {model} on {x.topology} ({_devices(x.topology.devices)}), "
        f"mesh {meshes.describe(x.mesh)}",
        f"{', '.join(_options(x))}; compiled in {x.program.seconds:.0f} s",
        f"attention: {_attention(x)}",
        *[f"  not {line}" for line in setting.passed_over],
        *_sequence_parallel(x),
        "",
        "memory of a device, GB",
    ]
    lines += [f"  {name:<12} {size / 1e9:9.3f}" for name, size in memory.parts.items() if size]
    lines.append(
        f"  {'needed':<12} {memory.needed / 1e9:9.3f} of {x.available / 1e9:.3f}: {_fits(x)}"
    )
    done = x.hardware_flops / x.model_flops
    lines += ["", f"FLOPs of {_UNIT[x.task]}: {x.model_flops:.4g}; done {done:.3f} times that"]
    return "\n".join([*lines, *_collectives(x), *_times(x)])


def _options(x: Estimate) -> list[str]:
    """Describe the batch of a setting, and the options that matter for its task."""
    setting = x.setting
    options = [f"{setting.batch} rows of {setting.length} tokens"]
    if x.task != "training":
        return [*options, f"{setting.cache_dtype} cache"] if setting.cache_dtype else options
    options.append(f"remat {setting.remat}")
    if (adapters := setting.adapters) is not None:
        options.append(f"adapters of rank {adapters.lora_rank}")
        options += ["int8 base"] if adapters.base_dtype == "int8" else []
        options += ["embeddings trained"] if adapters.train_embeddings else []
    options += [f"{setting.accumulate} parts"] if setting.accumulate > 1 else []
    return [*options, f"gradients summed in {setting.gradient_dtype}"]


def _collectives(x: Estimate) -> list[str]:
    """Format the lines of a program's collectives; [] if the compiler refused it."""
    found = x.program.collectives
    if x.bound is None:
        return []
    if found is None:
        return ["", f"collectives: not known: {x.program.unread}", _WITHOUT_LINKS]
    looped = any(row.looped for row in found)
    note = ["  * in the decode loop: for one token"] if looped else []
    return ["", collectives.table(found), *note]


def _times(x: Estimate) -> list[str]:
    """Format the lines of a program's times; [] if the compiler refused it."""
    if x.bound is None:
        return []
    unknown = "" if x.links_known else "; links not known"
    lines = ["", f"time of {_UNIT[x.task]}, from published rates, ms"]
    lines += [
        f"  {term.name:<22} {1e3 * term.seconds:12.3f}{_note(term)}" for term in x.bound.terms
    ]
    if not x.links_known and x.topology.network:
        lines.append(f"  {x.topology.network:<22} {'not known':>12}")
    return [
        *lines,
        f"  {'bound':<22} {1e3 * x.bound.seconds:12.3f}  {x.bound.limit}; all at once{unknown}",
        f"  {'serial':<22} {1e3 * x.bound.serial:12.3f}  one after the other{unknown}",
        f"at most {x.tokens_per_second:,.0f} tokens/s, "
        f"{x.tokens_per_second / x.topology.devices:,.0f} a device, MFU {100 * x.mfu:.1f} % "
        f"({100 * x.mfu * x.bound.seconds / x.bound.serial:.1f} % where nothing overlaps)",
    ]


def ranking(found: Sequence[Estimate]) -> str:
    """Format several estimates as a table, one per line."""
    head = (
        f"{'task':<9} {'mesh':<26} {'batch':>6} {'remat':<11} {'GB':>7} {'of':>6} "
        f"{'tokens/s':>10} {'MFU':>6} {'serial':>6}  limit"
    )
    lines = [head]
    for x in found:
        serial = x.mfu * x.bound.seconds / x.bound.serial if x.bound else 0
        rate = (
            f"{x.tokens_per_second:>10.4g} {x.mfu:>6.1%} {serial:>6.1%}  {x.bound.limit}"
            + ("" if x.links_known else " (links not known)")
            if x.bound and x.fits
            else f"does not fit: {x.over / 1e9:.2f} GB over"
        )
        lines.append(
            f"{x.task:<9} {meshes.describe(x.mesh):<26} {x.setting.batch:>6} "
            f"{x.setting.remat:<11} {x.program.memory.needed / 1e9:>7.2f} "
            f"{x.available / 1e9:>6.1f} {rate}"
        )
    lines += sorted({f"attention: {_attention(x)}" for x in found if x.setting.by_auto})
    lines += sorted({f"  not {line}" for x in found for line in x.setting.passed_over})
    return "\n".join(lines)


def _attention(x: Estimate) -> str:
    """Name the attention implementation; if `auto` chooses it, say where and on which condition."""
    name, chip = x.setting.attention, x.topology.chip
    if not x.setting.by_auto:
        return name
    device = chip.name.upper() if chip.platform != "tpu" else f"TPU {chip.name.removeprefix('tpu')}"
    if name == "xla":
        return f"{name} (what auto takes on {device}: no kernel there takes this)"
    return f"{name} (what auto takes on {device} once it has proved itself there; else xla)"


def _sequence_parallel(x: Estimate) -> list[str]:
    """Say in a line whether training splits the residual stream by tokens over `tp`, and why.

    Returns a list of this line; [] for other programs than training.
    """
    if x.task != "training":
        return []
    parallel, why = x.setting.splits_tokens(x.mesh)
    return [f"sequence parallel: {'yes' if parallel else 'no'} ({why})"]


def _note(term: Term) -> str:
    """Return the note beside a term's time: that a link is unused, or works in step; else ""."""
    if not term.seconds:
        return "  nothing goes over it"
    if term.in_step == term.seconds:
        return "  in step with a slower link, not in serial"
    part = f"  {1e3 * term.in_step:.3f} of it in step with a slower link"
    return part if term.in_step else ""


def _fits(x: Estimate) -> str:
    """Say whether the program fits, and how many GB are left or lacking."""
    if not x.fits:
        refused = " (the compiler refused it)" if x.bound is None else ""
        return f"does not fit, {x.over / 1e9:.3f} GB over{refused}"
    return f"fits, {(x.available - x.program.memory.needed) / 1e9:.3f} GB left"
