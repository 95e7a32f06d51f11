"""Adapters over HTTP with a real engine, whose rows have different ones in one step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from starlette.testclient import TestClient

import qwen_jax
from convert import from_hf
from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import adapter_files
from qwen_jax.engine import from_model
from qwen_jax.serve.app import application
from qwen_jax.serve.served import Defaults, Name
from tests.generate.test_load_adapter import adapters_of
from tests.support import launch

pytestmark = pytest.mark.slow
PROMPTS = [[5, 6, 7], list(range(40, 75)), [9] * 20]
NEW = 12


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("moby") / "ckpt"
    assert from_hf.main([str(launch.ROOT / "examples/moby_dick/model"), str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def folders(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of two adapters of different strength, both of which change much."""
    root, config = tmp_path_factory.mktemp("adapters"), checkpoint.load_config(ckpt)
    with meshes.entered(meshes.make()):
        for name, factor in (("poet", 4), ("critic", 6)):
            made = jax.tree.map(lambda x, factor=factor: factor * x, adapters_of(config))
            adapter_files.write(root / name, made)
    return {name: root / name for name in ("poet", "critic")}


@pytest.fixture(scope="module")
def client(ckpt: Path, folders: dict[str, Path]) -> Iterator[TestClient]:
    model = qwen_jax.load(ckpt, dtype="float32", max_length=128)
    engine = from_model.make(model, adapters=folders, rows=4, cache_gb=0.02)
    assert engine is not None and model.tokenizer is not None
    app, _ = application(
        engine,
        model.tokenizer,
        vocab_size=model.config.vocab_size,
        names=[Name(name="base"), *(Name(name=name, adapter=name) for name in folders)],
        defaults=Defaults(temperature=0.0, max_new_tokens=NEW, chat_stops=(), text_stops=()),
    )
    engine.start()
    with TestClient(app) as client:
        yield client
    engine.close()


def test_the_models_name_chooses_the_adapter(
    client: TestClient, ckpt: Path, folders: dict[str, Path]
) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [x["id"] for x in listed] == ["base", *folders]

    def answer(case: tuple[str, int]) -> list[int]:
        name, number = case
        body = {"model": name, "prompt": PROMPTS[number], "max_tokens": NEW}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    cases = [(name, number) for name in ("base", *folders) for number in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = dict(zip(cases, pool.map(answer, cases), strict=True))
    for name in ("base", *folders):
        model = qwen_jax.load(ckpt, dtype="float32", adapter=folders.get(name))
        wanted = model.generate(PROMPTS, max_new_tokens=NEW)
        for number in range(len(PROMPTS)):
            assert found[name, number] == list(wanted[number])[:NEW], (name, number)
    assert len({str(found[name, 1]) for name in ("base", *folders)}) == 3
    answer_of_nobody = client.post("/v1/completions", json={"model": "muse", "prompt": "a"})
    assert answer_of_nobody.status_code == 404
