"""Saving from a mesh: the same values on any other, from one process or two, and after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwen_jax import checkpoint, meshes, model
from qwen_jax.checkpoint import CheckpointError, saving, store
from qwen_jax.config import RopeScaling
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.meshes import sharding
from tests.support.conversion import GOLDEN, ROOT, back, same, tensors
from tests.support.launch import LONG
from tests.support.tiny import replace_leaves, tiny_config, tiny_decoder

MESHES = [(1, 1), (2, 4), (8, 1), (4, 2)]
CONFIG = tiny_config(hidden_size=64)


def mesh_of(fsdp: int, tp: int) -> Any:
    return meshes.make({"fsdp": fsdp, "tp": tp})


def arrays(decoder: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf.get_value()) for path, leaf in named_leaves(decoder).items()}


def made(mesh: Any, dtype: Any = jnp.float32) -> Any:
    with meshes.entered(mesh):
        return tiny_decoder(CONFIG, dtype)


def save_on(path: Path | str, mesh: Any, dtype: Any = jnp.float32, stacked: bool = False) -> Any:
    """The decoder that was saved, with a leaf for each layer."""
    with meshes.entered(mesh):
        decoder = tiny_decoder(CONFIG, dtype)
        checkpoint.save(path, CONFIG, model.stack(decoder) if stacked else decoder)
    return decoder


def chunks(path: Path) -> dict[str, bytes]:
    files = [f for f in (path / "params").rglob("*") if f.is_file()]
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in files}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("saved", MESHES)
def test_saved_on_any_mesh_restored_on_any_other(tmp_path, saved, dtype):
    decoder = arrays(save_on(tmp_path / "m", mesh_of(*saved), dtype))
    for restored in MESHES:
        where = mesh_of(*restored)
        loaded = checkpoint.load(tmp_path / "m", mesh=where)
        assert same(arrays(loaded), decoder)
        for path, leaf in named_leaves(loaded).items():
            assert leaf.get_value().sharding == sharding.named(
                leaf.letters, where, lengths=CONFIG.sizes
            ), path


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)])
def test_a_stacked_decoder_is_saved_as_its_layers(tmp_path, mesh):
    save_on(tmp_path / "layers", mesh_of(*mesh))
    save_on(tmp_path / "stacked", mesh_of(*mesh), stacked=True)
    assert chunks(tmp_path / "stacked") == chunks(tmp_path / "layers")
    for name in ("config.json", "manifest.json"):
        one, other = (json.loads((tmp_path / d / name).read_text()) for d in ("layers", "stacked"))
        if name == "manifest.json":
            assert one.pop("id") != other.pop("id"), "each save is one of its own"
        assert one == other


def test_an_array_is_never_whole_on_the_host(tmp_path, monkeypatch):
    """Stacked or not: what reaches the host at a time is a chunk."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 4096)
    sizes = []

    def noted(x: Any) -> np.ndarray:
        sizes.append(x.nbytes)
        return np.asarray(x)

    with meshes.entered(mesh_of(2, 2)):
        decoder = model.stack(tiny_decoder(CONFIG))
        monkeypatch.setattr(store, "np", SimpleNamespace(**vars(np) | {"asarray": noted}))
        checkpoint.save(tmp_path / "m", CONFIG, decoder)
    assert 2048 <= max(sizes) <= 4096 and sum(sizes) == 4 * CONFIG.num_params()
    assert same(arrays(checkpoint.load(tmp_path / "m")), arrays(made(mesh_of(1, 1))))


def test_a_leaf_of_zeros_is_written(tmp_path):
    """A chunk of the fill value alone, if there were one, would be left out."""
    with meshes.entered(mesh_of(4, 2)):
        decoder = model.create(CONFIG, jax.random.key(0), dtype=jnp.float32)
        checkpoint.save(tmp_path / "m", CONFIG, decoder)
    assert not np.any(arrays(decoder)["layers.0.attn.q_bias"])
    assert same(arrays(checkpoint.load(tmp_path / "m")), arrays(decoder))


def test_replicated_shards_are_written_once(tmp_path, monkeypatch):
    written = []
    plain = store.open_leaf

    class Noted:
        def __init__(self, stored: Any, name: str):
            self.stored, self.name = stored, name

        def __getitem__(self, index: Any) -> "Noted":
            return Noted(self.stored[index], self.name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stored, name)

        def write(self, value: Any) -> Any:
            written.append((self.name, self.stored.domain.size))
            return self.stored.write(value)

    monkeypatch.setattr(
        store, "open_leaf", lambda p, n, write=False: Noted(plain(p, n, write=write), n)
    )
    decoder = save_on(tmp_path / "m", mesh_of(2, 4))
    for path, array in arrays(decoder).items():
        assert sum(size for name, size in written if name == path) == array.size, path


def test_plain_orbax_opens_what_was_saved(tmp_path):
    decoder = arrays(save_on(tmp_path / "m", mesh_of(4, 2), stacked=True))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "m" / "params")
    found = {"layers.1.attn.q": tree["layers"]["1"]["attn"]["q"], "head": tree["head"]}
    assert same(found, {name: decoder[name] for name in found})


@pytest.mark.parametrize("mesh", [(4, 2), (1, 2)])
def test_what_was_saved_is_exported_byte_for_byte(tmp_path, golden_dir, mesh):
    decoder = checkpoint.load(golden_dir, mesh=mesh_of(*mesh))
    config = checkpoint.load_config(golden_dir)
    checkpoint.save(tmp_path / "m", config, decoder, like=golden_dir)
    back(tmp_path / "m", tmp_path / "hf", "--verify")
    assert same(tensors(GOLDEN), tensors(tmp_path / "hf"))
    for name in ("config.json", "generation_config.json"):
        carried = json.loads((tmp_path / "m" / name).read_text())
        assert carried == json.loads((GOLDEN / name).read_text())


def test_config_of_the_decoder_not_of_what_it_came_from(tmp_path, golden_dir):
    config = checkpoint.load_config(golden_dir).with_overrides({"seq_length": 64})
    decoder = checkpoint.load(golden_dir, config)
    checkpoint.save(tmp_path / "m", config, decoder, like=golden_dir)
    assert checkpoint.load_config(tmp_path / "m") == config
    assert checkpoint.load_generation_config(tmp_path / "m").stops == ((319,),)


@pytest.mark.parametrize(("kind", "lines"), [("yarn", 1), ("yarn_paper", 0)])
def test_a_directory_with_yarn_says_which_it_is(tmp_path, caplog, kind, lines):
    config = tiny_config(hidden_size=64, rope_scaling=RopeScaling(kind, 4.0, 16))
    with meshes.entered(mesh_of(1, 1)):
        checkpoint.save(tmp_path / "m", config, tiny_decoder(config))
    checkpoint.load(tmp_path / "m")
    said = [line for line in caplog.messages if "yarn has its ramp over the pair index" in line]
    assert len(said) == lines and all("which is yarn_paper now" in line for line in said)


def test_manifest_says_what_was_saved(tmp_path):
    save_on(tmp_path / "m", mesh_of(4, 2))
    manifest = checkpoint.verify_whole(tmp_path / "m")
    assert manifest["made_by"] == "qwen_jax.checkpoint.save"
    assert {axis: n for axis, n in manifest["mesh"].items() if n > 1} == {"fsdp": 4, "tp": 2}
    assert manifest["num_params"] == CONFIG.num_params()
    assert not (tmp_path / "m" / "unfinished.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_earlier_directory_is_never_touched(tmp_path):
    save_on(tmp_path / "m", mesh_of(1, 1))
    before = chunks(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is a whole model directory already"):
        save_on(tmp_path / "m", mesh_of(4, 2))
    assert chunks(tmp_path / "m") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis\.txt"):
        save_on(tmp_path / "other", mesh_of(1, 1))
    (tmp_path / "other" / "unfinished.json").write_text('{"made_by": "convert/from_hf.py"}')
    with pytest.raises(CheckpointError, match="which no save left there"):
        save_on(tmp_path / "other", mesh_of(1, 1))


def test_a_stopped_save_is_replaced_and_nothing_else(tmp_path, golden_dir, monkeypatch):
    config, decoder = checkpoint.load_config(golden_dir), checkpoint.load(golden_dir)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_manifest", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save(tmp_path / "m", config, decoder, like=golden_dir)
    (tmp_path / "m" / "notes.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which no save left there"):
        checkpoint.save(tmp_path / "m", config, decoder, like=golden_dir)
    assert (tmp_path / "m" / "notes.txt").read_text() == "years of work"
    (tmp_path / "m" / "notes.txt").unlink()
    checkpoint.save(tmp_path / "m", config, decoder, like=golden_dir)
    checkpoint.verify_whole(tmp_path / "m")


def test_what_cannot_be_saved(tmp_path):
    decoder = made(mesh_of(1, 1))
    with pytest.raises(CheckpointError, match=r"not one of the config given: .*layers\.2"):
        checkpoint.save(tmp_path / "m", tiny_config(hidden_size=64, num_layers=3), decoder)
    mixed = replace_leaves(
        decoder, lambda n, x: x[...].astype(jnp.float16 if n == "head" else jnp.float32)
    )
    with pytest.raises(CheckpointError, match="leaves of dtype float16, float32"):
        checkpoint.save(tmp_path / "m", CONFIG, mixed)
    grouped = tiny_config(num_kv_heads=2)
    with meshes.entered(mesh_of(1, 1)), pytest.raises(ValueError, match="no Qwen-1 spelling"):
        checkpoint.save(tmp_path / "m", grouped, tiny_decoder(grouped))
    assert not (tmp_path / "m").exists()


STOPPED = """
import os, signal, sys
import jax
from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import directory, saving, store
from qwen_jax.meshes import sharding
from tests.checkpoint.test_checkpoint_save import mesh_of, save_on
where, count = sys.argv[2], 0
def stopping(function):
    def stop(*arguments, **more):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return stop
home, name = where.split(".")
setattr(globals()[home], name, stopping(getattr(globals()[home], name)))
save_on(sys.argv[1], mesh_of(4, 2))
"""
MOMENTS = [
    ("saving.write_json", 1),
    ("saving.write_json", 2),
    ("store.write_metadata", 1),
    ("store.write_shards", 1),
    ("store.write_shards", 9),
    ("saving.write_manifest", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), MOMENTS)
def test_killed_at_any_moment(tmp_path, where, count):
    """Never whole, the one before still is, and the next save goes through."""
    save_on(tmp_path / "before", mesh_of(1, 1))
    path = tmp_path / "m"
    command = [sys.executable, "-c", STOPPED, str(path), where, str(count)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ).returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    decoder = save_on(path, mesh_of(2, 2))
    assert same(arrays(checkpoint.load(path)), arrays(decoder))
    assert same(arrays(checkpoint.load(tmp_path / "before")), arrays(decoder))


PROCESS = """
import sys
from pathlib import Path
import jax
path, address, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, number)
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
from qwen_jax import checkpoint, model, meshes
from qwen_jax.meshes import sharding
from tests.checkpoint.test_checkpoint_save import CONFIG, mesh_of
with meshes.entered(mesh_of(2, 4)):
    decoder = checkpoint.load(path / "one")
    checkpoint.save(path / "two", CONFIG, decoder)
    checkpoint.save(path / "stacked", CONFIG, model.stack(checkpoint.load(path / "two")))
    try:
        checkpoint.save(path / "one", CONFIG, decoder)
    except checkpoint.CheckpointError as error:
        sys.exit(f"{number}: {error}")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    decoder = arrays(save_on(tmp_path / "one", mesh_of(4, 2)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), address, str(number)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=LONG)[1] for process in processes]
    for name in ("two", "stacked"):
        for mesh in MESHES:
            assert same(arrays(checkpoint.load(tmp_path / name, mesh=mesh_of(*mesh))), decoder), (
                told
            )
    assert chunks(tmp_path / "two") == chunks(tmp_path / "stacked")
    # An error of one is an error of both: none waits for the other.
    assert "is a whole model directory already" in told[0].splitlines()[-1]
    assert "1: process 0 could not write" in told[1].splitlines()[-1]


def test_a_config_or_decoder_that_is_none(tmp_path):
    for config in (None, "qwen-7b", CONFIG.to_hf()):
        with pytest.raises(ValueError, match=r"^config .*: must be a Config$"):
            checkpoint.save(tmp_path / "a", config, None)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^decoder \{\}: must be a Decoder$"):
        checkpoint.save(tmp_path / "a", CONFIG, {})  # pyright: ignore
    with pytest.raises(ValueError, match=r"^config 3: must be a Config$"):
        checkpoint.load(tmp_path, 3)  # pyright: ignore
    assert not (tmp_path / "a").exists()
