"""The attention benchmark on shapes that a CPU does in a moment."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention as benchmark
from qwen_jax import attention
from qwen_jax.attention.workloads import Case


@pytest.mark.slow
def test_runs_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "table.md"
    args = ["--shapes", "tiny", "--only", "xla", "--rounds", "1", "--markdown", str(path)]
    assert benchmark.main(args) == 0
    lines = [x for x in path.read_text().splitlines() if x.startswith("| tiny")]
    assert {x.split(" | ")[1] for x in lines} >= {"xla", r"dot_product\*", "a product", "a copy"}
    assert all(x.count("|") == len(benchmark.COLUMNS) + 1 for x in lines)
    head = path.read_text().splitlines()[0]
    assert "jax 0." in head and "--shapes tiny" in head
    out = capsys.readouterr().out
    assert "TFLOP/s" in out and "GB/s" in out
    assert "pallas" not in out  # interpreted on a CPU, unless asked for


def test_shapes_cover_the_published_sizes():
    shapes = benchmark.shapes("bfloat16")
    sizes = {(x.heads, x.head_dim) for name, x in shapes.items() if not name.startswith("tiny")}
    assert sizes == {(16, 128), (32, 128), (40, 128), (64, 128)}
    lengths = {x.length for name, x in shapes.items() if "-forward-" in name}
    assert {512, 2048, 8192, 32768} <= lengths
    assert {x.cache for name, x in shapes.items() if "-decode-" in name} == {None, "int8"}
    assert {1, 64} <= {x.batch for x in shapes.values()}
    for pattern in benchmark.QUICK:
        assert benchmark.fnmatch.filter(shapes, pattern)


def test_rates_and_ratios(monkeypatch: pytest.MonkeyPatch):
    seconds = {"pallas_x": 1e-3, "pallas_x+": 1e-3, "xla": 4e-3, "other*": 2e-3, "limit": 1.0}

    def program() -> None: ...

    monkeypatch.setattr(benchmark.timing, "medians", lambda made, _: {k: seconds[k] for k in made})
    monkeypatch.setattr(benchmark.timing, "product", lambda dtype: (program, 1e12))
    monkeypatch.setattr(Case, "layers", lambda case: 1)
    case = Case("forward", 1, 4096, 8, 128, "bfloat16")
    made: dict[str, Any] = dict.fromkeys(["pallas_x", "pallas_x+", "xla", "other*"], program)
    first, second, third, limit = benchmark.rows("s", case, made, 1)
    assert first.implementation == "pallas_x"
    assert first.ratio == "2.00" and second.ratio == "1.00" and third.ratio == "0.50"
    # 2 products of 2 FLOPs, half of 4096 x 4096 pairs, 8 heads of 128, in a millisecond.
    assert first.rate == "34.36 TFLOP/s" and first.share == "3436 %"
    # 4 sequences have a quarter of plain causal's pairs, and windows of half of them 3/4 of that.
    assert first.features == "5.33" and second.features == ""
    assert limit.rate == "1 TFLOP/s"


def test_a_wrong_implementation_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "wrong", lambda *args, **named: attention.xla(*args) * 2
    )
    case = Case("forward", 1, 32, 2, 32, "float32")
    made = benchmark.programs("s", case, ["xla", "wrong"], False)
    assert "xla" in made and "wrong" not in made
    assert "wrong, forward: WRONG" in capsys.readouterr().err


def test_names_that_are_not_known(capsys: pytest.CaptureFixture[str]):
    assert benchmark.main(["--shapes", "nope"]) == 2
    assert "--shapes nope: no such shape" in capsys.readouterr().err
    assert benchmark.main(["--only", "nope"]) == 1
    assert "attention 'nope' is not known" in capsys.readouterr().err
