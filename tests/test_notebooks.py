"""The notebooks run from top to bottom on the tiny checkpoint."""

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

from tests.conftest import CACHE, FLAG
from tests.support.launch import LONG
from tests.support.training import curve

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LORA = "--steps 8 --rows 4 --length 64 --lora-rank 8 --learning-rate 0.01 --dtype float32"
TEXT = "--steps 24 --warmup 2 --learning-rate 0.003 --dtype float32"
# What changes sizes, and nothing else.
VARIABLES = {
    "quickstart": {},
    "finetune_lora": {"TRAIN": LORA},
    "serve_and_tools": {
        "SERVE": "--rows 4 --max-length 2048 --dtype float32",
        "FAVOURED": "198",  # the id of a line's end
    },
    "tpu_vm": {"TOPOLOGY": "v5e:1x2", "MESH": "fsdp=2", "LENGTH": "32", "ROWS": "4", "TRAIN": TEXT},
}


def quickstart(work: Path, printed: str) -> None:
    assert "weights float32" in printed and "tokens/s" in printed


def finetune_lora(work: Path, printed: str) -> None:
    """Replies are learned and questions read; the loss falls; both exports are there."""
    chats = (work / "orders.jsonl").read_text().splitlines()
    assert len(chats) == 200
    said, reply = (turn["value"] for turn in json.loads(chats[0])["conversations"])
    assert f"\nread    'user\\n{said}' [" in printed
    assert f"\nlearned '{reply}<|im_end|>\\n' [" in printed
    losses = [x["loss"] for x in curve(work / "orders-run").values()]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.05
    assert printed.count("\nbefore  ") == printed.count("\nafter   ") == 5
    assert re.search(r"exact matches before: 0 of 20, 0%\nexact matches after: \d+ of 20", printed)
    with safe_open(work / "orders-hf" / "model.safetensors", "numpy") as merged:
        new = merged.get_tensor("transformer.h.1.mlp.w1.weight")
    with safe_open(os.environ["QWEN_JAX_SOURCE"] + "/model.safetensors", "numpy") as source:
        old = source.get_tensor("transformer.h.1.mlp.w1.weight")
    assert new.shape == old.shape and abs(new - old).max() > 1e-4
    assert '"peft_type": "LORA"' in printed and "adapter_model.safetensors" in printed
    assert (work / "orders-run" / "adapter" / "adapter_model.safetensors").exists()


def tpu_vm(work: Path, printed: str) -> None:
    """The run was stopped on its way and went on to its end; every step is there once."""
    if importlib.util.find_spec("libtpu") is None:
        assert "compiling for tpu needs the package libtpu" in printed
    else:
        assert "tokens/s" in printed
    (stopped,) = re.findall(r"^stopped after step (\d+)$", printed, re.M)
    assert 5 <= int(stopped) < 24
    steps = curve(work / "text-run")
    assert list(steps) == list(range(1, 25)) and steps[24]["loss"] < steps[1]["loss"] - 0.05
    assert "trained on fsdp=2, loaded on tp=2\ndef main(" in printed
    manifest = json.loads((work / "ckpt" / "manifest.json").read_text())
    assert manifest["mesh"]["fsdp"] == 2


def serve_and_tools(work: Path, printed: str) -> None:
    """Grammars hold a random model to a call and to a schema; the server ends in order."""
    assert "\nthe same: True\n" in printed
    (result,) = re.findall(r"^called weather: (.*)$", printed, re.M)
    assert json.loads(result)["temperature"] in (21, 70)
    assert re.search(r"^answered: .", printed, re.M)
    (city,) = re.findall(r"^read: (.*)$", printed, re.M)
    assert list(json.loads(city)) == ["name", "continent", "capital"]
    assert re.search(r"^refused: .*\bnot\b", printed, re.M)
    ended = re.findall(r'^vllm:request_success_total\{.*reason="(\w+)".*\} (\S+)$', printed, re.M)
    assert sum(float(count) for _, count in ended) == 5
    assert "\nexit code 0\n" in printed
    assert "Traceback" not in (work / "server.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("check", [quickstart, finetune_lora, serve_and_tools, tpu_vm])
def test_notebook(
    check: Callable[[Path, str], None],
    chat_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = str(chat_dir.parent / "hf")
    values = {"SOURCE": source, "MODEL": source, "CKPT": str(tmp_path / "ckpt")}
    for name, value in (values | VARIABLES[check.__name__]).items():
        monkeypatch.setenv(f"QWEN_JAX_{name}", value)
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=2")
    monkeypatch.setenv("MPLCONFIGDIR", str(CACHE.parent / "matplotlib"))  # it looks for fonts once
    root = str(NOTEBOOKS.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOKS / f"{check.__name__}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "checked in without outputs"
    NotebookClient(
        notebook, timeout=int(LONG), resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert (tmp_path / "ckpt" / "manifest.json").exists()
    check(tmp_path, printed)
