"""Several processes, real ones: they agree with one alone, name who is missing, end together."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convert import shares, target
from qwen_jax import checkpoint, meshes
from qwen_jax.checkpoint import store
from qwen_jax.meshes import sharding
from qwen_jax.runtime import processes, rendezvous
from tests.support import launch
from tests.support.conversion import GOLDEN, contents, same, tensors, there
from tests.tools.make_checkpoint import PRESETS as HF_PRESETS
from tests.tools.make_checkpoint import make_checkpoint

BUSY = "tests/programs/busy.py"
COUNTED = "tests/programs/counted.py"
RESTORE = "tests/programs/restore.py"
STOPPED = "tests/programs/stopped.py"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """88 MB, in which headers and what Python reads besides are below a hundredth."""
    config = HF_PRESETS["tiny"] | {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "kv_channels": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 2752,
        "vocab_size": 30000,
    }
    return make_checkpoint(tmp_path_factory.mktemp("large") / "hf", config)


def succeeded(group: launch.Group) -> dict[int, launch.Result]:
    results = group.wait()
    for number, result in results.items():
        assert result.code == 0, (number, result.err)
        assert number == 0 or not result.out + result.err, "only process 0 prints"
    return results


def complaint(result: launch.Result) -> str:
    """The one line with which a process ended, on its own and without a traceback."""
    assert result.code == 1, result
    assert "Traceback" not in result.err and "***" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    return lines[0]


# Agreement with one process


@pytest.mark.parametrize(("count", "mesh"), [(2, None), (2, "fsdp=2,tp=2")])
def test_conversion_is_that_of_one_process(tmp_path, large, count, mesh):
    options = ["--mesh", mesh] if mesh else []
    there(large, tmp_path / "one", *options)
    command = [COUNTED, tmp_path / "bytes", "convert.from_hf", large, tmp_path / "many", *options]
    with launch.group(command, count) as group:
        results = succeeded(group)
    assert "many is complete" in results[0].err
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    read = [int((tmp_path / f"bytes.{i}").read_text()) for i in range(count)]
    assert size <= sum(read) <= 1.1 * size
    assert max(read) <= 1.2 * size / count  # each its share


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "golden"
    there(GOLDEN, path, "--mesh", "fsdp=2,tp=2")
    return path


def restored(model: Path, count: int) -> dict[str, Any]:
    with launch.group([RESTORE, model, "--mesh", "fsdp=2,tp=2", "--generate"], count) as group:
        return json.loads(succeeded(group)[0].out)


@pytest.fixture(scope="module")
def alone(model) -> dict[str, Any]:
    return restored(model, 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_restored_weights_and_tokens_are_those_of_one_process(model, alone, count):
    """And no more programs are made for a stride than there: none after the first."""
    assert restored(model, count) == alone
    assert alone["compiled"] == 0


@pytest.mark.slow
def test_generate_takes_all_devices(chat_dir):
    """The command itself, without --mesh: only process 0 speaks, and says what one process says."""
    command = ["-m", "qwen_jax.generate", "--ckpt", chat_dir, "--prompt", "a", "--json"]
    command += ["--max-new-tokens", "3", "--temperature", "0", "--dtype", "float32"]

    def said(count: int) -> Any:
        with launch.group(command, count) as group:
            results = succeeded(group)
        assert all(not results[i].out for i in range(1, count))
        return json.loads(results[0].out)

    assert said(1)["text"] == said(2)["text"]


def test_a_mesh_without_a_process_is_refused(chat_dir):
    command = ["-m", "qwen_jax.generate", "--ckpt", chat_dir, "--prompt", "a", "--mesh", "tp=1"]
    with launch.group(command, 2) as group:
        results = group.wait()
    assert [results[i].code for i in range(2)] == [2, 2]
    assert "mesh fsdp=1 uses no device of process 1: give a --mesh of 2 devices" in results[0].err


def test_export_and_verification(tmp_path, model):
    options = ["--max-shard-size", "200KB", "--verify"]
    with launch.group(["convert/to_hf.py", model, tmp_path / "hf", *options], 2) as group:
        assert "verified: all 27 tensors" in succeeded(group)[0].err
    assert same(tensors(tmp_path / "hf"), tensors(GOLDEN))
    assert not (tmp_path / "hf/unfinished.json").exists()


@pytest.mark.slow
def test_restore_reads_each_byte_once(tmp_path, large):
    there(large, tmp_path / "model", "--mesh", "fsdp=2")
    command = [COUNTED, tmp_path / "bytes", "tests.programs.restore", tmp_path / "model"]
    with launch.group([*command, "--mesh", "fsdp=2", "--dtype", "bfloat16"], 2) as group:
        succeeded(group)
    size = sum((tmp_path / "model" / f).stat().st_size for f in contents(tmp_path / "model"))
    read = [int((tmp_path / f"bytes.{i}").read_text()) for i in range(2)]
    assert 0.99 * size <= sum(read) <= 1.1 * size


# Who is missing


@pytest.mark.parametrize(
    ("present", "line"),
    [
        (0, "error: processes 1, 2 have not started within 1 s; of 3 there are 0 (HOST)"),
        (1, "error: process 0 has not started within 1 s at 127.0.0.1:"),
    ],
)
def test_a_process_that_never_starts_is_named(present, line):
    with launch.group([BUSY], 3, [present], start_timeout=1) as group:
        assert complaint(group.wait()[present]).startswith(
            line.replace("HOST", socket.gethostname())
        )


def call_roll(*claims: tuple[int, int], timeout: float = launch.LONG) -> list[Any]:
    """What processes that claim (number, how many there are) hear, in the order given."""
    coordinator = f"127.0.0.1:{launch.free_port()}"
    heard: list[Any] = [None] * len(claims)

    def claim(at: int, process: int, count: int) -> None:
        try:
            heard[at] = rendezvous.hold(coordinator, count, process=process, timeout=timeout)
        except rendezvous.Missing as error:
            heard[at] = str(error)

    threads = [
        threading.Thread(target=claim, args=(at, process, count))
        for at, (process, count) in enumerate(claims)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_rendezvous_without_one(monkeypatch):
    """The time of process 0 is over when the other one has reported."""
    host, came = socket.gethostname(), threading.Event()

    def conflict(*report: Any, check: Any = rendezvous._conflict) -> Any:
        came.set()
        return check(*report)

    listening: list[int] = []

    def server(port: int, make: Any = rendezvous.server) -> Any:
        listening.append(threading.get_ident())
        return make(port)

    def clock() -> float:
        over = came.is_set() and threading.get_ident() in listening
        return 2 * launch.LONG if over else 0.0

    monkeypatch.setattr(rendezvous, "server", server)
    monkeypatch.setattr(rendezvous, "_conflict", conflict)
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    for line in call_roll((0, 3), (1, 3)):
        assert line.startswith(f"process 2 has not started within {launch.LONG:g} s; of 3 there")
        assert line.endswith(f" are 0 ({host}), 1 ({host})")


def test_rendezvous():
    host = socket.gethostname()
    assert call_roll((0, 3), (2, 3), (1, 3)) == [(host,) * 3] * 3
    assert "processes 1, 2 have not started within 0.1 s" in call_roll((0, 3), timeout=0.1)[0]
    for line in call_roll((0, 3), (1, 3), (1, 3)):
        assert "process 1 was started twice" in line
    for line in call_roll((0, 2), (1, 4)):
        assert f"process 1 ({host}) was started as one of 4, process 0 ({host}) as one of 2" in line


def test_rendezvous_passes_over_strangers():
    coordinator = f"127.0.0.1:{launch.free_port()}"
    heard = []

    def hold(process: int) -> None:
        heard.append(rendezvous.hold(coordinator, 2, process=process, timeout=launch.LONG))

    first = threading.Thread(target=hold, args=(0,))
    first.start()
    while not rendezvous.answers(coordinator):  # which hangs up at once, as a port scanner does
        pass
    with socket.create_connection(rendezvous.address(coordinator)) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n")
        hold(1)
    first.join()
    assert heard[0] == heard[1] == (socket.gethostname(),) * 2


@pytest.mark.parametrize("text", ["host", "host:", ":80", "host:0", "host:99999", "host:x"])
def test_addresses_that_cannot_be(text):
    with pytest.raises(ValueError, match="write it as HOST:PORT"):
        rendezvous.address(text)


def test_what_initialize_refuses():
    with pytest.raises(ValueError, match="process 2 of 2: numbers are 0 to 1"):
        processes.initialize("127.0.0.1:1", 2, 2)
    with pytest.raises(ValueError, match="no TPU pod, Slurm job or other cluster is recognised"):
        processes.initialize()
    processes.initialize("127.0.0.1:1", 1, 0)  # one process: nothing to join
    assert (processes.index(), processes.count()) == (0, 1)


# Who is lost


@pytest.mark.parametrize(("count", "victim"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_the_others_stop_when_one_dies_in_a_computation(count, victim):
    with launch.group([BUSY], count, heartbeat=launch.SHORT) as group:
        group.until(lambda: "the sum is" in group.read(0, "out"))
        group.kill(victim)
        results = group.wait()
    host = socket.gethostname()
    for number, result in results.items():
        if number != victim:
            assert complaint(result).startswith(f"error: process {victim} ({host}) has died")


@pytest.mark.slow
def test_sigterm_ends_a_process():
    """As Slurm and Kubernetes stop one."""
    with launch.group([BUSY], 2, heartbeat=launch.SHORT) as group:
        group.until(lambda: "the sum is" in group.read(0, "out"))
        group.kill(1, signal.SIGTERM)
        results = group.wait()
    assert results[1].code == -signal.SIGTERM
    assert "process 1" in complaint(results[0]) and "has died" in complaint(results[0])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_conversion_continues_after_one_has_died(tmp_path, victim):
    """After so many blocks of its share, of some ninety."""
    out = tmp_path / "model"
    dying = [STOPPED, "convert.copying:_check_stop", 40, victim, 9]
    command = [*dying, "convert.from_hf", GOLDEN, out]
    with launch.group(command, 2, heartbeat=launch.SHORT) as group:
        results = group.wait()
    assert results[victim].code == -signal.SIGKILL
    assert f"error: process {victim} (" in complaint(results[1 - victim])
    assert "has died" in complaint(results[1 - victim])
    with pytest.raises(ValueError, match="unfinished conversion"):
        checkpoint.load(out)
    with launch.group(["convert/from_hf.py", GOLDEN, out], 2) as group:
        assert "continuing: " in succeeded(group)[0].err
    there(GOLDEN, tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_an_error_of_one_process_ends_all(tmp_path):
    with launch.group([BUSY, "--fail", "1"], 2) as group:
        results = group.wait()
    host = socket.gethostname()
    assert complaint(results[0]) == f"error: process 1 ({host}) has failed: this is the end"
    assert complaint(results[1]) == f"error: process 1 ({host}): this is the end"
    # And of attention all had taken what is right on all devices, and said why.
    assert "attention: xla xla\n" in results[0].out
    assert (
        f"not pallas_tpu: its self-test has failed on process 1 ({host}); please" in results[0].err
    )


def test_other_arguments_are_refused():
    """They would wait for each other for ever."""
    with launch.group(["-c", OTHER_ARGUMENTS], 2) as group:
        results = group.wait()
    assert "process 0 was started with other arguments" in results[1].err
    assert all(result.code == 1 for result in results.values())


OTHER_ARGUMENTS = """
import sys
from qwen_jax.runtime import command
from tests.programs import busy
sys.argv += ["--steps", sys.argv[sys.argv.index("--process") + 1]]
sys.exit(command.run(busy.parser(), busy.work))
"""


def test_jax_was_used_before():
    program = "import jax, qwen_jax; jax.devices(); qwen_jax.initialize('localhost:1', 2, 0)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError: jax has been used already: call initialize before" in ran.stderr


# Shares of the converter


@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=4", "tp=4", "fsdp=2,tp=2", "data=2,tp=2", "tp=2"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_chunk_has_one_writer_that_holds_it(mesh, count):
    sizes = meshes.parse(mesh)
    partition = tuple(map(sharding.entries, sharding.spec("FD", None, mesh=sizes)))
    cut = [64 // 2 // sizes["tp"], 32 // sizes["fsdp"]]  # two chunks of rows in a shard
    leaf = store.StoredLeaf("up", (64, 32), (cut[0], cut[1]), "float32")
    writers: dict[str, list[int]] = {}
    for process in range(count):
        share = shares.Shares({"up": leaf}, {"up": partition}, sizes=sizes, count=count)
        for band in leaf.bands():
            for name in share.of(process, band):
                writers.setdefault(name, []).append(process)
    assert sorted(writers) == sorted(name for band in leaf.bands() for name in band.pieces)
    assert all(len(who) == 1 for who in writers.values())
    devices = sizes["data"] * sizes["fsdp"] * sizes["tp"]
    for name, (writer,) in writers.items():
        row, column = map(int, name.split("."))
        where = [(d, column, row // 2) for d in range(sizes["data"])]
        numbers = [(d * sizes["fsdp"] + f) * sizes["tp"] + t for d, f, t in where]
        assert devices == 1 or writer in [n * count // devices for n in numbers]
    if devices == 1 and count <= 2:
        assert len({who for (who,) in writers.values()}) == count


def test_another_disk_is_found_out(tmp_path):
    with pytest.raises(ValueError, match="is not the folder that process 0 writes to"):
        target.check_shared(tmp_path / "elsewhere", {})
