"""What a start says of rows that are mostly empty, and of their length."""

import dataclasses
import re
from typing import Any

import pytest

from qwen_jax.meshes import sharding
from tests.support.tiny import tiny_config
from tests.train.data.test_packing import cached
from train.data.packing import Rows
from train.data.token_cache import TokenCache
from train.run import advice, recipes


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """40 examples of 20 to 50 tokens, 1,480 in all."""
    lengths = [20, 30, 48, 50] * 10
    return cached(tmp_path_factory.mktemp("short"), [{"ids": [1] * n} for n in lengths])


def of(cache: TokenCache, platform: str = "gpu", axes: Any = (), **changes: Any) -> list[str]:
    recipe = dataclasses.replace(recipes.sft_lora(), **changes)
    rows = Rows(cache, recipe.length, pack=recipe.pack)
    sizes = {**dict.fromkeys(sharding.AXES, 1), **dict(axes)}
    return advice.less_waste(rows, recipe, sizes=sizes, platform=platform)


def test_short_chats_a_row_each(short):
    """What is said comes true."""
    (alternatives,) = of(short)
    shorter, together = alternatives.split(" or ")
    assert shorter == "--length 64 (the longest example has 50 tokens), of which 58% are used"
    assert Rows(short, 64, pack="alone").efficiency == pytest.approx(0.58, abs=0.005)
    assert together == "--pack fitted --rows 2, with some 13 examples in a row of 512"
    assert len(Rows(short, 512, pack="fitted")) == 3, "13 and more in each"


def test_values_divide_over_the_mesh(short):
    axes = {"data": 2, "fsdp": 2, "context": 12}
    (alternatives,) = of(short, axes=axes, accumulate=2)
    shorter, together = alternatives.split(" or ")
    assert shorter.startswith("--length 96 ") and together.startswith("--pack fitted --rows 8,")


def test_what_is_full_needs_nothing(short):
    assert of(short, length=64) == of(short, pack="fitted", rows=2) == []


def test_one_row_that_holds_all(short):
    text = {"data": "text", "pack": "joined"}
    (said,) = of(short, length=4096, rows=1, **text)
    assert said == "--length 1536 (all of it has 1,480 tokens), of which 96% are used"


def test_more_rows_in_a_batch_than_there_are(short):
    (said,) = of(short, length=64, rows=64, axes={"fsdp": 3}, accumulate=1)
    assert said == "--rows 39, as a batch of 64 repeats the 40 rows"


def test_a_cpu_computes_float32(short):
    assert of(short, "cpu", length=64)[-1].startswith("--dtype float32, which CPUs compute faster")
    assert of(short, "cpu", length=64, dtype="float32") == of(short, "tpu", length=64) == []


@pytest.mark.parametrize(
    ("length", "fresh", "changes", "said"),
    [
        (16, True, {}, None),
        (8, True, {}, "--length 8: the model's config.json has seq_length 16; set it to 8 if"),
        (8, False, {}, "--length 8: .* 16; attention over more than 8 tokens is not trained"),
        (32, False, {"logn": True}, "--length 32: .* 16; generation extends the context beyond it"),
        (32, False, {}, "--length 32: .* 16; positions beyond it are new to the model"),
    ],
)
def test_a_length_that_is_not_the_models(length, fresh, changes, said):
    recipe = dataclasses.replace(recipes.sft(), length=length)
    found = advice.other_length(recipe, tiny_config(**changes), fresh=fresh)
    assert found is None if said is None else re.match(said, found or "")
