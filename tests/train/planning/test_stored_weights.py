"""Plans of models whose layers are integers: bytes, shares, and what cannot be planned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import quantised
from qwen_jax import meshes
from qwen_jax.config.presets import PRESETS
from qwen_jax.leaves.grouped import Grouped
from tests.support.conversion import last_line
from tests.support.tiny import on_mesh, tiny_config
from train import plan, step
from train.planning import programs, stored_weights
from train.planning.flops import nbytes
from train.planning.programs import Setting
from train.run import parameters, recipes


@pytest.mark.parametrize("form", stored_weights.FORMS)
@pytest.mark.parametrize("name", ["qwen-1.8b", "qwen-7b"])
def test_bytes_are_those_of_the_arrays(name, form):
    config = PRESETS[name]
    for sizes in ({}, {"fsdp": 2}):
        with on_mesh(**sizes):
            decoder = stored_weights.decoder(config, jnp.bfloat16, form=form)
            held = nbytes(decoder)
        wanted = stored_weights.size(config, 2, form=form) / max(1, *sizes.values(), 1)
        assert abs(held / wanted - 1) < 1e-3
    assert isinstance(decoder.layers[0].ffn.up, Grouped) == (form != "float")


@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("name", quantised.FINE_TUNING)
def test_the_originals_memory_holds_the_weights_and_the_cache_of_what_it_generates(name, form):
    config = PRESETS[name]
    cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * quantised.GENERATED
    needed = stored_weights.size(config, 2, form=form) + cache
    assert needed / 1e9 < quantised.GENERATION[name, form]


@pytest.mark.parametrize("name", quantised.FINE_TUNING)
def test_the_originals_memory_holds_the_weights_and_the_state_of_adapters(name):
    """And, at each length, the tokens between the layers, in bfloat16."""
    config = PRESETS[name]
    recipe = dataclasses.replace(recipes.sft_lora(), lora_rank=quantised.RANK)
    with on_mesh():
        state = parameters.abstract(config, recipe).abstract_state(step.Optimizer())
    held = stored_weights.size(config, 2, form="int4") + nbytes(state)
    for length, theirs in zip(quantised.LENGTHS, quantised.FINE_TUNING[name], strict=True):
        between = 2 * config.num_layers * length * config.hidden_size
        assert (held + between) / 1e9 < theirs


def test_training_and_decoding_are_planned_with_a_kernel_for_integers(monkeypatch):
    monkeypatch.setattr(programs, "compile_program", lambda trace, mesh, **_: traced(trace, mesh))
    config = tiny_config(num_layers=1, hidden_size=128, head_dim=32, intermediate_size=256)
    setting = Setting(
        config, batch=2, length=16, attention="xla", adapters=recipes.sft_lora(),
        weights="int4", kernel="pallas_triton",
    )  # fmt: skip
    mesh = meshes.make({}, jax.devices()[:1])
    for program in (programs.training, programs.decoding):
        assert "pallas_call" in program(setting, mesh)
        without = dataclasses.replace(setting, kernel=None)
        assert "pallas_call" not in program(without, mesh)


def traced(trace, mesh):
    """The text of a program that is not compiled."""
    with jax.set_mesh(mesh):
        return str(trace().jaxpr)


def test_shares():
    config = PRESETS["qwen-7b"]
    share = stored_weights.table_share(config, 2, form="int4")
    assert 0.21 < share < 0.22
    assert stored_weights.multiplied_share(config, 2, form="int4") == 1 - share


def test_a_matrix_that_groups_do_not_divide(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("train.planning.topology.prepare", lambda _: None)
    monkeypatch.setattr("train.planning.topology.mesh", lambda _, sizes: meshes.make(sizes))
    config = tiny_config(hidden_size=128, head_dim=32, intermediate_size=192)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    options = ["--topology", "v5e:1x1", "--decode", "--batch", "1", "--weights", "int4"]
    assert plan.main(["--model", str(tmp_path), *options]) == 1
    assert last_line(capfd) == (
        "error: --weights int4: layers.0.ffn.down has 192 inputs, which do not divide into groups "
        "of 128: leave it out"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--weights", "int4"], "--weights int4: integers are not trained: add --lora-rank"),
        (
            ["--weights", "int8", "--lora-rank", "8", "--base-dtype", "int8"],
            "cannot be combined with --weights int8",
        ),
    ],
)
def test_what_cannot_be_planned(options, told, capfd):
    assert plan.main(["--model", "qwen-7b", "--topology", "v5e:1x1", *options]) == 2
    assert told in last_line(capfd)
