import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import PRESETS, Config, model
from qwen_jax.config import RopeScaling
from qwen_jax.runtime.texts import read_json
from tests.support.tiny import on_mesh, tiny_config

COUNTS = {
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
}
# The config.json of Qwen/Qwen-7B, December 2023.
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
# Qwen/Qwen-72B, December 2023: `rope_theta` and `padded_vocab_size` say things twice.
QWEN_72B = {
    **{key: value for key, value in QWEN_7B.items() if key != "tokenizer_class"},
    "hidden_size": 8192,
    "intermediate_size": 49152,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "padded_vocab_size": 152064,
    "rope_theta": 1000000,
    "rotary_emb_base": 1000000,
    "tokenizer_type": "QWenTokenizer",
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "vocab_size": 152064,
}
# The first release spelled its keys differently; vocab_size is the number of real tokens here.
AUGUST_2023 = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0,
    "bias_dropout_fusion": True,
    "bos_token_id": 151643,
    "embd_pdrop": 0.1,
    "eos_token_id": 151643,
    "ffn_hidden_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-05,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 6144,
    "no_bias": True,
    "onnx_safe": None,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_flash_attn": True,
    "vocab_size": 151851,
}
LINEAR = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}
YARN = RopeScaling("yarn", 4.0, 16, beta_fast=8.0, beta_slow=2.0, attention_factor=1.5)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_exact(name):
    config = PRESETS[name]
    assert config.num_params() == COUNTS[name]
    with on_mesh():
        leaves = jax.tree.leaves(model.abstract(config, jnp.bfloat16))
    assert sum(leaf.size for leaf in leaves) == COUNTS[name]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves), "no memory is used"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"tie_embeddings": True},
        {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": False, "tie_embeddings": True},
    ],
)
def test_parameter_counts_of_later_architectures(changes):
    config = tiny_config(**changes)
    with on_mesh():
        leaves = jax.tree.leaves(model.abstract(config, jnp.float32))
    assert sum(leaf.size for leaf in leaves) == config.num_params()


@pytest.mark.parametrize(
    ("name", "sizes", "lengths", "long_context"),
    [
        ("qwen-1.8b", (151936, 2048, 24, 16, 5504), (8192, 8192), True),
        ("qwen-7b", (151936, 4096, 32, 32, 11008), (8192, 32768), True),
        ("qwen-14b", (152064, 5120, 40, 40, 13696), (2048, 8192), True),
        ("qwen-72b", (152064, 8192, 80, 64, 24576), (8192, 8192), False),
    ],
)
def test_presets_are_the_published_values(name, sizes, lengths, long_context):
    vocab, hidden, layers, heads, ffn = sizes
    assert PRESETS[name] == Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        intermediate_size=ffn,
        norm_eps=1e-6,
        rope_base=10000 if long_context else 1000000,
        seq_length=lengths[0],
        max_position_embeddings=lengths[1],
        dynamic_ntk=long_context,
        logn=long_context,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=False,
        initializer_range=0.02,
    )
    assert set(PRESETS) == set(COUNTS)


def test_from_hf_reads_the_hub_configs():
    assert Config.from_hf(QWEN_7B) == PRESETS["qwen-7b"]
    assert Config.from_hf(QWEN_72B) == PRESETS["qwen-72b"]


def test_from_hf_reads_the_spelling_of_august_2023():
    expected = dataclasses.replace(
        PRESETS["qwen-7b"],
        norm_eps=1e-5,
        seq_length=2048,
        max_position_embeddings=6144,
        dynamic_ntk=False,
        logn=False,
    )
    assert Config.from_hf(AUGUST_2023) == expected
    assert Config.from_hf(without(AUGUST_2023, "vocab_size")) == expected


def test_optional_keys_have_the_meaning_of_the_format():
    optional = ("use_dynamic_ntk", "use_logn_attn", "tie_word_embeddings", "initializer_range")
    assert Config.from_hf(without(QWEN_7B, *optional)) == PRESETS["qwen-7b"]
    off = Config.from_hf(without(AUGUST_2023, *optional))
    assert off == Config.from_hf(AUGUST_2023) and not off.dynamic_ntk and not off.logn


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        tiny_config(tie_embeddings=True, initializer_range=0.01, logn=True),
        tiny_config(layer_windows=(3, None)),
        tiny_config(rope_scaling=RopeScaling(**LINEAR)),
        tiny_config(rope_scaling=YARN, layer_windows=(None, 7)),
        tiny_config(rope_scaling=RopeScaling("yarn", 2.0, 16, truncate=False, mscale=1.0)),
        tiny_config(rope_scaling=RopeScaling("yarn_paper", 2.0, 16, beta_fast=8.0)),
    ],
)
def test_hf_round_trip(config):
    written = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(written) == config
    assert written["intermediate_size"] == 2 * config.intermediate_size
    assert written["model_type"] == "qwen"


def test_our_own_keys_are_written_only_when_set():
    assert not {"layer_windows", "rope_scaling"} & set(tiny_config().to_hf())
    config = tiny_config(layer_windows=(3, None), rope_scaling=RopeScaling(**LINEAR))
    assert config.to_hf()["layer_windows"] == [3, None]
    assert config.to_hf()["rope_scaling"] == LINEAR
    short = RopeScaling("ntk", 2.0)
    assert tiny_config(rope_scaling=short).to_hf()["rope_scaling"] == {"type": "ntk", "factor": 2.0}


@pytest.mark.parametrize("change", [{"num_kv_heads": 2}, {"qk_norm": True}, {"qkv_bias": False}])
def test_to_hf_refuses_what_qwen_cannot_spell(change):
    with pytest.raises(ValueError, match="no Qwen-1 spelling"):
        tiny_config(**change).to_hf()


def test_unknown_keys_are_refused_and_all_listed():
    strange = {"sliding_window": 4096, "attention_bias": True}
    with pytest.raises(ValueError, match="attention_bias, sliding_window is not known"):
        Config.from_hf({**QWEN_7B, **strange})
    assert Config.from_hf({**QWEN_7B, "attention_bias": None}) == PRESETS["qwen-7b"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_bias", False),
        ("rotary_pct", 0.5),
        ("scale_attn_weights", False),
        ("model_type", "llama"),
        ("activation", "gelu"),
        ("pos_emb", "alibi"),
        ("apply_residual_connection_post_layernorm", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("hidden_size", 0),
        ("hidden_size", "4096"),
        ("hidden_size", 4096.5),
        ("hidden_size", 2**31),
        ("kv_channels", 10**18),
        ("intermediate_size", 10**400),
        ("num_hidden_layers", 10**9),
        ("rotary_emb_base", 10**400),
        ("rotary_emb_base", 1e39),
        pytest.param("layer_norm_epsilon", 10**5000, id="too long to be printed"),
        ("num_hidden_layers", True),
        ("intermediate_size", 22017),
        ("intermediate_size", None),
        ("kv_channels", 127),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", float("nan")),
        ("rotary_emb_base", -1),
        ("use_dynamic_ntk", "true"),
        ("use_logn_attn", None),
        ("tie_word_embeddings", 1),
        ("layer_windows", [3]),
        ("layer_windows", [0] * 32),
        ("layer_windows", [2.5] * 32),
        ("layer_windows", 5),
        ("rotary_emb_base", float("inf")),
        ("initializer_range", "0.02"),
        ("seq_length", 1),
    ],
)
def test_wrong_values_are_refused_by_name(key, value):
    names = {
        "kv_channels": "head_dim",
        "layer_norm_epsilon": "norm_eps",
        "num_hidden_layers": "num_layers",
        "rotary_emb_base": "rope_base",
        "tie_word_embeddings": "tie_embeddings",
        "use_dynamic_ntk": "dynamic_ntk",
        "use_logn_attn": "logn",
    }
    with pytest.raises(ValueError, match=f"^dir/config.json: .*{names.get(key, key)}") as caught:
        Config.from_hf({**QWEN_7B, key: value}, "dir/config.json")
    assert key in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {}),
        ("rope_scaling", {"rope_type": "default"}),
        ("rope_scaling", {"type": "default", "factor": None}),
        ("rope_scaling", {"type": "default", "factor": 1.0}),
        ("rope_scaling", {"type": None, "attention_factor": None, "low_freq_factor": None}),
        ("seq_length", 8192.0),
        ("intermediate_size", 22016.0),
        ("rope_theta", None),
        ("padded_vocab_size", None),
        ("use_sliding_window", False),
        ("sliding_window", None),
        ("layer_types", ["full_attention"] * 32),
        ("layer_windows", None),
        ("use_cache_quantization", False),
        ("use_cache_kernel", True),
        ("fp32", True),
        ("pruned_heads", None),
        ("is_encoder_decoder", None),
        ("add_cross_attention", None),
    ],
)
def test_what_says_that_there_is_none(key, value):
    assert Config.from_hf({**QWEN_7B, key: value}) == PRESETS["qwen-7b"]


@pytest.mark.parametrize("key", ["no_bias", "scale_attn_weights", "rotary_pct"])
def test_null_that_would_turn_something_off_is_refused(key):
    with pytest.raises(ValueError, match=f"^config.json: {key} is None: only"):
        Config.from_hf({**QWEN_7B, key: None})


def test_missing_keys_are_all_listed():
    lacking = without(QWEN_7B, "seq_length", "kv_channels", "vocab_size")
    with pytest.raises(ValueError, match=r"lacks kv_channels, seq_length, vocab_size$"):
        Config.from_hf(lacking)


@pytest.mark.parametrize(
    ("key", "alias", "value"),
    [
        ("rotary_emb_base", "rope_theta", 500000),
        ("hidden_size", "n_embd", 2048),
        ("num_hidden_layers", "n_layer", 31),
        ("intermediate_size", "ffn_hidden_size", 11008),
    ],
)
def test_duplicates_that_disagree_are_refused(key, alias, value):
    with pytest.raises(ValueError, match=f"{key} and {alias} disagree: {QWEN_7B[key]}, {value}"):
        Config.from_hf({**QWEN_7B, alias: value})
    assert Config.from_hf({**QWEN_7B, alias: QWEN_7B[key]}) == PRESETS["qwen-7b"]


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ({}, {}),
        ({"use_dynamic_ntk": True, "use_logn_attn": True}, {"dynamic_ntk": True, "logn": True}),
        ({"seq_length": 2048}, {"seq_length": 2048}),
        ({"intermediate_size": 100}, {"intermediate_size": 50}),
        ({"rope_theta": 5000}, {"rope_base": 5000}),
        ({"padded_vocab_size": 128}, {"vocab_size": 128}),
        ({"layer_windows": [3, None]}, {"layer_windows": (3, None)}),
        ({"rope_scaling": LINEAR}, {"rope_scaling": RopeScaling(**LINEAR)}),
    ],
)
def test_overrides(overrides, fields):
    config = tiny_config()
    assert config.with_overrides(overrides) == dataclasses.replace(config, **fields)


def test_rope_type_is_the_later_spelling_of_type():
    later = {("rope_type" if key == "type" else key): value for key, value in LINEAR.items()}
    config = tiny_config(rope_scaling=RopeScaling(**LINEAR))
    for entry in (later, LINEAR | later):
        assert Config.from_hf(config.to_hf() | {"rope_scaling": entry}) == config


def test_overrides_of_what_qwen_cannot_spell():
    config = tiny_config(num_kv_heads=2, qk_norm=True)
    assert config.with_overrides({"seq_length": 8}) == dataclasses.replace(config, seq_length=8)
    fewer = tiny_config().with_overrides({"num_attention_heads": 2})
    assert fewer.num_heads == fewer.num_kv_heads == 2


def test_overrides_can_switch_our_keys_off():
    config = tiny_config(layer_windows=(3, None), rope_scaling=YARN)
    off = config.with_overrides({"layer_windows": None, "rope_scaling": None})
    assert off == tiny_config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window": 3, "alpha": 1}, "unknown config override alpha, window: allowed are "),
        ({"no_bias": True}, "unknown config override no_bias"),
        ({"seq_length": -1}, "seq_length is -1"),
        ({"layer_windows": [3]}, "layer_windows has 1 entries for 2 layers"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
        ({"rope_scaling": {**LINEAR, "short_factor": [1.0]}}, "has 'short_factor': its keys are"),
        ({"rope_scaling": {**LINEAR, "type": "su"}}, "allowed are linear, ntk, yarn, yarn_paper"),
        ({"rope_scaling": {**LINEAR, "factor": 0.5}}, "factor 0.5: must be"),
        ({"rope_scaling": {**LINEAR, "factor": float("inf")}}, "factor inf"),
        ({"rope_scaling": {**LINEAR, "factor": float("nan")}}, "factor nan"),
        ({"rope_scaling": {**LINEAR, "factor": "4"}}, "factor '4'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks type or factor"),
        ({"rope_scaling": {**LINEAR, "attention_factor": -1.0}}, "attention_factor -1.0"),
        ({"rope_scaling": {**LINEAR, "attention_factor": "x"}}, "attention_factor 'x'"),
        ({"rope_scaling": {**LINEAR, "mscale": 1}}, "type linear has no truncate, mscale"),
        (
            {"rope_scaling": {**LINEAR, "rope_type": "yarn"}},
            "'linear' and rope_type 'yarn' disagree",
        ),
        ({"rope_scaling": {**LINEAR, "type": "yarn", "truncate": 1}}, "truncate 1: must be"),
        ({"rope_scaling": {**LINEAR, "type": "yarn", "mscale": "x"}}, "mscale 'x': must be"),
        ({"rope_scaling": {**LINEAR, "type": "yarn_paper", "truncate": False}}, "no truncate"),
        ({"rope_scaling": {"type": "yarn_paper", "factor": 4.0}}, "type yarn_paper needs orig"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 0}}, "embeddings 0: must"),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 10**18}}, "1 to 2147"),
        ({"rope_scaling": {**LINEAR, "factor": 10**400}}, "factor 1000.*: must be a number from 1"),
        ({"rope_scaling": {**LINEAR, "type": "yarn"}, "rope_theta": 1}, "rope_base. is 1: must be"),
        ({"num_hidden_layers": 10**9}, "num_layers. is 1000000000: .* from 1 to 10000"),
        ({"rope_scaling": {**LINEAR, "beta_fast": 1.0}}, "beta_fast > beta_slow"),
        ({"rope_scaling": LINEAR, "use_dynamic_ntk": True}, "two schemes"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config().with_overrides(overrides)


def test_no_windows_beside_sizes_that_then_mean_nothing():
    none = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert Config.from_hf({**QWEN_7B, **none}) == PRESETS["qwen-7b"]
    for some in (none | {"use_sliding_window": True}, {"layer_types": ["sliding_attention"] * 32}):
        with pytest.raises(ValueError, match=r"(layer_types|use_sliding_window) is not known"):
            Config.from_hf({**QWEN_7B, **some})


def test_null_in_an_entry_of_yarn_is_what_is_not_there():
    entry = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16.0}
    nulls = dict.fromkeys(("truncate", "attention_factor", "beta_fast", "mscale"))
    config = tiny_config(rope_scaling=RopeScaling("yarn", 4.0, 16))
    read = Config.from_hf(config.to_hf() | {"rope_scaling": entry | nulls})
    assert read == config and isinstance(read.seq_length, int)
    assert isinstance(read.rope_scaling.original_max_position_embeddings, int)


def test_numbers_that_are_whole_become_ints():
    config = Config.from_hf({**QWEN_7B, "seq_length": 2048.0, "layer_windows": [4.0] * 32})
    assert type(config.seq_length) is int and {type(w) for w in config.windows} == {int}


@pytest.mark.parametrize("given", ["config.json", Path("config.json"), None, [1], {1: 2}])
def test_from_hf_takes_values_and_read_a_path(given, tmp_path):
    with pytest.raises(ValueError, match=r"Config\.read takes a path.*must map names to values"):
        Config.from_hf(given)
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B | {"no_bias": False}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: no_bias is False"):
        Config.read(tmp_path / "config.json")


def test_what_changes_answers_and_is_not_done_is_said():
    asked = {"use_cache_quantization": True, "use_cache_kernel": True, "prefix": "x"}
    with pytest.warns(UserWarning) as caught:
        assert Config.from_hf({**QWEN_7B, **asked}) == PRESETS["qwen-7b"]
    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith("config.json has entries that are ignored: prefix='x' (")
    assert "use_cache_quantization=True (for a cache of 8 bits, give cache_dtype int8" in line


def test_configs_are_values():
    windowed = tiny_config(layer_windows=(3, None), rope_scaling=YARN)
    same = Config.from_hf(json.loads(json.dumps(windowed.to_hf())))
    assert hash(windowed) == hash(same)
    assert len({windowed, same, tiny_config()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        windowed.vocab_size = 1  # type: ignore[misc]


def test_scalars_of_numpy_and_jax_become_plain_values():
    """What is kept can be hashed, compared and written."""
    sizes = {"factor": np.float32(4), "original_max_position_embeddings": np.int32(16)}
    scaling = {"type": "yarn", **sizes, "truncate": np.bool_(False), "mscale": jnp.float32(1)}
    changes = {"rotary_emb_base": jnp.float32(1e5), "use_logn_attn": np.bool_(True)}
    layers = {"layer_norm_epsilon": np.float64(0.5), "layer_windows": list(np.array([3, 4]))}
    large = {"initializer_range": 10**20}
    config = tiny_config().with_overrides({**changes, **layers, **large, "rope_scaling": scaling})
    assert isinstance(config.initializer_range, float)  # as an int, it would be none of jax
    read = Config.from_hf(json.loads(json.dumps(config.to_hf())))
    assert read == config and hash(read) == hash(config)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_heads 4 is no multiple of num_kv_heads 3"):
        tiny_config(num_kv_heads=3)


def test_read_json_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN_7B))
    assert read_json(path) == QWEN_7B
    for broken in (b'{"hidden_size":', b"[1]", b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"config\.json is not"):
            read_json(path)


def test_what_older_libraries_write_is_no_obstacle():
    """Of transformers 4, whole, with how to sample among it."""
    written = {
        "is_decoder": True, "pruned_heads": {}, "use_bfloat16": False, "tie_encoder_decoder": False,
        "do_sample": True, "max_length": 20, "num_beams": 1, "top_k": 50, "temperature": 0.7,
        "_attn_implementation": "eager", "unsloth_version": "2024.1", "sep_token_id": 5,
    }  # fmt: skip
    assert Config.from_hf({**QWEN_7B, **written}) == PRESETS["qwen-7b"]
    with pytest.raises(ValueError, match="pruned_heads"):
        Config.from_hf({**QWEN_7B, "pruned_heads": {"0": [1]}})
