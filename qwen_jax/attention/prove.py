"""Self-tests of kernels for "auto", which takes a kernel where it is right and faster.

`resolve` compares each candidate with the XLA reference on a small call, times both at the
program's shape, and stores the verdict (`verdicts.py`). It is called before a program is traced: by
`load`, by a training run, by `perplexity`. With several processes, each tests kernels on a device
of its own, and all take one kernel that is right on all of them.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
from collections.abc import Sequence
from importlib import metadata

import jax
from jax.typing import DTypeLike

from qwen_jax.attention import (
    agreement,
    deadline,
    paged_calls,
    registry,
    timing,
    verdicts,
    workloads,
)
from qwen_jax.attention.implementation import CACHED
from qwen_jax.attention.reference import Attend
from qwen_jax.attention.registry import IMPLEMENTATIONS, Implementation
from qwen_jax.attention.verdicts import REFERENCE, Key, Verdict
from qwen_jax.attention.workloads import Case
from qwen_jax.config import Config
from qwen_jax.kernels import choice
from qwen_jax.meshes import sharding
from qwen_jax.meshes.sharding import MeshOrSizes
from qwen_jax.runtime import processes

ROUNDS = 5  # rounds in which a kernel and the reference are timed in turns


def passes(
    config: Config,
    dtype: DTypeLike,
    *,
    rows: int,
    length: int,
    backward: bool = False,
    mesh: MeshOrSizes | None = None,
) -> list[Case]:
    """Return the attention calls of a forward or training pass, on which `resolve` tests kernels.

    rows, length: the number of sequences, and the tokens of each, over all devices.
    backward: whether the pass computes gradients, as a training step does.
    mesh: the mesh that divides the work; None is the mesh in force.
    """
    sizes = sharding.axis_sizes(mesh)
    rows = max(1, rows // math.prod(sizes[axis] for axis in sharding.BATCH))
    length = length // sizes[sharding.CONTEXT]
    tasks = ("forward", "backward") if backward else ("forward",)
    return [
        workloads.of_device(task, config, dtype=dtype, rows=rows, length=length, sizes=sizes)
        for task in tasks
    ]


def decoding(
    config: Config,
    dtype: DTypeLike,
    *,
    rows: int,
    slots: int,
    cache: str | None = None,
    mesh: MeshOrSizes | None = None,
) -> list[Case]:
    """Return the attention call of a decode step, on which `resolve` tests kernels.

    rows, slots: one token of each of `rows` sequences attends to `slots` cached keys.
    cache: the dtype of cached keys: None for `dtype`, "int8" or "int8_asymmetric".
    mesh: the mesh that divides the work; None is the mesh in force.
    """
    sizes = sharding.axis_sizes(mesh)
    rows = max(1, rows // math.prod(sizes[axis] for axis in sharding.BATCH))
    return [
        workloads.of_device(
            "decode", config, dtype=dtype, rows=rows, length=slots, sizes=sizes, cache=cache
        )
    ]


def paging(
    config: Config,
    dtype: DTypeLike,
    *,
    rows: int,
    slots: int,
    page: int,
    chunk: int,
    cache: str | None = None,
    mesh: MeshOrSizes | None = None,
) -> list[Case]:
    """Return the calls of an engine's steps, on which `resolve_pages` tests kernels.

    rows: the rows that decode; a chunk is of one prompt.
    slots: the most cached tokens of a row.
    page, chunk: the tokens in a page, and in a chunk of a prompt.
    cache: None for pages of `dtype`, or "int8".
    mesh: the mesh that divides the work; None is the mesh in force.
    """
    (step,) = decoding(config, dtype, rows=rows, slots=slots, cache=cache, mesh=mesh)
    step = dataclasses.replace(step, length=max(step.length, page), page=page)
    return [
        dataclasses.replace(step, task="paged decode"),
        dataclasses.replace(step, task="paged prefill", batch=1, tokens=chunk),
        dataclasses.replace(step, task="write"),
    ]


def resolve(name: str, cases: Sequence[Case]) -> Attend:
    """Return the attention function of a name; for "auto", the fastest that passes its self-tests.

    cases: the attention calls of the program to be traced, from `passes` and `decoding`.

    Every process must call this with the same arguments. Raises ValueError for a name that is not
    in the registry.
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
    return registry.inference(forward, decode)


def resolve_pages(attend: Attend, cases: Sequence[Case]) -> Attend:
    """Return an attention function with kernels for pages, for an engine.

    attend: from `resolve`. One that "auto" chose gets the fastest kernels that pass their
        self-tests. One that was named keeps its own, but those that do not support a call.
    cases: the calls, from `paging`.

    Every process must call this with the same arguments.
    """
    named = [name for name, x in IMPLEMENTATIONS.items() if x == attend]
    kernels = {}
    for case in cases:
        name = named[0] if named else _settled([case])
        kernel = Implementation.of(IMPLEMENTATIONS[name]).of_task(case.task)
        if named and kernel is not None and (why := _declined(case, name)):
            registry.log_once(f"attention: xla for {case.task}: {why}")
            kernel = None
        kernels[case.task.replace(" ", "_")] = kernel
    made = Implementation.of(attend)
    same = all(getattr(made, field) == kernel for field, kernel in kernels.items())
    return attend if same else dataclasses.replace(made, **kernels)


def _declined(case: Case, name: str) -> str:
    """Return why a kernel for pages does not support a call, or ""."""
    try:
        paged_calls.check(case, name)
    except NotImplementedError as refusal:
        return _one_line(_Declined(*refusal.args))
    return ""


def _settled(cases: Sequence[Case]) -> str:
    """Choose one implementation for these calls, log the reason, and have `auto` take it."""
    case = cases[0]
    if case.task in CACHED:
        purpose = case.task + (f" {case.cache}" if case.cache else "")
        does = "decodes" if case.task == "decode" else f"does {case.task}, pages of {case.page}"
        calls = f" {does} ({case.stored} cache, head dim {case.head_dim})"
    else:
        purpose = "gradients" if len(cases) > 1 else "forward"
        calls = f" ({case.dtype}, head dim {case.head_dim})"
    if choice.device().platform == "cpu":
        name, why = REFERENCE, ", as auto takes it on a CPU"
    else:
        name, reason = _choose(cases)
        why = f"{calls}: {reason}"
    registry.log_once(f"attention: {name}{why}; --attention NAME (attention=NAME) takes another")
    registry.remember(purpose, case.dtype, head_dim=case.head_dim, name=name)
    return name


def _choose(cases: Sequence[Case]) -> tuple[str, str]:
    """Test the candidates in all processes. Returns the name that all take, and the reason."""
    if jax.process_count() != processes.count():
        return REFERENCE, (
            "processes that were not joined by qwen_jax.initialize cannot agree on a kernel"
        )
    # Process 0 names the candidates, so that all processes try the same ones in the same order.
    names, ordered = json.loads(processes.gather(json.dumps(candidates(cases)))[0])
    trials: dict[str, list[list[Verdict]]] = {}
    for name in names:
        mine = json.dumps([x.to_json() for x in _trial(name, cases, timed=not ordered)])
        said = [json.loads(text) for text in processes.gather(mine)]
        trials[name] = [[verdicts.from_json(x) for x in each] for each in said]
        if ordered and verdicts.decide({name: trials[name]}, ordered)[0] == name:
            break
    agreement.forget()
    name, notes = verdicts.decide(trials, ordered)
    for line, level in notes:
        registry.log_once(line, level)
    return name, verdicts.why(name, trials, ordered=ordered, device=choice.device().device_kind)


def candidates(cases: Sequence[Case]) -> tuple[list[str], bool]:
    """Return the names that may replace the XLA reference, and whether measured times order them.

    If `measured.json` has lines for each of these cases on this device, they are the names faster
    than the reference, fastest first. Otherwise they are our own kernels.
    """
    times: list[dict[str, float]] = []
    for case in cases:
        lines = choice.lines(
            case.task, head_dim=case.head_dim, dtype=case.stored, length=case.length
        )
        times.append({line["kernel"]: line["milliseconds"] for line in reversed(lines)})
    task = cases[0].task
    kernels = {name: Implementation.of(x).of_task(task) for name, x in IMPLEMENTATIONS.items()}
    known = [x for x in kernels if x == REFERENCE or kernels[x] is not None]
    measured = [name for name in known if all(name in each for each in times)]
    if measured:
        measured.sort(key=lambda name: sum(each[name] for each in times))
        faster = measured[: measured.index(REFERENCE)] if REFERENCE in measured else measured
        return faster, True
    ours = [name for name in known if name.startswith("pallas")]
    # Two names may share one kernel.
    return list({kernels[name]: name for name in reversed(ours)}.values())[::-1], False


def _trial(name: str, cases: Sequence[Case], *, timed: bool) -> list[Verdict]:
    """Return verdicts on a kernel on this process's device, up to the first failure."""
    found: list[Verdict] = []
    for case in cases:
        key = Key(
            device=choice.device().device_kind,
            jax=jax.__version__,
            kernel=name,
            task=case.task,
            dtype=case.dtype,
            cache=case.cache,
            head_dim=case.head_dim,
            length=case.length,
            code=verdicts.code(),
            page=case.page,
        )
        verdict = verdicts.find(key)
        if verdict is None or (timed and verdict.agrees and verdict.milliseconds is None):
            verdict = _proved(key, case, timed=timed)
        found.append(verdict)
        if not verdict.agrees:
            break
    return found


def _proved(key: Key, case: Case, *, timed: bool) -> Verdict:
    """Run a kernel's self-test. Returns the verdict, and stores it unless it may change."""
    ran = f"{case.batch} x {case.length} tokens, {case.heads} heads over {case.kv_heads}"
    said = functools.partial(
        Verdict,
        key,
        jaxlib=metadata.version("jaxlib"),
        driver=verdicts.driver(),
        date=str(datetime.date.today()),
        ran=ran,
    )
    with verdicts.begun(key.file()) as should:
        if not should:
            verdict = said("crashed", detail="programs have died while it was proved")
            verdicts.keep(verdict)
            return verdict
        lasting = True
        try:
            error, times = deadline.within(
                deadline.LIMIT, functools.partial(_self_test, case, key, timed=timed)
            )
        except _Declined as refusal:
            return said("declined", detail=_one_line(refusal))
        except TimeoutError:
            verdict = said("timed out", detail=f"not done after {deadline.LIMIT:g} s")
        except Exception as refusal:  # compilers and drivers refuse in ways of their own
            verdict = said("refused", detail=_one_line(refusal))
            # Memory that was short now may be free the next time.
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
    """The kernel does not support the call. (A compiler's refusal is a failed test instead.)"""


def _self_test(case: Case, key: Key, *, timed: bool) -> tuple[float, tuple[float, float] | None]:
    """Compare a kernel with the XLA reference and, if it is right and `timed`, time both programs.

    Returns the error, and the seconds of both or None. Raises _Declined before anything is logged,
    compiled or run.
    """
    name = key.kernel
    calls = paged_calls if case.page else agreement
    try:
        calls.check(case, name)
    except NotImplementedError as refusal:
        raise _Declined(*refusal.args) from None
    registry.log_once(
        f"attention: proving {name} on {key.device}, once ({case.task}, {case.dtype}, head dim "
        f"{case.head_dim}, {case.length} tokens)"
    )
    error = calls.error(case, name, in_parts=True)
    if not (timed and error <= agreement.TOLERANCE[case.dtype]):
        return error, None
    program = paged_calls.program if case.page else workloads.program
    programs = {name: program(case, name)}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the reference's scores may not fit
        programs[REFERENCE] = program(case, REFERENCE)
    times = timing.medians(programs, ROUNDS)
    return error, (times[name], times.get(REFERENCE, math.inf))


def _one_line(error: BaseException) -> str:
    """Return an exception's text as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or "no message"
    named = isinstance(error, _Declined)
    return (text if named else f"{type(error).__name__}: {text}")[:300]
