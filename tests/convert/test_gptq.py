"""GPTQ checkpoints: kept byte for byte, computed as the tools do, and refused where unreadable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qwen_jax
from convert import from_hf, gptq, gptq_config, gptq_export, to_hf
from convert.gptq import Form, Linear
from convert.names import Expected, TensorPart
from qwen_jax import checkpoint
from qwen_jax.checkpoint import directory
from qwen_jax.checkpoint.store import StoredLeaf
from qwen_jax.leaves import grouped, int8
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weights import Weight, contract, named_leaves
from tests.support.conversion import back, contents, edit, last_line, same, tensors, there
from tests.support.golden_figures import worst
from tests.support.gptq import GPTQ, LINEARS, folder, linear, settings
from tests.support.tiny import on_mesh

FORMS = {
    "int4": {"bits": 4, "group": 64},
    "int8": {"bits": 8, "group": 32},
    "asymmetric": {"bits": 4, "group": 128, "sym": False},
    "asymmetric8-v2": {"bits": 8, "group": 128, "sym": False, "v2": True},
    "act-order": {"bits": 4, "group": 32, "act": True},
    "act-order8-asymmetric": {"bits": 8, "group": 64, "act": True, "sym": False},
    "v2-no-biases": {"bits": 4, "group": 128, "v2": True, "biases": False},
    "act-order-asymmetric-v2": {"bits": 4, "group": 16, "act": True, "sym": False, "v2": True},
}


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tp=2"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_comes_back_byte_for_byte(tmp_path, form, mesh):
    source, model = tmp_path / "source", tmp_path / "model"
    folder(source, **form)
    there(source, model, "--verify", *(["--mesh", mesh] if mesh else []))
    back(model, tmp_path / "back", "--verify", "--max-shard-size", "200KB")
    assert same(tensors(tmp_path / "back"), tensors(source))
    for name in ("config.json", "quantize_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def mixed(path: Path) -> None:
    """A folder with layers of 4 and of 8 bits, and one of floats, as GPTQModel writes it."""
    folder(path, bits=4, group=64, v2=True, biases=False)
    held, rng = load_file(path / "model.safetensors"), np.random.default_rng(1)
    for name, shape in (("0.mlp.c_proj", (384, 256)), ("2.attn.c_attn", (256, 768))):
        drawn, _ = linear(rng, shape, bits=8, group=128, v2=True)
        held |= {f"transformer.h.{name}.{key}": array for key, array in drawn.items()}
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        del held[f"transformer.h.1.mlp.w1.{key}"]
    weight = rng.standard_normal((384, 256)).astype(np.float16)
    held["transformer.h.1.mlp.w1.weight"] = weight
    save_file(held, path / "model.safetensors", {"format": "pt"})
    eight = {"bits": 8, "group_size": 128}
    rules = {
        "-:.*h\\.1\\.mlp\\.w1$": {},
        "+:.*\\.0\\.mlp\\.c_proj": eight | {"desc_act": False},
        "transformer\\.h\\.2\\.attn\\.c_attn": eight | {"sym": True},
        ".*": {},
        "+:.*mlp": {"bits": 8},  # not reached
    }
    settings(path, dynamic=rules, checkpoint_format="gptq_v2")


def test_layers_that_differ_come_back_byte_for_byte(tmp_path):
    """Of a folder, with its own rules; and without these, with rules that name the layers."""
    mixed(tmp_path / "source")
    there(tmp_path / "source", tmp_path / "model", "--verify")
    found = checkpoint.load_kinds(tmp_path / "model")
    assert found["layers.0.ffn.down"] == found["layers.2.attn.k"] == "grouped8"
    assert sorted(found.values()).count("grouped4") == 21 - 1 - 4
    (plain,) = {f"layers.1.ffn.{name}" for name in ("up", "gate")} - found.keys()
    back(tmp_path / "model", tmp_path / "back", "--verify")
    theirs = tensors(tmp_path / "source")
    assert same(tensors(tmp_path / "back"), theirs)
    for name in ("config.json", "quantize_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()

    directory.forget_quantisation(tmp_path / "model")
    back(tmp_path / "model", tmp_path / "named")
    assert same(tensors(tmp_path / "named"), theirs)
    made = json.loads((tmp_path / "named" / "config.json").read_text())["quantization_config"]
    eight = {"bits": 8, "group_size": 128}
    assert (made["bits"], made["group_size"]) == (4, 64)
    assert made["dynamic"] == {
        r"+:^transformer\.h\.0\.mlp\.c_proj$": eight,
        r"+:^transformer\.h\.2\.attn\.c_attn$": eight,
        r"-:^transformer\.h\.1\.mlp\.w1$": {},
    }
    there(tmp_path / "named", tmp_path / "again")
    back(tmp_path / "again", tmp_path / "last")
    assert same(tensors(tmp_path / "last"), theirs)
    leaf = named_leaves(checkpoint.load(tmp_path / "again"))[plain]
    assert np.array_equal(leaf[...], theirs["transformer.h.1.mlp.w1.weight"])


@pytest.mark.parametrize("kinds", [{"q": "grouped4", "k": "grouped8"}, {"q": "grouped4"}])
def test_parts_of_one_tensor_must_be_alike(tmp_path, kinds):
    parts = tuple(TensorPart(f"layers.0.attn.{name}", (8, 128), 0) for name in "qk")
    scales = {f"{part.path}.scales": (1, 8) for part in parts}
    leaves = {path: StoredLeaf(path, shape, shape, "float16") for path, shape in scales.items()}
    with pytest.raises(ValueError, match=r"^h\.c_attn\.weight: its parts differ in bits or groups"):
        gptq_export.of(
            tmp_path,
            leaves,
            manifest={"kinds": {f"layers.0.attn.{name}": kind for name, kind in kinds.items()}},
            wanted={"h.c_attn.weight": Expected((16, 128), parts)},
            dtype="float16",
            convention="v1",
            changes=None,
        )


def test_settings_that_say_something_else_of_a_layer(tmp_path, capfd):
    mixed(tmp_path / "source")
    there(tmp_path / "source", tmp_path / "model")
    settings(tmp_path / "model", dynamic={})
    assert to_hf.main([str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    told = "h.1.mlp.w1 bits 4, group_size 64 and sym True, its weights are of floats"
    assert told in last_line(capfd) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_tools_own_folders(tmp_path, case):
    """Logits, greedy tokens and bytes are those of auto-gptq's own checkpoint."""
    there(GPTQ / case, tmp_path / "model")
    figures = load_file(GPTQ / "model.safetensors")
    model = qwen_jax.load(tmp_path / "model", "float32", attention="xla", dequantise=False)
    assert isinstance(model.decoder.layers[0].ffn.up, Grouped)
    got = model.logits(figures["tokens"][None])[0]
    assert worst(got, figures[f"{case}.logits"]) < 2e-4
    greedy = model.generate(figures["prompt"][None], max_new_tokens=24)[0]
    assert np.array_equal(greedy, figures[f"{case}.greedy"])
    back(tmp_path / "model", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(GPTQ / case))


def leaf(linear: Linear, of: dict[str, np.ndarray], zeros: str, sym: bool) -> Grouped:
    """The leaf of a layer's tensors, in memory."""
    order = gptq.order_of(of["g_idx"], linear)
    words, at = of["qweight"].view(np.uint32), np.arange(linear.inputs, dtype=np.int32)
    codes = gptq.sorted_codes(words, at if order is None else order, bits=linear.bits)
    unpacked = gptq.zeros_of(of["qzeros"].view(np.uint32), bits=linear.bits, convention=zeros)
    return Grouped(
        codes=Weight(jnp.asarray(codes), letters="DF"),
        scales=Weight(jnp.asarray(of["scales"]), letters="DF"),
        zeros=None if sym else Weight(jnp.asarray(unpacked), letters="DF"),
        order=None if order is None else Weight(jnp.asarray(order), letters="I"),
        bits=linear.bits,
    )


def linear_of(of: dict[str, np.ndarray], bits: int) -> Linear:
    outputs, inputs = of["scales"].shape[1], len(of["g_idx"])
    part = TensorPart("layers.0.ffn.up", (outputs, inputs), 0)
    return Linear("x", (part,), bits, inputs // len(of["scales"]))


def suffixed(figures: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{prefix}."): v for k, v in figures.items() if k.startswith(prefix)}


def test_layers_of_auto_gptq():
    """Dequantised rows are exact, and products those of float64."""
    figures, said = (
        load_file(GPTQ / "layers.safetensors"),
        json.loads((GPTQ / "layers.json").read_text()),
    )
    count = 0
    for number, layer in enumerate(said["layers"]):
        for name, case in layer["cases"].items():
            of = suffixed(figures, f"{number}.{name}")
            linear = linear_of(of, case["bits"])
            found = leaf(linear, of, "v1", case["sym"])
            with on_mesh():
                plain = np.asarray(grouped.plain(found, "float32")[...])
                assert np.array_equal(plain[:8], of["dequantised_rows"])
                probe = figures[f"{number}.probe"].astype(np.float32)
                got = contract("BTD,FD->BTF", jnp.asarray(probe)[None], weight=found)[0]
            got = np.asarray(got) + figures.get(f"{number}.bias", np.float32(0))
            terms = np.abs(probe[:, None] * plain).max()
            assert np.abs(got - of["probe_out"]).max() <= 1e-5 * terms
            total = np.abs(plain.astype(np.float64)).sum()
            np.testing.assert_allclose(total, case["dequantised_abs_sum"], rtol=1e-6)
            count += 1
    assert count == 19


def test_layers_of_gptqmodel():
    """Both conventions of zeros say the same, where a zero of 0 borrows from its neighbour, too."""
    figures = load_file(GPTQ / "layers_gptqmodel.safetensors")
    said = json.loads((GPTQ / "layers_gptqmodel.json").read_text())["layers"]
    for number, cases in said.items():
        for name, case in cases.items():
            of = suffixed(figures, f"{number}.{name}")
            for version in ("v1", "v2"):
                form = of | {"qzeros": of[f"qzeros_{version}"]}
                with on_mesh():
                    found = leaf(linear_of(form, 4), form, version, sym=name == "int4_sym")
                    whole = np.asarray(grouped.plain(found, "float32")[...]).astype(np.float64)
                total = np.abs(whole).sum()
                np.testing.assert_allclose(total, case["dequantised_abs_sum"], rtol=1e-6)
                again = gptq.zeros_of(form["qzeros"].view(np.uint32), bits=4, convention=version)
                packed = gptq.qzeros_of(again, bits=4, convention=version)
                assert np.array_equal(packed.view(np.int32), form["qzeros"])


@pytest.mark.parametrize("form", ["int8", "asymmetric", "act-order-asymmetric-v2"])
def test_dequantised_folders_are_floats(tmp_path, form):
    """The floats are exact in float32, and nothing says any more that they are quantised."""
    weights = folder(tmp_path / "source", **FORMS[form])
    there(tmp_path / "source", tmp_path / "model", "--dequantise", "--dtype", "float32", "--verify")
    back(tmp_path / "model", tmp_path / "back")
    found = tensors(tmp_path / "back")
    for name, weight in weights.items():
        assert np.array_equal(found[f"{name}.weight"], weight.astype(np.float32)), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert not (tmp_path / "model" / "quantize_config.json").exists()
    assert checkpoint.verify_whole(tmp_path / "model")["format"] == 2


@pytest.mark.parametrize("form", ["int4", "act-order8-asymmetric"])
def test_exports_of_floats(tmp_path, form, capfd):
    """With an adapter merged, too; into integers it cannot be."""
    weights = folder(tmp_path / "source", **FORMS[form])
    there(tmp_path / "source", tmp_path / "model")
    options = ("--dequantise", "--dtype", "float32", "--verify")
    back(tmp_path / "model", tmp_path / "floats", *options)
    found = tensors(tmp_path / "floats")
    for name, weight in weights.items():
        assert np.array_equal(found[f"{name}.weight"], weight.astype(np.float32)), name
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())
    adapter = str(GPTQ / "qlora" / "adapter")
    back(tmp_path / "model", tmp_path / "merged", *options, "--adapter", adapter)
    merged = tensors(tmp_path / "merged")
    factors = load_file(GPTQ / "qlora" / "adapter" / "adapter_model.safetensors")
    for name, weight in weights.items():
        a, b = (factors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        np.testing.assert_allclose(merged[f"{name}.weight"], weight + 2 * b @ a, atol=1e-6)
    args = [str(tmp_path / "model"), str(tmp_path / "no"), "--adapter", adapter]
    assert to_hf.main(args) == 2
    assert "cannot be merged into integers: add --requantise DATA" in last_line(capfd)


@pytest.mark.parametrize("source", ["float16", "int4"])
def test_a_head_of_8_bits(tmp_path, source, capfd):
    there(GPTQ / source, tmp_path / "model", "--head", "int8", "--verify")
    decoder = checkpoint.load(tmp_path / "model", dtype="float32")
    whole = tensors(GPTQ / source)["lm_head.weight"].astype(np.float32)
    assert isinstance(decoder.head, Int8)
    wanted = int8.quantize_weight(Weight(jnp.asarray(whole), letters="VD"))
    assert np.array_equal(decoder.head.scale[...], wanted.scale[...])
    apart = np.abs(np.int32(decoder.head.values[...]) - np.int32(wanted.values[...]))
    assert apart.max() <= 1 and apart.mean() < 1e-3, "a compiled division may round otherwise"
    back(tmp_path / "model", tmp_path / "back", "--dtype", "float32")
    assert "the head has 8 bits here" in capfd.readouterr().err
    found = tensors(tmp_path / "back")["lm_head.weight"]
    assert np.array_equal(found, decoder.head.dequantize("float32"))


@pytest.mark.parametrize("form", ["act-order8-asymmetric", "act-order-asymmetric-v2"])
def test_what_was_saved_is_exported_byte_for_byte(tmp_path, form):
    """A decoder that was loaded, and saved again, still holds every byte."""
    folder(tmp_path / "source", **FORMS[form])
    there(tmp_path / "source", tmp_path / "model")
    config = checkpoint.load_config(tmp_path / "model")
    decoder = checkpoint.load(tmp_path / "model")
    checkpoint.save(tmp_path / "saved", config, decoder, like=tmp_path / "model")
    assert checkpoint.verify_whole(tmp_path / "saved")["format"] == 3
    back(tmp_path / "saved", tmp_path / "back")
    assert same(tensors(tmp_path / "source"), tensors(tmp_path / "back"))


@pytest.mark.parametrize("asked", [None, "v1", "v2"])
def test_zeros_whose_convention_nothing_says(tmp_path, asked):
    """As in what the quantiser makes."""
    folder(tmp_path / "source", **FORMS["asymmetric"])
    there(tmp_path / "source", tmp_path / "model")
    args = [] if asked is None else ["--zeros", asked]
    if asked == "v2":
        assert to_hf.main([str(tmp_path / "model"), str(tmp_path / "back"), *args]) == 1
        assert not (tmp_path / "back").exists(), "the source is of v1"
    there(GPTQ / "int4", tmp_path / "symmetric")
    edit(tmp_path / "symmetric" / "manifest.json", quantisation={})
    directory.forget_quantisation(tmp_path / "symmetric")
    for more in ([], ["--dequantise"]):
        bad = [str(tmp_path / "symmetric"), str(tmp_path / "no"), "--zeros", "v2", *more]
        assert to_hf.main(bad) == 1 + bool(more) and not (tmp_path / "no").exists()
    edit(tmp_path / "model" / "manifest.json", quantisation={})
    directory.forget_quantisation(tmp_path / "model")
    command = [str(tmp_path / "model"), str(tmp_path / "back"), *args]
    facts = to_hf.make_plan(to_hf.parser().parse_args(command)).facts
    assert facts["zeros"] == (asked or "v2"), "work of another convention is not gone on with"
    back(tmp_path / "model", tmp_path / "back", *args)
    said = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert said["checkpoint_format"] == ("gptq" if asked == "v1" else "gptq_v2")
    there(tmp_path / "back", tmp_path / "again")
    for path in ("layers.0.attn.q.zeros", "layers.1.ffn.down.zeros"):
        whole = [contents(tmp_path / x / "params" / path) for x in ("model", "again")]
        assert whole[0] and whole[0] == whole[1]


def test_floats_that_are_saved_are_not_said_to_be_quantised(tmp_path):
    there(GPTQ / "int4", tmp_path / "model")
    loaded = qwen_jax.load(tmp_path / "model", dequantise=True)
    checkpoint.save(tmp_path / "saved", loaded.config, loaded.decoder, like=tmp_path / "model")
    back(tmp_path / "saved", tmp_path / "floats")
    assert gptq_config.read(tmp_path / "floats") is None
    there(tmp_path / "floats", tmp_path / "again")
    assert checkpoint.verify_whole(tmp_path / "again")["format"] == 2


def test_manifest_names_the_dtype_of_each_leaf(tmp_path):
    folder(tmp_path / "source", **FORMS["asymmetric"])
    there(tmp_path / "source", tmp_path / "model")
    manifest = checkpoint.verify_whole(tmp_path / "model")
    assert manifest["format"] == 3 and manifest["dtype"] == "float16"
    assert manifest["dtypes"]["layers.0.ffn.up.codes"] == "uint32"
    assert manifest["dtypes"]["layers.0.ffn.up.zeros"] == "uint8"
    assert manifest["num_params"] == checkpoint.load_config(tmp_path / "model").num_params()


@pytest.mark.parametrize("quantisation", [[], {"zeros": "v9"}], ids=str)
def test_an_export_of_a_damaged_manifest(tmp_path, quantisation, capfd):
    there(GPTQ / "int4", tmp_path / "model")
    edit(tmp_path / "model" / "manifest.json", quantisation=quantisation)
    assert to_hf.main([str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "manifest.json is damaged: its quantisation says zeros" in last_line(capfd)
    assert not (tmp_path / "out").exists()


def of_query(**kinds_or_shapes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a manifest: of the kind of a weight, or of the shapes of its arrays."""

    def change(manifest: dict[str, Any]) -> None:
        for field, value in kinds_or_shapes.items():
            if field == "kind":
                manifest["kinds"]["layers.1.attn.q"] = value
            elif value is None:
                del manifest["shapes"][f"layers.1.attn.q.{field}"]
            else:
                manifest["shapes"][f"layers.1.attn.q.{field}"] = value

    return change


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "later": (lambda said: said.update(format=4, kinds=[]), r"format 4.*reads 2 and 3: update"),
    "kinds": (lambda said: said.update(kinds=[]), "its kinds is no object"),
    "dtype": (lambda said: said.update(dtype="int4"), "manifest.json is damaged"),
    "dtypes": (lambda said: said.update(dtype=["float32"]), "manifest.json is damaged"),
    "kind": (of_query(kind=["grouped4"]), r"of kind \['grouped4'\], this version of qwen_jax"),
    "other kind": (of_query(kind="int8"), "of kind int8, has no values and no scale"),
    "no codes": (of_query(codes=None), "of kind grouped4, has no codes;"),
    "axes": (of_query(codes=[32]), r"has codes \[32\] and scales \[2, 256\]"),
    "text": (of_query(codes=["32", 256]), "manifest.json is damaged: convert again"),
    "a float": (of_query(codes=[32.0, 256]), "manifest.json is damaged: convert again"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_manifest(tmp_path, damage, told):
    """One line says what is wrong, whoever reads it first."""
    there(GPTQ / "int4", tmp_path / "model")
    file = tmp_path / "model" / "manifest.json"
    said = json.loads(file.read_text())
    damage(said)
    file.write_text(json.dumps(said))
    for load in (checkpoint.load, qwen_jax.load):
        with pytest.raises(checkpoint.CheckpointError, match=told):
            load(tmp_path / "model")


def test_only_an_old_file_says_it(tmp_path):
    """Folders of the first AutoGPTQ have quantize_config.json alone."""
    shutil.copytree(GPTQ / "int4", tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    there(tmp_path / "source", tmp_path / "model")
    back(tmp_path / "model", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "source"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_keys_of_other_tools_are_kept(tmp_path):
    shutil.copytree(GPTQ / "int4", tmp_path / "source")
    others = {
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        "use_exllama": True,
        "pack_dtype": "int32",
    }
    settings(tmp_path / "source", **others, is_marlin_format=False, lm_head=False, format="gptq")
    there(tmp_path / "source", tmp_path / "model")
    back(tmp_path / "model", tmp_path / "back")
    assert (
        others.items() <= json.loads((tmp_path / "back/quantize_config.json").read_text()).items()
    )


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    held = load_file(path / "model.safetensors")
    change(held)
    save_file(held, path / "model.safetensors", {"format": "pt"})


def element(name: str, at: Any, value: float) -> Callable[[Path], None]:
    """A change of one element of a tensor."""

    def change(path: Path) -> None:
        rewrite(path, lambda held: held[f"transformer.h.1.{name}"].__setitem__(at, value))

    return change


def cut(name: str, axis: int) -> Callable[[Path], None]:
    """A change that drops half of a tensor."""

    def halve(held: dict[str, np.ndarray]) -> None:
        array = held[f"transformer.h.1.{name}"]
        half = np.split(array, 2, axis)[0]
        held[f"transformer.h.1.{name}"] = np.ascontiguousarray(half)

    return lambda path: rewrite(path, halve)


def without(name: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda held: held.pop(f"transformer.h.1.{name}"))


def said(**changes: Any) -> Callable[[Path], None]:
    return lambda path: settings(path, **changes)


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def only_in_one(path: Path) -> None:
    edit(path / "quantize_config.json", bits=8)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "is truncated"),
    "qweight": (cut("mlp.w1.qweight", 0), "mlp.w1.qweight is [16, 384], expected [32, 384]"),
    "zeros' shape": (cut("mlp.w1.qzeros", 1), "mlp.w1.qzeros is [2, 24], expected [2, 48]"),
    "group size": (said(group_size=64), "scales is [2, 768], expected [4, 768]"),
    "odd group": (said(group_size=12), "group_size is 12: must be -1 or a multiple of 8"),
    "large group": (said(group_size=96), "which groups of 96"),
    "g_idx beyond": (element("mlp.w2.g_idx", 5, 2), "input 5 is of group 2, and groups are 0 to 1"),
    "g_idx below": (element("mlp.w2.g_idx", 7, -1), "input 7 is of group -1"),
    "unequal groups": (element("mlp.w2.g_idx", 0, 1), "group 0 has 127 inputs instead of 128"),
    "bits": (said(bits=8), "qweight is [32, 768], expected [64, 768]"),
    "3 bits": (said(bits=3), "bits is 3: only 4 and 8 can be read"),
    "2 bits": (said(bits=2), "bits is 2: only 4 and 8 can be read"),
    "no bits": (said(bits=None), "bits is None: must be a whole number"),
    "bits differ": (only_in_one, "bits is 4 in"),
    "awq": (said(quant_method="awq"), "quant_method is 'awq': only GPTQ"),
    "marlin": (said(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "packed for marlin": (said(is_marlin_format=True), "is_marlin_format is True"),
    "dynamic": (said(dynamic="all"), "dynamic is 'all': must be objects by pattern"),
    "a rule": (said(dynamic={"x": 8}), "dynamic is {'x': 8}: must be objects by pattern"),
    "no pattern": (said(dynamic={"+:(": {}}), "dynamic has '+:(', which is no pattern: "),
    "a rule's bits": (said(dynamic={".*mlp": {"bits": 3}}), "bits is 3: only 4 and 8 can be read"),
    "a rule's sym": (
        said(dynamic={"+:.*w1": {"bits": 8, "sym": False}}),
        "dynamic has sym False for '+:.*w1': only bits, group_size and desc_act can differ",
    ),
    "no layer": (said(dynamic={"-:.*": {}}), "dynamic leaves no layer quantised"),
    "by layer": (
        said(dynamic={r".*1\.mlp\.w1": {"bits": 8}}),
        "h.1.mlp.w1.qweight is [32, 384], expected [64, 384]",
    ),
    "head": (said(lm_head=True), "lm_head is True, a quantised head"),
    "pack dtype": (said(pack_dtype="int64"), "pack_dtype is 'int64'"),
    "sym": (said(sym="yes"), "sym is 'yes': must be true or false"),
    "formats": (
        said(checkpoint_format="gptq", format="gptq_v2"),
        "checkpoint_format is 'gptq' and format is 'gptq_v2'",
    ),
    "format": (said(format=["gptq"]), "format is ['gptq']: only gptq and gptq_v2"),
    "by module in one place": (
        lambda path: edit(path / "quantize_config.json", dynamic={"+:.*1.mlp.w1": {"bits": 8}}),
        "h.1.mlp.w1.qweight is [32, 384], expected [64, 384]",
    ),
    "NaN": (element("mlp.w1.scales", (1, 3), np.nan), "scales is nan for group 1 of output 3"),
    "infinite": (element("mlp.w2.scales", (0, 5), -np.inf), "scales is -inf for group 0 of output"),
    "zeros": (element("mlp.w1.qzeros", (0, 3), 0x12345678), "qzeros has 0x12345678"),
    "one of v2": (
        lambda path: rewrite(
            path,
            lambda held: held["transformer.h.1.mlp.w1.qzeros"].fill(
                np.uint32(0x88888888).view(np.int32)
            ),
        ),
        "some layers have zeros in the convention of GPTQ v1, others of v2",
    ),
    "a bias": (element("mlp.w1.bias", 3, 1), "mlp.w1.bias is not 0"),
    "no g_idx": (without("mlp.w1.g_idx"), "missing 1 tensor: transformer.h.1.mlp.w1.g_idx"),
}


@pytest.mark.parametrize(("damage", "told"), BAD.values(), ids=BAD)
def test_bad_folder(tmp_path, damage, told, capfd):
    """One line, and nothing is written."""
    source = tmp_path / "source"
    shutil.copytree(GPTQ / "int4", source)
    damage(source)
    assert from_hf.main([str(source), str(tmp_path / "out")]) == 1
    assert told in last_line(capfd)
    assert not (tmp_path / "out").exists()


def test_a_head_that_int8_cannot_hold(tmp_path, capfd):
    source = tmp_path / "source"
    shutil.copytree(GPTQ / "int4", source)
    rewrite(source, lambda held: held["lm_head.weight"].__setitem__((9, 3), np.inf))
    assert from_hf.main([str(source), str(tmp_path / "out"), "--head", "int8"]) == 1
    assert "lm_head.weight has NaN or infinite values" in last_line(capfd)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_folders_that_say_nothing_of_quantisation(tmp_path, capfd):
    shutil.copytree(GPTQ / "int4", tmp_path / "source")
    (tmp_path / "source" / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "source/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    assert from_hf.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 1
    assert "quantize_config.json" in last_line(capfd)


def test_floats_are_not_dequantised(tmp_path, capfd):
    args = [str(GPTQ / "float16"), str(tmp_path / "out"), "--dequantise"]
    assert from_hf.main(args) == 2
    assert "--dequantise:" in last_line(capfd) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["auto_gptq_version", "other"])
def test_zeros_that_the_tool_spoiled_are_said(tmp_path, tool, capfd):
    """AutoGPTQ writes -1 for a zero of 0, which overwrites its neighbours in the word."""
    folder(tmp_path / "source", **FORMS["asymmetric"])
    held = load_file(tmp_path / "source" / "model.safetensors")
    for name, array in held.items():
        if name.endswith("qzeros"):  # as drawn, some words end in ones rightly
            array[:] = 0x12345678
    held["transformer.h.2.mlp.w2.qzeros"][1, 4] = -256
    notes = {"format": "pt", tool: "0.7.1"}
    save_file(held, tmp_path / "source" / "model.safetensors", notes)
    there(tmp_path / "source", tmp_path / "model")
    told = "warning: zeros of transformer.h.2.mlp.w2 look as" in capfd.readouterr().err
    assert told == (tool == "auto_gptq_version")
    back(tmp_path / "model", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), held)
    with safe_open(tmp_path / "back" / "model.safetensors", "numpy") as file:
        assert file.metadata() == notes


def test_layers_that_are_quantised():
    """All five linear layers of a block, and nothing else."""
    decoder = checkpoint.abstract_leaves(checkpoint.load_config(GPTQ / "int4"), "float32")[0]
    from convert import names

    shapes = {path: tuple(x.shape) for path, x in named_leaves(decoder).items()}
    found = gptq.linears(names.expected(shapes), lambda _: Form(4, 128))
    assert [x.name for x in found[:5]] == [
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    assert len(found) == 3 * len(LINEARS)
