"""Both converters: full disks, bad input, usage, and the hub."""

import errno
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import copying, folder, from_hf, target, to_hf
from qwen_jax.checkpoint import adapter_config, directory, peft
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
    rewrite,
    same,
    tensors,
    there,
)
from tests.support.vocabulary import write_tiny_vocab


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "source"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    there(GOLDEN, path)
    return path


# Disks


def test_a_disk_without_room_is_told_before_writing(tmp_path, monkeypatch, model, capfd):
    usage = shutil.disk_usage(tmp_path)._replace(free=700_000)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage)
    for main, src in ((from_hf.main, GOLDEN), (to_hf.main, model)):
        assert main([str(src), str(tmp_path / "out")]) == 1
        assert "needs 0.77 MB more on a disk that has 0.70 MB free" in last_line(capfd)
        assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_work_to_continue(tmp_path, monkeypatch, model, capfd):
    for name, main, src in (("there", from_hf.main, GOLDEN), ("back", to_hf.main, model)):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(copying.os, "copy_file_range", raises(full))
            assert main([str(src), str(out)]) == 1
        assert "is full; up to 0.77 MB were needed: free some space" in last_line(capfd)
        assert (out / "unfinished.json").exists()
        assert main([str(src), str(out), "--verify"]) == 0


def test_without_copies_by_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(copying.os, "copy_file_range", raises(OSError(errno.EXDEV, "other disk")))
    there(GOLDEN, tmp_path / "model")
    back(tmp_path / "model", tmp_path / "hf")
    assert same(tensors(GOLDEN), tensors(tmp_path / "hf"))


# Bad input


def no_shard(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").unlink()


def truncated(path: Path) -> None:
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_header(path: Path) -> None:
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def too_long(path: Path) -> None:
    with open(path / "model-00002-of-00002.safetensors", "ab") as file:
        file.write(b"more")


def garbage(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").write_bytes(b"version https://git-lfs" * 20)


def damaged_header(path: Path) -> None:
    flip(path / "model-00001-of-00002.safetensors", 9)


def overlapping(path: Path) -> None:
    """Two norms of one length share their bytes."""

    def change(first: dict[str, Any], second: dict[str, Any]) -> None:
        second["data_offsets"] = first["data_offsets"]

    change_norms(path, change)


def with_a_gap(path: Path) -> None:
    """Between two tensors, so that the file has the size of which its header speaks."""

    def change(first: dict[str, Any], second: dict[str, Any]) -> None:
        first["data_offsets"][0] += 4
        first["shape"][0] -= 1

    change_norms(path, change)


def change_norms(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change what the header of a file says of the norms of the first layer, not its length."""
    file = path / "model-00001-of-00002.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    change(*(header[f"transformer.h.0.ln_{number}.weight"] for number in (1, 2)))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.write_bytes(file.read_bytes()[:8] + text + file.read_bytes()[8 + length :])


def with_header(file: Path, header: Any) -> None:
    """Put another header before the bytes of the tensors."""
    data = file.read_bytes()
    text = json.dumps(header).encode()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


NO_HEADERS: list[tuple[Any, str]] = [
    ([], "it is no JSON object"),
    (5, "it is no JSON object"),
    ({"a": 5}, "'a' has data_offsets 5, not"),
    ({"a": {}}, "'a' has data_offsets None, not"),
    *(
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}, "'a' has data_offsets")
        for offsets in (None, "ab", ["0", "4"], [-4, 0], [0], [4, 0], [0, 4.0], [False, 4], 10**30)
    ),
    ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "'a' has shape '1'"),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "'a' has shape [-1]"),
    ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "dtype ['F32']"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "4 bytes for shape [2]"),
    ({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes for shape [1]"),
]


@pytest.mark.parametrize(("header", "told"), NO_HEADERS)
def test_headers_that_are_none(tmp_path, header, told):
    """Of a checkpoint, and of an adapter."""
    file = tmp_path / peft.TENSORS
    file.write_bytes(bytes(8))
    with_header(file, header)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w1"]}
    (tmp_path / adapter_config.SETTINGS).write_text(json.dumps(settings))
    for work in (folder.read, lambda path: peft.changes(path, {"layers.0.ffn.up": (4, 4)})):
        with pytest.raises(ValueError) as caught:
            work(tmp_path)
        said = str(caught.value)
        assert said.startswith(f"{file} is not a safetensors file: its header is damaged (")
        assert told in said and said.endswith("; download it again") and "\n" not in said


def empty_file(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")


def wrong_shape(path: Path) -> None:
    rewrite(path, lambda held: held.update({"lm_head.weight": np.zeros((320, 63), np.float32)}))


def renamed(path: Path) -> None:
    """Two tensors missing, three unknown."""

    def change(held: dict[str, np.ndarray]) -> None:
        for name in ("transformer.ln_f.weight", "transformer.h.2.mlp.w2.weight"):
            held[f"{name}_g"] = held.pop(name)
        held["extra"] = np.zeros(1, np.float32)

    rewrite(path, change)
    (path / INDEX).unlink()


def index_lies(path: Path) -> None:
    rewrite(path, lambda held: held.pop("lm_head.weight"))


def index_damaged(path: Path) -> None:
    (path / INDEX).write_text("[]")


def index_outside(path: Path) -> None:
    edit(path / INDEX, weight_map={"lm_head.weight": "../secret.safetensors"})


def duplicate(path: Path) -> None:
    rewrite(path, lambda held: held.update({"lm_head.weight": np.zeros((320, 64), np.float32)}), 1)


def only_bin(path: Path) -> None:
    no_weights(path)
    (path / "pytorch_model-00001-of-00001.bin").write_bytes(b"x")


def no_weights(path: Path) -> None:
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def unknown_key(path: Path) -> None:
    edit(path / "config.json", use_magic=True)


def too_deep(path: Path) -> None:
    edit(path / "config.json", num_hidden_layers=9999)


def quantised(path: Path) -> None:
    edit(path / "config.json", quantization_config={"bits": 4, "group_size": 16})


def integers(path: Path) -> None:
    rewrite(path, lambda held: held.update({"lm_head.weight": np.zeros((320, 64), np.int32)}))


def mixed(path: Path) -> None:
    rewrite(path, lambda held: held.update({"lm_head.weight": np.zeros((320, 64), np.float16)}))


def dangling(path: Path) -> None:
    """As in a cache of downloads that was cleared in part."""
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").symlink_to("../blobs/0123")


BAD: list[tuple[Callable[[Path], None], str]] = [
    (dangling, "generation_config.json is a symbolic link to ../blobs/0123, which leads nowhere"),
    (no_shard, "lacks model-00002-of-00002.safetensors: download it again"),
    (truncated, "model-00002-of-00002.safetensors is truncated: it has"),
    (truncated_header, "is truncated within its header"),
    (too_long, "has bytes that belong to no tensor"),
    (garbage, "is not a safetensors file"),
    (damaged_header, "is not a safetensors file: its header is damaged"),
    (overlapping, "tensors overlap or leave gaps"),
    (with_a_gap, "tensors overlap or leave gaps"),
    (empty_file, "is not a safetensors file"),
    (wrong_shape, "wrong shape: lm_head.weight is [320, 63], expected [320, 64]"),
    (
        renamed,
        "missing 2 tensors: transformer.h.2.mlp.w2.weight, transformer.ln_f.weight; "
        "unknown 3 tensors: extra, transformer.h.2.mlp.w2.weight_g, transformer.ln_f.weight_g",
    ),
    (index_lies, "names tensors that are not there: lm_head.weight in model-00002"),
    (index_damaged, "is not a JSON object"),
    (index_outside, "is no file of this folder"),
    (duplicate, "tensor lm_head.weight is in two files"),
    (only_bin, "safe_serialization=True"),
    (no_weights, "holds no *.safetensors files"),
    (no_config, "has no config.json: it is not a checkpoint folder"),
    (unknown_key, "use_magic is not known"),
    (too_deep, "config.json says num_hidden_layers 9999, the tensors are of 3 layers: put"),
    (quantised, "missing 60 tensors: transformer.h.0.attn.c_attn.qweight"),
    (integers, "only float32, bfloat16, float16 can be converted"),
    (mixed, "tensors of different dtypes (26 float32, 1 float16): choose one with --dtype"),
]


@pytest.mark.parametrize(("damage", "told"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_source(tmp_path, source, damage, told, capfd):
    damage(source)
    assert from_hf.main([str(source), str(tmp_path / "out")]) == 1
    assert told in last_line(capfd)
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_vocabulary_has_not_are_said_before_anything_is_copied(tmp_path, source):
    write_tiny_vocab(source / "qwen.tiktoken")
    (source / "added_tokens.json").write_text('{"<mine>": 500}')
    (source / "generation_config.json").unlink()
    asked = from_hf.parser().parse_args([str(source), str(tmp_path / "out")])
    with pytest.warns(
        UserWarning, match=r"added_tokens\.json has entries .*: added tokens <mine>$"
    ):
        from_hf.make_plan(asked)


def test_a_conversion_warns_of_a_key_once(tmp_path, source):
    """Python shows a warning once for each place in the code that reads the file."""
    edit(source / "config.json", prefix="Hello")
    asked = from_hf.parser().parse_args([str(source), str(tmp_path / "out")])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        from_hf.make_plan(asked)
    assert [str(warning.message) for warning in said] == [
        f"{source}/config.json has entries that are ignored: prefix='Hello' (write it into the "
        "prompt)"
    ]


def test_mixed_dtypes_convert_when_one_is_chosen(tmp_path, source):
    mixed(source)
    there(source, tmp_path / "out", "--dtype", "float32", "--verify")


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--mesh", "tp=4"], 1, "is not divisible by tp=4"),
        (["--mesh", "pp=4"], 2, "write it as fsdp=4,tp=2"),
        (["--mesh", "fsdp"], 2, "write it as fsdp=4,tp=2"),
    ],
)
def test_bad_mesh(tmp_path, options, code, told, capfd):
    assert from_hf.main([str(GOLDEN), str(tmp_path / "out"), *options]) == code
    assert told in last_line(capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (from_hf.main, ["a", "b", "--dtype", "int3"]),
        (from_hf.main, ["a"]),
        (to_hf.main, ["a", "b", "--max-shard-size", "0GB"]),
        (to_hf.main, ["a", "b", "--max-shard-size", "large"]),
        (to_hf.main, ["a", "b", "--max-shard-size", "9" * 400]),
    ],
)
def test_usage_errors(main, arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in last_line(capfd)


def test_bad_places(tmp_path, source, model, capfd):
    def refused(main: Callable[..., int], src: object, dst: object, code: int, told: str) -> None:
        before = contents(tmp_path)
        assert main([str(src), str(dst)]) == code
        assert told in last_line(capfd)
        assert contents(tmp_path) == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    for main, src in ((from_hf.main, source), (to_hf.main, model)):
        refused(main, src, src, 2, "is within SRC")
        refused(main, src, src / "sub", 2, "is within SRC")
        refused(main, src, other, 1, "neither empty nor unfinished work of this command")
        refused(main, src, other / "precious", 1, "exists and is not a folder")
        refused(main, src, other / "precious" / "x", 1, "precious")
        refused(main, src, model, 2 if main is to_hf.main else 1, str(model))
    refused(from_hf.main, model, tmp_path / "out", 1, "is a model directory already")
    refused(
        to_hf.main, source, tmp_path / "out", 1, "is a Hugging Face checkpoint: convert it with"
    )
    refused(from_hf.main, tmp_path / "no", tmp_path / "out", 1, "is not a folder, nor the id")
    refused(to_hf.main, tmp_path / "no", tmp_path / "out", 1, "is not a directory")
    there(source, tmp_path / "done")
    refused(from_hf.main, source, tmp_path / "done", 1, "is a finished model directory")
    assert (
        from_hf.main([*map(str, (source, tmp_path / "done")), "--verify", "--dtype=float16"]) == 1
    )
    assert "holds float32, not float16" in last_line(capfd)
    assert from_hf.main([*map(str, (source, tmp_path / "done")), "--verify", "--mesh=tp=2"]) == 1
    assert "is cut for another mesh than --mesh: leave out --mesh" in last_line(capfd)
    assert from_hf.main([*map(str, (source, tmp_path / "done")), "--verify", "--mesh=tp=1"]) == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    there(source, empty)


def test_an_adapter_beside_the_weights_is_told_of(tmp_path, source, capfd):
    """It is not merged."""
    (source / "adapter_config.json").write_text("{}")
    there(source, tmp_path / "out")
    told = f"warning: {source} has an adapter, which is not merged: `python convert/to_hf.py"
    assert told in capfd.readouterr().err


def test_damaged_model_directory_is_not_exported(tmp_path, model, capfd):
    damaged = Path(shutil.copytree(model, tmp_path / "model"))
    (damaged / "params/head/0.0").unlink()
    assert to_hf.main([str(damaged), str(tmp_path / "out")]) == 1
    assert "is damaged: params/head/0.0 is missing" in last_line(capfd)
    assert not (tmp_path / "out").exists()


# As processes


@pytest.mark.parametrize("script", ["from_hf", "to_hf"])
def test_help_is_quick_and_teaches(script):
    for command in ([f"convert/{script}.py"], ["-m", f"convert.{script}"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "examples:" in done.stdout
        loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "jax" not in loaded


def test_errors_of_a_process(tmp_path):
    command = [sys.executable, "-m", "convert.to_hf", str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    done = subprocess.run([*command, "--debug"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What `snapshot_download` asks the hub: the list of a model's files, and each of them."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    requests: tuple[str, ...] = ()

    def do_GET(self) -> None:
        Hub.requests += (self.path,)
        if self.path.startswith("/api/models/qwen/golden/"):
            held = {file.name: file.stat().st_size for file in GOLDEN.iterdir()}
            held |= {"original/model.safetensors": 9, "model.onnx": 9}
            entry = {"type": "file", "oid": self.commit}
            answer: Any = [{**entry, "path": name, "size": size} for name, size in held.items()]
            if "/tree/" not in self.path:
                files = [{"rfilename": name} for name in held]
                answer = {"id": "qwen/golden", "sha": self.commit, "siblings": files}
            self.answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith(f"/qwen/golden/resolve/{self.commit}/"):
            data = (GOLDEN / self.path.rsplit("/", 1)[1]).read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(data, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def from_hub(endpoint: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "convert/from_hf.py", *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


def test_download_from_the_hub(tmp_path, hub):
    out = tmp_path / "model"
    done = from_hub(hub, tmp_path / "cache", "qwen/golden", str(out), "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified: all 27 tensors" in done.stderr
    assert directory.origin(out) == {"name": "qwen/golden", "revision": Hub.commit}
    back(out, tmp_path / "hf")
    assert same(tensors(GOLDEN), tensors(tmp_path / "hf"))
    assert not [path for path in Hub.requests if "onnx" in path or "original" in path]


def test_a_model_the_hub_does_not_have(tmp_path, hub):
    done = from_hub(hub, tmp_path / "cache", "qwen/nothing", str(tmp_path / "out"))
    assert done.returncode == 1
    assert (
        "nor could it be had from the hub" in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_without_the_hub_library(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert from_hf.main(["qwen/golden", str(tmp_path / "out")]) == 1
    assert "pip install -e '.[hub]'" in last_line(capfd)
