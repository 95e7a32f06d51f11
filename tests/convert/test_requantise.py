"""An adapter merged into a quantised model, which is quantised again: as in separate steps, after
kills too.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import conversion, requantise, to_hf
from qwen_jax import checkpoint, meshes, model
from qwen_jax.checkpoint import adapter_config, peft
from qwen_jax.model import lora
from qwen_jax.quantise import __main__ as quantise
from qwen_jax.quantise import output
from qwen_jax.quantise.algorithm import Order, Scheme
from qwen_jax.runtime import paths
from tests.support.conversion import back, contents, edit, last_line, same, tensors, there
from tests.support.vocabulary import write_tiny_vocab
from tests.tools.make_checkpoint import PRESETS, make_checkpoint

# All matrices have one shape, so that one program rounds them.
SIZES = {"vocab_size": 512, "hidden_size": 128, "kv_channels": 64, "intermediate_size": 256}
SIZES |= {"num_hidden_layers": 1, "seq_length": 32}
END = {"eos_token_id": 261, "pad_token_id": 261, "stop_words_ids": [[261]]}
CONFIG, GENERATION = "config.json", "generation_config.json"
FLOAT32 = ("--dtype", "float32")


def main(*arguments: Any) -> int:
    """Run to_hf, and return its exit code."""
    return to_hf.main([str(each) for each in arguments])


def quantised(*arguments: Any) -> None:
    """Run the quantiser."""
    assert quantise.main([str(each) for each in arguments]) == 0


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of floats; do not change it."""
    work = tmp_path_factory.mktemp("floats")
    make_checkpoint(work / "hf", PRESETS["tiny"] | SIZES, "float32")
    write_tiny_vocab(work / "hf" / "qwen.tiktoken")
    edit(work / "hf" / GENERATION, **END)
    there(work / "hf", work / "ckpt")
    return work / "ckpt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data, of a token a byte."""
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(60)))
    return path


@pytest.fixture(scope="module")
def integers(floats: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of 4 bits, as if converted from a file of AutoGPTQ; do not change it."""
    path = tmp_path_factory.mktemp("integers") / "ckpt"
    options = ("--bits", 4, "--group-size", 64, "--act-order", "--asymmetric", "--head", "int8")
    quantised("--ckpt", floats, "--data", text, "--out", path, *options)
    manifest = json.loads((path / "manifest.json").read_text())
    edit(path / "manifest.json", quantisation=manifest["quantisation"] | {"zeros": "v1"})
    said = {"bits": 4, "group_size": 64, "sym": False, "desc_act": True}
    edit(path / CONFIG, quantization_config=said | {"quant_method": "gptq"})
    (path / "quantize_config.json").write_text(json.dumps(said))
    return path


def adapter_of(path: Path, floats: Path, **options: Any) -> Path:
    """Write an adapter that changes all matrices."""
    decoder = checkpoint.load(floats)
    with meshes.entered(meshes.make()):
        groups = adapter_config.targets(["c_attn", "c_proj", "w1", "w2"], 1)
        made = lora.create(
            model.stack(decoder), groups, rank=2, alpha=4.0, key=jax.random.key(0), **options
        )
        peft.write(path, jax.tree.map(lambda x: x + 0.02, made))
    return path


@pytest.fixture(scope="module")
def adapter(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with settings of its own."""
    path = adapter_of(tmp_path_factory.mktemp("adapters") / "adapter", floats)
    settings = json.loads((floats / GENERATION).read_text())
    (path / GENERATION).write_text(json.dumps(settings | {"top_p": 0.25}))
    return path


def beside(dst: Path) -> Path:
    """The model directory that lies beside the export until this is complete."""
    return dst.with_name(f"{dst.name}.requantised")


def test_integers(
    integers: Path, adapter: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As merged into floats, quantised and exported one after the other."""
    dst = tmp_path / "dst"
    assert main(integers, dst, "--adapter", adapter, "--requantise", text, "--verify") == 0
    *before, whole, error, compared = capfd.readouterr().err.strip().splitlines()
    assert (
        "note: the head has 8 bits here; lm_head.weight holds the floats they stand for" in before
    )
    assert whole == f"{dst} is complete" and not beside(dst).exists()
    assert "4 bits: mean relative output error of the matrices 0." in error
    assert (
        "beside the merged floats, on " in compared and " tokens of held-out rows: KL" in compared
    )

    back(integers, tmp_path / "hf", "--dequantise", "--adapter", str(adapter), *FLOAT32)
    there(tmp_path / "hf", tmp_path / "merged")
    options = ("--bits", 4, "--group-size", 64, "--act-order", "--asymmetric")
    quantised("--ckpt", tmp_path / "merged", "--data", text, "--out", tmp_path / "again", *options)
    back(tmp_path / "again", tmp_path / "apart")
    assert same(tensors(dst), tensors(tmp_path / "apart"))
    assert not same(tensors(dst), exported(integers, tmp_path / "before"))

    said = json.loads((dst / CONFIG).read_text())["quantization_config"]
    assert said == json.loads((tmp_path / "apart" / CONFIG).read_text())["quantization_config"]
    assert said["desc_act"] and not said["sym"]
    assert not (dst / "quantize_config.json").exists()
    assert json.loads((dst / GENERATION).read_text())["top_p"] == 0.25
    there(dst, tmp_path / "back")
    for name in ("dst", "apart"):
        figures = json.loads((tmp_path / name / output.REPORT).read_text())
        assert figures["complete"] and f"KL {figures['kl']:.4g}" in compared


def exported(ckpt: Path, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a model directory."""
    back(ckpt, path)
    return tensors(path)


@pytest.mark.slow
def test_floats(floats: Path, text: Path, tmp_path: Path) -> None:
    """With an embedding and a head of the adapter; the quantiser alone merges as well."""
    adapter = adapter_of(tmp_path / "adapter", floats, embeddings=True)
    dst = tmp_path / "dst"
    options = ("--adapter", adapter, "--requantise", text)
    assert main(floats, dst, *options, "--bits", 4, "--dtype", "float16") == 0
    back(floats, tmp_path / "hf", "--adapter", str(adapter))
    there(tmp_path / "hf", tmp_path / "merged")
    options = ("--data", text, "--bits", 4, "--group-aware")
    quantised("--ckpt", tmp_path / "merged", "--out", tmp_path / "again", *options)
    back(tmp_path / "again", tmp_path / "apart", "--dtype", "float16")
    found = tensors(dst)
    assert same(found, tensors(tmp_path / "apart"))
    table = found["transformer.wte.weight"]
    assert not np.array_equal(
        table, exported(floats, tmp_path / "before")["transformer.wte.weight"]
    )
    made = ("--ckpt", floats, "--out", tmp_path / "made", "--adapter", adapter)
    quantised(*made, *options)
    back(tmp_path / "made", tmp_path / "direct", "--dtype", "float16")
    assert same(found, tensors(tmp_path / "direct"))


def test_a_killed_command_goes_on(
    integers: Path,
    adapter: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed while it quantises, while it exports, and before it removes what it made."""
    command = ("--adapter", adapter, "--requantise", text)
    whole, dst = tmp_path / "whole", tmp_path / "dst"
    assert main(integers, whole, *command) == 0

    def dying(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            raise KeyboardInterrupt

        return run

    def once(place: Any, name: str, function: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, function)
            assert main(integers, dst, *command) == 130

    once(output.Output, "note", dying(output.Output.note))
    assert (beside(dst) / "unfinished.json").exists() and not dst.exists()
    once(conversion, "copy", dying(conversion.copy))
    assert (dst / "unfinished.json").exists()
    stamp = (beside(dst) / "manifest.json").stat()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert main(integers, dst, "--adapter", adapter, "--requantise", other) == 1
    assert "dst.requantised is a whole model directory already" in last_line(capfd)
    once(paths, "remove_tree", dying(lambda _: None))
    assert (beside(dst) / "manifest.json").stat() == stamp
    assert not (dst / "unfinished.json").exists()
    capfd.readouterr()
    assert main(integers, dst, *command) == 0
    *_, complete, _, compared = capfd.readouterr().err.strip().splitlines()
    assert complete == f"{dst} is complete" and "perplexity" in compared
    assert not beside(dst).exists() and contents(dst) == contents(whole)


def manifest(**linears: Any) -> dict[str, Any]:
    """A manifest with matrices of 128 outputs: inputs, bits (0: floats), groups, further fields."""
    found: dict[str, Any] = {"kinds": {}, "shapes": {"embedding": [512, 128]}}

    def add(path: str, inputs: int, bits: int, groups: int, *fields: str) -> None:
        if not bits:
            found["shapes"][path] = [128, inputs]
            return
        found["kinds"][path] = f"grouped{bits}"
        arrays = {"codes": [inputs * bits // 32, 128], "scales": [groups, 128]}
        arrays |= {"zeros": [groups, 128], "order": [inputs]}
        for field in ("codes", "scales", *fields):
            found["shapes"][f"{path}.{field}"] = arrays[field]

    for name, linear in linears.items():
        add(f"layers.0.ffn.{name}", *linear)
    return found


def scheme_of(**linears: Any) -> tuple[Scheme, dict[str, int]]:
    args = to_hf.parser().parse_args(["src", "dst", "--requantise", "x"])
    return requantise._scheme(args, manifest(**linears))


def test_the_scheme_of_the_source() -> None:
    up, down = (128, 4, 2), (256, 4, 4)
    assert scheme_of(up=up, down=down) == (Scheme(4, 64, order=Order.GROUPS), {})
    assert scheme_of(up=(128, 8, 1)) == (Scheme(8, 128, order=Order.GROUPS), {})
    assert scheme_of(up=(128, 8, 1), down=(256, 8, 1)) == (Scheme(8, -1, order=Order.GROUPS), {})
    # Groups of one layer may lie in order by chance.
    found = scheme_of(up=(*up, "zeros"), down=(*down, "zeros", "order"))
    assert found == (Scheme(4, 64, symmetric=False, order=Order.IMPORTANCE), {})
    found = scheme_of(up=up, gate=up, down=(256, 8, 4), other=(256, 0, 0))
    others = {"layers.0.ffn.down": 8, "layers.0.ffn.other": 16}
    assert found == (Scheme(4, 64, order=Order.GROUPS), others)
    with pytest.raises(ValueError, match=r"^the matrices of src have groups of 32 and 64: "):
        scheme_of(up=up, down=(256, 4, 8))


BAD = {
    "alone": ("integers", {"--adapter": None}, "--requantise: add the --adapter to merge"),
    "dequantise": ("integers", {"--dequantise": ()}, "writes integers and --dequantise floats"),
    "qwen2": ("integers", {"--as": ("qwen2",)}, "--as qwen2: --requantise writes the generation"),
    "processes": ("integers", {"--distributed": ()}, "--requantise runs as one process"),
    "no bits": ("floats", {}, "is of floats: add --bits 4 or 8"),
    "bits": ("integers", {"--bits": ("8",)}, "is quantised, and keeps its bits: leave it out"),
    "zeros": ("floats", {"--bits": ("4",), "--zeros": ("v2",)}, "has no zeros of its own"),
    "no data": ("integers", {"--requantise": ("none.txt",)}, "none.txt"),
    "little data": ("integers", {"--requantise": ("few.txt",)}, "which are 1 rows of 32"),
    "no adapter": ("integers", {"--adapter": ("nowhere",)}, "nowhere"),
    "not asked": ("floats", {"--requantise": None, "--bits": ("4",)}, "--bits applies to"),
    "settings": ("integers", {"--adapter": ("wrong",)}, "eos_token_id 512: ids are 0 to 511"),
    "shapes": ("integers", {"--adapter": ("larger",)}, "is not of this model"),
}


@pytest.mark.parametrize(("source", "changes", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(
    source: str,
    changes: dict[str, Any],
    message: str,
    adapter: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before anything is written."""
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("few")
    for name in ("wrong", "larger"):
        shutil.copytree(adapter, name)
    edit(Path("wrong") / GENERATION, eos_token_id=512)
    edit(Path("larger") / "adapter_config.json", r=3)
    before = contents(tmp_path)
    options = {"--adapter": (adapter,), "--requantise": (text,)} | changes
    given = [x for key, values in options.items() if values is not None for x in (key, *values)]
    assert main(request.getfixturevalue(source), "dst", *given) in (1, 2)
    assert message in last_line(capfd)
    assert contents(tmp_path) == before and not Path("dst").exists()


def test_a_folder_that_is_there_is_refused_at_once(
    integers: Path, adapter: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "notes.txt").write_text("mine")
    assert main(integers, dst, "--adapter", adapter, "--requantise", text) == 1
    assert "is neither empty nor unfinished work" in last_line(capfd)
    assert [file.name for file in tmp_path.iterdir()] == ["dst"]
