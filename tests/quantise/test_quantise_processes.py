"""The quantiser in several processes, real ones, and what each of them checks."""

import json
import shutil
from pathlib import Path

import pytest

from qwen_jax.quantise import output
from qwen_jax.quantise.algorithm import Scheme
from qwen_jax.quantise.run import Settings, run
from qwen_jax.runtime import processes
from tests.quantise.test_run import floats, rows  # noqa: F401 (a fixture)
from tests.runtime.test_processes import succeeded
from tests.support import launch
from tests.support.conversion import ROOT, contents, there
from tests.tools.make_checkpoint import PRESETS, make_checkpoint


@pytest.mark.slow
def test_two_processes_make_the_model_of_one(tmp_path: Path) -> None:
    """To the byte: each sum over the mesh has two terms, whose order does not matter."""
    ckpt = tmp_path / "ckpt"
    make_checkpoint(tmp_path / "hf", PRESETS["tiny"] | {"vocab_size": 1280, "num_hidden_layers": 1})
    for name in ("qwen.tiktoken", "generation_config.json"):
        shutil.copy(ROOT / "examples/moby_dick/model" / name, tmp_path / "hf")
    there(tmp_path / "hf", ckpt)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"After {number} comes {number + 1}.\n" for number in range(40)))
    command = ["-m", "qwen_jax.quantise", "--ckpt", ckpt, "--data", text, "--bits", "4"]
    command += ["--group-size", "16", "--act-order", "--asymmetric", "--head", "int8", "--json"]
    command += ["--bits-of", "*.ffn.*=16", "--length", "64", "--mesh", "fsdp=2", "--out"]

    def made(count: int) -> dict[str, str]:
        with launch.group([*command, tmp_path / str(count)], count) as group:
            results = succeeded(group)
        report = json.loads((tmp_path / str(count) / output.REPORT).read_text())
        assert json.loads(results[0].out) == report
        return contents(tmp_path / str(count))

    assert made(2) == made(1)


def test_a_process_that_sees_another_folder_stops(
    floats: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "index", lambda: 1)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"out is not the folder that process 0 writes to: all"):
        run(Settings(floats, out, Scheme()), rows(1), held_out=None)
    assert not out.exists()
