"""The benchmark of products with weights in groups, on a shape that a CPU does in a moment."""

from pathlib import Path

import pytest

from benchmarks import grouped
from benchmarks.grouped import Case


@pytest.mark.slow
def test_runs_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.md"
    args = ["--shapes", "tiny", "--rows", "1", "--rounds", "1", "--markdown", str(path)]
    assert grouped.main(args) == 0
    lines = [x for x in path.read_text().splitlines() if x.startswith("| tiny")]
    forms = {"floats", "by_floats", "by_groups", "one_row", "a copy"}
    assert {x.split(" | ")[1] for x in lines} == forms
    assert "WRONG" not in capsys.readouterr().err
    assert grouped.main(["--shapes", "9b-*"]) == 2


def test_rates_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"floats": 4e-3, "by_groups": 2e-3, "limit": 1.0}

    def program() -> None: ...

    monkeypatch.setattr(grouped.timing, "medians", lambda made, _: {k: seconds[k] for k in made})
    monkeypatch.setattr(grouped.timing, "copy", lambda: (program, 1e10))
    monkeypatch.setattr(Case, "weights", lambda case: 2)
    case = Case(1, 4096, 4096, 4, "float32")
    made = {"floats": program, "by_groups": program}
    ours, floats, limit = grouped.rows("s", case, made, 1)
    # 8.4 MB of integers and 0.3 MB of scales in 1 ms, 67 MB of floats in 2 ms.
    assert ours == ("s", "by_groups", "1000", "2.00", "8.651 GB/s", "87 %")
    assert floats == ("s", "floats", "2000", "1.00", "33.55 GB/s", "336 %")
    assert limit[1:] == ("a copy", "", "", "10 GB/s", "100 %")
