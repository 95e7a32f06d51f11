"""`python -m qwen_jax.checkpoint inspect`: what it says of whole and of damaged directories."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import inspection
from qwen_jax.config.presets import PRESETS
from tests.support.conversion import ROOT, last_line
from tests.support.tiny import tiny_config, tiny_decoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "m"
    config = tiny_config(hidden_size=64)
    with meshes.entered(meshes.make({"fsdp": 4, "tp": 2})):
        checkpoint.save(path, config, tiny_decoder(config, jnp.bfloat16))
    return path


def inspect(path: Path, *options: str) -> int:
    return inspection.main(["inspect", str(path), *options])


def test_what_a_directory_holds(saved, capsys):
    assert inspect(saved, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = checkpoint.verify_whole(saved)
    chunks = [f for f in (saved / "params").glob("*/[0-9]*")]
    expected = {
        "whole": True,
        "reason": None,
        "model": None,
        "dtype": "bfloat16",
        "num_params": tiny_config(hidden_size=64).num_params(),
        "mesh": manifest["mesh"],
        "chunk_files": len(chunks),
        "bytes": sum(f.stat().st_size for f in (saved / "params").rglob("*") if f.is_file()),
        "largest_chunk_bytes": max(f.stat().st_size for f in chunks),
        "made_by": "qwen_jax.checkpoint.save",
        "versions": manifest["versions"],
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["sizes"]["vocabulary"] == 68 and facts["sizes"]["layers"] == 2
    assert inspect(saved) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["sharding"].startswith(f"cut for fsdp=4, tp=2: {len(chunks)} chunk files")
    assert shown["whole"] == "yes" and shown["dtype"] == "bfloat16"


def rewritten(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | changes))


def test_published_models_are_named():
    for name, preset in PRESETS.items():
        assert inspection.model_name(dataclasses.replace(preset, seq_length=4096)) == name
        wider = dataclasses.replace(preset, vocab_size=preset.vocab_size + 64)
        assert inspection.model_name(wider) is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda m: (m / "manifest.json").unlink(), "is not a model directory"),
        (lambda m: (m / "manifest.json").rename(m / "unfinished.json"), "a save that was stopped"),
        (lambda m: (m / "params/head/0.0").unlink(), "params/head/0.0 is missing"),
        (lambda m: (m / "params/head/0.0").write_bytes(b"x"), "has 1 bytes instead of"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (lambda m: rewritten(m, shapes={"a": "xx"}), "manifest.json is damaged"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_what_is_not_whole(saved, tmp_path, capfd, damage, told):
    damage(Path(shutil.copytree(saved, tmp_path / "m")))
    assert inspect(tmp_path / "m", "--json") == 1
    out, err = capfd.readouterr()
    facts = json.loads(out)
    assert not facts["whole"] and told in facts["reason"]
    assert err.strip() == f"error: {facts['reason']}"
    assert inspect(tmp_path / "m") == 1
    assert told in last_line(capfd)


def test_weights_of_another_config(saved, tmp_path, capfd):
    path = Path(shutil.copytree(saved, tmp_path / "m"))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    assert inspect(path) == 1
    assert "do not match config.json" in last_line(capfd)


def test_it_needs_no_jax(saved):
    """Neither the time that takes nor the accelerator."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['inspect', sys.argv[1]]\n"
        "try: runpy.run_module('qwen_jax.checkpoint', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'jax', 'flax', 'orbax', 'tensorstore', 'etils'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True, cwd=ROOT)


def test_usage_and_help(capsys):
    with pytest.raises(SystemExit) as ended:
        inspection.main([])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        inspection.main(["inspect", "--help"])
    assert ended.value.code == 0
    assert "Exit codes: 0 whole, 1 not whole" in capsys.readouterr().out
