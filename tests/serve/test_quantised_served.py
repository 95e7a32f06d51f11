"""A server of weights of 4 bits with a head, keys and values in int8, and two adapters."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

import qwen_jax
from qwen_jax import checkpoint
from qwen_jax.checkpoint import adapter_files
from qwen_jax.engine import from_model
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.serve.app import application
from qwen_jax.serve.served import Defaults, Name
from tests.generate.test_load_adapter import adapters_of
from tests.support.conversion import edit, there
from tests.support.gptq import GPTQ
from tests.support.served_app import TOKENIZER, payloads
from tests.support.tiny import on_mesh

PROMPTS = [[5, 6, 7], list(range(40, 60))]
NEW = 6


class Quantised(NamedTuple):
    """A model directory of 4 bits with a head in int8, and two adapters by name.

    mesh: the sizes of the mesh that it is loaded on.
    """

    ckpt: Path
    adapters: dict[str, Path]
    mesh: dict[str, int]

    def load(self, adapter: str | None) -> qwen_jax.LanguageModel:
        """Load it with an adapter or none."""
        folder = None if adapter is None else self.adapters[adapter]
        kept = {"cache_dtype": "int8", "max_length": 64, "dequantise": False}
        with on_mesh(**self.mesh):
            return qwen_jax.load(self.ckpt, "float32", adapter=folder, **kept)


def first_layer(path: Path) -> None:
    """Write the golden folder of 4 bits with one layer, whose programs are compiled sooner."""
    shutil.copytree(GPTQ / "int4", path)
    edit(path / "config.json", num_hidden_layers=1)
    found = load_file(path / "model.safetensors")
    first = {name: x for name, x in found.items() if ".h." not in name or ".h.0." in name}
    save_file(first, path / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=[{}, pytest.param({"tp": 2}, marks=pytest.mark.slow)])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    root = tmp_path_factory.mktemp("quantised")
    first_layer(root / "source")
    there(root / "source", root / "ckpt", "--head", "int8")
    with on_mesh():
        made = adapters_of(checkpoint.load_config(root / "ckpt"))
        for name, factor in (("poet", 4), ("critic", 6)):
            scaled = jax.tree.map(lambda x, factor=factor: factor * x, made)
            adapter_files.write(root / name, scaled)
    adapters = {name: root / name for name in ("poet", "critic")}
    return Quantised(root / "ckpt", adapters, request.param)


@pytest.fixture(scope="module")
def client(quantised: Quantised) -> Iterator[TestClient]:
    model = quantised.load(None)
    assert isinstance(model.decoder.layers[0].attn.q, Grouped)
    assert isinstance(model.decoder.head, Int8)
    engine = from_model.make(model, adapters=quantised.adapters, rows=4, cache_gb=0.01)
    assert engine is not None
    app, _ = application(
        engine,
        TOKENIZER,
        vocab_size=model.config.vocab_size,
        names=[Name(name="base"), *(Name(name=x, adapter=x) for x in quantised.adapters)],
        defaults=Defaults(temperature=0.0, max_new_tokens=NEW),
    )
    engine.start()
    with TestClient(app) as client:
        yield client
    engine.close()


def test_replies_are_those_of_generate(quantised: Quantised, client: TestClient) -> None:
    def answer(case: tuple[str, int, bool]) -> list[int]:
        name, number, stream = case
        body = {"model": name, "prompt": PROMPTS[number], "max_tokens": NEW, "stream": stream}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        parts = payloads(answer.text) if stream else [answer.json()]
        return [id for part in parts for x in part["choices"] for id in x["token_ids"]]

    listed = [x["id"] for x in client.get("/v1/models").json()["data"]]
    assert listed == ["base", *quantised.adapters]
    names = quantised.adapters  # engines of integers without one are tested in tests/engine
    cases = [(name, n, stream) for name in names for n in (0, 1) for stream in (False, True)]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = dict(zip(cases, pool.map(answer, cases), strict=True))
    for name in names:
        wanted = quantised.load(name).generate(PROMPTS, max_new_tokens=NEW)
        for number, ids in enumerate(wanted):
            for stream in (False, True):
                assert found[name, number, stream] == [*ids], (name, number, stream)
    assert len({str(found[name, 1, False]) for name in names}) == 2
