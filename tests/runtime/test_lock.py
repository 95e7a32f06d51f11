"""One program at a time in a place: who is refused, what a lock says, when it is left behind."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qwen_jax.runtime import lock, paths
from tests.support.conversion import raises


def test_a_lock_says_who_is_there_and_goes(tmp_path):
    place = tmp_path / "a" / "b"
    with lock.alone(place):
        said = json.loads((place / lock.NAME).read_text())
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        for _ in range(2):  # to be refused changes nothing
            with pytest.raises(lock.Busy) as error, lock.alone(place):
                pass
        start = f"{place}: process {os.getpid()} on {said['host']} has been at work there since "
        assert str(error.value).startswith(f"{start}{said['since']}: wait for it or stop it")
    assert not place.exists(), "left empty, it goes"
    with lock.alone(place):
        (place / "file").touch()
    assert [file.name for file in place.iterdir()] == ["file"]


def test_a_lock_that_cannot_be_made_is_refused(tmp_path):
    """/proc has folders in which every creation of a file says that the folder is missing."""
    for place in (Path("/proc"), Path("/proc/x/y")):
        with (
            pytest.raises(OSError, match=f"^{place}: no file can be made there"),
            lock.alone(place),
        ):
            pass
    with pytest.raises(ZeroDivisionError), lock.alone(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()), "the folders that it made go"


def test_a_lock_of_a_killed_program_locks_nobody_out(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\nfrom qwen_jax.runtime import lock\n"
    )
    program += "with lock.alone(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2])
    left = json.loads((tmp_path / lock.NAME).read_text())
    with lock.alone(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid() != left["pid"]


def test_who_waits_comes_next(tmp_path):
    """Also where the holder has removed the file that the other one waits for."""
    file, came, there = tmp_path / "x.lock", [], threading.Event()

    def second() -> None:
        there.set()
        with lock.alone(tmp_path / "x", file, wait=True):
            came.append(json.loads(file.read_text())["id"])

    with lock.alone(tmp_path / "x", file):
        first = json.loads(file.read_text())["id"]
        thread = threading.Thread(target=second)
        thread.start()
        there.wait()
        assert not came
    thread.join()
    assert len(came) == 1 and came[0] != first and not file.exists()


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock.fcntl, "flock", raises(OSError(errno.ENOLCK, "No locks available")))
    with lock.alone(tmp_path), lock.alone(tmp_path):
        pass
    assert f"{tmp_path}: its disk has no locks (No locks available)" in caplog.messages[0]
    assert not list(tmp_path.iterdir())


def test_processes_that_live(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert lock.lives(os.getpid()) and not lock.lives(gone.pid)
    monkeypatch.setattr(lock.os, "kill", raises(PermissionError()))
    assert lock.lives(gone.pid), "someone else's"


def test_drafts_have_names_of_their_kind(tmp_path):
    with paths.draft(tmp_path / "0.0") as draft:
        assert list(tmp_path.glob(paths.DRAFTS)) == [draft]


def test_a_failed_draft_names_its_file(tmp_path):
    with pytest.raises(OSError, match=r"x\.png'") as error, paths.draft(Path("/proc/x.png")):
        pass
    assert error.value.filename == "/proc/x.png"
    (place := tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        paths.write(place, b"a")
    assert (error.value.filename, error.value.filename2) == (str(place), None)
    assert list(tmp_path.iterdir()) == [place]
