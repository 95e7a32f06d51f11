"""From GPTQ to GGUF, by `to_hf --dequantise --as qwen2` and llama.cpp's converter: equal logits."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import qwen_jax
from convert import from_hf, to_hf
from tests.tools.make_checkpoint import PRESETS, make_checkpoint

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_channels": 64,
    "seq_length": 512,
}
TEXT = "The whale, 你好 world! It's 12 o'clock, <|im_end|>\n\n  and he said: "
# Of the largest logit. Weights and activations are rounded to float16, by up to 2^-11; in q8_0, by
# up to 1/254 of the largest of 32, which is some 2.5 of their deviations.
TOLERANCE = {"f16": 1e-3, "q8_0": 3e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of 4 bits, with the published vocabulary."""
    path = tmp_path_factory.mktemp("model")
    preset = PRESETS["demo"] | SIZES
    make_checkpoint(path / "gptq", preset, dtype="float16", bits=4, tokenizer=True)
    assert from_hf.main([str(path / "gptq"), str(path / "model")]) == 0
    return path / "model"


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """Its floats under the names of Qwen2."""
    folder = model.with_name("qwen2")
    assert to_hf.main([str(model), str(folder), "--dequantise", "--as", "qwen2"]) == 0
    return folder


@pytest.mark.parametrize("kind", TOLERANCE)
def test_ids_and_logits_are_ours(model: Path, folder: Path, kind: str, tmp_path: Path) -> None:
    """The converter accepts the folder, and knows its tokenizer."""
    converter = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    file = tmp_path / "model.gguf"
    command = [sys.executable, converter, folder, "--outtype", kind, "--outfile", file]
    subprocess.run(command, check=True)
    ours = qwen_jax.load(model, "float32", attention="xla")
    ids = ours.tokenizer.encode(TEXT, allowed_special="all")
    theirs = llama_cpp.Llama(str(file), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    theirs.eval(ids)
    got, wanted = theirs.scores[: len(ids)], np.asarray(ours.logits([ids]))[0]
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < TOLERANCE[kind]
