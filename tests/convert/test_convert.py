"""Both converters: round trips, layout, verification, and continuing what was stopped."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import (
    conversion,
    copying,
    export_plan,
    folder,
    from_hf,
    import_plan,
    names,
    to_hf,
)
from convert.export_plan import ExportPlan
from qwen_jax import checkpoint, meshes
from qwen_jax import model as model_
from qwen_jax.checkpoint import adapter_config, directory, peft, saving, store
from qwen_jax.config.presets import PRESETS
from qwen_jax.model import lora
from qwen_jax.runtime import lock, paths
from tests.programs.stopped import BLOCK, stopping
from tests.support.conversion import (
    GOLDEN,
    INDEX,
    ROOT,
    back,
    contents,
    edit,
    flip,
    last_line,
    raises,
    same,
    tensors,
    there,
)
from tests.support.launch import environment
from tests.support.vocabulary import write_tiny_vocab
from tests.tools.make_checkpoint import make_checkpoint

STOPPED = "tests/programs/stopped.py"


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "source"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    there(GOLDEN, path)
    return path


# Round trips


@pytest.mark.parametrize("mesh", [None, "tp=2", "fsdp=4,tp=2"])
@pytest.mark.parametrize("size", ["5GB", "200KB", "1KB"])
def test_every_byte_comes_back(tmp_path, mesh, size):
    options = ["--mesh", mesh] if mesh else []
    there(GOLDEN, tmp_path / "model", *options, "--verify")
    back(tmp_path / "model", tmp_path / "hf", "--max-shard-size", size, "--verify")
    assert same(tensors(GOLDEN), tensors(tmp_path / "hf"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (GOLDEN / name).read_bytes()
    leftovers = {"unfinished.json", "manifest.json"} & {f.name for f in (tmp_path / "hf").iterdir()}
    assert not leftovers and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_generated_checkpoints_of_every_dtype(tmp_path, preset, dtype):
    make_checkpoint(tmp_path / "hf", preset, dtype, max_shard_size=300_000)
    there(tmp_path / "hf", tmp_path / "model")
    assert checkpoint.verify_whole(tmp_path / "model")["dtype"] == dtype
    back(tmp_path / "model", tmp_path / "back", "--max-shard-size", "300KB")
    assert same(tensors(tmp_path / "hf"), tensors(tmp_path / "back"))
    theirs, ours = (json.loads((tmp_path / d / INDEX).read_text()) for d in ("hf", "back"))
    assert theirs == ours
    carried = {f.name for f in (tmp_path / "hf").iterdir()} - {
        f.name for f in (tmp_path / "back").iterdir()
    }
    assert not carried


def test_a_directory_says_where_its_checkpoint_is(tmp_path, model):
    """By its folder, or in the hub's cache by its id, also through a link to it."""
    assert directory.origin(model) == {"name": str(GOLDEN)}
    snapshot = tmp_path / "models--Qwen--Qwen-7B" / "snapshots" / ("0a" * 20)
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert import_plan.origin(path) == {"name": "Qwen/Qwen-7B", "revision": "0a" * 20}
    assert import_plan.origin(Path("here")) == {"name": str(Path.cwd() / "here")}


def test_layout_of_the_export(tmp_path, model):
    back(model, tmp_path / "one")
    assert not (tmp_path / "one" / INDEX).exists()
    with safe_open(tmp_path / "one" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    order = list(folder.read_header(tmp_path / "one" / "model.safetensors"))
    assert order == list(json.loads((GOLDEN / INDEX).read_text())["weight_map"])
    back(model, tmp_path / "many", "--max-shard-size", "300000")
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert files == [
        f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 770048
    assert set(index["weight_map"].values()) == set(files)


def test_spelling_of_august_2023_is_kept(tmp_path, source):
    values = json.loads((source / "config.json").read_text())
    for new, old in {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "n_positions",
        "vocab_size": "padded_vocab_size",
    }.items():
        values[old] = values.pop(new)
    values |= {"vocab_size": 319, "torch_dtype": "float32", "_name_or_path": "x"}
    (source / "config.json").write_text(json.dumps(values))
    there(source, tmp_path / "model")
    assert checkpoint.load_config(tmp_path / "model") == checkpoint.load_config(GOLDEN)
    back(tmp_path / "model", tmp_path / "same")
    assert json.loads((tmp_path / "same/config.json").read_text()) == values
    assert same(tensors(GOLDEN), tensors(tmp_path / "same"))
    back(tmp_path / "model", tmp_path / "half", "--dtype", "float16")
    assert json.loads((tmp_path / "half/config.json").read_text()) == values | {
        "torch_dtype": "float16"
    }


@pytest.mark.parametrize("mesh", [(), ("--mesh", "fsdp=2")])
def test_casts_on_both_ways(tmp_path, mesh):
    there(GOLDEN, tmp_path / "model", "--dtype", "bfloat16", "--verify", *mesh)
    back(tmp_path / "model", tmp_path / "wide", "--dtype", "float32", "--verify")
    for name, array in tensors(GOLDEN).items():
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(tensors(tmp_path / "wide")[name], rounded)


def test_what_does_not_fit_float16(tmp_path, source, capfd):
    file = source / "model-00002-of-00002.safetensors"
    held = load_file(file)
    held["lm_head.weight"][3, 4] = 1e6
    save_file(held, file, {"format": "pt"})
    assert from_hf.main([str(source), str(tmp_path / "m"), "--dtype", "float16"]) == 1
    assert "head has values up to 1e+06, which do not fit float16" in last_line(capfd)


def test_inert_buffers_are_passed_over(tmp_path, source):
    file = source / "model-00001-of-00002.safetensors"
    held = load_file(file) | {"transformer.h.0.attn.masked_bias": np.zeros(1, np.float32)}
    save_file(held, file, {"format": "pt"})
    there(source, tmp_path / "model")


def test_other_files_are_carried(tmp_path, source):
    texts = ["more.tiktoken", "LICENSE", "modeling_qwen.py"]
    for name in (*texts, "model.onnx", "train.bin"):
        (source / name).write_text(name)
    write_tiny_vocab(source / "qwen.tiktoken")
    edit(source / "generation_config.json", eos_token_id=261)
    (source / "tokenizer_config.json").write_text("{}")
    texts += ["qwen.tiktoken", "tokenizer_config.json"]
    there(source, tmp_path / "model")
    back(tmp_path / "model", tmp_path / "hf")
    carried = {f.name for f in (tmp_path / "hf").iterdir()} - {"model.safetensors"}
    assert carried == {*texts, "config.json", "generation_config.json"}


def test_names_cover_the_published_sizes():
    for config in PRESETS.values():
        _, leaves = checkpoint.abstract_leaves(config, "bfloat16")
        wanted = names.expected({path: tuple(leaf.shape) for path, leaf in leaves.items()})
        assert len(wanted) == 3 + 8 * config.num_layers
        assert sum(int(np.prod(tensor.shape)) for tensor in wanted.values()) == config.num_params()


def test_names_of_a_tied_decoder_and_of_unknown_leaves():
    assert list(names.expected({"embedding": (8, 4)})) == ["transformer.wte.weight"]
    with pytest.raises(ValueError, match="no tensor of this format holds head_norm"):
        names.expected({"embedding": (8, 4), "head_norm": (4,)})


@pytest.mark.parametrize(
    ("shard", "chunks"),
    [
        ((151936, 4096), (4748, 4096)),  # 1.2 GB: 32 pieces, the first count above 19 that divides
        ((32, 128, 4096), (32, 128, 4096)),
        ((151937, 4096), (151937, 4096)),  # a prime
        ((7,), (7,)),
    ],
)
def test_chunks_divide_a_shard(shard, chunks):
    assert store.chunk_shape(shard, 2) == chunks


# Verification


def test_verify_finds_a_flipped_bit(tmp_path, source, capfd):
    there(source, tmp_path / "model")
    assert from_hf.main([str(source), str(tmp_path / "model"), "--verify"]) == 0
    assert "verified: all 27 tensors" in last_line(capfd)
    file = tmp_path / "model/params/layers.1.attn.k/0.0"
    flip(file, 5)
    assert from_hf.main([str(source), str(tmp_path / "model"), "--verify"]) == 1
    assert "differ in transformer.h.1.attn.c_attn.weight" in last_line(capfd)


def test_verify_of_an_export_finds_a_flipped_bit(tmp_path, model, monkeypatch, capfd):
    copy = conversion.copy

    def copy_and_flip(plan: ExportPlan) -> None:
        copy(plan)
        flip(plan.target / "model.safetensors", -1)

    monkeypatch.setattr(conversion, "copy", copy_and_flip)
    assert to_hf.main([str(model), str(tmp_path / "hf"), "--verify"]) == 1
    assert "differ in lm_head.weight" in last_line(capfd)
    assert (tmp_path / "hf/unfinished.json").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model) -> Path:
    """An adapter that changes something, for `model`."""
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    peft.write(path, jax.tree.map(lambda x: x + 0.01, small_adapters(checkpoint.load(model))))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_of_a_merged_export(tmp_path, model, adapter, dtype, monkeypatch, capfd):
    """It is compared with the source and the adapter, merged again: the lowest bit counts."""
    options = ["--adapter", str(adapter), "--dtype", dtype, "--verify"]
    monkeypatch.setattr(copying, "BLOCK_BYTES", BLOCK)
    back(model, tmp_path / "hf", *options, "--max-shard-size", "200KB")
    told = "verified: all 27 tensors are the source's, the adapter merged into them"
    assert told in capfd.readouterr().err
    back(model, tmp_path / "plain", "--dtype", dtype)
    merged, plain = tensors(tmp_path / "hf"), tensors(tmp_path / "plain")
    name = "transformer.h.1.attn.c_attn.weight"
    changed = {n for n in plain if merged[n].tobytes() != plain[n].tobytes()}
    assert changed == {name.replace("1", str(layer)) for layer in range(3)}
    copy = conversion.copy

    def copy_and_flip(plan: ExportPlan) -> None:
        copy(plan)
        tensor = folder.read(plan.target)[name]
        flip(tensor.file, tensor.offset)

    def unmerged(plan: ExportPlan, band: store.Band, dtype: str, stream: copying.Target) -> None:
        copying.export_band(band, plan.params, target=stream, dtype=dtype)

    monkeypatch.setattr(conversion, "copy", copy_and_flip)
    assert to_hf.main([str(model), str(tmp_path / "flipped"), *options]) == 1
    assert f"differ in {name}; remove" in last_line(capfd)
    monkeypatch.setattr(ExportPlan, "_export", unmerged)
    monkeypatch.setattr(conversion, "copy", copy)
    assert to_hf.main([str(model), str(tmp_path / "unmerged"), *options]) == 1
    assert "differ in transformer.h.0.attn.c_attn.weight" in last_line(capfd)


# Stopped and continued


BLOCKS = 60  # of 4 kB, of about 190: copied when a command is stopped, whichever files they are of


def stopped(
    command: str, source: Path, out: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that is stopped after so many blocks: killed, or by Ctrl-C."""
    where = "convert.copying:_check_stop"
    if how == "kill":
        arguments = [STOPPED, where, BLOCKS, "-", 9, f"convert.{command}", source, out]
        ran = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment())
        assert ran.returncode == -signal.SIGKILL
        return

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        copying._stop.wait()  # which the main thread sets; until then this one writes no more

    with monkeypatch.context() as patch:
        patch.setattr(copying, "BLOCK_BYTES", BLOCK)
        stopping(where, BLOCKS, interrupt, patch.setattr)
        assert {"from_hf": from_hf, "to_hf": to_hf}[command].main([str(source), str(out)]) == 130


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_stopped_conversion_continues(tmp_path, how, monkeypatch, capfd):
    out = tmp_path / "model"
    stopped("from_hf", GOLDEN, out, how, monkeypatch)
    assert (out / lock.NAME).exists() == (how == "kill"), "what a killed one leaves"
    with pytest.raises(ValueError, match="unfinished conversion"):
        checkpoint.load(out)
    assert from_hf.main([str(GOLDEN), str(out), "--dtype", "bfloat16"]) == 1
    assert "unfinished work of another command (dtype was 'float32')" in last_line(capfd)
    there_already = [f for f in (out / "params").glob("*/*") if f.suffix != ".tmp"]
    written = {f: f.stat().st_mtime_ns for f in there_already if f.name[0].isdecimal()}
    assert 0 < len(written) < 45
    there(GOLDEN, out)
    assert "continuing: " in capfd.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in written} == written
    there(GOLDEN, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_stopped_export_continues(tmp_path, model, how, monkeypatch, capfd):
    out = tmp_path / "hf"
    stopped("to_hf", model, out, how, monkeypatch)
    assert (out / "model.safetensors.tmp").exists()
    assert from_hf.main([str(out), str(tmp_path / "other")]) == 1
    assert "is an unfinished export" in last_line(capfd)
    back(model, out, "--verify")
    told = re.search(r"continuing: (\S+) .B of", capfd.readouterr().err)
    assert told and float(told[1]) > 0
    assert same(tensors(GOLDEN), tensors(out))
    whole = {"config.json", "generation_config.json", "model.safetensors"}
    assert {f.name for f in out.iterdir()} == whole


# Two programs, one target


def others_refused(out: Path, model: Path, capfd: Any) -> None:
    """Whatever would write to `out` besides ends with a line."""
    for main, arguments in (
        (from_hf.main, [GOLDEN, out]),
        (from_hf.main, [GOLDEN, out, "--dtype", "bfloat16"]),
        (to_hf.main, [model, out]),
    ):
        capfd.readouterr()
        assert main([str(x) for x in arguments]) == 1
        assert re.search(BUSY.format(out), last_line(capfd))
    config, decoder = checkpoint.load_config(model), checkpoint.load(model)
    with pytest.raises(lock.Busy, match=BUSY.format(out)):
        checkpoint.save(out, config, decoder)
    with pytest.raises(lock.Busy, match=BUSY.format(out)):
        peft.write(out, small_adapters(decoder))


BUSY = (
    rf"{{}}: process {os.getpid()} on \S+ has been at work there since .* UTC: wait for it or stop"
)


def small_adapters(decoder: Any) -> Any:
    with meshes.entered(meshes.make()):
        stacked, groups = model_.stack(decoder), adapter_config.targets(["c_attn"], 3)
        return lora.create(stacked, groups, rank=2, alpha=4.0, key=jax.random.key(0))


@pytest.mark.parametrize("first", ["from_hf", "to_hf", "save", "adapter"])
def test_a_second_writer_is_refused(tmp_path, model, first, monkeypatch, capfd):
    """In the middle of a file of the first, which ends as if nothing had been."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    config, decoder = checkpoint.load_config(model), checkpoint.load(model)
    run, where = {
        "from_hf": (lambda path: there(GOLDEN, path), "convert.copying:_copy"),
        "to_hf": (lambda path: back(model, path), "convert.copying:_copy"),
        "save": (
            lambda path: checkpoint.save(path, config, decoder),
            "qwen_jax.checkpoint.store:write_shards",
        ),
        "adapter": (
            lambda path: peft.write(path, small_adapters(decoder)),
            "qwen_jax.checkpoint.adapter_files:save_file",
        ),
    }[first]
    run(alone)
    tried = []
    with monkeypatch.context() as patch:
        attempt = lambda: tried.append(others_refused(out, model, capfd))  # noqa: E731
        stopping(where, 1 if first == "adapter" else 5, attempt, patch.setattr)
        run(out)
    assert len(tried) == 1
    left, right = contents(out), contents(alone)
    if first == "save":  # its manifest has an id
        assert left.pop("manifest.json") != right.pop("manifest.json")
    assert left == right


def test_each_writer_has_a_draft_of_its_own(tmp_path):
    """Where no lock could keep them apart, what gets its name is whole all the same."""
    file = tmp_path / "0.0"
    with paths.writer(file) as first:
        os.write(first, b"aaa")
        with pytest.raises(ZeroDivisionError), paths.writer(file) as second:
            os.write(second, b"b")
            raise ZeroDivisionError
        os.write(first, b"a")
        with paths.writer(file) as third:
            os.write(third, b"cccc")
        assert file.read_bytes() == b"cccc"
        paths.write(file, b"dddd")
    assert file.read_bytes() == b"aaaa" and [*tmp_path.iterdir()] == [file]


def test_an_export_takes_nothing_away_from_another(tmp_path):
    """Where no lock could keep them apart, and the second found no file when it looked."""
    (tmp_path / "draft").write_bytes(b"headtensors")
    export_plan._write_head(tmp_path / "draft", b"head")
    assert (tmp_path / "draft").read_bytes() == b"headtensors"


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_sizes_are_compared_at_the_end(tmp_path, model, command, monkeypatch, capfd):
    """Of a file that was cut short behind the converter's back nothing is declared whole."""
    main, source = {"from_hf": (from_hf.main, GOLDEN), "to_hf": (to_hf.main, model)}[command]
    out, run = tmp_path / "out", copying.run

    def run_and_cut(*arguments: Any, **more: Any) -> None:
        run(*arguments, **more)
        file = next(out.glob("params/head/0.0" if command == "from_hf" else "*.safetensors"))
        file.write_bytes(file.read_bytes()[:-4])

    with monkeypatch.context() as patch:
        patch.setattr(copying, "run", run_and_cut)
        assert main([str(source), str(out)]) == 1
    assert re.search(r"was not written as it should be: \S+ has [\d,]+ bytes", last_line(capfd))
    assert (out / "unfinished.json").exists() and not (out / "manifest.json").exists()
    assert main([str(source), str(out), "--verify"]) == 0


def test_changed_source_is_not_continued(tmp_path, source, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(copying, "_copy", raises(OSError(errno.EIO, "broken disk")))
        assert from_hf.main([str(source), str(tmp_path / "m")]) == 1
    assert "broken disk" in last_line(capfd)
    os.utime(source / "model-00001-of-00002.safetensors")
    assert from_hf.main([str(source), str(tmp_path / "m")]) == 1
    assert "the source was another or has changed" in last_line(capfd)


def test_a_file_cut_short_is_written_again(tmp_path, source, monkeypatch):
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_manifest", raises(OSError(errno.EIO, "broken disk")))
        assert from_hf.main([str(source), str(out)]) == 1
    cut = out / "params" / "head" / "0.0"  # as after a power failure: the rename came to the disk
    cut.write_bytes(cut.read_bytes()[:100])
    there(source, out, "--verify")
