"""Model directories: restoring into any mesh and dtype, and telling damage from wholeness."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import qwen_jax
from convert import from_hf
from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import CheckpointError, directory, loading, saving
from qwen_jax.decoding.sampling import Greedy
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.meshes import sharding
from qwen_jax.runtime import paths

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    files = sorted(GOLDEN.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    assert from_hf.main([str(GOLDEN), str(path)]) == 0
    return path


@pytest.fixture
def copied(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def leaves(decoder: Any) -> dict[str, jax.Array]:
    return {path: leaf.get_value() for path, leaf in named_leaves(decoder).items()}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_values(found: dict[str, Any], original: dict[str, np.ndarray]) -> None:
    """Written out by hand, without the table of names: it is what is tested here."""
    for layer in range(3):
        block, mine = f"transformer.h.{layer}", f"layers.{layer}"
        fused = original[f"{block}.attn.c_attn.weight"].reshape(3, 64, 64)
        bias = original[f"{block}.attn.c_attn.bias"].reshape(3, 64)
        for i, name in enumerate("qkv"):
            np.testing.assert_array_equal(found[f"{mine}.attn.{name}"], fused[i])
            np.testing.assert_array_equal(found[f"{mine}.attn.{name}_bias"], bias[i])
        o = original[f"{block}.attn.c_proj.weight"]
        np.testing.assert_array_equal(found[f"{mine}.attn.o"], o)
        for name, theirs in {
            "attn_norm": "ln_1",
            "ffn_norm": "ln_2",
            "ffn.up": "mlp.w1",
            "ffn.gate": "mlp.w2",
            "ffn.down": "mlp.c_proj",
        }.items():
            np.testing.assert_array_equal(
                found[f"{mine}.{name}"], original[f"{block}.{theirs}.weight"]
            )
    np.testing.assert_array_equal(found["embedding"], original["transformer.wte.weight"])
    np.testing.assert_array_equal(found["final_norm"], original["transformer.ln_f.weight"])
    np.testing.assert_array_equal(found["head"], original["lm_head.weight"])
    assert len(found) == 3 + 3 * 12


@pytest.mark.parametrize("stored", [None, "fsdp=4,tp=2", "tp=2"])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tp": 2}, {"fsdp": 8}])
def test_restored_into_any_mesh_from_any_mesh(tmp_path, original, stored, mesh):
    arguments = ["--mesh", stored] if stored else []
    assert from_hf.main([str(GOLDEN), str(tmp_path / "model"), *arguments]) == 0
    where = meshes.make(mesh)
    sizes = checkpoint.load_config(tmp_path / "model").sizes
    decoder = checkpoint.load(tmp_path / "model", mesh=where)
    check_values(leaves(decoder), original)
    for path, leaf in named_leaves(decoder).items():
        assert leaf.get_value().sharding == sharding.named(leaf.letters, where, lengths=sizes), path


def test_plain_orbax_opens_the_params(converted, original):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(converted / "params")
    check_values(dict(flat(tree)), original)


def test_a_mesh_in_the_files_is_a_grid_of_raw_chunks(tmp_path, original):
    assert from_hf.main([str(GOLDEN), str(tmp_path / "m"), "--mesh", "fsdp=4,tp=2"]) == 0
    files = sorted(f.name for f in (tmp_path / "m/params/layers.1.attn.o").glob("[0-9]*"))
    assert files == [f"{d}.{n}" for d in range(4) for n in range(2)]
    chunk = (tmp_path / "m/params/layers.1.attn.o/2.1").read_bytes()
    o = original["transformer.h.1.attn.c_proj.weight"]
    assert chunk == o[32:48, 32:].tobytes()


@pytest.mark.parametrize("dtype", ["int8", "float64", 5, ["float32"]])
def test_a_dtype_that_is_none_of_a_directory(converted, dtype):
    with pytest.raises(ValueError, match=r"^dtype .*: allowed are float32, bfloat16, float16"):
        checkpoint.load(converted, dtype=dtype)


def test_a_path_that_goes_up(tmp_path, converted, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "model").symlink_to(converted)
    decoder = checkpoint.load("../model")
    checkpoint.save("../in/../copy", decoder.config, decoder)
    assert leaves(checkpoint.load("../copy")).keys() == leaves(decoder).keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cast_while_restoring(converted, original, dtype):
    decoder = checkpoint.load(converted, dtype=jnp.dtype(dtype))  # is equal to its name
    found = leaves(decoder)
    assert {str(array.dtype) for array in found.values()} == {dtype}
    head = original["lm_head.weight"].astype(found["head"].dtype)
    np.testing.assert_array_equal(found["head"], head)


def test_the_rest_of_the_directory(converted, copied):
    assert checkpoint.load_config(converted).vocab_size == 320
    assert checkpoint.load_generation_config(converted).stops == ((319,),)
    assert checkpoint.load_tokenizer(converted) is None
    (copied / "generation_config.json").unlink()
    assert checkpoint.load_generation_config(copied).stops == ()
    # As transformers: without that file, and only then, config.json says how to generate.
    edit(copied / "config.json", repetition_penalty=1.5, eos_token_id=7, pad_token_id=3)
    config = checkpoint.load_generation_config(copied)
    assert config.sampler == Greedy(1.5) and config.stops == ((7,),) and config.pad_id == 3
    other = checkpoint.load_config(copied).with_overrides({"seq_length": 9})
    saved = saving._Small(other, copied, in_groups=False).settings
    assert saved == other.to_hf() | {
        "repetition_penalty": 1.5, "eos_token_id": 7, "pad_token_id": 3
    }  # fmt: skip
    edit(copied / "config.json", temperature=-1)
    with pytest.raises(ValueError, match=r"config\.json: temperature is -1: must be a number from"):
        checkpoint.load_generation_config(copied)
    (copied / "generation_config.json").write_text("{}")
    assert checkpoint.load_generation_config(copied).sampler == Greedy()


def test_tokenizer_with_its_expansion(copied):
    from qwen_jax.expand_vocab import main as expand
    from tests.support.vocabulary import qwen_vocab_path

    shutil.copyfile(qwen_vocab_path(), copied / "qwen.tiktoken")
    words = copied / "words.txt"
    words.write_text("一只猫\n", encoding="utf-8")
    assert expand([str(copied / "qwen.tiktoken"), str(words), str(copied / "more.tiktoken")]) == 0
    plain = checkpoint.load_tokenizer(copied)
    (copied / "tokenizer_config.json").write_text('{"extra_vocab_file": "more.tiktoken"}')
    expanded = checkpoint.load_tokenizer(copied)
    assert plain is not None and expanded is not None
    assert len(expanded.encode("一只猫")) == 1 < len(plain.encode("一只猫"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "sub/../../secret", "link", 5, "no"])
def test_an_expansion_is_a_file_of_the_directory(tmp_path, name):
    """A name that came with a checkpoint opens nothing else."""
    from tests.support.vocabulary import write_tiny_vocab

    root = tmp_path / "model"
    root.mkdir()
    shutil.copyfile(GOLDEN / "config.json", root / "config.json")
    write_tiny_vocab(root / "qwen.tiktoken")
    (tmp_path / "secret").write_text("eHl6 500\n")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inside").symlink_to(root / "own")
    (root / "own").write_text("eHl6 500\n")
    settings = root / "tokenizer_config.json"
    settings.write_text(json.dumps({"extra_vocab_file": name}))
    with pytest.raises(ValueError, match=f"extra_vocab_file '?{name}"):
        checkpoint.load_tokenizer(root)
    for own in ("own", "inside"):
        settings.write_text(json.dumps({"extra_vocab_file": own, "errors": "replace"}))
        assert len(checkpoint.load_tokenizer(root) or "") == 501
    added = {"1": {"content": "<|im_end|>"}, "2": {"content": "<mine>"}}
    asked = {"added_tokens_decoder": added, "errors": "strict", "chat_template": "[INST]"}
    settings.write_text(json.dumps(asked))
    with pytest.warns(UserWarning, match="errors='strict'; added tokens <mine>; chat_template"):
        checkpoint.load_tokenizer(root)


def test_an_expansion_in_the_cache_of_the_hub(tmp_path):
    """Where every file is a link to one of another folder."""
    from tests.support.vocabulary import write_tiny_vocab

    root, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    root.mkdir(parents=True)
    blobs.mkdir()
    write_tiny_vocab(blobs / "qwen.tiktoken")
    shutil.copyfile(GOLDEN / "config.json", blobs / "config.json")
    (blobs / "extra").write_text("eHl6 500\n")
    (blobs / "tokenizer_config.json").write_text(json.dumps({"extra_vocab_file": "extra"}))
    for file in blobs.iterdir():
        (root / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(checkpoint.load_tokenizer(root) or "") == 501
    (root / "extra").unlink()
    (root / "extra").symlink_to("../../../blobs/extra")
    with pytest.raises(ValueError, match="which is not within that directory"):
        checkpoint.load_tokenizer(root)


def test_tokens_that_the_vocabulary_has_not_are_said(tmp_path):
    """Each once, whichever of transformers' three files names it, and not those that it has."""
    from tests.support.tiny import tiny_config
    from tests.support.vocabulary import write_tiny_vocab

    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    write_tiny_vocab(tmp_path / "qwen.tiktoken")
    own = {"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_end|>"]}
    files = {
        "tokenizer_config.json": own | {"additional_special_tokens": "<a>", "extra_vocab_file": ""},
        "special_tokens_map.json": own | {"eos_token": {"content": "</s>"}, "mask_token": None},
        "added_tokens.json": {"<a>": 1, "</s>": 2, "<b>": 3, "<|im_start|>": 4, "abcd": 258},
    }
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.warns(UserWarning) as caught:
        checkpoint.load_tokenizer(tmp_path)
    assert [str(warning.message) for warning in caught] == [
        f"{name} has entries that are ignored: added tokens {token}"
        for name, token in zip(files, ("<a>", "</s>", "<b>"), strict=True)
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(own))
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match=r"added_tokens\.json is not a JSON object"):
        checkpoint.load_tokenizer(tmp_path)


def chunk(path: Path) -> Path:
    return path / "params" / "layers.1.ffn.up" / "0.0"


def damage_missing(path: Path) -> None:
    chunk(path).unlink()


def damage_truncated(path: Path) -> None:
    chunk(path).write_bytes(chunk(path).read_bytes()[:-2])


def damage_extra(path: Path) -> None:
    chunk(path).with_name("1.0").write_bytes(b"x")


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_unfinished(path: Path) -> None:
    (path / "manifest.json").rename(path / "unfinished.json")


def damage_format(path: Path) -> None:
    edit(path / "manifest.json", format=99)


def damage_manifest_text(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def damage_layers(path: Path) -> None:
    edit(path / "config.json", num_hidden_layers=2)


def damage_width(path: Path) -> None:
    edit(path / "config.json", vocab_size=318)


def damage_config(path: Path) -> None:
    edit(path / "config.json", rope_scaling_of_tomorrow=1)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_missing, r"damaged: params/layers\.1\.ffn\.up/0\.0 is missing"),
        (damage_truncated, r"layers\.1\.ffn\.up/0\.0 has .* bytes instead of"),
        (damage_extra, r"layers\.1\.ffn\.up/1\.0 does not belong there"),
        (damage_manifest, "is not a model directory: it has no manifest.json"),
        (damage_unfinished, "unfinished conversion: give the same"),
        (damage_format, "has format 99"),
        (damage_manifest_text, "not valid JSON"),
        (damage_layers, r"do not match config.json: layers\.2\..* is not in the model"),
        (damage_width, r"embedding is \[320, 64\] instead of \[318, 64\]"),
        (damage_config, "rope_scaling_of_tomorrow is not known"),
    ],
)
def test_damage_is_told_in_one_line(copied, damage, told):
    damage(copied)
    with pytest.raises(ValueError, match=told) as caught:
        checkpoint.load(copied)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_directory(tmp_path, converted):
    with pytest.raises(CheckpointError, match="is not a directory"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a Hugging Face checkpoint: convert it with"):
        checkpoint.load(GOLDEN)
    with pytest.raises(ValueError, match="is not divisible by tp=4"):
        checkpoint.load(converted, mesh=meshes.make({"tp": 4}))


FROM_HF = "`python convert/from_hf.py {} DIR`"


def refused(path: Path | str) -> str:
    """What `load` says, before it has read anything, as `finished` does."""
    with pytest.raises(CheckpointError) as caught:
        qwen_jax.load(path)
    with pytest.raises(CheckpointError) as again:
        checkpoint.verify_whole(path)
    assert str(again.value) == str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_converted_names_the_converter(tmp_path):
    said = refused("Qwen/Qwen-7B")
    assert "if it is a model on the Hugging Face hub, " + FROM_HF.format("Qwen/Qwen-7B") in said
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").touch()
    checkpoint_of_hub = "is a Hugging Face checkpoint: convert it with "
    assert checkpoint_of_hub + FROM_HF.format(tmp_path / "hub") in refused(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "of tomorrow"}')
    assert checkpoint_of_hub + FROM_HF.format(tmp_path / "hub") in refused(tmp_path / "hub")
    assert f"is a file, not a model directory: give {tmp_path / 'hub'}" in refused(
        tmp_path / "hub" / "model.safetensors"
    )


def test_what_to_give_in_place_of_a_run(tmp_path, converted):
    """Whatever part of a run is named, and whatever its folders are called."""
    run = tmp_path / "run"
    parts = [run, run / "files", run / "checkpoints", run / "checkpoints/500/default", run / "new"]
    parts[3].mkdir(parents=True)
    parts[1].mkdir()
    (run / "files" / "config.json").write_text("{}")
    (run / "run.json").write_text('{"recipe": {"data": "text"}, "arguments": {}}')
    going = f"which has not ended: `python train/pretrain.py --out {run} --resume` goes on, and wri"
    for part in parts:
        assert going in refused(part) and refused(part).endswith(f"writes {run / 'model'}")
    (run / "run.json").write_text('{"arguments": {"ckpt": "/models/chat"}}')
    (run / "lora").mkdir()
    (run / "lora" / "adapter_config.json").write_text("{}")
    (run / "lora" / "adapter_model.safetensors").touch()
    merging = (
        f": `python train/sft.py --out {run} --resume --merge` writes {run / 'model'}; or "
        f"`--ckpt /models/chat --adapter {run / 'lora'}` generates with it; `python "
        "convert/to_hf.py /models/chat "
        f"run-merged-hf --adapter {run / 'lora'}` and `python convert/from_hf.py run-merged-hf "
        "run-merged` make run-merged of it"
    )
    for part in [*parts, run / "lora"]:
        assert refused(part).endswith(merging)
    (run / "run.json").unlink()
    assert f"{run / 'lora'} is an adapter, not a model: `--ckpt CKPT --adapter" in refused(
        run / "lora"
    )
    (run / "run.json").write_text("{}")
    (run / "out").symlink_to(converted)
    for part in [*parts, run / "lora"]:
        assert refused(part).endswith(f"not a model directory: give {run / 'out'}")
    inside = converted / "params"
    assert f"{inside}/nothing is not a directory" in refused(inside / "nothing")
    assert refused(inside) == (
        f"{inside} is a part of the model directory {converted}: give {converted}"
    )


def test_a_run_is_looked_for_within_its_bucket():
    deep, flat = (paths.parse(f"gs://bucket/{name}") for name in ("a/b/c/d", "model"))
    assert [str(x) for x in directory._around(flat)] == ["gs://bucket/model", "gs://bucket"]
    assert [str(x) for x in directory._around(deep)][-1] == "gs://bucket/a"


def test_a_chunk_lost_after_the_check_is_never_zeros(copied, monkeypatch):
    manifest = checkpoint.verify_whole(copied)
    damage_missing(copied)
    monkeypatch.setattr(loading, "verify_whole", lambda path: manifest)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(copied)


def test_manifest_describes_the_directory(converted):
    manifest = checkpoint.verify_whole(converted)
    assert manifest["dtype"] == "float32"
    assert manifest["mesh"] == dict.fromkeys(sharding.AXES, 1)
    assert manifest["num_params"] == checkpoint.load_config(converted).num_params()
    assert manifest["shapes"]["layers.0.attn.q"] == [64, 64]
    assert {"jax", "orbax-checkpoint"} <= manifest["versions"].keys()
