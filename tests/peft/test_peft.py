"""Adapters that one side wrote, read by the other: the logits are equal to float32's rounding."""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft as original
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import names
from qwen_jax.checkpoint import adapter_config, peft
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder, adapted, lora
from qwen_jax.model.adapted import GroupsByRow
from qwen_jax.model.lora import Adapters
from tests.peft.torch_model import Model
from tests.support.tiny import (
    full_logits,
    on_mesh,
    replace_leaves,
    small_noise,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)
from train import step

CONFIG = tiny_config()
TOKENS = tiny_tokens(3, 14)
ALL = ["c_attn", "c_proj", "w1", "w2"]
WHOLE = ["wte", "lm_head"]
TOLERANCE = 5e-6  # of the largest logit
SEEN = 0.1  # of the largest logit: what adapters change at least, so that equality means something


@functools.cache
def _torch_base() -> Model:
    model = Model(
        vocabulary=CONFIG.vocab_size, width=CONFIG.hidden_size, layers=CONFIG.num_layers,
        heads=CONFIG.num_heads, head_dim=CONFIG.head_dim, inner=CONFIG.intermediate_size,
        eps=CONFIG.norm_eps, rope_base=CONFIG.rope_base,
    )  # fmt: skip
    with on_mesh():
        leaves = {n: np.asarray(x[...]) for n, x in named_leaves(tiny_decoder(CONFIG)).items()}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    state = {
        tensor: torch.tensor(np.concatenate([leaves[part.path] for part in wanted.parts]))
        for tensor, wanted in names.expected(shapes).items()
    }
    model.load_state_dict(state)
    return model


def torch_base() -> Model:
    """A copy: PEFT changes the model that it is given."""
    return copy.deepcopy(_torch_base())


def torch_logits(model: Any) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS).long()).numpy()


def base() -> Decoder:
    return step.stacked(tiny_decoder(CONFIG))


def our_logits(adapters: Adapters) -> np.ndarray:
    return full_logits(lora.attach(base(), adapters), TOKENS)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def drawn(wanted: Any, whole: list[str]) -> Adapters:
    """That change much: b is not 0."""
    fresh = lora.create(
        base(),
        adapter_config.targets(wanted, CONFIG.num_layers),
        rank=4,
        alpha=8.0,
        key=jax.random.key(0),
        embeddings=bool(whole),
    )

    left = {"wte": "embedding", "lm_head": "head"}
    absent = {left[module]: None for module in left if module not in whole}
    return replace_leaves(fresh, small_noise(CONFIG)).replace(**absent)


def trained(config: original.LoraConfig) -> Any:
    """A model with PEFT's adapters after a few steps in torch, so that B is not 0."""
    torch.manual_seed(0)
    model = original.get_peft_model(torch_base(), config)
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.03)
    ids = torch.tensor(TOKENS).long()
    for _ in range(4):
        logits = model(input_ids=ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(x.any() for name, x in model.named_parameters() if "lora_B" in name)
    return model


def test_base_models_agree():
    with on_mesh():
        assert distance(full_logits(base(), TOKENS), torch_logits(torch_base())) < TOLERANCE


CASES = {
    "all": (ALL, [], {}),
    "one": (["c_attn"], [], {}),
    "some": (["attn.c_proj", "w2"], [], {}),
    "pattern": (r".*\.mlp\.(w\d|c_proj)", [], {}),
    "rank-stabilised": (ALL, [], {"use_rslora": True}),
    "whole": (ALL, WHOLE, {}),
    "embedding": (["w1"], ["wte"], {}),
    "head": (["w1"], ["lm_head"], {}),
}
cases = pytest.mark.parametrize(("wanted", "whole", "settings"), CASES.values(), ids=CASES)


@cases
def test_ours_in_peft(tmp_path: Path, wanted: Any, whole: list[str], settings: Any) -> None:
    with on_mesh():
        adapters = drawn(wanted, whole)
        if isinstance(wanted, str):
            settings = {"target_modules": wanted}
        elif settings:
            settings = {**settings, "lora_alpha": adapters.scale * math.sqrt(4)}
        peft.write(tmp_path / "ours", adapters, **settings)
        ours = our_logits(adapters)
    model = original.PeftModel.from_pretrained(torch_base(), tmp_path / "ours")
    assert distance(torch_logits(torch_base()), ours) > SEEN
    assert distance(torch_logits(model), ours) < TOLERANCE
    # And back: what PEFT writes of them holds the same values.
    model.save_pretrained(tmp_path / "theirs")
    with on_mesh():
        found = peft.read(tmp_path / "theirs", base())
        assert found.scale == pytest.approx(adapters.scale)
        assert found.groups == adapters.groups
        values, expected = named_leaves(found), named_leaves(adapters)
        assert values.keys() == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(values[name][...], leaf[...])


@cases
def test_theirs_in_ours(tmp_path: Path, wanted: Any, whole: list[str], settings: Any) -> None:
    config = original.LoraConfig(
        r=4, lora_alpha=8, target_modules=wanted, modules_to_save=whole or None, **settings
    )
    model = trained(config)
    model.save_pretrained(tmp_path)
    theirs = torch_logits(model)
    assert distance(torch_logits(torch_base()), theirs) > SEEN
    with on_mesh():
        assert distance(our_logits(peft.read(tmp_path, base())), theirs) < TOLERANCE


def test_theirs_in_bfloat16(tmp_path: Path) -> None:
    """As PEFT keeps adapters of a model in bfloat16."""
    model = trained(original.LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    file = tmp_path / peft.TENSORS
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file, {"format": "pt"})
    theirs = torch_logits(original.PeftModel.from_pretrained(torch_base(), tmp_path))
    with on_mesh():
        assert distance(our_logits(peft.read(tmp_path, base())), theirs) < TOLERANCE


def test_theirs_by_row(tmp_path: Path) -> None:
    """Two adapters on one decoder with separate layers: each row is as in PEFT with its own."""
    cases = ({"r": 4, "target_modules": ALL}, {"r": 2, "target_modules": ["c_attn", "w1"]})
    theirs = [torch_logits(torch_base())]
    for number, settings in enumerate(cases):
        model = trained(original.LoraConfig(lora_alpha=8, **settings))
        model.save_pretrained(tmp_path / str(number))
        theirs.append(torch_logits(model))
    with on_mesh():
        decoder = tiny_decoder(CONFIG)
        found = [peft.read(tmp_path / str(i), decoder, whole=False) for i in range(len(cases))]
        rows = np.array([1, 0, 2], np.int32)
        groups = GroupsByRow.of(adapted.attach_several(decoder, found)).select(place(rows, "R"))
        ours = full_logits(decoder, TOKENS, groups=groups)
        for i, row in enumerate(rows):
            assert distance(ours[i], theirs[row][i]) < TOLERANCE
            assert not row or distance(theirs[row][i], theirs[0][i]) > SEEN
        one = full_logits(adapted.attach_one(decoder, found[0]), TOKENS)
        assert distance(one, theirs[1]) < TOLERANCE


# PEFT takes the bias of an adapter for a matrix that was cut.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, 'bias="all"'),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias=true"),
        ({"rank_pattern": {"w1": 8}}, 'rank_pattern={"w1": 8}'),
        ({"alpha_pattern": {"w1": 16}}, 'alpha_pattern={"w1": 16}'),
        ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\]"),
        ({"layers_to_transform": 0}, "layers_to_transform=0"),
        ({"exclude_modules": ["w2"]}, r'exclude_modules=\["w2"\]'),
        ({"trainable_token_indices": {"wte": [3]}}, r"trainable_token_indices="),
        ({"use_qalora": True}, "use_qalora=true"),
        # These change the weights that the adapters are put on.
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights="olora"'),
        ({"target_modules": [*ALL, "lm_head"]}, "no module is called lm_head"),
        ({"target_modules": [*ALL, "wte"]}, "no module is called wte"),
        ({"target_modules": r".*(w1|lm_head)"}, "lm_head.lora_A.weight is not known"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save ln_f"),
    ],
)
def test_what_peft_can_and_we_cannot_is_named(tmp_path: Path, settings: Any, problem: str) -> None:
    config = original.LoraConfig(**{"r": 4, "target_modules": ALL, **settings})
    model = original.get_peft_model(torch_base(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with on_mesh(), pytest.raises(ValueError, match=problem):
        peft.read(tmp_path, base())


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal"])
def test_how_adapters_began_does_not_matter(tmp_path: Path, how: Any) -> None:
    config = original.LoraConfig(r=4, target_modules=["w1"], init_lora_weights=how)
    original.get_peft_model(torch_base(), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / adapter_config.SETTINGS).read_text())["init_lora_weights"] == how
    assert adapter_config.read_shape(tmp_path, CONFIG.num_layers).scale == 2


def test_every_field_of_peft_is_decided() -> None:
    """A field that a new version brings is looked at before this passes again."""
    fields = {field.name for field in dataclasses.fields(original.LoraConfig)}
    kinds = (adapter_config.INERT, adapter_config.READ, adapter_config.JUDGED)
    decided = frozenset().union(*kinds, adapter_config.REFUSED)
    assert not fields - decided
    assert sum(map(len, (*kinds, adapter_config.REFUSED))) == len(decided)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True", "ignore:.*keys did not match")
@pytest.mark.parametrize(
    "settings",
    [
        {"fan_in_fan_out": True},
        {"exclude_modules": ["lm_head"]},
        {"rank_pattern": {"c_proj": 64}, "alpha_pattern": {".*": 8}},
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    ],
)
def test_fields_that_change_nothing_in_peft_either(tmp_path: Path, settings: Any) -> None:
    config = original.LoraConfig(r=4, lora_alpha=8, target_modules=["w1"], **settings)
    model = trained(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / adapter_config.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with on_mesh():
        ours = our_logits(peft.read(tmp_path, base()))
    assert distance(ours, torch_logits(model)) < TOLERANCE
