"""Adapters on integers: losses, gradients and AdamW steps are those of PEFT on a GPTQ model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax import checkpoint, model
from qwen_jax.attention import xla
from qwen_jax.checkpoint import adapter_config, adapter_files
from qwen_jax.generate import integer_products, integers
from qwen_jax.leaves import grouped
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Weight
from qwen_jax.model import lora
from qwen_jax.model.lora import Adapters
from tests.support.conversion import there
from tests.support.gptq import GPTQ, folder
from tests.support.tiny import QUICK, on_mesh
from train import step
from train.data import batches
from train.run import parameters, recipes
from train.step import loss as losses

MESHES: list[dict[str, int]] = [{}, {"fsdp": 2, "tp": 2}, {"data": 2, "tp": 2}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qlora") / "model"
    there(GPTQ / "int4", path)
    return path


def figures() -> dict[str, np.ndarray]:
    return load_file(GPTQ / "qlora" / "qlora.safetensors")


def said() -> dict[str, Any]:
    return json.loads((GPTQ / "qlora" / "qlora.json").read_text())


def in_peft(adapters: Adapters, layer: int, module: str) -> dict[str, np.ndarray]:
    """A module's A and B as PEFT has them, from adapters or their gradients."""
    members = dict(adapters.groups)[module]
    b = [np.asarray(adapters.b[member][...])[layer] for member in members]
    return {"A": np.asarray(adapters.a[module][...])[layer], "B": np.concatenate(b)}


def of(adapters: Adapters, decoder: Any, batch: Any, remat: str = "full") -> Any:
    attached = lora.attach(decoder, adapters)
    return losses.loss(attached, batch, attend=xla, dtype=jnp.float32, remat=step.REMAT[remat])[0]


def through(kernel: str | None) -> integers.Converter | None:
    def prepared(_: str, leaf: Any) -> Any:
        return grouped.for_kernel(leaf, str(kernel)) if isinstance(leaf, Grouped) else leaf

    return None if kernel is None else prepared


@pytest.mark.parametrize("adapter", [True, False])
def test_training_and_measuring_have_kernels(base, adapter, monkeypatch):
    """On an accelerator; the base of a run is what its steps are compiled for."""
    monkeypatch.setattr(integer_products, "settled", lambda bits, dtype: f"for {bits} {dtype}")
    for platform, kernel in (("cpu", None), ("gpu", "for 4 bfloat16")):
        monkeypatch.setattr(integers.jax, "default_backend", lambda platform=platform: platform)
        with on_mesh():
            if adapter:
                run = parameters.of(
                    checkpoint.load_config(base), base, recipe=recipes.sft_lora(), merge=False
                )
                assert jax.tree.structure(run.abstract_base()) == jax.tree.structure(run.base)
                found = run.base.layers.attn.q
            else:
                keep = integers.for_passes(base, "bfloat16")
                found = checkpoint.load(base, dtype="bfloat16", keep=keep).layers[0].attn.q
        assert isinstance(found, Grouped) and found.kernel == kernel


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [*((sizes, None) for sizes in MESHES), ({"fsdp": 2, "tp": 2}, "by_groups")],
    ids=str,
)
def test_loss_and_gradients(base, sizes, kernel):
    found = figures()
    with on_mesh(**sizes):
        loaded = checkpoint.load(base, dtype="float32", keep=through(kernel))
        assert isinstance(loaded.layers[0].attn.q, Grouped)
        adapters = adapter_files.read(GPTQ / "qlora" / "adapter", loaded)
        decoder = model.stack(loaded)
        batch = batches.place(batches.batch_of(found["tokens"], found["labels"]))
        value, gradients = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)(
            adapters, decoder, batch
        )
    np.testing.assert_allclose(value, said()["loss"], rtol=1e-5)
    count = 0
    for name, theirs in found.items():
        if not name.startswith("grad."):
            continue
        path, kind = name.removesuffix(".weight").rsplit(".lora_", 1)
        _, rest = path.split("transformer.h.")
        layer, module = rest.split(".", 1)
        ours = in_peft(gradients, int(layer), module)[kind]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
        count += 1
    assert count == said()["trained"]


def test_five_steps_of_adamw(base):
    found, want = figures(), said()["adamw"]
    with on_mesh():
        loaded = checkpoint.load(base, dtype="float32")
        adapters = adapter_files.read(GPTQ / "qlora" / "adapter", loaded)
        decoder = model.stack(loaded)
        batch = batches.place(batches.batch_of(found["tokens"], found["labels"]))
        optimizer = step.Optimizer(
            want["learning_rate"],
            b1=want["betas"][0],
            b2=want["betas"][1],
            eps=want["eps"],
            weight_decay=want["weight_decay"],
            clip_norm=want["clip"],
        )
        run = step.make_step(
            optimizer,
            xla,
            dtype=jnp.float32,
            attach=lambda weights, base, key: lora.attach(base, weights, key=key),
        )
        state = step.state_of(adapters, optimizer)
        reports = []
        for _ in want["losses"]:
            state, report = run(state, batch, decoder)
            reports.append(jax.device_get(report))
        after = {
            (layer, module): in_peft(state.weights, layer, module)
            for layer, module in ((0, "attn.c_attn"), (1, "mlp.c_proj"))
        }
    np.testing.assert_allclose([r.metrics.loss for r in reports], want["losses"], rtol=1e-5)
    norms = [r.gradient_norm for r in reports]
    np.testing.assert_allclose(norms, want["norms_before_clip"], rtol=1e-4)
    count = 0
    for (layer, module), ours in after.items():
        for kind, array in ours.items():
            name = f"final.base_model.model.transformer.h.{layer}.{module}.lora_{kind}.weight"
            if name in found:
                np.testing.assert_allclose(array, found[name], rtol=0, atol=2e-5)
                count += 1
    assert count == 3


@pytest.mark.slow
def test_gradients_through_any_form(tmp_path):
    """Act-order and zeros: the gradients are those over the floats that the integers stand for."""
    form = {"bits": 4, "group": 32, "act": True, "sym": False}
    folder(tmp_path / "source", **form)
    there(tmp_path / "source", tmp_path / "kept")
    there(tmp_path / "source", tmp_path / "floats", "--dequantise", "--dtype", "float32")
    found = figures()
    results = []
    for name, sizes in (("floats", {}), ("kept", {}), ("kept", {"fsdp": 2, "tp": 2})):
        with on_mesh(**sizes):
            loaded = checkpoint.load(tmp_path / name, dtype="float32")
            adapters = adapter_files.read(GPTQ / "qlora" / "adapter", loaded)
            batch = batches.place(batches.batch_of(found["tokens"], found["labels"]))
            graded = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)
            value, gradients = graded(adapters, model.stack(loaded), batch)
            arrays = [
                in_peft(gradients, 1, m) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
            ]
            results.append((float(value), arrays))
    (value, arrays), *others = results
    for other, found_arrays in others:
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for ours, theirs in zip(found_arrays, arrays, strict=True):
            for kind in "AB":
                most = np.abs(theirs[kind]).max()
                np.testing.assert_allclose(ours[kind], theirs[kind], rtol=0, atol=1e-4 * most)


@pytest.mark.parametrize(
    ("changes", "merge", "told"),
    [
        ({"lora_rank": 0}, False, "integers cannot be trained"),
        ({"base_dtype": "int8"}, False, "base_dtype 'int8'"),
        ({}, True, "cannot be merged into the integers"),
    ],
)
def test_what_would_change_integers_is_refused(base, changes, merge, told):
    """Before anything is encoded or loaded."""
    recipe = dataclasses.replace(recipes.sft_lora(), **changes)
    config = checkpoint.load_config(base)
    with pytest.raises(ValueError, match=told):
        parameters.of(config, base, recipe=recipe, merge=merge)
    parameters.of(config, base, recipe=recipes.sft_lora(), merge=False)


def test_a_head_in_int8(tmp_path):
    """It stays as it is beside layers of floats, into which adapters can be merged."""
    path = tmp_path / "model"
    there(GPTQ / "float16", path, "--head", "int8")
    config = checkpoint.load_config(path)
    whole = dataclasses.replace(recipes.sft_lora(), lora_rank=0)
    with pytest.raises(ValueError, match=r"integers cannot be trained.*without --head int8"):
        parameters.of(config, path, recipe=whole, merge=False)
    recipe = dataclasses.replace(recipes.sft_lora(), lora_rank=2)
    with on_mesh():
        run = parameters.of(config, path, recipe=recipe, merge=True)
        assert isinstance(run, parameters.Adapted)
        head = checkpoint.load(path).head
        assert isinstance(head, Int8)
        assert isinstance(run.base.head, Weight), "the loss reads it by its rows"
        assert np.array_equal(run.base.head[...], head.dequantize(run.base.head.dtype))
        adapters = lora.create(
            run.base,
            adapter_config.targets(["c_attn"], config.num_layers),
            rank=2,
            alpha=4.0,
            key=jax.random.key(0),
            embeddings=True,
        )
        for own, kind in ((None, Int8), (adapters.head, Weight)):
            given = dataclasses.replace(adapters, head=own)
            out = tmp_path / kind.__name__
            run.save(given, out, files=path, merge=True)
            assert isinstance(checkpoint.load(out / "model").head, kind)
