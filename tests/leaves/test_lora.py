"""Adapters: what they add, on every mesh, what is trained, and PEFT's format both ways."""

import dataclasses
import functools
import json
import os
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import checkpoint, meshes
from qwen_jax.attention import xla
from qwen_jax.checkpoint import adapter_config, patterns, peft
from qwen_jax.leaves import low_rank
from qwen_jax.leaves.weights import Weight, contract, named_leaves
from qwen_jax.model import lora
from qwen_jax.model.lora import Adapters
from qwen_jax.runtime import lock
from tests.support.conversion import edit
from tests.support.tiny import (
    QUICK,
    on_mesh,
    replace_leaves,
    small_noise,
    tiny_config,
    tiny_decoder,
)
from tests.train.step.test_step import CONFIG, packed_batch
from train import step
from train.data import batches
from train.run import parameters, recipes
from train.step import loss as losses

GROUPS = adapter_config.targets(("c_attn", "c_proj", "w1", "w2"), CONFIG.num_layers)
MESHES = [
    pytest.param({"tp": 2}, False, marks=pytest.mark.slow),
    ({"tp": 8}, True),  # more than key/value heads
    ({"fsdp": 2, "tp": 4}, False),
    ({"fsdp": 2, "context": 2, "tp": 2}, True),
    ({"data": 2, "fsdp": 2, "tp": 2}, False),
]


def name_of(value: dict[str, int] | bool) -> str:
    """For the name of a test: a mesh, or how its tokens are split."""
    if isinstance(value, dict):
        return meshes.describe(value)
    return "sequence" if value else "plain"


def drawn(embeddings: bool = True) -> Adapters:
    """That add something: as wide as the leaves that they are added to."""
    decoder = step.stacked(tiny_decoder(CONFIG))
    key, draw = jax.random.key(0), small_noise(CONFIG)
    fresh = lora.create(decoder, GROUPS, rank=4, alpha=8.0, key=key, embeddings=embeddings)
    return fresh.replace(a=replace_leaves(fresh.a, draw), b=replace_leaves(fresh.b, draw))


@functools.cache
def graded(sizes: tuple[tuple[str, int], ...], sequence_parallel: bool) -> tuple[float, Any]:
    """Loss and gradients of the adapters, and the loss with them merged."""

    def of(adapters: Adapters, decoder: Any, batch: Any) -> Any:
        decoder = lora.attach(decoder, adapters)
        return losses.loss(
            decoder,
            batch,
            attend=xla,
            dtype=jnp.float32,
            remat=step.REMAT["full"],
            sequence_parallel=sequence_parallel,
        )[0]

    with on_mesh(**dict(sizes)):
        decoder, adapters = step.stacked(tiny_decoder(CONFIG)), drawn()
        batch = batches.place(packed_batch())
        grad = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)
        value, gradients = grad(adapters, decoder, batch)
        merge = jax.jit(lora.merge, compiler_options=QUICK)
        plain = jax.jit(
            lambda d, b: losses.loss(d, b, attend=xla, dtype=jnp.float32)[0], compiler_options=QUICK
        )
        merged = plain(merge(decoder, adapters), batch)
        base = plain(decoder, batch)
    np.testing.assert_allclose(merged, value, rtol=1e-5)
    assert abs(base - value) > 0.01, "adapters that change nothing show nothing"
    for name, leaf in named_leaves(gradients).items():
        place = named_leaves(adapters)[name][...].sharding
        assert leaf[...].sharding.is_equivalent_to(place, leaf.ndim), name
    return float(value), {n: np.asarray(x[...]) for n, x in named_leaves(gradients).items()}


@pytest.mark.parametrize(("sizes", "sequence"), MESHES, ids=name_of)
def test_on_a_mesh_as_on_one_device(sizes, sequence):
    value, gradients = graded(tuple(sizes.items()), sequence)
    expected, exact = graded((), False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert gradients.keys() == exact.keys() and len(exact) == 5 + 7 + 2
    for name, gradient in exact.items():
        most = np.abs(gradient).max()
        assert most > 0, name
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=2e-5 * most)


def test_fresh_adapters_change_nothing_and_are_what_is_trained():
    """The state holds no moment of a base weight, and a step leaves the base as it was."""
    optimizer = step.Optimizer(learning_rate=0.1)
    with on_mesh(fsdp=2):
        base = step.stacked(tiny_decoder(CONFIG))
        adapters = lora.create(base, GROUPS, rank=4, alpha=8.0, key=jax.random.key(0))
        batch = batches.place(packed_batch())
        plain = losses.loss(base, batch, attend=xla, dtype=jnp.float32)[0]
        state = step.state_of(adapters, optimizer)
        assert {x.shape for x in jax.tree.leaves(state.moments) if x.ndim} == {
            x.shape for x in jax.tree.leaves(adapters)
        }
        before = jax.tree.map(np.asarray, base)
        run = step.make_step(
            optimizer, xla, dtype=jnp.float32, attach=lambda w, b, _: lora.attach(b, w)
        )
        run = run.lower(state, batch, base).compile(compiler_options=QUICK)
        state, report = run(state, batch, base)
        np.testing.assert_allclose(report.metrics.loss, plain, rtol=1e-5)
        state, after = run(state, batch, base)
        assert after.metrics.loss < report.metrics.loss - 0.01
        jax.tree.map(np.testing.assert_array_equal, before, base)


@pytest.mark.slow
def test_dropout_of_what_goes_into_adapters():
    def loss(made: Any, batch: Any) -> Any:
        return losses.loss(made, batch, attend=xla, dtype=jnp.float32)[0]

    run = jax.jit(loss, compiler_options=QUICK)
    with on_mesh():
        decoder, adapters = step.stacked(tiny_decoder(CONFIG)), drawn(embeddings=False)
        batch = batches.place(packed_batch())

        def of(key: Any, rate: float) -> float:
            made = lora.attach(decoder, adapters, key=key, dropout=rate)
            return float(run(made, batch))

        keys = [jax.random.key(i) for i in range(2)]
        assert of(keys[0], 0.0) == of(None, 0.5) != of(keys[0], 0.5)
        dropped = of(keys[0], 0.5)
        assert of(keys[0], 0.5) == dropped != of(keys[1], 0.5)
    with on_mesh(context=2, tp=2):  # tokens in another order, and columns apart
        decoder, adapters = step.stacked(tiny_decoder(CONFIG)), drawn(embeddings=False)
        batch = batches.place(packed_batch())
        np.testing.assert_allclose(of(jax.random.key(0), 0.5), dropped, rtol=1e-5)


# PEFT's format


def test_targets_are_chosen_as_peft_does():
    assert list(GROUPS) == ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
    assert GROUPS["attn.c_attn"] == ("attn.q", "attn.k", "attn.v")
    assert list(adapter_config.targets(["attn.c_proj"], 2)) == ["attn.c_proj"]
    assert list(adapter_config.targets(r".*\.mlp\.w\d", 2)) == ["mlp.w1", "mlp.w2"]
    with pytest.raises(ValueError, match="no module is called q_proj: there are c_attn, c_proj"):
        adapter_config.targets(["c_attn", "q_proj"], 2)
    assert list(adapter_config.targets(r".*\.h\.[01]\.mlp\.w1", 2)) == ["mlp.w1"]
    for some in (["transformer.h.1.mlp.w1"], r".*\.h\.0\..*w1"):
        with pytest.raises(ValueError, match=r"chooses mlp\.w1 in some layers only"):
            adapter_config.targets(some, 2)
    with pytest.raises(ValueError, match=r"target_modules '\*w1': no pattern: nothing to repeat"):
        adapter_config.targets("*w1", 2)


def written(folder: Path, **settings: Any) -> None:
    with on_mesh(fsdp=2):
        peft.write(folder, drawn(), **settings)


def test_one_program_at_a_time_writes_adapters(tmp_path):
    with lock.alone(tmp_path / "adapter"), pytest.raises(lock.Busy, match="at work there"):
        written(tmp_path / "adapter")


def test_written_and_read_again(tmp_path):
    written(tmp_path, lora_dropout=0.1, base_model_name_or_path="x")
    with on_mesh(tp=2):
        wanted = drawn()
        decoder = step.stacked(tiny_decoder(CONFIG))
        found = peft.read(tmp_path, decoder)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for name, leaf in named_leaves(wanted).items():
            got = named_leaves(found)[name]
            assert got[...].sharding.is_equivalent_to(leaf[...].sharding, leaf.ndim), name
            np.testing.assert_array_equal(got[...], leaf[...])


def test_everybody_may_read_an_adapter(tmp_path):
    """As any new file there, which the user's umask decides."""
    before = os.umask(0o027)
    try:
        written(tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {adapter_config.SETTINGS: 0o640, peft.TENSORS: 0o640}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True, "bias": "all"}, 'not supported: bias="all", use_dora=true'),
        ({"layers_to_transform": 0}, "not supported: layers_to_transform=0"),
        ({"init_lora_weights": "pissa"}, 'not supported: init_lora_weights="pissa"'),
        ({"rank_pattern": {"w1": 8}}, 'not supported: rank_pattern={"w1": 8}'),
        ({"peft_type": "IA3"}, "peft_type 'IA3', only LORA is supported"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save ln_f: only wte and lm_head"),
        ({"target_modules": ["q_proj"]}, "no module is called q_proj"),
        ({"target_modules": [5]}, r"target_modules \[5\]: must be a list of names"),
        (
            {"modules_to_save": "wte"},
            r"modules_to_save 'wte': must be a list of names, \[\"wte\"\]",
        ),
        ({"target_modules": None}, "names no target_modules"),
        ({"use_rslora": "false"}, "use_rslora 'false': must be true or false"),
        ({"r": 0}, "r 0: must be a whole number from 1 to 2147483647"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan: must be a number from "),
        ({"lora_alpha": 0}, "lora_alpha 0: must be a number from 1.17549e-38 to 3.40282e"),
        ({"lora_alpha": 1e300}, r"lora_alpha 1e\+300: must be a number from "),
        ({"lora_alpha": 10**400}, r"lora_alpha 10+\.\.\.0+: must be a number from "),
        ({"r": 10**400}, r"r 10+\.\.\.0+: must be a whole number from 1 to "),
        ({"bias": 5}, "bias 5: allowed are none, all, lora_only"),
        ({"alpha_pattern": {"(": 16}}, r"alpha_pattern '\(': no pattern: missing"),
        ({"rank_pattern": {"w1": 4, "(": 16}}, r"rank_pattern '\(': no pattern: missing"),
        ({"alpha_pattern": 5}, "alpha_pattern 5: must be an object of patterns and numbers"),
        ({"r": 8}, r"c_attn.lora_A.weight is \[4, 32\] instead of \[8, 32\]"),
        ({"target_modules": ["c_attn"]}, "w1.lora_A.weight is not known"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, settings, problem):
    written(tmp_path)
    file = tmp_path / adapter_config.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with on_mesh(), pytest.raises(ValueError, match=problem):
        peft.read(tmp_path, step.stacked(tiny_decoder(CONFIG)))


def test_adapters_that_are_no_numbers_are_refused(tmp_path):
    written(tmp_path)
    tensors = load_file(tmp_path / peft.TENSORS)
    name = next(iter(tensors))
    tensors[name][0, 0] = np.nan
    save_file(tensors, tmp_path / peft.TENSORS)
    with on_mesh(), pytest.raises(ValueError, match=f"not all are numbers: {name}"):
        peft.read(tmp_path, step.stacked(tiny_decoder(CONFIG)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: np.full_like(x, 1e38), "with its lora_A .* adds up to .*float32 has no room"),
        (lambda x: x.astype(np.int32), "adapters are of F32.*lora_B.weight is I32; save .*floats"),
        (lambda x: x.astype(bool), "adapters are of F32.*lora_B.weight is BOOL"),
        (lambda x: np.full(x.shape, 1e300), "not all are numbers: .*lora_B.weight"),
        (lambda x: x.astype(np.float64), None),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(tmp_path, change, problem):
    adapter_of(tmp_path)
    tensors = load_file(tmp_path / peft.TENSORS)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: change(tensors[name])}, tmp_path / peft.TENSORS)
    if problem is None:
        assert peft.changes(tmp_path, UNTIED)["layers.0.ffn.up"](0, np.ones((1, 8)))[0, 0] == 9
        return
    with pytest.raises(ValueError, match=problem) as caught:
        peft.changes(tmp_path, UNTIED)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_merge_that_is_not_finite_is_refused(tmp_path):
    adapter_of(tmp_path)
    change = peft.changes(tmp_path, UNTIED)["layers.0.ffn.up"]
    for value in (np.inf, np.nan):
        with pytest.raises(
            ValueError, match=r"h\.0\.mlp\.w1\.weight with the adapter .* not all num"
        ):
            change(3, np.full((2, 8), value, np.float32))


def base_named(adapter: Path) -> tuple[str | None, str | None]:
    said = json.loads((adapter / adapter_config.SETTINGS).read_text())
    return said["base_model_name_or_path"], said["revision"]


def test_a_run_writes_no_model_that_is_not_finite(tmp_path, capsys):
    """The adapter that it trained stays. It names what its base was converted from, and no base
    that was trained since, which others do not have.
    """
    config = tiny_config(num_layers=1)
    with on_mesh(tp=2):
        decoder = tiny_decoder(config)
        checkpoint.save(tmp_path / "ckpt", config, decoder)
        (tmp_path / "ckpt/generation_config.json").write_text("{}")
        stacked = step.stacked(decoder)
        fresh = lora.create(
            stacked, GROUPS, rank=4, alpha=8.0, key=jax.random.key(0), embeddings=False
        )
        huge = jax.tree.map(lambda x: x + 1e30, fresh)
        made = parameters.Adapted(config, tmp_path / "ckpt", recipes.sft_lora())
        with pytest.raises(ValueError, match=r"not all merged weights are numbers: .*: no model"):
            made.save(huge, tmp_path, files=tmp_path / "ckpt", merge=True)
        assert base_named(tmp_path / "adapter") == (None, None)
        assert f"`python convert/to_hf.py {tmp_path}/ckpt BASE`" in capsys.readouterr().err
        origin = {"name": "Qwen/Qwen-7B", "revision": "0" * 40}
        edit(tmp_path / "ckpt/manifest.json", origin=origin)
        made.save(fresh, tmp_path, files=tmp_path / "ckpt", merge=False)
        assert base_named(tmp_path / "adapter") == tuple(origin.values())
        assert "names no base" not in capsys.readouterr().err
    assert (tmp_path / "adapter").is_dir() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("end", ["lora_A.default.weight", "modules_to_save.default.weight"])
def test_names_within_peft_are_told_of(tmp_path, end):
    adapter_of(tmp_path)
    tensors = load_file(tmp_path / peft.TENSORS)
    name = f"base_model.model.transformer.h.0.mlp.w1.{end}"
    save_file(tensors | {name: np.ones((4, 8), np.float32)}, tmp_path / peft.TENSORS)
    with pytest.raises(ValueError, match=f"{end}: such are the names within PEFT.*save_pretrained"):
        peft.changes(tmp_path, UNTIED)


def test_what_peft_writes_always_is_no_obstacle(tmp_path):
    inert = {"megatron_core": "megatron.core", "qalora_group_size": 16, "init_lora_weights": True}
    written(tmp_path, **inert, loftq_config={}, layers_to_transform=None, use_dora=False)
    assert adapter_config.read_shape(tmp_path, CONFIG.num_layers).scale == 2


def test_a_head_for_a_model_without_one_is_refused(tmp_path):
    written(tmp_path)
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with on_mesh(), pytest.raises(ValueError, match="lm_head: this model's embedding is its head"):
        peft.read(tmp_path, step.stacked(tiny_decoder(tied)))


def test_rank_stabilised_scale(tmp_path):
    written(tmp_path, use_rslora=True)
    assert adapter_config.read_shape(tmp_path, CONFIG.num_layers).scale == 2 * 4 / 2


BASE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "w1"]}


def shape_of(folder: Path, **settings: Any) -> Any:
    (folder / adapter_config.SETTINGS).write_text(json.dumps(BASE | settings))
    return adapter_config.read_shape(folder, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["lm_head", "w2"]},
        {"exclude_modules": r".*\.mlp\.w2"},
        {"rank_pattern": {".*": 4}, "alpha_pattern": {"w1": 8}},
        {"rank_pattern": {"w2": 64}, "alpha_pattern": {r"h\.7\.attn\.c_attn": 1}},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
        {"layers_to_transform": [1, 0]},
        {"layers_pattern": ["layers"]},
        {"runtime_config": {"ephemeral_gpu_offload": True}, "fan_in_fan_out": True},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "mica", "velora_config": {"scale": 1.0}},
        {"ensure_weight_tying": True, "a_field_of_tomorrow": None, "another": False},
        {"target_modules": r"^(transformer.h)(?!.*(lm_head|w2|c_proj|wte)).*\.(w1|c_attn)"},
    ],
)
def test_fields_that_change_nothing_are_accepted(tmp_path, settings):
    assert shape_of(tmp_path, **settings) == shape_of(tmp_path)


def test_all_linear_is_every_module(tmp_path):
    assert shape_of(tmp_path, target_modules="all-linear").groups == adapter_config.modules()


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["w1"]},
        {"exclude_modules": r".*h\.1\..*"},
        {"alpha_pattern": {"c_attn": 16}},
        {"rank_pattern": {r"h\.1\.mlp\.w1": 8}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["x"]},
        {"megatron_config": {"x": 1}},
        {"init_lora_weights": "pissa_niter_4"},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_fields_that_change_the_result_are_refused_by_name(tmp_path, settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"not supported: .*{name}=.*merge_and_unload"):
        shape_of(tmp_path, **settings)


@pytest.mark.parametrize("pattern", [r"(?:\w|\w\w|.)+(?<=z)", r"(.|[a-z.0-9])+(.|\w)+(.|\w)+h"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_does_not_end_is_refused(tmp_path, monkeypatch, field, pattern):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.01)
    value = {pattern: 8} if field == "rank_pattern" else pattern
    with pytest.raises(ValueError, match=f"{field} .*: name the modules in a list instead"):
        shape_of(tmp_path, **{field: value})


def test_a_pattern_that_is_slow_to_compile_is_refused(tmp_path):
    pattern = "|".join("x" * i for i in range(400))
    with pytest.raises(
        ValueError, match=r"target_modules .*: 80,199 characters, 50,000 at most"
    ) as e:
        shape_of(tmp_path, target_modules=pattern)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{99999999999}", "["])
def test_what_is_no_pattern_is_refused(tmp_path, pattern):
    with pytest.raises(ValueError, match=r"exclude_modules .*: no pattern"):
        shape_of(tmp_path, exclude_modules=pattern)


def adapter_of(folder: Path, **more: np.ndarray) -> None:
    """An adapter of one layer's up projection, and what came along."""
    (folder / adapter_config.SETTINGS).write_text(json.dumps(BASE | {"target_modules": ["w1"]}))
    module = "base_model.model.transformer.h.0.mlp.w1"
    pair = {"lora_A": np.ones((4, 8)), "lora_B": np.ones((16, 4))}
    tensors = {f"{module}.{name}.weight": x.astype(np.float32) for name, x in pair.items()}
    tensors |= {f"base_model.model.{name}.weight": x for name, x in more.items()}
    save_file(tensors, folder / peft.TENSORS)


UNTIED = {"embedding": (20, 8), "head": (20, 8), "layers.0.ffn.up": (16, 8)}


def test_embeddings_that_came_along_unasked(tmp_path):
    """As PEFT adds them where the vocabulary was resized."""
    table, head = np.ones((20, 8), np.float32), np.zeros((20, 8), np.float32)
    adapter_of(tmp_path, **{"transformer.wte": table, "lm_head": head})
    changes = peft.changes(tmp_path, UNTIED)
    assert changes.keys() == UNTIED.keys()
    np.testing.assert_array_equal(changes["head"](3, np.ones((2, 8), np.float32)), head[3:5])
    smaller = UNTIED | {"embedding": (16, 8), "head": (16, 8)}
    with pytest.raises(ValueError, match=r"vocabulary of the base was resized to 20: .*model 16"):
        peft.changes(tmp_path, smaller)
    tied = {name: size for name, size in UNTIED.items() if name != "head"}
    with pytest.raises(ValueError, match="this model's embedding is its head"):
        peft.changes(tmp_path, tied)
    adapter_of(tmp_path, **{"transformer.wte": table, "lm_head": table})
    assert peft.changes(tmp_path, tied).keys() == tied.keys()


def test_an_adapter_in_pytorchs_own_format_tells_the_way_out(tmp_path):
    shape_of(tmp_path)
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: download"):
        peft.changes(tmp_path, UNTIED)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*safe_serialization=True"):
        peft.changes(tmp_path, UNTIED)


def test_merging_multiplies_float32_as_float32():
    """On GPUs and TPUs it would be TF32 or bfloat16."""
    with on_mesh():
        base = step.stacked(tiny_decoder(CONFIG))
        text = str(jax.make_jaxpr(lora.merge)(base, drawn(embeddings=False)))
    products = text.count("dot_general[")
    assert products == text.count("Precision.HIGHEST, Precision.HIGHEST") == 7


def test_what_adapters_add_in_float16_is_scaled_before_it_is_rounded():
    with on_mesh():
        parts = [Weight(jnp.full(s, 1, jnp.float16), letters=x) for s, x in
                 (((2, 4), "FD"), ((4, 4), "RD"), ((2, 4), "FR"))]  # fmt: skip
        leaf = low_rank.Lora(*parts, key=None, scale=2.0**-8, dropout=0.0)
        x = jnp.full((1, 1, 4), 5000, jnp.float16)  # b a x = 80000
        np.testing.assert_allclose(contract("BTD,FD->BTF", x, weight=leaf), 20312.5, rtol=1e-3)
