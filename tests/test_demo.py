"""The model that comes along: that it has learned, can be made again, and learns further."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_jax
from convert import from_hf
from qwen_jax import attention, chat, checkpoint, meshes, model
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.runtime import records
from tests.support.bigram import held_out_loss
from tests.support.conversion import contents
from tests.support.training import curve, succeed, weights
from train import data, pretrain, sft, step, tokenizer
from train.data import batches, packing, token_cache

HOME = Path(__file__).parent.parent / "examples" / "moby_dick"
TEXT = HOME / "moby_dick.jsonl"
SHARE = 0.05


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "ckpt"
    assert from_hf.main([str(HOME / "model"), str(path), "--dtype", "float32"]) == 0
    return path


def documents(vocabulary: Tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What a run is trained on and what it holds out, as ids."""
    ids = [np.array(data.text_example(vocabulary, x.value)) for x in records.read(TEXT)]
    kept, out = packing.split(len(ids), SHARE, seed=0)
    return [ids[i] for i in kept], [ids[i] for i in out]


@pytest.mark.slow
def test_it_knows_more_than_pairs_of_tokens(demo):
    """Of chapters that it has not read; by far."""
    config = checkpoint.load_config(demo)
    vocabulary = checkpoint.load_tokenizer(demo)
    train, held_out = documents(vocabulary)

    def text(record: records.Record) -> tuple[list[int], None]:
        return data.text_example(vocabulary, record.value), None

    cache = token_cache.make(
        [TEXT], vocabulary, encoding=token_cache.Encoding(text, {"data": "text"})
    )
    chosen = packing.split(len(cache), SHARE, seed=0)[1]
    rows = packing.Rows(cache, 256, pack="joined", examples=chosen)
    evaluate = step.make_evaluation(attention.get("xla"), dtype="float32")
    batch = jax.tree.map(lambda *x: np.stack(x), *[rows[i] for i in range(len(rows))])
    with meshes.entered(meshes.make(meshes.parse(None))):
        decoder = model.stack(checkpoint.load(demo))
        found = float(evaluate(decoder, batches.place(batch)).loss)
    assert found < held_out_loss(train, held_out, config.vocab_size) - 0.5


@pytest.mark.slow
def test_the_recipe_is_whole(tmp_path):
    """Its script, but for most of the steps: the same vocabulary, a model of the same layout."""
    script = [HOME / "train.sh", tmp_path, "--steps", "2", "--warmup", "1", "--eval-every", "0"]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", *map(str, script)], check=True, env=environment)
    for name in ("qwen.tiktoken", "config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (HOME / "model" / name).read_bytes(), name
    made, kept = (load_file(x / "model.safetensors") for x in (tmp_path / "hf", HOME / "model"))
    shapes = [{name: (x.shape, x.dtype) for name, x in tensors.items()} for tensors in (made, kept)]
    assert shapes[0] == shapes[1]
    held_out = curve(tmp_path / "run", "held_out")
    assert list(held_out) == [2] and held_out[2]["loss"] < np.log(1280) + 0.2


@pytest.mark.slow
@pytest.mark.release
def test_the_recipe_learns_from_random_weights(tmp_path):
    """Smaller than the model that comes along, so that it takes a minute: it passes the model of
    pairs of tokens that has seen the same text.
    """
    given = ["--data", str(TEXT), "--size", "512", "--out", str(tmp_path / "qwen.tiktoken")]
    succeed(given, tokenizer)
    config = json.loads((HOME / "config.json").read_text())
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 352, "vocab_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {
        "model": tmp_path / "config.json",
        "tokenizer": tmp_path / "qwen.tiktoken",
        "data": TEXT,
        "eval-share": SHARE,
        "length": 128,
        "rows": 16,
        "steps": 700,
        "warmup": 30,
        "learning-rate": 6e-3,
        "dtype": "float32",
        "remat": "none",
        "mesh": "fsdp=1",
        "out": tmp_path / "run",
    }
    succeed([str(x) for name, value in options.items() for x in (f"--{name}", value)], pretrain)
    found = curve(tmp_path / "run", "held_out")[700]["loss"]
    pairs = held_out_loss(*documents(Tokenizer.from_file(tmp_path / "qwen.tiktoken")), 768)
    assert found < pairs, "no better than a table of pairs"


@pytest.mark.slow
@pytest.mark.release
def test_adapters_teach_a_format(demo, tmp_path):
    """Prompts that were never seen are answered in it, of which before none was; what the adapters
    are attached to stays as it was.
    """
    numbers = random.Random(0).sample(range(100, 1000), 800)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": r}]}
        for n, r in ((n, reply(n)) for n in numbers[100:])
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    before = contents(demo)
    assert exact(demo, numbers[:100]) == 0
    options: dict[str, Any] = {
        "recipe": "sft_lora",
        "ckpt": demo,
        "data": tmp_path / "chats.json",
        "length": 48,
        "rows": 32,
        "steps": 140,
        "learning-rate": 4e-3,
        "lora-rank": 16,
        "loss-on": "assistant",
        "dtype": "float32",
        "remat": "none",
        "mesh": "fsdp=1",
        "out": tmp_path / "run",
    }
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    succeed([*given, "--merge"], sft)
    assert contents(demo) == before
    base, taught = weights(demo), weights(tmp_path / "run" / "model")
    for name, value in base.items():
        added = taught[name] - value
        if name in ("embedding", "head"):  # it has not seen ChatML
            assert added.any()
        elif value.ndim == 2:
            assert np.linalg.matrix_rank(added, tol=1e-5) <= 16, name
        else:
            assert not added.any(), name
    assert exact(tmp_path / "run" / "model", numbers[:100]) > 0.9


def reply(number: int) -> str:
    return f"<{'-'.join(str(number))}>"


def exact(ckpt: Path, numbers: list[int]) -> float:
    """The share of prompts that are answered to the letter, and no more."""
    asked = qwen_jax.load(ckpt)
    vocabulary = asked.need_tokenizer()
    system = "You are a helpful assistant."
    prompts = [chat.make_context(vocabulary, str(n), system=system)[1] for n in numbers]
    stop = (vocabulary.im_end_id, vocabulary.eod_id)
    rows = asked.generate(prompts, max_new_tokens=12, stop=stop)
    said = [vocabulary.decode([int(i) for i in row], skip_special_tokens=True) for row in rows]
    return sum(s == reply(n) for s, n in zip(said, numbers, strict=True)) / len(numbers)
