"""A stand-in of Google Cloud Storage on this machine, for the real clients: gcsfs, TensorStore."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "models"


@contextlib.contextmanager
def running(log: Path) -> Iterator[dict[str, str]]:
    """A server with an empty bucket; yields the environment in which the clients talk to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", BUCKET]
    with open(log, "wb") as file:
        server = subprocess.Popen([*module, *options], stdout=file, stderr=file)
        try:
            _wait(port, server, log)
            address = f"http://127.0.0.1:{port}"
            yield {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                # What no stand-in has: credentials, and buckets of other kinds.
                "GCE_METADATA_ROOT": "127.0.0.1:9",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        finally:
            server.kill()
            server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the stand-in does not answer: {log.read_text()}")
