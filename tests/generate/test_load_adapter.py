"""An adapter on a loaded model, not merged: `load(..., adapter=DIR)` and `--adapter DIR`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_jax
from qwen_jax import checkpoint, meshes, model
from qwen_jax.checkpoint import adapter_config, adapter_files, directory
from qwen_jax.generate import __main__ as generate
from qwen_jax.generate import from_directory
from qwen_jax.generate.description import Description
from qwen_jax.leaves.low_rank import Lora
from qwen_jax.leaves.weights import Weight, named_leaves
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder, lora
from qwen_jax.model.lora import Adapters
from qwen_jax.terminal import program
from tests.support.conversion import edit
from tests.support.tiny import replace_leaves, small_noise, tiny_config

WANTED = ["c_attn", "c_proj", "w1"]
TOKENS = np.random.default_rng(3).integers(0, 320, (2, 12))


def adapters_of(config: qwen_jax.Config, embeddings: bool = False) -> Adapters:
    """Adapters that change much, with an embedding and a head of their own if `embeddings`."""
    groups = adapter_config.targets(WANTED, config.num_layers)

    def create(decoder: Decoder) -> Adapters:
        key = jax.random.key(0)
        return lora.create(decoder, groups, rank=4, alpha=8.0, key=key, embeddings=embeddings)

    shapes = jax.eval_shape(create, model.abstract(config, "float32"))
    noise = small_noise(config)
    return replace_leaves(shapes, lambda path, leaf: noise(path, leaf) / 4)


@pytest.fixture(scope="module")
def adapter(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter for the golden model, as a training run writes it."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    with meshes.entered(meshes.make()):
        adapter_files.write(folder, adapters_of(checkpoint.load_config(golden_dir)))
    settings = json.loads((golden_dir / directory.GENERATION_CONFIG).read_text())
    own = settings | {"max_new_tokens": 7}
    (folder / directory.GENERATION_CONFIG).write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def adapted(golden_dir: Path, adapter: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(golden_dir, dtype="float32", adapter=adapter)


def test_logits_are_those_of_the_merged_model(golden_dir, adapter, adapted):
    base = checkpoint.load(golden_dir, dtype="float32")
    tensors = load_file(adapter / adapter_files.TENSORS)
    stored = {name: np.asarray(leaf[...]) for name, leaf in named_leaves(base).items()}
    for layer in range(base.config.num_layers):
        for module in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.c_proj"):
            start = f"base_model.model.transformer.h.{layer}.{module}"
            a, b = (tensors[f"{start}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            first = 0
            for leaf in adapter_config.modules()[module]:
                path = f"layers.{layer}.{leaf}"
                rows = slice(first, first := first + len(stored[path]))
                stored[path] = np.float32(stored[path] + 2 * (b[rows] @ a))
    with meshes.entered(adapted.mesh):
        merged = replace_leaves(base, lambda path, leaf: place(stored[path], leaf.letters))
    before = qwen_jax.load(golden_dir, dtype="float32").logits(TOKENS)
    made = {field: getattr(adapted, field) for field in adapted.__dataclass_fields__}
    expected = np.asarray(qwen_jax.LanguageModel(**made | {"decoder": merged}).logits(TOKENS))
    most = np.abs(expected).max()
    np.testing.assert_allclose(adapted.logits(TOKENS), expected, rtol=0, atol=5e-6 * most)
    assert np.abs(expected - before).max() > 0.1 * most
    assert adapted.generation_config.max_new_tokens == 7, "as the adapter's own settings say"


@pytest.mark.slow
def test_it_generates_what_its_logits_say(adapted):
    """By prefill and decode steps, which have other programs than `logits`."""
    new = adapted.generate(TOKENS[:1], max_new_tokens=4)
    whole = np.concatenate([TOKENS[:1], new], axis=1)
    best = np.asarray(adapted.logits(whole))[0, TOKENS.shape[1] - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(new[0], best)


def test_its_factors_have_the_models_dtype(golden_dir, adapter):
    found = qwen_jax.load(golden_dir, dtype="bfloat16", adapter=str(adapter)).decoder
    leaf = found.layers[0].attn.q
    assert isinstance(leaf, Lora) and leaf.a.dtype == leaf.b.dtype == "bfloat16"
    assert isinstance(found.layers[0].ffn.gate, Weight)


@pytest.mark.slow
def test_an_embedding_and_a_head_of_its_own(golden_dir, tmp_path):
    config = checkpoint.load_config(golden_dir)
    with meshes.entered(meshes.make()):
        adapters = adapters_of(config, embeddings=True)
        adapter_files.write(tmp_path, adapters)
        with pytest.raises(ValueError, match="modules_to_save wte, lm_head: several adapters"):
            adapter_files.read(tmp_path, model.abstract(config, "float32"), whole=False)
    decoder = qwen_jax.load(golden_dir, dtype="float32", adapter=tmp_path).decoder
    for name in ("embedding", "head"):
        got, expected = getattr(decoder, name), getattr(adapters, name)
        np.testing.assert_array_equal(got[...], expected[...])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "not supported: use_dora=true"),
        ({"bias": "all"}, 'not supported: bias="all"'),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save ln_f: only wte and lm_head can"),
        ({"r": 8}, r"c_attn.lora_A.weight is \[4, 64\] instead of \[8, 64\]"),
        ({"peft_type": "IA3"}, "peft_type 'IA3', only LORA is supported"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    golden_dir, adapter, tmp_path, monkeypatch, settings, told
):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / adapter_config.SETTINGS, **settings)
    with pytest.raises(ValueError, match=told) as caught:
        qwen_jax.load(golden_dir, adapter=tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_adapter_of_another_model_is_refused(golden_dir, tmp_path):
    with meshes.entered(meshes.make()):
        adapter_files.write(tmp_path, adapters_of(tiny_config(num_layers=3)))
    with pytest.raises(ValueError, match=r"not of this model: .*lora_A.weight is \[4, 32\]"):
        qwen_jax.load(golden_dir, adapter=tmp_path)
    with pytest.raises(ValueError, match=f"{golden_dir} is no adapter: it has no adapter_config"):
        qwen_jax.load(golden_dir, adapter=golden_dir)
    with pytest.raises(TypeError, match="'lora_path': give adapter="):
        qwen_jax.load(golden_dir, lora_path=tmp_path)


def test_a_model_with_an_adapter_is_not_saved(adapted, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"layers\.0\.attn\.k is Lora.*--adapter"):
        checkpoint.save(tmp_path, adapted.config, adapted.decoder)


@pytest.mark.parametrize(("main", "more"), [(generate.main, ["--prompt", "a"]), (program.main, [])])
def test_commands_take_an_adapter(chat_dir, adapter, monkeypatch, capsys, main, more):
    def with_weights(path: str, about: Description, *, adapter: str, **_: object) -> None:
        raise ValueError(f"{adapter} is read, for {about.generation_config.max_new_tokens} tokens")

    monkeypatch.setattr(from_directory, "with_weights", with_weights)
    argv = ["--ckpt", str(chat_dir), *more, "--adapter"]
    for folder, told in (
        (adapter, f"{adapter} is read, for 7 tokens"),
        (chat_dir, f"{chat_dir} is read, for 512 tokens"),  # without settings of its own
    ):
        assert main([*argv, str(folder)]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and told in said[0]


@pytest.mark.slow
def test_a_command_with_an_adapter(chat_dir, tmp_path, capsys):
    with meshes.entered(meshes.make()):
        adapter_files.write(tmp_path / "a", adapters_of(checkpoint.load_config(chat_dir)))
    argv = ["--ckpt", str(chat_dir), "--prompt", "the", "--temperature", "0", "--json"]
    settings = ["--dtype", "float32", "--max-new-tokens", "4", "--repetition-penalty", "1"]
    assert generate.main([*argv, *settings, "--adapter", str(tmp_path / "a")]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    made = qwen_jax.load(chat_dir, dtype="float32", adapter=tmp_path / "a")
    expected = made.generate([made.need_tokenizer().encode("the")], max_new_tokens=4)
    assert tokens == expected[0, : len(tokens)].tolist()
    assert generate.main([*argv, "--adapter", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{tmp_path / 'b'} is no adapter" in said[0]
