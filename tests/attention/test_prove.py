"""`auto`: stand-ins for kernels prove themselves on a CPU that passes for a TPU."""

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import attention
from qwen_jax.attention import (
    FULL,
    agreement,
    deadline,
    pages,
    prove,
    registry,
    timing,
    verdicts,
    workloads,
)
from qwen_jax.attention.verdicts import Key, Verdict
from qwen_jax.attention.workloads import Case
from qwen_jax.decoding import decode
from qwen_jax.kernels import choice
from qwen_jax.leaves.int8 import quantize
from qwen_jax.runtime import processes
from tests.support import launch
from tests.support.tiny import on_mesh, tiny_config
from tests.support.training import prepared, pretraining
from train import perplexity, pretrain
from train.measuring import measure

KIND = "TPU test"
TINY = Case("forward", 1, 64, 4, 16, "float32", kv_heads=2)
BACKWARD = dataclasses.replace(TINY, task="backward")
DECODE = dataclasses.replace(TINY, task="decode")
PAGED, CHUNK, WRITE = (
    dataclasses.replace(TINY, task=task, page=8, tokens=20, cache="int8")
    for task in ("paged decode", "paged prefill", "write")
)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A device of a kind of its own, for which there is one kernel, never run before."""
    here = SimpleNamespace(platform="tpu", device_kind=KIND)
    monkeypatch.setattr(choice, "device", lambda: here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(registry, "_RESOLVED", {})
    monkeypatch.setattr(deadline, "LIMIT", launch.LONG)
    for name in ("pallas_triton", "pallas_hopper"):
        monkeypatch.delitem(attention.IMPLEMENTATIONS, name)
    registry.log_once.cache_clear()
    yield
    registry.log_once.cache_clear()
    agreement.forget()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that were logged; those of `command.show_log` in other tests go elsewhere."""
    logger = logging.getLogger("qwen_jax")
    logger.handlers, logger.propagate = [], True
    caplog.set_level(logging.INFO, "qwen_jax")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "qwen_jax"]


def kernel(
    monkeypatch: pytest.MonkeyPatch, attend: Any, name: str = "pallas_tpu", decoder: Any = None
) -> None:
    """Put a stand-in where a kernel is, and one for the decode kernel that goes with it."""
    made = registry.Implementation(name, attend, decoder)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, name, made)


def right(q: Any, k: Any, v: Any, mask: Any, scale: Any, return_lse: bool = False) -> Any:
    return attention.xla(q, k, v, mask, scale, return_lse)


def right_decoder(
    q: Any, k: Any, v: Any, keys: Any, values: Any, start: Any, index: Any, window: Any, scale: Any
) -> Any:
    return workloads.decode(
        attention.xla,
        q,
        k=k,
        v=v,
        cache_k=keys,
        cache_v=values,
        start=start,
        index=index,
        window=window,
        scale=scale,
    )


def changed(**masks: Callable[[Any], Any]) -> Any:
    """The reference with fields of its mask changed."""

    def attend(q: Any, k: Any, v: Any, mask: Any, scale: Any, return_lse: bool = False) -> Any:
        values = {name: change(getattr(mask, name)) for name, change in masks.items()}
        return attention.xla(q, k, v, dataclasses.replace(mask, **values), scale, return_lse)

    return attend


def no_padding(q: Any, k: Any, v: Any, mask: Any, scale: Any, return_lse: bool = False) -> Any:
    return changed(q_segments=lambda x: x + 1, k_segments=lambda x: x + 1)(
        q, k, v, mask, scale, return_lse
    )


def ungrouped(q: Any, k: Any, v: Any, mask: Any, scale: Any, return_lse: bool = False) -> Any:
    """The heads of the keys in another order over those of the queries."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.tile(x, (1, 1, groups, 1)) for x in (k, v))
    return attention.xla(q, k, v, mask, scale, return_lse)


def wrong_lse(q: Any, k: Any, v: Any, mask: Any, scale: Any, return_lse: bool = False) -> Any:
    """A sum of exponentials that is not the same for both parts of the keys."""
    out = attention.xla(q, k, v, mask, scale, return_lse)
    return (out[0], out[1] + 1e-3 * k.shape[1]) if return_lse else out


def not_a_number(q: Any, *rest: Any, **named: Any) -> Any:
    return jax.tree.map(lambda x: x * jnp.nan, attention.xla(q, *rest, **named))


@jax.custom_jvp
def _steeper(x: Any) -> Any:
    return x


_steeper.defjvp(lambda x, dx: (x[0], 1.1 * dx[0]))


def wrong_gradient(q: Any, *rest: Any, **named: Any) -> Any:
    return attention.xla(_steeper(q), *rest, **named)


WRONG = {
    "window": changed(window=lambda x: jnp.int32(FULL)),
    "packing": changed(q_segments=lambda x: 1 * (x > 0), k_segments=lambda x: 1 * (x > 0)),
    "padding": no_padding,
    "groups": ungrouped,
    "log-sum-exp": wrong_lse,
    "NaN": not_a_number,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_self_test_finds_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch):
    kernel(monkeypatch, WRONG[what])
    (verdict,) = prove._trial("pallas_tpu", [TINY], timed=False)
    assert verdict.outcome == "wrong"
    assert verdict.error is not None and verdict.error > 10 * agreement.TOLERANCE["float32"]


def test_a_self_test_finds_wrong_gradients(monkeypatch: pytest.MonkeyPatch):
    kernel(monkeypatch, wrong_gradient)
    forward, backward = prove._trial("pallas_tpu", [TINY, BACKWARD], timed=False)
    assert (forward.outcome, backward.outcome) == ("agrees", "wrong")


def test_a_self_test_decodes(monkeypatch: pytest.MonkeyPatch):
    case = dataclasses.replace(DECODE, cache="int8")
    for name, window in (("pallas_tpu", 0), ("pallas_triton", FULL)):

        def step(*call: Any, window: int = window) -> Any:
            return right_decoder(*call[:-2], call[-2] + window, call[-1])

        kernel(monkeypatch, functools.partial(right), name, step)
    outcomes = [
        prove._trial(name, [case], timed=False)[0].outcome
        for name in ("pallas_tpu", "pallas_triton")
    ]
    assert outcomes == ["agrees", "wrong"]


def right_pages(q: Any, kv: Any, table: Any, written: Any, window: Any, scale: Any) -> Any:
    places = pages.Places(table, written, jnp.full_like(written, q.shape[1]))
    return pages.attend_pages(attention.xla, q, kv=kv, places=places, window=window, scale=scale)


def no_window(q: Any, kv: Any, table: Any, written: Any, window: Any, scale: Any) -> Any:
    return right_pages(q, kv, table, written, jnp.int32(FULL), scale)


def next_slot(kv: Any, new: Any, where: Any, slots: Any = None) -> Any:
    return pages.scatter(kv, new, where, None if slots is None else (slots + 1) % 8)


def with_pages(monkeypatch: pytest.MonkeyPatch, decode: Any, prefill: Any, write: Any) -> Any:
    """Put a stand-in where a kernel is that has these kernels for pages."""
    made = registry.Implementation(
        "pallas_tpu", right, paged_decode=decode, paged_prefill=prefill, write=write
    )
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "pallas_tpu", made)
    return made


def test_a_self_test_goes_over_pages(monkeypatch: pytest.MonkeyPatch):
    with_pages(monkeypatch, right_pages, no_window, pages.scatter)
    found = [prove._trial("pallas_tpu", [x], timed=False)[0] for x in (PAGED, CHUNK, WRITE)]
    assert [x.outcome for x in found] == ["agrees", "wrong", "agrees"]
    assert found[0].key.page == 8 and found[0].error == 0
    with_pages(monkeypatch, None, None, next_slot)
    verdicts.forget()
    assert prove._trial("pallas_tpu", [WRITE], timed=False)[0].outcome == "wrong"


def test_a_kernel_is_run_once_and_timed(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    kernel(monkeypatch, right)
    monkeypatch.setattr(timing, "_SECONDS", 0.001)
    name, _ = prove._choose([TINY])
    (verdict,) = verdicts.kept()
    assert verdict.agrees and verdict.error is not None
    assert verdict.milliseconds and verdict.xla_milliseconds
    assert verdict.ran == "1 x 64 tokens, 4 heads over 2"
    assert name == ("xla" if verdict.milliseconds >= verdict.xla_milliseconds else "pallas_tpu")
    assert said()[0] == (
        f"attention: proving pallas_tpu on {KIND}, once (forward, float32, head dim 16, 64 tokens)"
    )
    monkeypatch.setattr(prove, "_self_test", lambda *_, **__: pytest.fail("it was run again"))
    assert prove._choose([TINY])[0] == name


# What follows decides by what self-tests say, whatever they ran.


def says(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> list[str]:
    """Self-tests answer (error, (seconds, seconds of the reference)), or raise; those that ran."""
    ran: list[str] = []

    def self_test(case: Case, key: Key, *, timed: bool) -> Any:
        name = key.kernel
        ran.append(f"{name} {case.task}" + ("" if timed else ", not timed"))
        answer = answers.get(f"{name}_{case.task}", answers.get(name))
        if isinstance(answer, Exception):
            raise answer
        return answer if timed else (answer[0], None)

    monkeypatch.setattr(prove, "_self_test", self_test)
    return ran


FAST, SLOW = (1e-7, (1e-3, 2e-3)), (1e-7, (2e-3, 1e-3))


def test_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]):
    ran = says(monkeypatch, pallas_tpu=FAST)
    assert prove.resolve("auto", [TINY]) == registry.inference("pallas_tpu", "xla")
    assert ran == ["pallas_tpu forward"]
    assert said()[-1] == (
        "attention: pallas_tpu (float32, head dim 16): it is right on this TPU test, and the "
        "fastest (0.25 ms, xla 0.5 ms); --attention NAME (attention=NAME) takes another"
    )
    verdicts.forget()
    says(monkeypatch, pallas_tpu=SLOW)
    assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
    # The program that is timed runs through four layers.
    assert said()[-2] == "attention: not pallas_tpu: slower here (0.5 ms, xla 0.25 ms)"
    assert "xla (float32, head dim 16): no kernel is right and faster on this TPU te" in said()[-1]


def test_training_takes_what_is_right_and_faster_both_ways(monkeypatch: pytest.MonkeyPatch):
    both = [TINY, BACKWARD]
    says(monkeypatch, pallas_tpu_forward=SLOW, pallas_tpu_backward=(1e-7, (1e-3, 9e-3)))
    assert prove.resolve("auto", both) is attention.IMPLEMENTATIONS["pallas_tpu"]
    verdicts.forget()
    says(monkeypatch, pallas_tpu_forward=FAST, pallas_tpu_backward=(0.5, None))
    assert prove.resolve("auto", both) is attention.xla
    # A prompt may still go through it.
    assert prove.resolve("auto", [TINY]) == registry.inference("pallas_tpu", "xla")


def test_kernels_for_pages_are_taken_one_by_one(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    cases = [PAGED, CHUNK, WRITE]
    with_pages(monkeypatch, right_pages, no_window, pages.scatter)
    ran = says(monkeypatch, **{"pallas_tpu": FAST, "pallas_tpu_paged prefill": (0.5, None)})
    chosen = prove.resolve("auto", [TINY])
    found = prove.resolve_pages(chosen, cases)
    assert found == dataclasses.replace(chosen, paged_decode=right_pages, write=pages.scatter)
    assert len(ran) == 4
    assert "pallas_tpu does write, pages of 8 (int8 cache, head dim 16): it is" in said()[-1]
    # A decoder that is called with "auto" finds the same ones.
    q = jnp.zeros((1, 1, 4, 16))
    leaf = quantize(jnp.zeros((2, 2, 2, 8, 16)))
    assert attention.auto.paged_kernel(q, kv=leaf) is right_pages
    assert attention.auto.write_kernel(q, kv=leaf) is pages.scatter
    assert attention.auto.paged_kernel(jnp.zeros((1, 20, 4, 16)), kv=leaf) is None
    assert attention.auto.paged_kernel(q, kv=jnp.zeros((2, 2, 2, 8, 16))) is None


def test_a_named_kernel_for_pages_that_declines_is_left_out(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    def declines(*_: Any) -> Any:
        raise NotImplementedError("decode_tpu: pages of 8 tokens")

    made = with_pages(monkeypatch, declines, right_pages, None)
    found = prove.resolve_pages(made, [PAGED, CHUNK, WRITE])
    assert found == dataclasses.replace(made, paged_decode=None)
    assert said() == ["attention: xla for paged decode: decode_tpu: pages of 8 tokens"]
    assert prove.resolve_pages(attention.xla, [PAGED, CHUNK, WRITE]) is attention.xla


@pytest.mark.parametrize(
    ("answer", "found", "kept"),
    [
        ((0.3, None), "wrong by 3.0e-01 of the largest number", True),
        ((float("inf"), None), "wrong by inf of the largest number", True),
        (ValueError("Mosaic\n failed"), "refused: ValueError: Mosaic failed", True),
        (RuntimeError("RESOURCE_EXHAUSTED: hbm"), "refused: RuntimeError: RESOURCE_", False),
        (TimeoutError(), f"timed out: not done after {launch.LONG:g} s", True),
    ],
)
def test_a_kernel_that_fails_is_reported_and_left(
    answer: Any,
    found: str,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
):
    kernel(monkeypatch, right, "pallas_triton")
    ran = says(monkeypatch, pallas_tpu=answer, pallas_triton=FAST)
    assert prove.resolve("auto", [TINY]) == registry.inference("pallas_triton", "xla")
    (line,) = [x for x in said() if "please send us this line" in x]
    assert f"qwen_jax {qwen_jax.__version__}; {KIND}; jax {jax.__version__}, jaxlib " in line
    assert f"; pallas_tpu forward; float32, head dim 16, 64 tokens; {found}" in line
    assert "\n" not in line and caplog.records[-2].levelno == logging.WARNING
    again = len(ran)
    prove.resolve("auto", [TINY])
    assert ran[again:] == ([] if kept else ["pallas_tpu forward"])


@pytest.mark.parametrize("calls", [[TINY], [TINY, BACKWARD], [DECODE]])
def test_what_is_declined_is_no_failure(
    calls: list[Case], monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    """Nor is it proved: a trace tells."""

    def declines(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("pallas_tpu: head dim 16, only 32")

    kernel(monkeypatch, declines, decoder=declines)
    monkeypatch.setattr(agreement, "_results", lambda *_, **__: pytest.fail("something was run"))
    prove.resolve("auto", calls)
    assert "attention: not pallas_tpu: pallas_tpu: head dim 16, only 32" in said()
    assert "): no kernel takes such calls; --attention NAME" in said()[-1]
    assert not verdicts.kept()
    assert not any("send us" in line or "proving" in line for line in said())


def test_what_a_compiler_lacks_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    """It says so as a kernel declines, but when it has been asked: once is enough."""
    says(monkeypatch, pallas_tpu=NotImplementedError("no lowering of sin"))
    assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
    assert [x.found for x in verdicts.kept()] == [
        "refused: NotImplementedError: no lowering of sin"
    ]


def test_what_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    """The verdict is kept, so that the next start does not wait again."""
    go_on, at_exit = threading.Event(), []

    def hanging(*_: Any, **__: Any) -> Any:
        go_on.wait()
        raise NotImplementedError("over")

    kernel(monkeypatch, hanging)
    monkeypatch.setattr(deadline, "LIMIT", 0.1)
    monkeypatch.setattr(deadline.atexit, "register", lambda *call: at_exit.append(call))
    try:
        assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
        ((handler, thread),) = at_exit
        assert handler is deadline.wait_at_exit and thread.is_alive() and thread.daemon
        assert [x.outcome for x in verdicts.kept()] == ["timed out"]
        monkeypatch.setattr(deadline, "within", lambda *_, **__: pytest.fail("it waits again"))
        prove.resolve("auto", [TINY])
    finally:
        go_on.set()
    thread.join()
    handler(thread)  # nothing is left behind: nothing to do


STUCK = """
import sys, threading, jax, jax.numpy as jnp
from qwen_jax.attention import deadline, prove
from qwen_jax.runtime import command
command.show_log()
deadline.LIMIT = float(sys.argv[1])
begun = threading.Event()
def work(x):
    for i in range(400):
        x = jnp.sin(x @ x) + jax.lax.cond(x[0, 0] > i, lambda y: y * 2, lambda y: y - 1, x)
    return x
def compile_it():
    lowered = jax.jit(work).lower(jnp.ones((64, 64)))
    begun.set()
    lowered.compile()
join = threading.Thread.join
threading.Thread.join = lambda self, _: begun.wait()
try:
    deadline.within(0, compile_it)
except TimeoutError:
    threading.Thread.join = join
    print("done")
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("seconds", "code"),
    [pytest.param(str(launch.LONG), 3, marks=pytest.mark.slow), ("0.1", 1)],
)
def test_a_process_ends_beside_a_compiler(seconds: str, code: int):
    """With its own exit code when the compiler is done; with 1 and a line where it hangs."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", STUCK, seconds]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == "done\n"
    assert ("hangs: this process ends with exit code 1" in ran.stderr) == (code == 1)


def test_programs_that_died_of_a_kernel_are_enough(monkeypatch: pytest.MonkeyPatch):
    ran = says(monkeypatch, pallas_tpu=FAST)
    prove.resolve("auto", [TINY])
    (verdict,) = verdicts.kept()
    verdicts.forget()

    class Died(BaseException):
        pass

    for number in (os.getpid(), 1):  # as a container restarts: with the same number
        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(verdicts.Path, "unlink", lambda _: None)  # it died: its note stays
            if number == 1:
                patch.setattr(verdicts.os, "getpid", lambda: 2**30)  # no such process
            with verdicts.begun(verdict.key.file()) as should:
                assert should
                raise Died
    prove.resolve("auto", [TINY])
    assert ran == ["pallas_tpu forward"]
    assert [x.outcome for x in verdicts.kept()] == ["crashed"]
    assert verdicts.forget() == 1
    prove.resolve("auto", [TINY])
    assert ran == ["pallas_tpu forward"] * 2


def test_a_program_that_proves_the_same_is_no_death(monkeypatch: pytest.MonkeyPatch):
    ran = says(monkeypatch, pallas_tpu=FAST)
    with monkeypatch.context() as patch:
        notes = []
        for number in (os.getppid(), 1):  # both live
            patch.setattr(verdicts.os, "getpid", lambda number=number: number)
            notes.append(verdicts.begun(prove_key().file()))
            assert notes[-1].__enter__()
    prove.resolve("auto", [TINY])
    assert ran == ["pallas_tpu forward"]
    for note in notes:
        note.__exit__(None, None, None)


def prove_key() -> Key:
    return Key(
        KIND, jax.__version__, "pallas_tpu", "forward", "float32", None, 16, 64, verdicts.code()
    )


# What is kept


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"key": {}}', b"\xff\xfe", b'{"key": 3}'])
def test_a_damaged_file_is_proved_anew(text: bytes, monkeypatch: pytest.MonkeyPatch):
    ran = says(monkeypatch, pallas_tpu=FAST)
    prove.resolve("auto", [TINY])
    (file,) = verdicts.folder().iterdir()
    file.write_bytes(text)
    assert verdicts.kept() == []
    assert prove.resolve("auto", [TINY]) == registry.inference("pallas_tpu", "xla")
    assert len(ran) == 2 and json.loads(file.read_text())["outcome"] == "agrees"


@pytest.mark.parametrize("field", ["device", "jax", "kernel", "task", "dtype", "cache", "code"])
def test_a_verdict_holds_for_nothing_else(field: str):
    verdict = Verdict(prove_key(), "agrees", "1", "driver", "2026-11-28", error=0.0)
    verdicts.keep(verdict)
    assert verdicts.find(prove_key()) == verdict
    assert verdicts.find(dataclasses.replace(prove_key(), **{field: "other"})) is None


def test_programs_write_at_the_same_time():
    """Readers see one of what was written, whole; nothing else stays behind."""
    found = [
        Verdict(prove_key(), "refused", "1", "driver", "2026-11-28", detail=letter * 20000)
        for letter in "abcd"
    ]
    verdicts.keep(found[0])
    threads = [
        threading.Thread(target=lambda x=x: [verdicts.keep(x) for _ in range(20)]) for x in found
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert verdicts.find(prove_key()) in found
    for thread in threads:
        thread.join()
    assert verdicts.find(prove_key()) in found
    assert [x.suffix for x in verdicts.folder().iterdir()] == [".json"]


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    says(monkeypatch, pallas_tpu=FAST)
    with pytest.warns(UserWarning, match=r"/file/qwen_jax cannot be written to: Not a directory: "):
        assert prove.resolve("auto", [TINY]) == registry.inference("pallas_tpu", "xla")
    assert not list((tmp_path).rglob("*.json"))


# What was measured


def test_measured_lines_give_the_order_and_still_need_agreement(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    def line(name: str, milliseconds: float) -> dict[str, Any]:
        values = (KIND, name, "forward", 16, "float32", 2048)
        return dict(zip(choice.KEYS, values, strict=True)) | {"milliseconds": milliseconds}

    lines = [line("pallas_tpu", 2), line("xla", 9), line("splash", 1), line("flash", 10)]
    monkeypatch.setattr(choice, "measured", lambda: lines)
    ran = says(monkeypatch, splash=(0.5, None), pallas_tpu=SLOW)
    assert prove.resolve("auto", [TINY]) == registry.inference("pallas_tpu", "xla")
    assert ran == ["splash forward, not timed", "pallas_tpu forward, not timed"]
    assert "it is right on this TPU test, and the fastest that was measured on such" in said()[-1]
    prove.resolve("auto", [TINY])
    assert len(ran) == 2
    # Without lines the order is to be found out, and a verdict without times says too little.
    monkeypatch.setattr(choice, "measured", list)
    assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
    assert ran[2:] == ["pallas_tpu forward"]
    monkeypatch.setattr(choice, "measured", lambda: lines[1:2])
    assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
    assert "nothing that was measured on TPU test is faster" in said()[-1]


# Several processes


def verdict(name: str, outcome: str = "agrees", own: Any = 1.0, reference: Any = 2.0) -> Verdict:
    key = dataclasses.replace(prove_key(), kernel=name)
    error = 0.5 if outcome == "wrong" else None
    return Verdict(key, outcome, "1", "driver", "2026-11-28", error, "", "", own, reference)


def test_what_fails_on_one_process_is_left_by_all():
    a, b = (functools.partial(verdict, name) for name in "ab")
    trials = {"a": [[a()], [a("wrong")]], "b": [[b(own=1.5)], [b(own=1.6)]]}
    name, ((line, level),) = verdicts.decide(trials, ordered=False)
    assert name == "b" and level == logging.WARNING
    assert line.startswith("attention: not a: its self-test has failed on process 1; please send")
    assert line.endswith("wrong by 5.0e-01 of the largest number")
    assert verdicts.decide(trials, ordered=True)[0] == "b"
    # The pace is that of the slowest, of the kernel as of the reference.
    assert verdicts.decide({"a": [[a(own=1.0)], [a(own=3.0)]]}, False)[0] == "xla"
    assert verdicts.decide({"a": [[a(own=1.0)], [a(own=3.0, reference=4.0)]]}, False)[0] == "a"
    assert verdicts.decide({"a": [[a(own=None)], [a()]]}, False)[0] == "xla"
    assert verdicts.decide({}, False) == ("xla", [])


def test_all_processes_take_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two of them, in turns of a thread each: one has a verdict already, one's device is wrong."""
    kernel(monkeypatch, right, "pallas_triton")
    me = threading.local()
    said_by: dict[tuple[int, int], str] = {}
    meet = threading.Barrier(2, timeout=launch.LONG)

    def gather(text: str) -> list[str]:
        me.count = getattr(me, "count", 0) + 1
        said_by[me.count, me.index] = text
        meet.wait()
        return [said_by[me.count, i] for i in range(2)]

    def self_test(case: Case, key: Key, *, timed: bool) -> Any:
        return (0.5, None) if ran_by.index == 1 and key.kernel == "pallas_tpu" else FAST

    ran_by = me
    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(deadline, "within", lambda _, work: work())
    monkeypatch.setattr(prove, "_self_test", self_test)
    monkeypatch.setattr(verdicts, "folder", lambda: tmp_path / str(me.index))
    me.index = 0
    verdicts.keep(dataclasses.replace(verdict("pallas_tpu", own=0.1), key=prove_key()))
    taken: dict[int, str] = {}

    def process(index: int) -> None:
        me.index = index
        try:
            taken[index], _ = prove._choose([TINY])
        except BaseException:
            meet.abort()  # the other would wait for ever
            raise

    threads = [threading.Thread(target=process, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == {0: "pallas_triton", 1: "pallas_triton"}


def test_processes_that_cannot_agree_take_the_reference(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        prove, "_self_test", lambda *_, **__: pytest.fail("each would decide alone")
    )
    assert prove.resolve("auto", [TINY]) == registry.inference("xla", "xla")
    assert "processes that were not joined by qwen_jax.initialize cannot agree" in said()[-1]


# What is taken, in programs


def test_names_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    monkeypatch.setattr(prove, "_self_test", lambda *_, **__: pytest.fail("nothing to find out"))
    assert prove.resolve("pallas_tpu", [TINY]) is attention.get("pallas_tpu")
    with pytest.raises(ValueError, match="'nope' is not known"):
        prove.resolve("nope", [TINY])
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu")
    monkeypatch.setattr(choice, "device", lambda: cpu)
    assert prove.resolve("auto", [TINY, DECODE]) == registry.inference("xla", "xla")
    line = (
        "attention: xla, as auto takes it on a CPU; --attention NAME (attention=NAME) takes another"
    )
    assert said() == [line], "once"
    assert prove.resolve("auto", [TINY, BACKWARD]) is attention.xla


def call(length: int) -> tuple[Any, ...]:
    q = jax.random.normal(jax.random.key(0), (1, length, 2, 16))
    ids = jnp.arange(length, dtype=jnp.int32)[None]
    mask = attention.Mask(ids, ids, 1 + 0 * ids, 1 + 0 * ids, jnp.int32(FULL))
    return q, q, q, mask, jnp.float32(0.25)


def test_what_is_proved_forward_alone_has_the_gradient_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
):
    kernel(monkeypatch, lambda *x, **y: 2 * wrong_gradient(*x, **y))
    q, k, v, mask, scale = call(20)

    def gradient(attend: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda q, s: jnp.sum(attend(q, k, v, mask, s)), (0, 1)))

    chosen = registry.inference("pallas_tpu", "xla")
    once, twice = (jax.jit(attend)(q, k, v, mask, scale) for attend in (right, chosen))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    for got, wanted in zip(
        jax.tree.leaves(gradient(chosen)(q, scale)),
        jax.tree.leaves(gradient(attention.xla)(q, scale)),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_auto_in_a_trace_takes_what_was_resolved(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
):
    kernel(monkeypatch, lambda *x: 2 * right(*x), decoder=right_decoder)
    q, k, v, mask, scale = call(20)
    assert attention.auto.decode_kernel(q[:, :1], keys=jnp.swapaxes(k, 1, 2)) is None

    def run() -> Any:
        return jax.jit(lambda *x: attention.get("auto")(*x))(q, k, v, mask, scale)

    plain = run()
    assert "no kernel was proved in this process" in said()[-1]
    says(monkeypatch, pallas_tpu=FAST, pallas_tpu_backward=(0.5, None))
    prove.resolve("auto", [TINY, DECODE])
    np.testing.assert_allclose(run(), 2 * plain, rtol=1e-5)
    keys = jnp.zeros((1, 2, 20, 16))
    assert attention.auto.decode_kernel(q[:, :1], keys=keys) is right_decoder
    int8 = quantize(keys)
    assert attention.auto.decode_kernel(q[:, :1], keys=int8) is None  # proved for others
    # A step is differentiated, which the kernel has failed: from then on it is not taken.
    prove.resolve("auto", [TINY, BACKWARD])
    np.testing.assert_allclose(run(), plain, rtol=1e-5)


def test_decoding_takes_a_kernel_of_its_own():
    q, keys = jnp.zeros((1, 1, 2, 16)), jnp.zeros((1, 2, 20, 16))
    pallas = registry.pallas_tpu.decode
    assert registry.inference("xla", "pallas_tpu").decode_kernel(q, keys=keys) is pallas
    assert registry.inference("pallas_tpu", "xla").decode_kernel(q, keys=keys) is None
    few = call(4)  # which then go through the reference, in parts
    chosen = jax.make_jaxpr(registry.inference("pallas_tpu", "xla"))(*few)
    assert str(chosen) == str(jax.make_jaxpr(right)(*few))


def test_equal_choices_share_a_program():
    traced: list[Any] = []
    run = jax.jit(lambda attend, x: traced.append(attend) or x, static_argnums=0)
    for _ in range(2):
        run(registry.inference("pallas_tpu", "pallas_tpu"), jnp.zeros(1))
    assert len(traced) == 1


def test_a_plain_function_has_no_decode_kernel():
    q = jnp.zeros((1, 1, 2, 16))
    assert registry.Implementation.of(right).decode_kernel(q, keys=q) is None
    assert registry.Implementation.of(attention.auto) is attention.auto


def test_a_model_is_loaded_with_what_has_proved_itself(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: list[str] = []

    def attend(q: Any, *rest: Any, **named: Any) -> Any:
        taken.append("forward")
        return right(q, *rest, **named)

    def step(*call: Any) -> Any:
        taken.append("decode")
        return right_decoder(*call)

    kernel(monkeypatch, attend, decoder=step)
    ran = says(monkeypatch, pallas_tpu=FAST)
    model = qwen_jax.load(golden_dir, dtype="float32", cache_dtype="int8")
    assert ran == ["pallas_tpu forward", "pallas_tpu decode"]
    assert {(x.key.task, x.key.cache) for x in verdicts.kept()} == {
        ("forward", None),
        ("decode", "int8"),
    }
    config, slots = model.config, min(8192, model.max_length)
    (forward, *_) = prove.passes(config, "float32", rows=1, length=decode.buckets()[-1])
    assert verdicts.kept()[1].key.length == min(forward.length, slots)
    monkeypatch.setattr(
        prove, "_self_test", lambda *_, **__: pytest.fail("attention=NAME skips it")
    )
    qwen_jax.load(golden_dir, dtype="float32", cache_dtype="int8")
    model.generate(np.arange(5, 25)[None], max_new_tokens=3)
    assert set(taken) == {"forward", "decode"}


@pytest.mark.parametrize("command", ["pretrain", "perplexity"])
def test_runs_resolve_before_they_trace(
    command: str, tmp_path: Path, golden_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []

    def resolve(name: str, cases: list[Case]) -> Any:
        asked.append((name, [(x.task, x.batch, x.length, x.dtype) for x in cases]))
        raise ValueError("far enough")

    monkeypatch.setattr(prove, "resolve", resolve)
    given = prepared(tmp_path / "given")
    if command == "pretrain":
        options = ["--accumulate", "2", "--mesh", "fsdp=2"]
        assert pretrain.main(pretraining(given, tmp_path / "out", *options)) == 1
        wanted = [("forward", 1, 256, "float32"), ("backward", 1, 256, "float32")]
    else:
        monkeypatch.setattr(measure, "read_ids", lambda *_, **__: np.arange(16))
        text = ["--data", str(given / "text.txt"), "--lengths", "16", "--json"]
        assert perplexity.main(["--ckpt", str(golden_dir), *text, "--modes", "plain"]) == 1
        wanted = [("forward", 1, 256, "float32")]
    assert asked == [("auto", wanted)]


def test_cases_are_those_of_a_device():
    config = tiny_config(num_heads=8, num_kv_heads=2)
    with on_mesh(fsdp=2, tp=4):
        forward, backward = prove.passes(config, jnp.bfloat16, rows=64, length=3000, backward=True)
        (step,) = prove.decoding(config, "float16", rows=8, slots=100_000, cache="int8")
    assert (forward.batch, forward.length, forward.heads, forward.kv_heads) == (2, 4096, 2, 1)
    assert backward == dataclasses.replace(forward, task="backward")
    assert (step.task, step.batch, step.length, step.cache) == ("decode", 1, 8192, "int8")
    assert (step.dtype, step.stored) == ("float16", "int8")
    with on_mesh(fsdp=2, tp=4):
        sizes = {"rows": 8, "slots": 2000, "page": 128, "chunk": 512}
        cases = prove.paging(config, "float16", **sizes, cache="int8")
    assert [(x.task, x.batch, x.length, x.tokens) for x in cases] == [
        ("paged decode", 4, 2048, 1),
        ("paged prefill", 1, 2048, 512),
        ("write", 4, 2048, 1),
    ]
    assert {(x.page, x.kv_heads, x.cache) for x in cases} == {(128, 1, "int8")}
