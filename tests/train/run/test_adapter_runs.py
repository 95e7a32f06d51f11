"""Runs that train adapters: on what, what of it is left, and the ways to merge it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_jax
from convert import from_hf, to_hf
from qwen_jax import checkpoint
from qwen_jax.checkpoint import adapter_config, peft
from tests.support.conversion import contents
from tests.support.training import curve, fail, fine_tuning, prepared, pretraining, succeed, weights
from train import sft

pytestmark = pytest.mark.slow

RANK = ("--recipe", "sft_lora", "--lora-rank", 4)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data, and in it the model directory `model`, which knows no ChatML."""
    folder = prepared(tmp_path_factory.mktemp("given"))
    succeed(pretraining(folder, folder / "run", "--steps", 2))
    return (folder / "run" / "model").rename(folder / "model").parent


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Path:
    """A run of adapters of which a model has been made, too."""
    out = tmp_path_factory.mktemp("merged") / "run"
    before = contents(given / "model")
    succeed(fine_tuning(given, given / "model", out, *RANK, "--merge"), sft)
    assert contents(given / "model") == before
    return out


def test_what_a_run_of_adapters_leaves(merged, given):
    losses = [figures["loss"] for figures in curve(merged).values()]
    assert losses[-1] < losses[0] - 0.05
    tensors = load_file(merged / "adapter" / peft.TENSORS)
    # A model that has not seen ChatML: its embedding and head come along.
    assert {"base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"} < {
        *tensors
    }
    settings = json.loads((merged / "adapter" / adapter_config.SETTINGS).read_text())
    assert settings["r"] == 4 and settings["modules_to_save"] == ["wte", "lm_head"]
    assert settings["base_model_name_or_path"] is None, "nobody else has what was trained here"
    assert checkpoint.load_generation_config(merged / "model").chat_format == "chatml"


def test_a_run_is_loaded_without_merging(merged, given):
    """With its embedding and head, and as the chat model that it has become."""
    tokens = np.arange(24).reshape(2, 12)
    alone = qwen_jax.load(given / "model", "float32", adapter=merged / "adapter")
    expected = np.asarray(qwen_jax.load(merged / "model", "float32").logits(tokens))
    most = np.abs(expected).max()
    np.testing.assert_allclose(alone.logits(tokens), expected, rtol=0, atol=1e-5 * most)
    before = qwen_jax.load(given / "model", "float32")
    assert np.abs(before.logits(tokens) - expected).max() > 1e-3 * most
    assert not alone.is_base and before.is_base


def test_merged_on_the_way_to_safetensors(merged, given, tmp_path):
    """The same weights as those merged in the run, which are not those of the base."""
    options = ["--max-shard-size", "100KB", "--verify"]
    adapter = ["--adapter", str(merged / "adapter")]
    assert to_hf.main([str(given / "model"), str(tmp_path / "hf"), *adapter, *options]) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert from_hf.main([str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    assert checkpoint.load_generation_config(tmp_path / "again").chat_format == "chatml"
    found, expected = weights(tmp_path / "again"), weights(merged / "model")
    base = weights(given / "model")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        most = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * most, err_msg=name)
        trained = name.split(".")[-1] in ("q", "k", "v", "o", "gate", "up", "down")
        same = np.array_equal(found[name], base[name])
        assert same != (trained or name in ("embedding", "head")), name


@pytest.mark.slow
def test_a_base_of_eight_bits(merged, given, tmp_path):
    """Learns as one of the run's dtype does, and merges into the model as it was."""
    out = tmp_path / "run"
    options = (*RANK, "--base-dtype", "int8", "--merge")
    succeed(fine_tuning(given, given / "model", out, *options), sft)
    for step, figures in curve(merged).items():
        np.testing.assert_allclose(curve(out)[step]["loss"], figures["loss"], rtol=0.01)
    assert curve(out) != curve(merged)
    base, found = weights(given / "model"), weights(out / "model")
    added = found["layers.0.attn.q"] - base["layers.0.attn.q"]
    assert np.linalg.matrix_rank(added, tol=1e-6) == 4, "no rounding of the base is in it"


@pytest.mark.slow
def test_a_chat_model_keeps_its_embeddings(merged, given, tmp_path, capsys):
    """And one that has not seen ChatML is warned of, where its embeddings are to stay."""
    succeed(fine_tuning(given, merged / "model", tmp_path / "a", *RANK, "--steps", 1), sft)
    assert len(load_file(tmp_path / "a" / "adapter" / peft.TENSORS)) == 2 * 5 * 2
    assert "has not seen ChatML" not in capsys.readouterr().err
    options = (*RANK, "--steps", 1, "--no-train-embeddings", "--lora-targets", r".*\.mlp\.w\d")
    succeed(fine_tuning(given, given / "model", tmp_path / "b", *options), sft)
    assert "warning: the model has not seen ChatML" in capsys.readouterr().err
    settings = json.loads((tmp_path / "b" / "adapter" / adapter_config.SETTINGS).read_text())
    assert settings["target_modules"] == ["mlp.w1", "mlp.w2"]


def test_a_run_of_adapters_resumes(merged, given, tmp_path):
    out = tmp_path / "run"
    options = (*RANK, "--save-every", 3)
    succeed(fine_tuning(given, given / "model", out, *options, "--steps", 6), sft)
    for name in ("6", "adapter"):
        folder = next(out.rglob(name))
        folder.rename(tmp_path / name)
    file = given / "chats.json"
    elsewhere = ("--data", file.rename(tmp_path / "same.json"), "--resume")
    try:
        succeed(fine_tuning(given, given / "model", out, *options, *elsewhere), sft)
    finally:
        (tmp_path / "same.json").rename(file)
    assert curve(out) == curve(merged)
    found = load_file(out / "adapter" / peft.TENSORS)
    for name, value in load_file(merged / "adapter" / peft.TENSORS).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
def test_more_steps_make_another_model(given, tmp_path):
    out = tmp_path / "run"
    options = (*RANK, "--schedule", "constant", "--merge", "--resume", "--steps")
    found = []
    for steps in (2, 3, 3):
        succeed(fine_tuning(given, given / "model", out, *options, steps), sft)
        found.append(weights(out / "model")["layers.0.attn.q"])
    assert not np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["--lora-targets", "q_proj"], "no module is called q_proj: there are c_attn"),
        (["--base-dtype", "int4"], "base_dtype 'int4': allowed are same, int8"),
    ],
)
def test_adapters_that_cannot_be(given, tmp_path, capsys, change, problem):
    assert problem in fail(
        capsys, fine_tuning(given, given / "model", tmp_path / "x", *RANK, *change)
    )


def test_an_adapter_of_another_model(merged, given, tmp_path, capsys):
    for file in (adapter_config.SETTINGS, peft.TENSORS):
        (tmp_path / file).write_bytes((merged / "adapter" / file).read_bytes())
    settings = json.loads((tmp_path / adapter_config.SETTINGS).read_text())
    (tmp_path / adapter_config.SETTINGS).write_text(json.dumps(settings | {"r": 8}))
    arguments = [str(given / "model"), str(tmp_path / "hf"), "--adapter", str(tmp_path)]
    assert "lora_A.weight is [4, 64] instead of [8, 64]" in fail(capsys, arguments, to_hf)
    assert not (tmp_path / "hf").exists()
