"""Chooses the kernel that multiplies by integers in groups, as "auto" chooses one for attention.

A kernel is tested on the user's device before it is used: it must be right there, and faster than
products for which floats are made. For Hopper GPUs there are two, and the fastest is used. With
several processes, each tests them on a device of its own, and all take the same one or none.
"""

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.attention import deadline, timing, verdicts
from qwen_jax.kernels import choice
from qwen_jax.leaves import grouped, grouped_calls
from qwen_jax.runtime import processes

# The kernel of each platform, a name of KERNELS, and one that is tested on Hopper GPUs beside it.
_ON_HOPPERS = "pallas_hopper"
OF_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_triton", "cpu": "by_groups"}
_GROUP = 128  # inputs that share a scale, as in the published checkpoints
_SIDE, _WEIGHTS = 4096, 16  # inputs and outputs of a weight that is timed, and how many in turn
_MANY = 256  # rows of a product that is timed where there are several kernels
_ROUNDS = 5  # rounds in which a kernel and floats are timed in turns


class Trial(NamedTuple):
    """What the self-test of a kernel found on one process.

    wrong: why the kernel cannot be used there, in words; None if its products are right.
    own, floats: seconds of a decode step's product with the kernel, and with floats that are made
        for it; None where the kernel is wrong, and on a CPU, where nothing is timed.
    many: seconds of products of many rows with the kernel; None where it is the only one.
    """

    wrong: str | None
    own: float | None = None
    floats: float | None = None
    many: float | None = None


def settled(bits: int, dtype: str) -> str | None:
    """Return the kernel for products with weights of these bits; None makes floats for each.

    dtype: the dtype in which the model computes.

    The choice and its reason are a line of the log for each kernel. Every process must call this.
    """
    names = _candidates()
    if not names:
        return None
    if jax.process_count() == processes.count():
        mine = {name: _trial(name, bits, dtype=dtype, alone=len(names) == 1) for name in names}
        said = [json.loads(text) for text in processes.gather(json.dumps(mine))]
        absent = ["another process has no such device"]
        found = {name: [Trial(*x.get(name, absent)) for x in said] for name in names}
        decided = {name: _decided(trials) for name, trials in found.items()}
    else:
        why = "processes that were not joined by qwen_jax.initialize cannot agree"
        found, decided = {}, dict.fromkeys(names, (False, why))
    right = [name for name, (taken, _) in decided.items() if taken]
    best = min(right, key=lambda name: _seconds(found[name]), default=None)
    instead = f"products with {best}" if best else "floats are made for each product"
    for name, (taken, why) in decided.items():
        does = instead if name == best else f"{instead}, and not {name}"
        if taken and name != best:
            does = f"{best} is used, and {name} is slower"
        level = logging.INFO if taken else logging.WARNING
        logging.getLogger("qwen_jax").log(level, "weights of %d bits: %s: %s", bits, does, why)
    return best


def _candidates() -> list[str]:
    """Return the names of the kernels that are tested here, the same ones on every process."""
    name = OF_PLATFORM.get(jax.default_backend())
    if name is None:
        return []
    return [_ON_HOPPERS, name] if choice.is_hopper(choice.device()) else [name]


def _seconds(found: list[Trial]) -> float:
    """Return the time by which kernels are compared, on the slowest process."""
    return max((x.own or 0.0) + (x.many or 0.0) for x in found)


def _decided(found: list[Trial]) -> tuple[bool, str]:
    """Return whether a kernel is used, from its trials on all processes, and the reason."""
    device = choice.device().device_kind
    for process, trial in enumerate(found):
        if trial.wrong is not None:
            where = f" ({processes.name(process)})" if len(found) > 1 else ""
            return False, f"{trial.wrong}, on this {device}{where}"
    own, floats = (max(getattr(x, field) or 0.0 for x in found) for field in ("own", "floats"))
    if not floats:
        return True, "it is right here"
    many = max(x.many or 0.0 for x in found)
    more = f"; {_MANY} rows {1e3 * many:.3g} ms" if many else ""
    times = f"({1e3 * own:.3g} ms, with floats {1e3 * floats:.3g} ms{more})"
    if own < floats:
        return True, f"it is right on this {device}, and faster {times}"
    return False, f"it is slower on this {device} {times}"


def _trial(name: str, bits: int, *, dtype: str, alone: bool) -> Trial:
    """Test a kernel on this process's first device, within a limit of time.

    alone: whether there is no other to compare it with.
    """
    with verdicts.begun(_mark(name, bits, dtype=dtype)) as should:
        if not should:
            return Trial("programs have died while it was tested")
        try:
            test = functools.partial(_tested, name, bits, dtype, alone)
            return deadline.within(deadline.LIMIT, test)
        except TimeoutError:
            return Trial(f"its test was not done after {deadline.LIMIT:g} s")
        except Exception as error:  # whatever the compiler or the device raises
            return Trial(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def _mark(name: str, bits: int, *, dtype: str) -> Path:
    """Return the file after which marks of running tests are named, among those of attention."""
    conditions = (choice.device().device_kind, jax.__version__, verdicts.code())
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:12]
    return verdicts.folder() / f"{name}-int{bits}-{dtype}-{digest}.json"


def _tested(name: str, bits: int, dtype: str, alone: bool) -> Trial:
    """Test a kernel: whether it is right, and on an accelerator how fast it is."""
    if wrong := amiss(name, bits=bits, dtype=dtype):
        return Trial(wrong)
    if choice.device().platform == "cpu":
        return Trial(None)
    times = timing.medians(_programs(name, bits, dtype=dtype, alone=alone), _ROUNDS)
    return Trial(None, times["kernel"], times["floats"], times.get("many"))


def amiss(name: str, *, bits: int, dtype: str) -> str | None:
    """Multiply by small weights with a kernel, and say what is wrong with its products.

    Returns None if nothing is: for one row and for many, with the groups of published checkpoints
    and with smaller ones that have zeros, each product differs from that with exact floats by less
    than the rounding of `dtype` may, in the sum of the sizes of its terms. A kernel may decline all
    but the first of these, as products that it declines are computed without it.
    """
    bound = {"float32": 2.0**-16, "float16": 2.0**-8, "bfloat16": 2.0**-6}[dtype]
    for rows, group in ((1, _GROUP), (128, _GROUP), (1, 32), (128, 32)):
        words, scales, zeros = map(jnp.asarray, _drawn(1024, 640, bits=bits, group=group))
        x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 1024)), dtype)
        given = {"scales": scales, "zeros": None if group == _GROUP else zeros}
        multiply = functools.partial(grouped_calls.KERNELS[name], bits=bits)
        try:
            found = jax.jit(multiply)(x, words, **given)
        except NotImplementedError:
            if (rows, group) == (1, _GROUP):
                raise
            continue
        exact = np.asarray(grouped.floats(words, **given, bits=bits, dtype="float32"), np.float64)
        wanted = np.asarray(x, np.float64) @ exact
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(exact)
        worst = float(np.max(np.abs(np.asarray(found, np.float64) - wanted) / terms))
        if not worst < bound:
            of = f"{rows} rows and groups of {group}"
            return f"with {of} it is wrong by {worst:.2g} of the sum of its terms"
    return None


def _programs(name: str, bits: int, *, dtype: str, alone: bool) -> dict[str, timing.TimedCall]:
    """Return the products of one row that are timed, with the kernel and with floats.

    Each multiplies by several weights in turn, which together fit no cache. Unless the kernel is
    alone, there is one of many rows with it, too.
    """
    x = jnp.ones((1, _SIDE), dtype)
    words, scales, _ = map(jnp.asarray, _drawn(_SIDE, _SIDE, bits=bits, group=_GROUP))
    held = [(words + np.uint32(i), scales) for i in range(_WEIGHTS)]
    multiply = functools.partial(grouped_calls.KERNELS[name], zeros=None, bits=bits)
    precision = "highest" if dtype == "float32" else None  # as the model's own products

    def kernel(x: jax.Array, held: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [multiply(x, words, scales=scales) for words, scales in held]

    def floats(x: jax.Array, held: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        made = (grouped.floats(*each, bits=bits, dtype=dtype) for each in held)
        return [jnp.dot(x, weight, precision=precision) for weight in made]

    programs = {run.__name__: timing.compiled(run, x, held) for run in (kernel, floats)}
    if not alone:
        programs["many"] = timing.compiled(kernel, jnp.ones((_MANY, _SIDE), dtype), held)
    return programs


def _drawn(inputs: int, outputs: int, *, bits: int, group: int) -> tuple[np.ndarray, ...]:
    """Draw the words [in x bits / 32, out] of a weight, and scales and zeros [groups, out]."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (inputs * bits // 32, outputs), np.uint32)
    of_groups = (inputs // group, outputs)
    scales = rng.uniform(0.5, 1, of_groups).astype(np.float16)
    return words, scales, rng.integers(0, 2**bits, of_groups).astype(np.uint8)
