"""Models quantised block by block: beside the released tool's, stopped and resumed, on a mesh."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_jax
from convert import from_hf, to_hf
from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import CheckpointError, directory
from qwen_jax.leaves.weights import Weight
from qwen_jax.quantise import calibration, observing, output
from qwen_jax.quantise import run as quantise_run
from qwen_jax.quantise.algorithm import Hessian, Order, Scheme
from qwen_jax.quantise.calibration import Rows
from qwen_jax.quantise.run import Settings, run
from qwen_jax.quantise.source import Source
from tests.support.conversion import contents
from tests.support.gptq import GPTQ
from tests.support.tiny import on_mesh

Figures = dict[str, Any]
BY_IMPORTANCE = Scheme(group_size=64, symmetric=False, order=Order.IMPORTANCE)


@functools.cache
def figures_of(case: str) -> Figures:
    """The scalars of the released tool's model."""
    return json.loads((GPTQ / "model.json").read_text())["cases"][case]


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """The arrays of the golden model: its calibration data, its logits."""
    return load_file(GPTQ / "model.safetensors")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in floats; do not change it."""
    path = tmp_path_factory.mktemp("floats") / "ckpt"
    assert from_hf.main([str(GPTQ / "float16"), str(path)]) == 0
    return path


def rows(count: int = 16, first: int = 0) -> Rows:
    """Some of the golden calibration rows."""
    return calibration.of_tokens(arrays()["calibration.tokens"][first : first + count])


def quantised(floats: Path, out: Path, scheme: Scheme, **settings: Any) -> Figures:
    """Quantise the golden model on all its rows."""
    return run(Settings(floats, out, scheme, **settings), rows(), held_out=None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def kl(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The divergence of each token's prediction."""
    p, q = log_softmax(before), log_softmax(after)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def linear_errors(found: Figures) -> list[float]:
    """The relative output error of each linear layer of the original's, in its order."""
    errors = []
    for layer in range(3):
        squares = {
            name: np.array(found["layers"][f"layers.{layer}.{name}"]["mean_squares"])
            for name in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.gate", "ffn.down")
        }
        joined = sum(squares.pop(f"attn.{name}") for name in "qkv")
        errors += [float(np.sqrt(a / b)) for a, b in (joined, *squares.values())]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_is_nearer_than_that_of_the_tool(bits: int, floats: Path, tmp_path: Path) -> None:
    found = quantised(floats, tmp_path / "out", Scheme(bits=bits))
    tool = figures_of(f"int{bits}")
    theirs = [each["relative_output_error"] for each in tool["layers"].values()]
    assert np.mean(linear_errors(found)) < np.mean(theirs)
    assert np.all(np.array(found["blocks"]) < tool["block_output_relative_error"])

    after = np.asarray(qwen_jax.load(tmp_path / "out").logits(arrays()["tokens"][None]))[0]
    assert kl(arrays()["float.logits"], after).mean() <= 1.03 * tool["kl_from_float"]

    # These 64 tokens say little. On the calibration data, the tool's model is beaten clearly.
    assert from_hf.main([str(GPTQ / f"int{bits}"), str(tmp_path / "tool")]) == 0
    tokens = arrays()["calibration.tokens"]
    before, theirs = (
        np.asarray(qwen_jax.load(path).logits(tokens)) for path in (floats, tmp_path / "tool")
    )
    assert found["kl"] < 0.95 * kl(before, theirs)[:, :-1].mean()


def test_a_run_that_died_early_has_no_figures_of_another(
    floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that the quantiser made has its own."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(floats, source)
    (source / output.REPORT).write_text("{}")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.store, "write_metadata", dies)
    for resume in (False, True):  # which begins again
        with pytest.raises(KeyboardInterrupt):
            run(Settings(source, out, BY_IMPORTANCE, resume=resume), rows(4), held_out=None)
        assert directory.CONFIG in directory.names(out) and not (out / output.REPORT).exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_model(
    floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    few: Any = {"bits_of": {"layers.2.*": 16, "layers.*.ffn.*": 16}, "int8_head": True}

    def start(out: Path, **settings: Any) -> Figures:
        held_out = rows(2, first=4)
        found = Settings(floats, out, BY_IMPORTANCE, **few, **settings)
        return run(found, rows(4), held_out=held_out)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = start(whole)
    note = output.Output.note
    with monkeypatch.context() as patch:  # before all small files are there
        patch.setattr(output.directory, "carried", dies)
        with pytest.raises(KeyboardInterrupt):
            start(stopped)
    assert directory.names(stopped) == {directory.UNFINISHED}

    def dying(self: output.Output, figures: Figures) -> None:
        note(self, figures)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "note", dying)
        with pytest.raises(KeyboardInterrupt):
            start(stopped, resume=True)
    with pytest.raises(CheckpointError, match=r"an unfinished quantisation: .* with --resume"):
        qwen_jax.load(stopped)
    with pytest.raises(ValueError, match="is an unfinished quantisation: add --resume"):
        start(stopped)
    begun = json.loads((stopped / directory.UNFINISHED).read_text())
    patterns = dict(reversed(few["bits_of"].items()))  # the last one that matches holds
    for key in ("mesh", *begun["run"]):
        other = {**begun, "run": {**begun["run"], "bits_of": patterns}}
        if key != "bits_of":
            other = {**begun, "run": {**begun["run"], key: 0}, key: 0}
        directory.write_json(stopped / directory.UNFINISHED, other)
        with pytest.raises(ValueError, match=f"was begun with {key} .*: give the command that beg"):
            start(stopped, resume=True)
    directory.write_json(stopped / directory.UNFINISHED, begun)
    found = start(stopped, resume=True)
    assert found == expected and found["complete"]
    assert json.loads((stopped / output.REPORT).read_text()) == found

    # The streams of activations are the passes of the two models, and so are their predictions.
    tokens = rows(2, first=4).tokens
    before, after = (np.asarray(qwen_jax.load(path).logits(tokens)) for path in (floats, stopped))
    assert found["kl"] == pytest.approx(kl(before, after)[:, :-1].mean(), rel=1e-3)
    for name, logits in (("before", before), ("after", after)):
        scores = np.take_along_axis(log_softmax(logits)[:, :-1], tokens[:, 1:, None], -1)
        assert found["perplexity"][name] == pytest.approx(np.exp(-scores.mean()), rel=1e-4)

    assert contents(whole) == contents(stopped)
    manifest = json.loads((stopped / directory.MANIFEST).read_text())
    assert manifest["kinds"] == {"head": "int8"} | {
        f"layers.{i}.attn.{name}": "grouped4" for i in (0, 1) for name in "qkvo"
    }
    # Layers of floats among the others come back, too.
    assert to_hf.main([str(whole), str(tmp_path / "hf")]) == 0
    assert from_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back = contents(tmp_path / "back")
    layers = {path: x for path, x in contents(whole).items() if path.startswith("params/layers.")}
    assert layers and layers == {path: back[path] for path in layers}
    assert start(stopped, resume=True) == found, "the same command again is content"
    for settings in ({}, {"resume": True, "dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="is a whole model directory already"):
            start(stopped, **settings)


def test_inputs_are_those_of_the_quantised_model(
    floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is rounded so far, in earlier blocks and in the same one."""
    observe, run_block = observing.observe, observing.run_block
    observed: list[tuple[str, np.ndarray, np.ndarray]] = []
    passed: list[np.ndarray] = []

    def noted(hessian: Hessian, x: Any, block: Any, *, path: str, **more: Any) -> Hessian:
        observed.append((path, np.asarray(x), np.asarray(block.attn.q[...])))
        return observe(hessian, x, block, path=path, **more)

    def moved(x: Any, block: Any, **more: Any) -> Any:
        passed.append(np.asarray(run_block(x, block, **more)))
        return run_block(x, block, **more)

    monkeypatch.setattr(observing, "observe", noted)
    monkeypatch.setattr(observing, "run_block", moved)
    few = {"layers.2.*": 16, "layers.*.ffn.*": 16}
    settings = Settings(floats, tmp_path / "out", BY_IMPORTANCE, bits_of=few)
    run(settings, rows(4), held_out=None)
    assert [path for path, *_ in observed] == ["attn.q", "attn.o"] * 2
    originals = Source(floats, meshes.make())
    for number, (path, x, q) in enumerate(observed):
        layer, rounded = number // 2, path == "attn.o"
        given = np.asarray(originals.weight(f"layers.{layer}.attn.q")[...], np.float32)
        assert np.array_equal(q, given) == (not rounded)
        if layer:
            assert np.array_equal(x, passed[1]) and not np.array_equal(x, passed[0])


def test_batches_are_filled_up_with_rows_that_do_not_count(floats: Path) -> None:
    given = calibration.of_tokens(np.arange(15, dtype=np.int32).reshape(3, 5))
    given.segments[:] = [[1, 1, 2, 2, 2], [1, 1, 1, 1, 0], [1, 2, 3, 0, 0]]
    config = checkpoint.load_config(floats)
    with on_mesh():
        first, last = quantise_run._batches(given, config, size=2)
        targets = [np.asarray(quantise_run._targets(batch)) for batch in (first, last)]
    assert np.array_equal(first.tokens, given.tokens[:2])
    assert np.array_equal(last.tokens[0], given.tokens[2])
    assert np.array_equal(first.counted, given.segments[:2] > 0)
    assert np.array_equal(last.counted, [[True] * 3 + [False] * 2, [False] * 5])
    yes, no = True, False
    assert np.array_equal(targets[0], [[yes, no, yes, yes, no], [yes, yes, yes, no, no]])
    assert not targets[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("order", Order)
def test_what_is_exported_is_what_was_made(order: Order, floats: Path, tmp_path: Path) -> None:
    """A folder in the tools' format comes back as the same directory."""
    for symmetric in (True, False):
        here = tmp_path / str(symmetric)
        quantised(floats, here / "out", Scheme(symmetric=symmetric, order=order))
        assert to_hf.main([str(here / "out"), str(here / "hf")]) == 0
        assert from_hf.main([str(here / "hf"), str(here / "back")]) == 0
        tokens = arrays()["tokens"][None]
        logits = [
            np.asarray(qwen_jax.load(here / name, dtype="float32").logits(tokens))
            for name in ("out", "back")
        ]
        assert np.array_equal(*logits)
        said = json.loads((here / "hf/config.json").read_text())["quantization_config"]
        assert said["desc_act"] == (order is Order.IMPORTANCE) and said["sym"] == symmetric


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "scheme"),
    [({"fsdp": 2, "tp": 2}, BY_IMPORTANCE), ({"data": 3}, Scheme()), ({"tp": 2}, Scheme())],
)
def test_a_mesh_makes_as_good_a_model(
    sizes: dict[str, int], scheme: Scheme, floats: Path, tmp_path: Path
) -> None:
    alone = quantised(floats, tmp_path / "alone", scheme)
    with on_mesh(**sizes):
        found = quantised(floats, tmp_path / "mesh", scheme)
    for one, other in zip(linear_errors(alone), linear_errors(found), strict=True):
        assert one == pytest.approx(
            other, rel=0.02
        )  # a rounding that is a tie changes what follows
    np.testing.assert_allclose(found["blocks"], alone["blocks"], rtol=0.03)
    assert found["perplexity"]["before"] == pytest.approx(alone["perplexity"]["before"], rel=1e-4)
    logits = [
        np.asarray(qwen_jax.load(tmp_path / name, dtype="float32").logits(arrays()["tokens"][None]))
        for name in ("alone", "mesh")
    ]
    assert kl(*logits).mean() < 0.2 * kl(arrays()["float.logits"], logits[0][0]).mean()


def test_bad_input_is_refused_before_anything_is_written(floats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def start(scheme: Scheme, **settings: Any) -> None:
        run(Settings(floats, out, scheme, **settings), rows(2), held_out=None)

    for scheme, settings, message in (
        (Scheme(group_size=4), {}, "group_size 4: a word holds 8 codes of 4 bits"),
        (Scheme(group_size=96), {}, r"layers\.0\.attn\.q: group_size: 96 does not divide the 256"),
        (Scheme(), {"bits_of": {"*.mlp": 8}}, r"'\*\.mlp' names no matrix: they are layers\.N and"),
        (Scheme(), {"bits_of": {"*.q": 5}}, r"bits of '\*\.q': 5 must be 4, 8 or 16"),
        (Scheme(), {"bits_of": {"*": 16}}, "no matrix is left to be rounded"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            start(scheme, **settings)
    strange = calibration.of_tokens(np.full((2, 64), 512, np.int32))
    for given in ({"rows": strange, "held_out": None}, {"rows": rows(2), "held_out": strange}):
        with pytest.raises(ValueError, match="has token 512, and the model's vocabulary ends bef"):
            run(Settings(floats, out, Scheme()), **given)
    single = dataclasses.replace(rows(2), positions=np.zeros((2, 64), np.int32))
    with pytest.raises(ValueError, match="no row on which the models are compared has two tokens"):
        run(Settings(floats, out, Scheme()), rows(2), held_out=single)
    inside = Settings(floats, floats / "a/b", Scheme())
    with pytest.raises(ValueError, match=r"a/b is within .*ckpt: name another place"):
        run(inside, rows(2), held_out=None)
    assert not (floats / "a").exists()
    with on_mesh(context=2), pytest.raises(ValueError, match="a context axis is for training"):
        start(Scheme())
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no quantisation left there"):
        start(Scheme(), resume=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        ("layers.0.attn.k", "layers.0.attn.k: the matrix"),
        ("layers.0.attn.v_bias", "layers.0.attn.o: its input"),
        ("layers.0.ffn.down", "block 0: its output"),
        ("head", "the head's output"),
    ],
)
def test_weights_that_are_not_finite_are_said(
    damaged: str, what: str, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.weight

    def weight(self: Source, path: str) -> Weight:
        found = read(self, path)
        if path != damaged:
            return found
        return Weight(found[...].at[..., 0].set(np.nan), letters=found.letters)

    monkeypatch.setattr(Source, "weight", weight)
    few = {"layers.[12].*": 16, "layers.0.ffn.*": 16}
    settings = Settings(floats, tmp_path / "out", BY_IMPORTANCE, bits_of=few)
    with pytest.raises(ValueError, match=f"^{what} is not finite: quantise with --dtype float32"):
        run(settings, rows(4), held_out=None)
    assert not (tmp_path / "out" / directory.MANIFEST).exists()


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    assert from_hf.main([str(GPTQ / "int4"), str(path)]) == 0
    with pytest.raises(
        ValueError, match=r"is quantised already \(21 weights\): give the directory"
    ):
        run(Settings(path, tmp_path / "out", Scheme()), rows(2), held_out=None)
