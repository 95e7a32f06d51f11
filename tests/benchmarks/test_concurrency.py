"""benchmarks/concurrency.py: which tokens count as steady, and what it writes of an engine."""

from benchmarks import concurrency, decoding
from benchmarks.serve import Asked, Times
from qwen_jax import meshes
from tests.support import engines


def test_steady_counts_while_all_requests_decode() -> None:
    asked = Asked(0.0, [1], 4)
    first, second = Times(asked, [1.0, 2.0, 3.0, 4.0]), Times(asked, [2.0, 3.0, 4.0, 5.0])
    assert concurrency.steady([first, second]) == 4 / 2  # those after 2.0, until 4.0
    assert concurrency.steady([first, Times(asked, [5.0, 6.0])]) is None
    assert concurrency.steady([first]) == 1.0


def test_every_figure_of_an_engine_is_written() -> None:
    steps = engines.programs()
    options = {"prompt": 8, "new": 6, "new-few": 4, "steps": 1}
    given = [f"--{name}={value}" for name, value in options.items()]
    args = concurrency.parser().parse_args([*given, "--concurrency", "1", "3"])
    args.bandwidth = 1e9
    found: dict[str, str] = {}
    with meshes.entered(steps.mesh):
        model = decoding.made(steps.decoder, "xla", "bfloat16", engines.LONGEST)
        needed = decoding.step_bytes(model, 4, 8 + 6 // 2)
        try:
            made = engines.engine(steps)
            concurrency.measure(made, model, args=args, write=found.__setitem__)
        finally:  # other tests share these programs, and all rows are on now
            steps._state = steps._programs.state()
    assert found["attention"].count("xla") >= 3
    assert found["rows, pages, tokens of a page"] == "4, 33, 4"
    for name in ("1 at a time, 8 in, 4 out", "3 at a time, 8 in, 4 out"):
        assert float(found[f"{name}: whole run (tok/s)"]) > 0
    assert float(found["1 at a time, 8 in, 4 out: steady, decode step (ms)"]) > 0
    line = "decode program, 4 rows of 11 tokens, weights and pages read (GB)"
    assert found[line] == f"{needed / 1e9:.4g}"
    assert found["decode program, 4 rows of 11 tokens, of copy"].endswith(" %")
