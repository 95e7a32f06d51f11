"""`auto`: a kernel is proved on the device here before it is trusted, and taken where it is faster.

`resolve` runs each candidate against the reference on a small call, times both at the shape that
the program has, and keeps the verdict (`verdicts.py`). It is called before a program is traced: by
`load`, by a training run, by `perplexity`. Several processes prove on a device each, and all take
what agrees on all of them.
"""

import contextlib
import datetime
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from qwen_jax.attention import agreement, deadline, registry, timing, verdicts, workloads
from qwen_jax.attention.registry import DECODERS, IMPLEMENTATIONS, Chosen
from qwen_jax.attention.verdicts import Key, Verdict
from qwen_jax.attention.workloads import Case
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.meshes import sharding
from qwen_jax.runtime import processes

ROUNDS = 5  # of a kernel and the reference in turns
_SHORTEST, _LONGEST = 256, 8192  # tokens of what is timed
REFERENCE = "xla"


def passes(
    config: Config, dtype: Any, rows: int, length: int, backward: bool = False, mesh: Any = None
) -> list[Case]:
    """The calls of attention that a pass makes, for `resolve` to prove kernels on.

    The pass goes over `rows` rows of `length` tokens, of which a device of the mesh (None: the one
    in force) has its share. backward: the pass of a training step, with gradients.
    """
    sizes = sharding.axis_sizes(mesh)
    rows = max(1, rows // math.prod(sizes[axis] for axis in sharding.BATCH))
    length = length // sizes[sharding.CONTEXT]
    tasks = ("forward", "backward") if backward else ("forward",)
    return [_case(task, config, dtype, rows, length, sizes) for task in tasks]


def decoding(
    config: Config, dtype: Any, rows: int, slots: int, cache: str | None = None, mesh: Any = None
) -> list[Case]:
    """The call of attention that decoding makes, for `resolve` to prove kernels on: a token of each
    of `rows` rows against `slots` keys. cache: None (of `dtype`), "int8" or "int8_asymmetric".
    """
    sizes = sharding.axis_sizes(mesh)
    rows = max(1, rows // math.prod(sizes[axis] for axis in sharding.BATCH))
    return [_case("decode", config, dtype, rows, slots, sizes, cache)]


def _case(
    task: str,
    config: Config,
    dtype: Any,
    rows: int,
    length: int,
    sizes: Mapping[str, int],
    cache: str | None = None,
) -> Case:
    """A call of attention, smaller than the program's where that is large: the reference's scores
    must fit beside it, and a turn take milliseconds.
    """
    tp = sizes[sharding.TENSOR]
    length = min(max(_SHORTEST, 1 << (length - 1).bit_length()), _LONGEST)
    return Case(
        task,
        batch=min(rows, max(1, _LONGEST // length)),
        length=length,
        heads=config.num_heads // tp,
        head_dim=config.head_dim,
        dtype=jax.numpy.dtype(dtype).name,
        kv_heads=math.lcm(config.num_kv_heads, tp) // tp,
        cache=cache,
    )


def resolve(name: str, cases: Sequence[Case]) -> Callable[..., Any]:
    """The implementation of that name; for "auto" the fastest that has proved itself here.

    cases: the calls of the program that is to be traced, from `passes` and `decoding`. Every
    process calls this for the same. Raises ValueError for a name that is not in the registry.
    """
    if name != "auto":
        return registry.get(name)
    whole = [case for case in cases if case.task != "decode"]
    forward = _settled(whole) if whole else REFERENCE
    if any(case.task == "backward" for case in whole):
        return IMPLEMENTATIONS[forward]
    decode = REFERENCE
    for case in cases:
        decode = _settled([case]) if case.task == "decode" else decode
    return Chosen(forward, decode)


def _settled(cases: Sequence[Case]) -> str:
    """What is taken for calls that one implementation makes, said and remembered for `auto`."""
    case, kind = cases[0], choice.device().device_kind
    name = _choose(cases) if choice.device().platform != "cpu" else REFERENCE
    if case.task == "decode":
        purpose = "decode" + (f" {case.cache}" if case.cache else "")
        registry.say(f"attention: {name} decodes ({case.stored} cache, head dim {case.head_dim})")
    else:
        purpose = "gradients" if len(cases) > 1 else "forward"
        registry.say(f"attention: {name} ({case.dtype}, head dim {case.head_dim})")
    registry.RESOLVED[kind, purpose, case.dtype, case.head_dim] = name
    return name


def _choose(cases: Sequence[Case]) -> str:
    if jax.process_count() != processes.count():
        registry.say(
            "attention: xla: processes that were not joined by qwen_jax.initialize cannot agree "
            "on a kernel; name one to take it"
        )
        return REFERENCE
    # The first process says which, so that all try the same, in the same order.
    names, ordered = json.loads(processes.gather(json.dumps(candidates(cases)))[0])
    trials: dict[str, list[list[Verdict]]] = {}
    for name in names:
        mine = json.dumps([x.to_json() for x in _trial(name, cases, timed=not ordered)])
        said = [json.loads(text) for text in processes.gather(mine)]
        trials[name] = [[verdicts.from_json(x) for x in each] for each in said]
        if ordered and decide({name: trials[name]}, ordered)[0] == name:
            break
    agreement.forget()
    name, notes = decide(trials, ordered)
    for line, level in notes:
        registry.say(line, level)
    return name


def candidates(cases: Sequence[Case]) -> tuple[list[str], bool]:
    """The implementations that may be taken instead of the reference, and whether they are in the
    order of measured lines.

    They are names that have a line for each task on this device, as far as they are faster than
    the reference. Where there are no lines: our own kernels.
    """
    times: list[dict[str, float]] = []
    for case in cases:
        lines = choice.lines(case.task, case.head_dim, case.stored, case.length)
        times.append({line["kernel"]: line["milliseconds"] for line in reversed(lines)})
    decodes = cases[0].task == "decode"
    known = {
        name: attend
        for name, attend in IMPLEMENTATIONS.items()
        if name == REFERENCE or not decodes or attend in DECODERS
    }
    measured = [name for name in known if all(name in each for each in times)]
    if measured:
        measured.sort(key=lambda name: sum(each[name] for each in times))
        faster = measured[: measured.index(REFERENCE)] if REFERENCE in measured else measured
        return faster, True
    ours = [name for name in known if name.startswith("pallas")]
    if decodes:  # two of the names decode with the same kernel
        ours = list({DECODERS[known[name]]: name for name in reversed(ours)}.values())[::-1]
    return ours, False


def decide(
    trials: Mapping[str, Sequence[Sequence[Verdict]]], ordered: bool
) -> tuple[str, list[tuple[str, int]]]:
    """Choose the implementation that all processes take, and say why not another: lines, each with
    its level of logging.

    trials: by name, in the order of trial: for each process its verdicts, of each task. ordered:
    the first that agrees is the fastest; else the one whose slowest process is.
    """
    best, least, notes = REFERENCE, math.inf, []
    for name, found in trials.items():
        failed = [(i, x) for i, each in enumerate(found) for x in each if not x.agrees]
        if failed:
            notes.append(_failure(name, *failed[0], several=len(found) > 1))
            continue
        if ordered:
            return name, notes
        own, reference = (
            max(sum(getattr(x, field) or math.inf for x in each) for each in found)
            for field in ("milliseconds", "xla_milliseconds")
        )
        if own >= reference:
            line = f"attention: not {name}: slower here ({own:.4g} ms, xla {reference:.4g} ms)"
            notes.append((line, logging.INFO))
        elif own < least:
            best, least = name, own
    return best, notes


def _failure(name: str, process: int, verdict: Verdict, several: bool) -> tuple[str, int]:
    where = f" on {processes.name(process)}" if several else ""
    if verdict.outcome == "declined":
        return f"attention: not {name}{where}: {verdict.detail}", logging.INFO
    line = (
        f"attention: not {name}: its self-test has failed{where}; please send us this line: "
        f"{verdict.line()}"
    )
    return line, logging.WARNING


def _trial(name: str, cases: Sequence[Case], timed: bool) -> list[Verdict]:
    """Verdicts of a kernel on this process's device, up to the first that is against it."""
    found: list[Verdict] = []
    for case in cases:
        key = Key(
            choice.device().device_kind,
            jax.__version__,
            name,
            case.task,
            case.dtype,
            case.cache,
            case.head_dim,
            case.length,
            verdicts.code(),
        )
        verdict = verdicts.find(key)
        if verdict is None or (timed and verdict.agrees and verdict.milliseconds is None):
            verdict = _proved(key, case, timed)
        found.append(verdict)
        if not verdict.agrees:
            break
    return found


def _proved(key: Key, case: Case, timed: bool) -> Verdict:
    """Run the self-test, and keep what it found."""
    ran = f"{case.batch} x {case.length} tokens, {case.heads} heads over {case.kv_heads}"
    said = functools.partial(
        Verdict,
        key,
        jaxlib=metadata.version("jaxlib"),
        driver=verdicts.driver(),
        date=str(datetime.date.today()),
        ran=ran,
    )
    with verdicts.begun(key) as should:
        if not should:
            verdict = said("crashed", detail="programs have died while it was proved")
            verdicts.keep(verdict)
            return verdict
        lasting = True
        try:
            error, times = deadline.within(
                deadline.LIMIT, functools.partial(_self_test, case, key, timed)
            )
        except _Declined as refusal:
            return said("declined", detail=_one_line(refusal))
        except TimeoutError:
            verdict = said("timed out", detail=f"not done after {deadline.LIMIT:g} s")
        except Exception as refusal:  # compilers and drivers refuse in ways of their own
            verdict = said("refused", detail=_one_line(refusal))
            # Where memory was short, it may be there the next time.
            lasting = "RESOURCE_EXHAUSTED" not in verdict.detail
        else:
            right = error <= agreement.TOLERANCE[case.dtype]
            verdict = said("agrees" if right else "wrong", error=error)
            if right and times is not None:
                own, reference = (1e3 * x / case.layers() for x in times)
                verdict = said("agrees", error=error, milliseconds=own, xla_milliseconds=reference)
        if lasting:
            verdicts.keep(verdict)
    return verdict


class _Declined(Exception):
    """A kernel is not for such calls, as its trace says. What a compiler lacks is a failure."""


def _self_test(case: Case, key: Key, timed: bool) -> tuple[float, tuple[float, float] | None]:
    """The worst error; and seconds of the kernel's program and of the reference's, if it agrees.

    Raises _Declined before anything is said, compiled or run.
    """
    name = key.kernel
    try:
        agreement.check(case, name)
    except NotImplementedError as refusal:
        raise _Declined(*refusal.args) from None
    registry.say(
        f"attention: proving {name} on {key.device}, once ({case.task}, {case.dtype}, head dim "
        f"{case.head_dim}, {case.length} tokens)"
    )
    error = agreement.error(case, name, in_parts=True)
    if not (timed and error <= agreement.TOLERANCE[case.dtype]):
        return error, None
    programs = {name: workloads.program(case, name)}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # its scores may not fit, here as there
        programs[REFERENCE] = workloads.program(case, REFERENCE)
    times = timing.medians(programs, ROUNDS)
    return error, (times[name], times.get(REFERENCE, math.inf))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    named = isinstance(error, _Declined)
    return (text if named else f"{type(error).__name__}: {text}")[:300]
