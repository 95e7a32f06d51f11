"""The training benchmark on a model that a CPU trains in a moment; torch is played by a script."""

import sys
from pathlib import Path

import pytest

from benchmarks import train as benchmark
from qwen_jax.config.presets import PRESETS
from qwen_jax.meshes import hardware

TINY = ["--hidden", "64", "--layers", "2", "--vocab", "256", "--length", "16", "--tokens", "32"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "CHECKED", 2)


@pytest.mark.slow
def test_runs_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, trace = tmp_path / "table.md", tmp_path / "trace"
    args = ["--rounds", "1", "--markdown", str(path), "--profile", str(trace), "--remat", "full"]
    assert benchmark.main([*TINY, *args]) == 0
    lines = path.read_text().splitlines()
    assert "jax 0." in lines[0] and "--hidden 64" in lines[0]
    assert {x.split(" | ")[3] for x in lines[4:]} == {"full", "a product"}
    assert all(x.count("|") == len(benchmark.COLUMNS) + 1 for x in lines[2:])
    assert "TFLOP/s" in capsys.readouterr().out
    assert list(trace.rglob("*.xplane.pb"))


def test_scopes_of_operations():
    line = 'f32[2] fusion(x), metadata={op_name="jit(step)/%s/mul" stack_frame_id=1}'
    step = "transpose(jvp())/while/body/checkpoint/rematted_computation/attention"
    assert benchmark._scope(line % step) == ("attention", "again")
    assert benchmark._scope(line % "transpose(jvp(vocabulary))") == ("vocabulary", "backward")
    assert benchmark._scope(line % "jvp()/feed_forward") == ("feed_forward", "forward")
    assert benchmark._scope(line % "optimizer") == ("optimizer", "")
    assert benchmark._scope("f32[2] copy(x)") == ("other", "")


@pytest.mark.slow
def test_adapters(capsys: pytest.CaptureFixture[str]):
    """A step of theirs runs, and it needs no gradient of the weights below."""
    args = ["--rounds", "1", "--lora", "4", "--remat", "full"]
    assert benchmark.main([*TINY, *args]) == 0
    assert "lora 4, full" in capsys.readouterr().out
    parse = benchmark.parser().parse_args
    (whole,), (adapters,) = (benchmark.cases(parse(x)) for x in (TINY, [*TINY, "--lora", "4"]))
    assert whole.flops() - adapters.flops() == 32 * 2 * whole.config.num_multiplied()


RIVAL = """
import json, sys
print(json.dumps({"torch": "9.9"}), flush=True)
for line in sys.stdin:
    way, *count = line.split()
    if way == "compiled":
        answer = {"error": "no compiler"}
    else:
        n = int(count[0]) if count else 0
        answer = {"losses": [%s] * n, "norms": [1.0] * n}
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.parametrize("loss", ["5.0", "float('nan')"])
def test_a_rival(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loss: str,
):
    """It is timed where it agrees, and ends the run where it does not; a way that fails is left
    out.
    """
    script = tmp_path / "rival.py"
    script.write_text(RIVAL % loss)
    monkeypatch.setattr(benchmark, "TORCH", script)
    ours = benchmark.Ours
    monkeypatch.setattr(ours, "compile", lambda *_, **__: None)
    monkeypatch.setattr(ours, "first", lambda *_, **__: [(5.0, 1.0)] * 2)
    monkeypatch.setattr(ours, "step", lambda *_, **__: None)
    monkeypatch.setattr(ours, "memory", lambda *_, **__: 1e9)
    args = ["--rounds", "1", "--torch-python", sys.executable, "--remat", "full"]
    wrong = loss != "5.0"
    assert benchmark.main([*TINY, *args]) == (1 if wrong else 0)
    heard = capsys.readouterr()
    if wrong:
        assert "torch 9.9, eager: first 2 losses differ by inf" in heard.err
        assert "not the same step" in heard.err
    else:
        assert "not torch compiled: no compiler" in heard.err
        assert "torch eager" in heard.out and "torch compiled" not in heard.out


def test_what_the_rival_is_given(tmp_path: Path):
    from safetensors.numpy import load_file

    (case,) = benchmark.cases(benchmark.parser().parse_args(TINY))
    with benchmark.meshes.entered(benchmark.meshes.make()):
        benchmark.write(case, tmp_path / "file")
    arrays = load_file(tmp_path / "file")
    assert arrays["layers.attn.q"].shape == (2, 64, 64)
    assert (arrays["tokens"][:, 1:] == arrays["targets"][:, :-1]).all()


def test_models_and_layers(monkeypatch: pytest.MonkeyPatch):
    """On a Hopper GPU the published sizes in bfloat16, as many layers as its memory takes."""

    class Device:
        platform, device_kind = "gpu", hardware.GPUS["h100"].kind
        memory_stats = staticmethod(lambda: {"bytes_limit": int(76e9)})

    monkeypatch.setattr(benchmark.choice, "device", Device)
    monkeypatch.setattr(benchmark.jax, "local_devices", lambda: [Device])
    found = benchmark.cases(benchmark.parser().parse_args([]))
    named = [(x.name, x.length, x.rows, x.config.num_layers) for x in found]
    assert named == [
        ("qwen-1.8b", 2048, 16, 24),
        ("qwen-1.8b", 8192, 4, 24),
        ("qwen-7b", 2048, 16, 11),
        ("qwen-7b", 8192, 4, 11),
    ]
    assert {(x.dtype, x.attention) for x in found} == {("bfloat16", "pallas_hopper")}
    assert found[0].config == PRESETS["qwen-1.8b"]


def test_arguments_that_cannot_be(capsys: pytest.CaptureFixture[str]):
    assert benchmark.main([*TINY, "--lora", "4", "--torch-python", "python"]) == 2
    assert "--torch-python: on a CPU, in float32, without --lora" in capsys.readouterr().err
    assert benchmark.main(["--hidden", "300"]) == 2
    assert "--hidden 300: a multiple of 16" in capsys.readouterr().err
