"""gs:// wherever a local path may be, with the real clients, against a stand-in of the service."""

import gzip
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from jax._src import monitoring
from jax.experimental.compilation_cache import compilation_cache

import qwen_jax
from convert import from_hf
from qwen_jax import checkpoint, expand_vocab, model
from qwen_jax.checkpoint import CheckpointError, adapter_config, directory, inspection, peft, store
from qwen_jax.generate import __main__ as generate
from qwen_jax.meshes import sharding
from qwen_jax.model import lora
from qwen_jax.runtime import caches, lock, paths, records
from tests.checkpoint.test_checkpoint_save import STOPPED, arrays, mesh_of, save_on
from tests.programs.stopped import stopping
from tests.support import training
from tests.support.conversion import GOLDEN, ROOT, back, contents, last_line, same, there
from tests.support.launch import LONG
from tests.support.tiny import tiny_config
from tests.support.vocabulary import qwen_tokenizer
from tests.tools import object_store
from train import data as run_data
from train import plan, pretrain, tokenizer
from train.data import batches, text_example, token_cache
from train.planning import attempts, topology
from train.run import checkpoints, logs, loop, run_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[None]:
    with object_store.running(tmp_path_factory.mktemp("server") / "log") as environment:
        before = dict(os.environ)
        os.environ.update(environment)
        yield
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def bucket(server, request) -> str:
    """A place of its own in the bucket."""
    return f"gs://{object_store.BUCKET}/{zlib.crc32(request.node.name.encode())}"


def downloaded(address: str, folder: Path) -> Path:
    root = paths.parse(address)
    for name in paths.sizes(root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((root / name).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--mesh", "fsdp=2,tp=2")])
def test_converted_there_and_back(bucket, tmp_path, mesh):
    there(GOLDEN, tmp_path / "model", *mesh)
    there(GOLDEN, f"{bucket}/model", *mesh, "--verify")
    remote = contents(downloaded(f"{bucket}/model", tmp_path / "fetched"))
    assert remote == contents(tmp_path / "model")
    back(f"{bucket}/model", f"{bucket}/hf", "--max-shard-size", "200KB", "--verify")
    back(tmp_path / "model", tmp_path / "hf", "--max-shard-size", "200KB")
    assert contents(downloaded(f"{bucket}/hf", tmp_path / "hf2")) == contents(tmp_path / "hf")
    there(f"{bucket}/hf", tmp_path / "again", "--verify", *mesh)
    assert contents(tmp_path / "again" / "params") == contents(tmp_path / "model" / "params")
    back(f"{bucket}/model", tmp_path / "half", "--dtype", "bfloat16", "--verify")


def test_saved_and_restored(bucket):
    decoder = arrays(save_on(f"{bucket}/m", mesh_of(4, 2), stacked=True))
    for mesh in ((1, 1), (2, 4)):
        assert same(arrays(checkpoint.load(f"{bucket}/m", mesh=mesh_of(*mesh))), decoder)
    with pytest.raises(CheckpointError, match="is a whole model directory already"):
        save_on(f"{bucket}/m", mesh_of(1, 1))


def test_one_chunk_for_many_shards(bucket):
    """Read at the same time from one chunk; asking for it again would be an error here."""
    decoder = arrays(save_on(f"{bucket}/m", mesh_of(1, 1)))
    stored = store.open_leaf(paths.parse(f"{bucket}/m") / "params", "head")
    with ThreadPoolExecutor(8) as executor:
        for _ in range(20):
            rows = executor.map(lambda i: stored[i : i + 1].read().result(), range(64))
            np.testing.assert_array_equal(np.concatenate(list(rows)), decoder["head"][:64])


def test_a_plan_of_a_remote_model(bucket, monkeypatch, capsys):
    settings = []
    monkeypatch.setattr(topology, "prepare", lambda _: None)
    monkeypatch.setattr(attempts, "estimates", lambda one, *_, **__: settings.append(one) or [])
    options = ["--model", f"{bucket}/m", "--topology", "v5e:2x2", "--attention", "xla"]
    assert plan.main(options) == 2
    assert "or a config.json, or a folder that holds one" in capsys.readouterr().err
    config = tiny_config()
    paths.write(paths.parse(f"{bucket}/m/config.json"), json.dumps(config.to_hf()).encode())
    assert plan.main(options) == 0
    assert [one.config for one in settings] == [config]


@pytest.mark.slow
def test_text_from_a_remote_directory(bucket, tmp_path, chat_dir, capsys):
    back(chat_dir, f"{bucket}/hf")
    there(f"{bucket}/hf", f"{bucket}/chat")
    local, remote = qwen_jax.load(chat_dir), qwen_jax.load(f"{bucket}/chat")
    assert remote.tokenizer is not None and remote.generation_config == local.generation_config
    ids = remote.tokenizer.encode("Der Mond ist aufgegangen")
    np.testing.assert_array_equal(remote.logits([ids]), local.logits([ids]))
    options = ["--prompt", "a", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    texts = []
    for path in (chat_dir, f"{bucket}/chat"):
        capsys.readouterr()
        assert generate.main(["--ckpt", str(path), *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_data_to_train_on(bucket, tmp_path):
    """Records and their tokens are those of the same files on a disk."""
    lines = "".join(f'{{"text": "{i} and so on"}}\n' for i in range(100))
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}] * 5), parquet)
    contents = {
        "a.jsonl": lines.encode(),
        "b.jsonl.gz": gzip.compress(lines.encode()),
        "c.parquet": parquet.getvalue(),
        "d.txt": b"plain text\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        paths.write(paths.parse(f"{bucket}/data/{name}"), content)
    tokenizer, digests = qwen_tokenizer(), []

    def text(record):
        return text_example(tokenizer, record.value, ends=record.ends), None

    for source in (tmp_path, f"{bucket}/data"):
        files = records.files([source])
        assert [file.name for file in files] == list(contents)
        encoding = token_cache.Encoding(text, {"data": "text"})
        cache = token_cache.make(files, tokenizer, encoding=encoding, home=tmp_path / "cache")
        assert len(cache) == 206
        digests.append(cache.counts.digest)
    assert digests[0] == digests[1]


def cut_off(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM when so many steps have been told of."""
    write = logs.Log.write

    def signalled(self, step, *arguments, **named):
        write(self, step, *arguments, **named)
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(logs.Log, "write", signalled)


@pytest.mark.slow
def test_a_run(bucket, tmp_path, monkeypatch, capsys):
    """Stopped by a signal, resumed by another host, and at its end what a local run is, to the bit;
    what has been encoded is there for both.
    """
    given = training.prepared(tmp_path / "given")
    options = ("--steps", 4, "--save-every", 2, "--keep-last", 1)
    local, remote = tmp_path / "local", f"{bucket}/run"
    training.succeed(training.pretraining(given, local, *options))
    arguments = training.pretraining(given, remote, *options, "--token-cache", f"{bucket}/tokens")
    calls = []
    text = run_data.text_example
    monkeypatch.setattr(
        run_data, "text_example", lambda *a, **named: calls.append(a) or text(*a, **named)
    )
    save, there_at = checkpoints.Checkpoints.save, {}

    def noted(self, step, state, **named):
        there_at[step] = (paths.parse(remote) / "metrics.jsonl").read_text().count("\n")
        save(self, step, state, **named)

    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "host0"))
        cut_off(patch, 2)
        patch.setattr(checkpoints.Checkpoints, "save", noted)
        training.succeed(arguments)
    assert "--resume goes on from there" in capsys.readouterr().err and calls
    calls.clear()
    root = paths.parse(remote)
    step = max(run_folder._steps_saved(root / "checkpoints"))
    assert step < 4 and not (root / "model").exists()
    assert there_at and all(n == at for at, n in there_at.items()), "figures before checkpoints"
    # A kill leaves a checkpoint that is not whole, which nobody takes for one.
    paths.write(root / "checkpoints" / "4" / "state" / "d" / "part", b"")
    assert "holds a run already: --resume" in training.fail(capsys, arguments, pretrain)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "host1"))
    changed = [*arguments, "--resume", "--learning-rate", "0.5"]
    line = training.fail(capsys, changed, pretrain)
    assert "holds another run: --learning-rate was 0.01, is 0.5" in line
    training.succeed([*arguments, "--resume"])
    assert f"resumed from step {step}" in capsys.readouterr().err
    assert not calls, "the parts of the token cache were there"
    fetched = downloaded(remote, tmp_path / "fetched")
    assert training.curve(fetched) == training.curve(local)
    expected = training.weights(local / "model")
    for name, value in training.weights(fetched / "model").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert len(list((fetched / "events").iterdir())) == 2
    told = [json.loads((folder / "run.json").read_text()) for folder in (fetched, local)]
    same = ("recipe", "config", "ckpt", "data", "rows", "versions")
    assert [told[0][name] for name in same] == [told[1][name] for name in same]
    state = checkpoints.Checkpoints(root / "checkpoints")
    assert state.latest == 4
    state.close()
    longer = [*arguments, "--resume", "--steps", "3"]
    assert "is at step 4: of 3 steps it has more" in training.fail(capsys, longer, pretrain)
    run_folder.remove_results(root)  # as a run does that goes on further
    assert not (root / "model").exists() and (root / "run.json").exists()
    run_folder.remove_results(root)


def test_what_else_a_run_writes(bucket, tmp_path, monkeypatch):
    """Adapters, the batch of a step that has no number, and a profile."""
    with jax.set_mesh(mesh_of(1, 1)):
        decoder = model.stack(model.create(tiny_config(), jax.random.key(0), dtype="float32"))
        chosen = adapter_config.targets(["c_attn"], decoder.config.num_layers)
        adapters = lora.create(
            decoder, chosen, rank=4, alpha=8, key=jax.random.key(1), embeddings=False
        )
        root = paths.parse(bucket)
        for folder in (tmp_path / "adapter", root / "adapter"):
            peft.write(folder, adapters, base_model_name_or_path="m", lora_dropout=0.0)
        ids = np.zeros((1, 4), np.int32)
        batch = batches.place(batches.batch_of(ids, ids))
        found = peft.read(root / "adapter", decoder)
        jax.tree.map(np.testing.assert_array_equal, found, adapters)
    fetched = downloaded(f"{bucket}/adapter", tmp_path / "fetched")
    assert contents(fetched) == contents(tmp_path / "adapter")

    settings = loop.Settings(out=root, profile=(1, 1))
    at_work = SimpleNamespace(
        settings=settings, _skipped=1, _save_good=lambda *_, **__: "it is saved"
    )
    report = SimpleNamespace(metrics=SimpleNamespace(loss=math.nan), gradient_norm=math.nan)
    with pytest.raises(loop.NotANumber, match=f"the batch is in {bucket}/batch-7.npz"):
        loop.Loop._not_a_number(at_work, 7, batch, report=report, state=None)  # pyright: ignore
    with np.load(io.BytesIO((root / "batch-7.npz").read_bytes())) as found:
        np.testing.assert_array_equal(found["tokens"], ids)

    def start(folder: str) -> None:
        Path(folder, "plugins").mkdir()
        Path(folder, "plugins", "trace.pb").write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with loop._profile(settings) as at:
        for position in range(3):
            at(position, lambda: None)
    assert paths.sizes(root / "profile") == {"plugins/trace.pb": 5}


def test_figures_are_copied_now_and_then(bucket, monkeypatch):
    """Not with each step, but so often that little is lost, and at the end."""
    root = paths.parse(bucket)
    monkeypatch.setattr(logs, "_SHARE", 0)
    log = logs.Log(root, 0, steps=10)
    told = lambda: len((root / "metrics.jsonl").read_text().splitlines())  # noqa: E731
    for step, seconds in ((1, 10**6), (2, -1)):
        monkeypatch.setattr(logs, "_EVERY", seconds)
        assert not (root / "metrics.jsonl").exists()
        log.write(step, {"loss": 1.0})
    assert told() == 2
    monkeypatch.setattr(logs, "_EVERY", 10**6)
    log.write(3, {"loss": math.nan})
    assert told() == 2
    log.close()
    assert told() == 3 and len(list((root / "events").iterdir())) == 1
    assert not log._local.exists()
    again = logs.Log(root, 2, steps=10)
    again.close()
    assert told() == 2


def test_compiled_programs(bucket, tmp_path, monkeypatch):
    """What one host has compiled, another one finds."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    names = tuple(f"jax_{name}" for name in (*names, "persistent_cache_enable_xla_caches"))
    before = {name: jax.config.values[name] for name in names}
    hits = []
    heard = lambda event, **_: hits.append(event) if "cache_hits" in event else None  # noqa: E731
    monitoring.register_event_listener(heard)
    try:
        caches.use_compilation_cache(f"{bucket}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for expected in ([], ["/jax/compilation_cache/cache_hits"]):
            compilation_cache.reset_cache()
            jax.jit(lambda x: x * 3 + 1)(np.arange(7))
            assert hits == expected
        (entry,) = paths.sizes(paths.parse(f"{bucket}/compiled"))
        assert entry.endswith("-cache")
        assert jax.config.values["jax_persistent_cache_enable_xla_caches"] == "none"
        caches.use_compilation_cache()  # a place that was named stays
        assert jax.config.values["jax_compilation_cache_dir"] == f"{bucket}/compiled"
        with pytest.raises(OSError):
            caches.use_compilation_cache("/dev/null/compiled")
    finally:
        monitoring.unregister_event_listener(heard)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_inspected(bucket, capfd):
    assert inspection.main(["inspect", f"{bucket}/m"]) == 1
    assert "is not a directory" in last_line(capfd)
    save_on(f"{bucket}/m", mesh_of(2, 2))
    assert inspection.main(["inspect", f"{bucket}/m", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["whole"] and facts["mesh"]["fsdp"] == 2
    (paths.parse(f"{bucket}/m") / "params" / "head" / "0.0").unlink()
    assert inspection.main(["inspect", f"{bucket}/m"]) == 1
    assert "params/head/0.0 is missing" in last_line(capfd)


def test_a_conversion_continues(bucket, tmp_path, capfd):
    there(GOLDEN, f"{bucket}/m")
    root = paths.parse(f"{bucket}/m")
    before = contents(downloaded(f"{bucket}/m", tmp_path / "before"))
    manifest = json.loads((root / "manifest.json").read_text())
    facts = {key: manifest[key] for key in ("made_by", "dtype", "mesh", "source")}
    paths.write(root / "unfinished.json", json.dumps(facts).encode())
    (root / "manifest.json").unlink()
    lost = root / "params" / "head" / "0.0"
    kept, missing = paths.stamp(root / "params" / "embedding" / "0.0"), paths.size(lost)
    lost.unlink()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        checkpoint.load(f"{bucket}/m")
    capfd.readouterr()
    there(GOLDEN, f"{bucket}/m")
    assert f"continuing: {(770048 - missing) / 1e6:.2f} MB of 0.77 MB" in capfd.readouterr().err
    assert contents(downloaded(f"{bucket}/m", tmp_path / "after")) == before
    assert paths.stamp(root / "params" / "embedding" / "0.0") == kept


@pytest.mark.slow
def test_killed_while_saving(bucket):
    """Of this machine, so that its lock is known to be left behind."""
    command = [sys.executable, "-c", STOPPED, f"{bucket}/m", "store.write_shards", "9"]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert (paths.parse(f"{bucket}/m") / lock.NAME).exists()
    with pytest.raises(CheckpointError, match="a save that was stopped before its end"):
        checkpoint.load(f"{bucket}/m")
    decoder = save_on(f"{bucket}/m", mesh_of(2, 2))
    assert same(arrays(checkpoint.load(f"{bucket}/m")), arrays(decoder))
    assert not (paths.parse(f"{bucket}/m") / lock.NAME).exists()


def test_a_second_writer_is_refused(bucket, monkeypatch, capfd):
    """In the middle of the first, which goes on to its end."""
    root, tried = paths.parse(f"{bucket}/m"), []

    def others() -> None:
        assert from_hf.main([str(GOLDEN), str(root)]) == 1
        tried.append(last_line(capfd))
        with pytest.raises(lock.Busy):
            save_on(root, mesh_of(1, 1))

    stopping("convert.copying:import_band", 5, others, monkeypatch.setattr)
    there(GOLDEN, root)
    assert f"{root}: process {os.getpid()} on {socket.gethostname()} has been at work" in tried[0]
    checkpoint.verify_whole(root)
    assert lock.NAME not in paths.sizes(root)


@pytest.fixture
def quick_beats(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", 0.5)


def test_a_lock_that_was_left_behind(bucket, quick_beats, caplog):
    """By a process of this machine that is gone: at once. By one elsewhere: when it shows no sign
    of life. Two that find it do not both take it.
    """

    def said() -> list[str]:  # clients of the service log, too
        return [record.getMessage() for record in caplog.records if record.name == "qwen_jax"]

    file = paths.parse(f"{bucket}/m") / lock.NAME
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = lock._me() | {"pid": gone.pid}
    paths.create(file, json.dumps(left | {"machine": "other"}).encode())
    with lock.alone(file.parent) as check:
        assert json.loads(file.read_text())["pid"] == os.getpid()
        check()
    assert f"waiting up to 0.5 s for a sign of life of process {gone.pid} on" in said()[0]
    assert len(said()) == 1 and not file.exists()
    paths.create(file, json.dumps(left).encode())
    first = paths.stamp(file)[1]
    paths.rewrite(file, json.dumps(left).encode(), generation=first)
    paths.remove_generation(file, first)  # by who has seen another lock there
    with pytest.raises(FileExistsError):
        paths.create(file, b"{}")
    with lock.alone(file.parent):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert len(said()) == 1 and not file.exists()


def test_a_program_elsewhere_that_lives(bucket, quick_beats, monkeypatch):
    """It goes on writing its lock, and is seen to, however slowly."""
    monkeypatch.setattr(lock, "LEASE", LONG)
    place = paths.parse(f"{bucket}/m")
    with lock.alone(place) as check:
        monkeypatch.setattr(lock, "_machine", lambda: "other")
        with pytest.raises(lock.Busy, match=f"process {os.getpid()} on"), lock.alone(place):
            pass
        check()


def test_a_program_that_was_halted(bucket, quick_beats, monkeypatch):
    """Another one has taken its place: it must not declare anything whole, and leaves the lock."""
    place = paths.parse(f"{bucket}/m")
    with lock.alone(place) as check:
        monkeypatch.setattr(lock._Lease, "keep", lambda _: None)
        monkeypatch.setattr(lock, "_machine", lambda: "other")
        (place / lock.NAME).unlink()
        check()
        assert (place / lock.NAME).exists(), "removed by somebody: it is there again"
    with lock.alone(place) as check:
        monkeypatch.setattr(lock, "_machine", lambda: "a third")
        took_over = pytest.raises(lock.Busy, match=f"process {os.getpid()} on .* has taken over")
        with lock.alone(place), took_over:
            check()
        assert not (place / lock.NAME).exists()


def taken_over(monkeypatch) -> None:
    """From now on, every lock has been taken by another program."""
    taken = lambda self: setattr(self, "_taken_by", {"pid": 1, "host": "other"})  # noqa: E731
    monkeypatch.setattr(lock._Lease, "_beat", taken)


def test_nothing_counts_after_another_has_taken_over(bucket, monkeypatch, capfd):
    """A conversion and a save that were halted end with an error, and declare nothing whole."""
    taken_over(monkeypatch)
    assert from_hf.main([str(GOLDEN), f"{bucket}/m"]) == 1
    assert "process 1 on other has taken over" in last_line(capfd)
    with pytest.raises(lock.Busy, match="has taken over"):
        save_on(f"{bucket}/s", mesh_of(1, 1))
    for name in "ms":
        assert not (paths.parse(f"{bucket}/{name}") / directory.MANIFEST).exists()


@pytest.mark.slow
def test_a_run_saves_nothing_after_another_has_taken_over(bucket, tmp_path, monkeypatch, capsys):
    taken_over(monkeypatch)
    out = paths.parse(f"{bucket}/run")
    arguments = training.pretraining(training.prepared(tmp_path), out)
    assert "process 1 on other has taken over" in training.fail(capsys, arguments, pretrain)
    assert not any(name.startswith("checkpoints/") for name in paths.sizes(out))


def test_files_of_tokens(bucket, tmp_path):
    """A vocabulary that is learned, and an expansion of it."""
    (tmp_path / "text.txt").write_text("aab " * 30 + "ab " * 10)
    (tmp_path / "words.txt").write_text("aabab\n")
    vocabulary, expansion = f"{bucket}/q.tiktoken", f"{bucket}/more.tiktoken"
    learning = ["--data", str(tmp_path / "text.txt"), "--size", "258", "--out", vocabulary]
    assert tokenizer.main(learning) == 0
    assert len(paths.parse(vocabulary).read_bytes().splitlines()) == 258
    words = paths.parse(f"{bucket}/words.txt")
    paths.write(words, (tmp_path / "words.txt").read_bytes())
    assert expand_vocab.main([vocabulary, str(words), expansion]) == 0
    assert paths.parse(expansion).read_bytes()


UPLOAD = """
import gc, os, sys, time
from qwen_jax.runtime import paths
def upload():
    with paths.writer(paths.parse(sys.argv[1])) as target:
        for _ in range(5):
            target.write(bytes(8 * 2**20))
        {end}
code = 0
try:
    upload()
except OSError:
    code = 3
gc.collect()
time.sleep(1)  # what is left open, gcsfs would complete here, in a thread of its own
sys.exit(code)
"""


@pytest.mark.parametrize("end", ["os._exit(3)", "raise OSError", "target.write(b'x')"])
def test_an_object_is_whole_or_not_there(bucket, end):
    """Also one larger than what is sent at a time."""
    command = [sys.executable, "-c", UPLOAD.format(end=end), f"{bucket}/large"]
    code = subprocess.run(command, cwd=ROOT).returncode
    file = paths.parse(f"{bucket}/large")
    assert file.exists() == (code == 0) == end.startswith("target")
    assert code or paths.size(file) == 5 * 8 * 2**20 + 1


def test_what_others_write_is_seen(bucket):
    """A listing that was kept would tell of what was there before."""
    root = paths.parse(f"{bucket}/m")
    paths.write(root / "params" / "a", b"1")
    assert list(paths.sizes(root)) == ["params/a"] and root.exists()
    assert [file.name for file in (root / "params").iterdir()] == ["a"]
    write = "import sys; from qwen_jax.runtime import paths; p = paths.parse(sys.argv[1]);"
    write += "paths.write(p / 'b', b'22'); paths.write(p / 'a', b'333')"
    subprocess.run([sys.executable, "-c", write, f"{bucket}/m/params"], cwd=ROOT, check=True)
    assert paths.size(root / "params" / "a") == 3
    assert paths.size(root / "params" / "b") == 2 and (root / "params" / "b").is_file()
    assert sorted(f.name for f in (root / "params").iterdir()) == ["a", "b"]
    assert paths.sizes(root) == {"params/a": 3, "params/b": 2}


def test_arguments_that_cannot_be(tmp_path, capfd, monkeypatch):
    from convert import to_hf

    assert from_hf.main([str(GOLDEN), "s3://bucket/m"]) == 1
    assert "s3://bucket/m: only local paths and gs://BUCKET/... can be used" in last_line(capfd)
    found = paths.importlib.util.find_spec
    lacking = lambda name: None if name == "gcsfs" else found(name)  # noqa: E731
    monkeypatch.setattr(paths.importlib.util, "find_spec", lacking)
    for main, arguments in (
        (from_hf.main, [str(GOLDEN), "gs://models/m"]),
        (from_hf.main, ["gs://models/m", str(tmp_path / "m")]),
        (to_hf.main, ["gs://models/m", str(tmp_path / "m")]),
        (inspection.main, ["inspect", "gs://models/m"]),
        (generate.main, ["--ckpt", "gs://models/m", "--prompt", "a"]),
    ):
        assert main(arguments) == 1
        assert last_line(capfd).endswith("gs://models/m needs gcsfs: pip install -e '.[gcs]'")


def test_local_paths_are_plain(tmp_path):
    """What is fast about them depends on it."""
    assert type(paths.parse("some/where")) is type(tmp_path)
    (tmp_path / "file").write_bytes(b"0123")
    with paths.reader(tmp_path / "file") as source, paths.writer(tmp_path / "copy") as target:
        assert isinstance(source, int) and isinstance(target, int)
        assert not (tmp_path / "copy").exists()
    assert (tmp_path / "copy").exists() and sharding.AXES
