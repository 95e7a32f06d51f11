"""The tuner: what it writes and refuses to write, on a CPU and with stand-ins for kernels."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import attention
from qwen_jax.attention import FULL, block_grids, timing, tuning, verdicts, workloads
from qwen_jax.attention.workloads import Case
from qwen_jax.kernels import choice, flash_hopper, flash_tpu
from qwen_jax.runtime import lock, paths

SMALL = ["--length", "32", "--heads", "2", "--batch", "1", "--head-dim", "32", "--rounds", "1"]
TINY = Case("forward", 1, 32, 2, 32, "float32")


def line(kernel: str, length: int, milliseconds: float = 1.0) -> dict[str, Any]:
    values = ("a chip", kernel, "forward", 128, "bfloat16", length)
    return dict(zip(choice.KEYS, values, strict=True)) | {"milliseconds": milliseconds}


@pytest.mark.slow
def test_writes_lines_that_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "lines.json"
    args = ["--dtype", "float32", "--kernel", "xla", "--task", "forward", "decode"]
    assert tuning.main([*SMALL, *args, "--out", str(out)]) == 0
    lines = json.loads(out.read_text())
    assert [(x["task"], x["dtype"]) for x in lines] == [
        ("decode", "float32"),
        ("decode", "int8"),
        ("forward", "float32"),
    ]
    for each in lines:
        assert each["milliseconds"] > 0 and each["blocks"] == {}
        assert ("gbytes_per_second" in each) == (each["task"] == "decode")
        assert {*choice.KEYS, "jax", "date"} <= set(each)
    monkeypatch.setattr(choice, "measured", lambda: lines)
    assert choice.lines("decode", head_dim=32, dtype="int8", length=100)[0]["kernel"] == "xla"


def test_a_cpu_writes_no_measured_table(capsys: pytest.CaptureFixture[str]):
    before = choice.TABLE.read_text()
    for out in ([], ["--out", str(choice.TABLE)]):
        assert tuning.main([*SMALL, *out]) == 2
        assert "interpreted" in capsys.readouterr().err
    assert choice.TABLE.read_text() == before


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]):
    assert tuning.main(["--kernel", "nope"]) == 2
    assert "--kernel nope: choose from xla" in capsys.readouterr().err


def test_writing_replaces_and_sorts(tmp_path: Path):
    path = tmp_path / "table.json"
    tuning.write(path, [line("b", 2048), line("a", 8192), line("a", 512)])
    tuning.write(path, [line("a", 8192, 0.5)])
    table = json.loads(path.read_text())
    assert [(x["kernel"], x["length"]) for x in table] == [("a", 512), ("a", 8192), ("b", 2048)]
    assert table[1]["milliseconds"] == 0.5
    assert list(tmp_path.iterdir()) == [path]
    tuning.write(path, [])
    assert json.loads(path.read_text()) == table


def test_no_line_of_another_program_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody else reads the table between this program's reading and writing."""
    path, write = tmp_path / "table.json", paths.write

    def while_writing(*arguments: Any) -> None:
        with pytest.raises(lock.Busy), lock.alone(path, tmp_path / "table.json.lock"):
            pass
        write(*arguments)

    monkeypatch.setattr(paths, "write", while_writing)
    tuning.write(path, [line("a", 512)])
    assert list(tmp_path.iterdir()) == [path]


def test_blocks_that_are_tried_reach_the_kernel(monkeypatch: pytest.MonkeyPatch):
    bodies = []

    def forward(
        body: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any, lse: bool, known: None
    ) -> Any:
        bodies.append(body)
        return attention.xla(q, k, v, mask, scale, lse)

    monkeypatch.setattr(flash_tpu.flash, "attend_through", forward)
    with tuning.trying(TINY, "pallas_tpu", blocks={"q": 256, "k": 512, "compute": 256}):
        workloads.program(TINY, "pallas_tpu")
    workloads.program(TINY, "pallas_tpu")
    assert bodies[0].forward_blocks == flash_tpu.TpuBlocks(256, 512, 256)
    assert bodies[-1].forward_blocks != bodies[0].forward_blocks
    assert bodies[-1].backward_blocks == bodies[0].backward_blocks


def test_candidates_are_what_kernels_take():
    for task in ("forward", "backward"):
        for grid in block_grids.CANDIDATES["pallas_tpu"][task]:
            assert all(flash_tpu.TpuBlocks(**blocks) for blocks in grid)
        for grid in block_grids.CANDIDATES["pallas_hopper"][task]:
            assert all(flash_hopper.Hopper(**blocks) for blocks in grid)


def test_a_wrong_kernel_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(q: Any, *rest: Any, **named: Any) -> Any:
        return attention.xla(q, *rest, **named) + 0.1

    def broken(q: Any, *rest: Any, **named: Any) -> Any:
        return attention.xla(q, *rest, **named) * jnp.nan

    for name, attend in {"wrong": wrong, "broken": broken}.items():
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, attend)
    out = tmp_path / "lines.json"
    names = ["--kernel", "wrong", "broken", "xla", "--task", "forward", "--dtype", "float32"]
    assert tuning.main([*SMALL, *names, "--out", str(out)]) == 0
    assert [x["kernel"] for x in json.loads(out.read_text())] == ["xla"]
    said = capsys.readouterr().err
    assert "wrong : WRONG, by" in said and "broken : WRONG" in said


def test_the_best_blocks_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each grid is searched with what was best before; a refused candidate does no harm."""
    slow = {1: 3.0, 2: 1.0, 3: 2.0, 10: 0.2, 20: 0.1}
    grids = [[{"a": 1}, {"a": 2}, {"a": 3}, {"a": 99}], [{"b": 10}, {"b": 20}]]
    monkeypatch.setitem(block_grids.CANDIDATES, "xla", {"forward": grids})

    def program(case: Case, name: str) -> Any:
        blocks = choice.measured()[0]["blocks"] if choice.measured() else {"a": 1}
        if 99 in blocks.values():
            raise RuntimeError("RESOURCE_EXHAUSTED: shared memory")
        return lambda: sum(slow[x] for x in blocks.values()) + (0 if "b" in blocks else 10)

    monkeypatch.setattr(choice, "measured", lambda: [])
    monkeypatch.setattr(workloads, "program", program)
    monkeypatch.setattr(timing, "medians", lambda made, _: {k: x() for k, x in made.items()})
    out = tmp_path / "lines.json"
    args = [*SMALL, "--kernel", "xla", "--task", "forward", "--dtype", "float32"]
    assert tuning.main([*args, "--out", str(out)]) == 0
    assert json.loads(out.read_text())[0]["blocks"] == {"a": 2, "b": 20}


@pytest.mark.parametrize("features", [False, True])
def test_pairs_are_counted_as_the_mask_has_them(features: bool):
    case = dataclasses.replace(TINY, length=131, features=features)
    mask = workloads.mask_of(case)
    assert case.pairs() == int(np.asarray(mask.visible())[0].sum())
    unlimited = dataclasses.replace(mask, window=jnp.int32(FULL)).visible()
    assert features == bool((unlimited != mask.visible()).any())  # the window cuts


def test_programs_take_turns():
    order: list[str] = []
    programs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(timing.medians(programs, 3)) == {"a", "b"}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 4


def test_what_is_known_of_kernels_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.main(["--show"]) == 0
    out = capsys.readouterr().out
    assert f"auto has found out nothing yet (it would be in {tmp_path}/qwen_jax/attention)" in out
    assert "python -m qwen_jax.generate --ckpt DIR --bench" in out
    assert "no lines for cpu in" in out and "python -m qwen_jax.kernels.tune, on that device" in out

    key = verdicts.Key("TPU v5 lite", "0.10.2", "a", "decode", "bfloat16", "int8", 128, 4096, "1")
    facts = {"jaxlib": "0.10.2", "driver": "libtpu", "date": "2026-11-28"}
    right = verdicts.Verdict(
        key, "agrees", error=2e-3, milliseconds=0.5, xla_milliseconds=4, **facts
    )
    other = dataclasses.replace(key, kernel="b", cache=None)
    for verdict in (right, verdicts.Verdict(other, "refused", detail="ValueError: no", **facts)):
        verdicts.keep(verdict)
    of_here = line("c", 2048, 0.25) | {"device": "cpu", "blocks": {"q": 128}, "tflops": 7}
    monkeypatch.setattr(choice, "measured", lambda: [of_here, line("d", 2048)])
    assert tuning.main(["--show"]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(x.split()) for x in out.splitlines()]
    assert "TPU v5 lite" in rows
    assert "a decode bfloat16, int8 cache 128 4096 agrees 2.0e-03 0.5 4 0.10.2 2026-11-28" in rows
    assert "b decode bfloat16 128 4096 refused: ValueError: no - - - 0.10.2 2026-11-28" in rows
    assert "forward bfloat16 128 2048 c 0.2500 ms 7 TFLOP/s {'q': 128}" in rows
    assert "a chip" not in out  # another device's lines

    assert tuning.main(["--forget"]) == 0
    assert "forgot 2 verdicts in" in capsys.readouterr().out
    assert verdicts.kept() == []
