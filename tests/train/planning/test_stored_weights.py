"""Plans of models whose layers are integers: bytes, shares, and what cannot be planned."""

import jax.numpy as jnp
import pytest

from qwen_jax.config.presets import PRESETS
from qwen_jax.leaves.grouped import Grouped
from tests.support.conversion import last_line
from tests.support.tiny import on_mesh
from train import plan
from train.planning import stored_weights
from train.planning.flops import nbytes

# The least memory of a GPU, in GB, with which the original generates 2,048 tokens: its README.
ORIGINAL = {"qwen-1.8b": 2.9, "qwen-7b": 8.2, "qwen-14b": 13.0, "qwen-72b": 48.9}


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


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_originals_least_memory_holds_the_weights_and_their_cache(name):
    """Of 2,048 tokens, in bfloat16, with weights of 4 bits."""
    config = PRESETS[name]
    cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * 2048
    needed = stored_weights.size(config, 2, form="int4") + cache
    assert needed / 1e9 < ORIGINAL[name]


def test_shares():
    config = PRESETS["qwen-7b"]
    share = stored_weights.table_share(config, 2, form="int4")
    assert 0.21 < share < 0.22
    assert stored_weights.multiplied_share(config, 2, form="int4") == 1 - share


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
