"""Plans for a TPU slice and for GPUs of two hosts: the real compilers, on a small model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantised
from qwen_jax import PRESETS, meshes
from qwen_jax.config import Config
from tests.support.tiny import tiny_config
from train.planning import attempts, estimate, stored_weights, topology
from train.planning.estimate import Estimate
from train.planning.programs import Setting
from train.run import recipes


def small() -> Config:
    """Heads as wide as the published models', so that the kernels take them."""
    return tiny_config(
        vocab_size=1024, hidden_size=512, num_heads=4, num_kv_heads=4, head_dim=128,
        intermediate_size=1024, num_layers=3,
    )  # fmt: skip


def plan(task: Any, where: str, mesh: str, batch: int, length: int, kernel: str) -> Estimate:
    setting = Setting(small(), batch=batch, length=length, attention=kernel)
    return task(setting, topology.parse(where), sizes=meshes.parse(mesh))


CASES = [
    pytest.param("v5e:2x2", "fsdp=2,tp=2", "pallas_tpu", id="v5e"),
    pytest.param("v4:2x2x1", "fsdp=4", "pallas_tpu", id="v4"),
    pytest.param("v5p:2x2x1*2", "data=2,fsdp=2,tp=2", "pallas_tpu", id="v5p-slices"),
    pytest.param("tpu7x:2x2x1", "fsdp=4,tp=2", "pallas_tpu", id="tpu7x"),
    pytest.param("h100:2x2", "fsdp=2,tp=2", "pallas_hopper", marks=pytest.mark.smoke, id="h100"),
    pytest.param("h200:4", "context=2,tp=2", "pallas_triton", id="h200"),
    pytest.param("a100:4", "fsdp=4", "pallas_triton", id="a100"),
]


@pytest.mark.parametrize(("where", "mesh", "kernel"), CASES)
def test_training(where: str, mesh: str, kernel: str) -> None:
    x = plan(estimate.training, where, mesh, 8, 512, kernel)
    parts = x.program.memory.parts
    assert x.fits and x.bound is not None
    # What is known of the arguments is what the compiler says, within 1 %.
    assert abs(parts["padding"]) < 0.01 * x.program.memory.needed
    assert parts["optimiser"] == pytest.approx(2 * parts["weights"], rel=0.001)
    rows = 8 // (x.mesh["data"] * x.mesh["fsdp"])
    residual = rows * 512 // x.mesh["context"] * 512 * 2
    kept = residual // x.mesh["tp"]  # its tokens are split, too
    assert 3 * kept <= parts["residuals"] < 3.2 * kept
    assert 1 < x.hardware_flops / x.model_flops < (2 if kernel == "xla" else 1.6)
    assert 0 < x.mfu < 1
    # A layer's weights are gathered for the forward pass and again for the backward pass, and its
    # rows are summed over tp three times or more, each device keeping its tokens.
    found = x.program.collectives
    assert found is not None, x.program.unread
    split = [axis for axis in ("fsdp", "context") if x.mesh[axis] > 1]
    if split and "*" not in where:
        layer = small().num_params() / 3  # roughly: the tables are a tenth
        gathered = sum(c.bytes for c in found if c.kind == "all-gather" and c.axes == (split[0],))
        assert gathered > 2 * 2 * 0.8 * 3 * layer / x.mesh["tp"]
    if x.mesh["tp"] > 1:
        sums = ("all-reduce", "reduce-scatter")
        reduced = sum(c.bytes for c in found if c.kind in sums and c.axes == ("tp",))
        assert reduced > 3 * 3 * residual
    terms = {term.name for term in x.bound.terms}
    assert ("DCN data" in terms) == ("*" in where)
    assert ("InfiniBand fsdp" in terms) == (where == "h100:2x2")


@pytest.mark.parametrize(
    ("where", "mesh", "kernel"),
    [
        pytest.param("v5e:2x2", "fsdp=2,tp=2", "pallas_tpu", id="v5e"),
        pytest.param("h100:4", "fsdp=2,tp=2", "pallas_hopper", id="h100"),
    ],
)
def test_decoding(where: str, mesh: str, kernel: str) -> None:
    x = plan(estimate.decoding, where, mesh, 4, 1024, kernel)
    parts = x.program.memory.parts
    assert x.fits and x.bound is not None
    assert parts["cache"] == 4 * 1024 * small().kv_bytes_per_token("bfloat16") // 4
    assert parts["temporaries"] < parts["cache"] + 2**24  # it is not copied
    prompt = plan(estimate.prefill, where, mesh, 4, 1024, kernel)
    assert prompt.program.memory.parts["cache"] == parts["cache"]


@pytest.mark.release
@pytest.mark.parametrize(
    ("name", "adapters"),
    [pytest.param("qwen-7b", recipes.sft_lora(), id="LoRA"), pytest.param("qwen-1.8b", None)],
)
def test_fine_tuning_on_one_gpu(name: str, adapters: recipes.Recipe | None) -> None:
    """Of 80 GB, at 8192 tokens: 8 rows one after the other, as in docs/training.md."""
    where = topology.parse("h100:1")
    kernel = where.chip.kernel
    setting = Setting(
        PRESETS[name], batch=8, length=8192, attention=kernel, accumulate=8, adapters=adapters
    )
    x = estimate.training(setting, where, sizes=meshes.parse(None))
    assert x.fits and x.program.memory.needed < 80e9


def on_integers(name: str, *, decode: bool = False, **options: Any) -> float:
    """GB of one H100 that a model of 4 bits needs, as `train/plan.py --weights int4` says."""
    kernel = stored_weights.KERNELS["cuda"]
    setting = Setting(PRESETS[name], attention="auto", weights="int4", kernel=kernel, **options)
    where, sizes = topology.parse("h100:1"), meshes.parse(None)
    found = attempts.estimates(setting, where, sizes=sizes, decode=decode)
    return max(x.program.memory.needed for x in found) / 1e9


@pytest.mark.release
@pytest.mark.parametrize("name", quantised.FINE_TUNING)
def test_adapters_on_integers_need_no_more_than_the_originals(name: str) -> None:
    recipe = dataclasses.replace(recipes.sft_lora(), lora_rank=quantised.RANK)
    rows = quantised.ROWS
    for length, theirs in zip(quantised.LENGTHS, quantised.FINE_TUNING[name], strict=True):
        ours = on_integers(name, batch=rows, accumulate=rows, length=length, adapters=recipe)
        assert ours <= theirs, length


@pytest.mark.release
@pytest.mark.parametrize("name", quantised.FINE_TUNING)
def test_generation_from_integers_needs_no_more_than_the_originals(name: str) -> None:
    ours = on_integers(name, batch=1, length=quantised.GENERATED, decode=True)
    assert ours <= quantised.GENERATION[name, "int4"]


def test_the_command_says_all_and_nothing_else(tmp_path: Path) -> None:
    """Of a program that jaxlib cannot print: what it holds of collectives, and no trace of C++, nor
    a warning of jax's cache, from which nothing compiled for absent devices can be read.
    """
    (tmp_path / "config.json").write_text(json.dumps(small().to_hf()))
    given = ["--model", str(tmp_path), "--topology", "tpu7x:2x2x1", "--mesh", "fsdp=4,tp=2"]
    given += ["--batch", "8", "--length", "512", "--attention", "pallas_tpu"]
    cache = tmp_path / "cache"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment.pop("XLA_FLAGS", None)  # of this process, which dumps what kernels become
    command = [sys.executable, "-m", "train.plan", *given]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "\nall-gather           fsdp " in ran.stdout and "not known" not in ran.stdout
    shown = ran.stderr.replace("\r", "\n").split("\n")
    assert [x for x in shown if x and not x.startswith("compiling for tpu7x:2x2x1: training")] == []
    assert not cache.exists() or not list(cache.glob("jit_step*"))


def test_what_does_not_fit_is_reported() -> None:
    x = plan(estimate.training, "v5e:2x2", "fsdp=4", 4096, 4096, "pallas_tpu")
    assert not x.fits and x.bound is None
    assert x.available == 15.75 * 2**30
    assert x.over > 2**30
