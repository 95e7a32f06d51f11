"""benchmarks/quantisation_curve.py: the perplexity at 8 bits, average bits, and the picture."""

from pathlib import Path

import pytest

from benchmarks import quantisation_curve


@pytest.mark.slow
def test_8_bits_keep_the_perplexity_of_a_trained_model(tmp_path: Path) -> None:
    """On chapters that it has not read."""
    table = tmp_path / "table.md"
    options = ["--points", "8", "--rows", "4", "--held-out", "8", "--out", str(table)]
    assert quantisation_curve.main(options) == 0
    floats, eight = (line.split("|")[4] for line in table.read_text().splitlines()[-2:])
    assert float(eight) == pytest.approx(float(floats), rel=0.01)


def test_bits_are_averaged_over_weights() -> None:
    figures = {"layers": {"a": {"bits": 4}, "b": {"bits": 8}}}
    shapes = {"a": [32, 96], "b": [32, 32], "head": [1280, 32]}
    assert quantisation_curve.bits_with_scales(figures, shapes) == 5 + 0.5


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    points = {"4": (4.5, 3.0), "mixed": (6.0, 3.5), "8": (8.5, 2.0)}
    quantisation_curve.plot(2.0, points, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert "<svg" in drawn and "<!-- mixed -->" in drawn
