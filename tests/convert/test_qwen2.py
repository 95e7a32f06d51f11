"""Exports under Qwen2's names: tensors, settings, refusals, and the ids of tokenizer.json."""

import base64
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from convert import names, qwen2_plan, to_hf
from qwen_jax import checkpoint
from qwen_jax.chat import tokenizer_json
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from qwen_jax.checkpoint import adapter_config, peft
from qwen_jax.checkpoint.generation_config import GenerationConfig
from qwen_jax.config import RopeScaling, qwen2_config
from qwen_jax.config.presets import PRESETS
from tests.support.conversion import GOLDEN, back, edit, last_line, raises, same, tensors, there
from tests.support.gptq import GPTQ, settings
from tests.support.tiny import tiny_config
from tests.support.vocabulary import qwen_tokenizer, tiny_ranks, write_tiny_vocab

HEADS = {"num_heads": 2, "num_kv_heads": 2}  # so that hidden_size is that of all heads
PARTS = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
WHOLE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The golden model with a small vocabulary, whose last control tokens have no rows."""
    path = tmp_path_factory.mktemp("models")
    there(GOLDEN, path / "golden")
    write_tiny_vocab(path / "golden" / "qwen.tiktoken")
    return path / "golden"


def renamed(original: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of the first generation under Qwen2's names, by a table of their own."""
    made = {}
    for name, tensor in original.items():
        if name in WHOLE:
            made[WHOLE[name]] = tensor
            continue
        layer, _, part = name.removeprefix("transformer.h.").partition(".")
        if part in PARTS:
            made[f"model.layers.{layer}.{PARTS[part]}"] = tensor
        else:
            for letter, rows in zip("qkv", np.split(tensor, 3), strict=True):
                kind = part.removeprefix("attn.c_attn.")
                made[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = rows
    return made


def test_qwen2_names_cover_every_leaf_once():
    for config in (PRESETS["qwen-7b"], tiny_config(**HEADS, tie_embeddings=True)):
        _, leaves = checkpoint.abstract_leaves(config, "bfloat16")
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        wanted = names.expected(shapes, names.QWEN2)
        assert len(wanted) == 3 - config.tie_embeddings + 12 * config.num_layers
        assert sorted(part.path for x in wanted.values() for part in x.parts) == sorted(shapes)
        assert sum(int(np.prod(x.shape)) for x in wanted.values()) == config.num_params()
    with pytest.raises(ValueError, match=r"no tensor of this format holds attn\.q_norm"):
        names.expected({"embedding": (8, 4), "attn.q_norm": (4,)}, names.QWEN2)


@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_the_same_values_under_qwen2_names(tmp_path, model, size):
    back(model, tmp_path / "out", "--as", "qwen2", "--max-shard-size", size, "--verify")
    assert same(tensors(tmp_path / "out"), renamed(tensors(GOLDEN)))
    back(model, tmp_path / "half", "--as", "qwen2", "--dtype", "float16")
    halves = {name: x.astype(np.float16) for name, x in renamed(tensors(GOLDEN)).items()}
    assert same(tensors(tmp_path / "half"), halves)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


def test_an_adapter_is_merged(tmp_path, model, capfd):
    """And its generation_config makes a chat model of a base model."""
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    (tmp_path / "adapter" / adapter_config.SETTINGS).write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    pairs = {
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{name}.weight": rng.normal(
            size=size
        )
        for layer in range(3)
        for name, size in (("A", (2, 64)), ("B", (192, 2)))
    }
    drawn = {name: x.astype(np.float32) for name, x in pairs.items()}
    save_file(drawn, tmp_path / "adapter" / peft.TENSORS)
    (tmp_path / "adapter" / "generation_config.json").write_text('{"chat_format": "chatml"}')
    options = ["--adapter", str(tmp_path / "adapter"), "--verify"]
    back(model, tmp_path / "qwen", *options)
    back(model, tmp_path / "qwen2", *options, "--as", "qwen2")
    merged = tensors(tmp_path / "qwen")
    assert not same(merged, tensors(GOLDEN))
    assert same(tensors(tmp_path / "qwen2"), renamed(merged))
    settings = json.loads((tmp_path / "qwen2" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [263, 262, 261] and not settings["do_sample"]
    assert "the adapter merged into them" in capfd.readouterr().err


@pytest.mark.parametrize("rules", [None, {"+:.*mlp.c_proj": {"bits": 4}}])
def test_integers_are_said_to_be_integers(tmp_path, rules):
    """By the layers' names there, and not by those of the first generation."""
    there(GPTQ / "int4", tmp_path / "model")
    if rules is not None:
        settings(tmp_path / "model", dynamic=rules)
    back(tmp_path / "model", tmp_path / "out", "--as", "qwen2", "--verify")
    found, before = tensors(tmp_path / "out"), tensors(GPTQ / "int4")
    for field in ("qweight", "qzeros", "scales"):
        parts = [found[f"model.layers.1.self_attn.{x}_proj.{field}"] for x in "qkv"]
        whole = before[f"transformer.h.1.attn.c_attn.{field}"]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said == {
        **{"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        **{"quant_method": "gptq", "checkpoint_format": "gptq"},
    }
    back(tmp_path / "model", tmp_path / "floats", "--as", "qwen2", "--dequantise")
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())


def test_files_of_a_qwen2_folder(tmp_path, model, capfd):
    """The licence goes along; the code and the vocabulary of the first generation do not."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    for name in ("LICENSE", "modeling_qwen.py", "added_tokens.json"):
        (source / name).write_text("{}")
    back(source, tmp_path / "out", "--as", "qwen2")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("LICENSE", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "eos_token_id": 319,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 176,
        "max_position_embeddings": 64,
        "model_type": "qwen2",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 319,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 320,
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "do_sample": True,
        "eos_token_id": [319, 261],
        "max_new_tokens": 64,
        "pad_token_id": 319,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 320,  # all of them: the source has no limit
        "top_p": 0.8,
    }
    said = "warning: max_position_embeddings is 64, and was 2048: programs take no longer texts"
    assert said in capfd.readouterr().err


def test_without_a_vocabulary_there_are_weights_alone(tmp_path, model):
    """And a setting of generation that is not carried over is told."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    (source / "qwen.tiktoken").unlink()
    edit(source / "generation_config.json", num_beams=4)
    with pytest.warns(UserWarning, match="entries that are ignored: num_beams=4"):
        back(source, tmp_path / "out", "--as", "qwen2")
    assert not list((tmp_path / "out").glob("token*"))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [319]


def test_tokens_that_no_merges_lead_to_are_told(tmp_path, model, capfd):
    source = Path(shutil.copytree(model, tmp_path / "model"))
    back(source, tmp_path / "one", "--as", "qwen2")
    assert "no merges lead" not in capfd.readouterr().err
    with (source / "qwen.tiktoken").open("a") as file:
        file.write(f"{base64.b64encode(b'xyz').decode()} 261\n")
    back(source, tmp_path / "two", "--as", "qwen2")
    assert "warning: no merges lead to some tokens" in capfd.readouterr().err


# Settings

YARN = {"original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
KEPT = {
    "plain": ({}, {"max_position_embeddings": 16}, "max_position_embeddings is 16, and was 64:"),
    "as long": ({"max_position_embeddings": 16}, {"max_position_embeddings": 16}, None),
    "dynamic NTK": (
        {"dynamic_ntk": True},
        {"max_position_embeddings": 16},
        "Qwen2 has no dynamic NTK: nothing is lost up to 16 tokens (seq_length); max_position",
    ),
    "both": (
        {"dynamic_ntk": True, "logn": True},
        {"max_position_embeddings": 16},
        "Qwen2 has no dynamic NTK and no LogN: nothing is lost up to 16 tokens",
    ),
    "linear": (
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "max_position_embeddings is 16",
    ),
    "yarn": (
        {"rope_scaling": RopeScaling("yarn", 4.0, 16)},
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **YARN},
        },
        None,
    ),
    "yarn, all keys": (
        {"rope_scaling": RopeScaling("yarn", 4.0, 16, truncate=False, mscale=1, mscale_all_dim=2)},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                **YARN,
                **{"truncate": False, "mscale": 1.0, "mscale_all_dim": 2.0},
            },
        },
        None,
    ),
    "NTK-aware": (
        {"rope_scaling": RopeScaling("ntk", 4.0)},
        {"max_position_embeddings": 64, "rope_theta": 10000 * 4 ** (16 / 14)},
        None,
    ),
    "windows": (
        {"layer_windows": (None, 5), "max_position_embeddings": 16},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        None,
    ),
    "tied, of grouped heads": (
        {"tie_embeddings": True, "num_kv_heads": 1, "max_position_embeddings": 16},
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "num_attention_heads": 2},
        None,
    ),
}


@pytest.mark.parametrize(("changes", "written", "lost"), KEPT.values(), ids=KEPT)
def test_what_qwen2_can_express(changes: Any, written: Any, lost: str | None) -> None:
    config = tiny_config(**HEADS | changes)
    made = qwen2_config.write(config)
    assert {key: made[key] for key in written} == written
    assert ("rope_scaling" in made) == ("rope_scaling" in written)
    said = qwen2_config.lost(config)
    assert said is None if lost is None else said is not None and said.startswith(lost)


REFUSED = {
    "the paper's YaRN": (
        {"rope_scaling": RopeScaling("yarn_paper", 4.0, 16)},
        "rope_scaling of type yarn_paper has no Qwen2 spelling",
    ),
    "windows of two widths": ({"layer_windows": (4, 5)}, r"layer_windows \[4, 5\] has no Qwen2"),
    "windows in the first layers": ({"layer_windows": (4, None)}, r"layer_windows \[4, None\]"),
    "wide heads": ({"head_dim": 32}, "kv_channels is 32: a head of Qwen2 has .* = 16 channels"),
    "no biases": ({"qkv_bias": False}, "bias-free QKV"),
}


@pytest.mark.parametrize(("changes", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_qwen2_cannot_express_is_refused_by_name(changes: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        qwen2_config.write(tiny_config(**HEADS | changes))


def test_a_refusal_comes_before_anything_is_written(tmp_path, model, capfd):
    source = Path(shutil.copytree(model, tmp_path / "model"))
    edit(source / "config.json", layer_windows=[3, 4, 5])
    assert to_hf.main([str(source), str(tmp_path / "out"), "--as", "qwen2"]) == 1
    assert "layer_windows [3, 4, 5] has no Qwen2 spelling" in last_line(capfd)
    assert not (tmp_path / "out").exists()


def test_settings_of_generation() -> None:
    """A stop of several tokens cannot be said, and is named; chats end as here."""
    tokenizer, config = Tokenizer(tiny_ranks()), tiny_config(**HEADS, vocab_size=320)

    def made(**values: Any) -> tuple[dict[str, Any], list[str]]:
        settings = GenerationConfig.from_hf(values)
        files = qwen2_plan.documents(config, tokenizer, settings=settings, dtype="float32")
        return files, list(qwen2_plan.lost(dataclasses.replace(config, seq_length=64), settings))

    files, lost = made(chat_format="chatml", do_sample=True, top_k=7, repetition_penalty=1.1)
    settings = files["generation_config.json"]
    assert settings["eos_token_id"] == [tokenizer.im_end_id, tokenizer.im_start_id, 261]
    assert files["config.json"]["eos_token_id"] == tokenizer.im_end_id
    assert settings["top_k"] == 7 and settings["repetition_penalty"] == 1.1 and not lost
    assert settings["pad_token_id"] == tokenizer.eod_id
    assert files["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    files, lost = made(stop_words_ids=[[5, 6], [7]])
    assert files["generation_config.json"]["eos_token_id"] == [7, 261]
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"
    assert len(lost) == 1 and lost[0].startswith("stop_words_ids [[5, 6]] are left out")


# What identifies the command


@pytest.mark.parametrize("option", ["--as", "--adapter"])
def test_an_option_that_was_given_once_is_a_difference(tmp_path, model, option, monkeypatch, capfd):
    """A stopped export is not continued without the option, nor with it where it was lacking."""
    monkeypatch.setattr(peft, "changes", lambda *_: {})
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    value = {"--as": "qwen2", "--adapter": str(tmp_path / "adapter")}[option]
    for first, second in (([option, value], []), ([], [option, value])):
        out = tmp_path / f"out{len(first)}"
        with monkeypatch.context() as patch:
            patch.setattr(to_hf.ExportPlan, "copied", raises(KeyboardInterrupt()))
            assert to_hf.main([str(model), str(out), *first]) == 130
        assert to_hf.main([str(model), str(out), *second]) == 1
        assert f"unfinished work of another command ({option[2:]} was" in last_line(capfd)
        assert to_hf.main([str(model), str(out), *first]) == 0


# tokenizer.json


def read(made: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(made))


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of many scripts, of parts that merge, and of any code points but surrogates."""
    rng = random.Random(seed)
    parts = ["the", " the", "ing", "don't", "I'LL", "12345", "  ", "\n", "\r\n\n", "\t", " " * 300]
    parts += [
        "你好",
        "世界",
        "é",
        "e\u0301",
        "\u1100\u1161",
        "한국",
        "ſ",
        "Å",
        "👩‍👩‍👧",
        "नमस्ते",
        "مرحبا",
        "```",
        "==",
    ]
    parts += [
        *SPECIAL_TOKENS[:4],
        "<|im",
        "_end|>",
        "\u00a0",
        "\u3000",
        "\u2028",
        "ab",
        "abcd",
    ]

    def point() -> str:
        code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)])
        return "?" if 0xD800 <= code < 0xE000 else chr(code)

    return [
        "".join(
            rng.choice(parts) if rng.random() < 0.6 else point() for _ in range(rng.randrange(16))
        )
        for _ in range(count)
    ]


def test_the_published_vocabulary_gives_the_same_ids(tmp_path):
    ours = qwen_tokenizer()
    made = tokenizer_json.contents(ours, 151_936)
    assert len(made["model"]["vocab"]) == 151_643 and not made["model"]["ignore_merges"]
    assert len(made["model"]["merges"]) == 151_643 - 256
    theirs = read(made)
    golden = json.loads((GOLDEN.parent / "tokenizer.json").read_text())["encode"]
    for case in golden:
        assert theirs.encode(case["text"]).ids == case["ids"]
        assert theirs.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
        assert theirs.decode(case["ids"]) == case["decoded_skip"]
    texts = random_texts(2000, seed=0)
    found = [theirs.encode(text).ids for text in texts]
    assert found == [ours.encode(text, allowed_special="all") for text in texts]
    named = {name: theirs.token_to_id(name) for name in SPECIAL_TOKENS}
    assert named == ours.special_tokens


EXPANSION = {b"abcdab": 480, b" abc": 470, b"xyz": 471, "好".encode(): 599}  # ids with gaps


@pytest.mark.parametrize(("rows", "extra"), [(300, {}), (469, {}), (600, EXPANSION)])
def test_a_vocabulary_of_ones_own_gives_the_same_ids(rows: int, extra: dict[bytes, int]) -> None:
    """With fewer rows than ids, and with an expansion, some of whose tokens no merges lead to."""
    ours = Tokenizer(tiny_ranks(), extra)
    made = tokenizer_json.contents(ours, rows)
    theirs = read(made)
    assert made["model"]["ignore_merges"] == bool(extra)
    controls = set(SPECIAL_TOKENS[: rows - 261])
    assert {token["content"] for token in made["added_tokens"]} == controls
    assert all(theirs.token_to_id(name) == ours.special_tokens[name] for name in controls)
    texts = [*random_texts(300, seed=rows), "xyz", " abc", "xyzxyz", "abcdab", "abcdabcd", "你好好"]
    found = [theirs.encode(text).ids for text in texts]
    assert found == [ours.encode(text, allowed_special=controls) for text in texts]
