"""A local emulator of Google Cloud Storage for the real clients, gcsfs and TensorStore."""

import contextlib
import http
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BUCKET = "models"


@contextlib.contextmanager
def running(log: Path) -> Iterator[dict[str, str]]:
    """Run a server with an empty bucket; yields the environment variables for its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = [sys.executable, "-m", "tests.tools.object_store", "start", "--in-memory"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", BUCKET]
    with open(log, "wb") as file:
        server = subprocess.Popen([*module, *options], cwd=ROOT, stdout=file, stderr=file)
        try:
            _wait(port, server, log)
            address = f"http://127.0.0.1:{port}"
            yield {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                # Without credentials and other kinds of buckets, which the emulator lacks.
                "GCE_METADATA_ROOT": "127.0.0.1:9",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        finally:
            server.kill()
            server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers. Raises RuntimeError if it ends."""
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the stand-in does not answer: {log.read_text()}")


def _heed_generations() -> None:
    """Patch the emulator so that it handles the generations of objects.

    It does not report the generation of an object that it sends, without which TensorStore cannot
    read an object twice, as it does for Orbax's checkpoints. And it ignores `ifGenerationMatch`, by
    which an object is only created if there is none, and only removed if unchanged.
    """
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def generation(request: Any, storage: Any) -> str:
        key = request.params.get("object_id") or request.query.get("name", [None])[0]
        key = key or request.data["meta"]["name"]
        try:
            return storage.get_file_obj(request.params["bucket_name"], key)["generation"]
        except NotFound:
            return "0"

    def telling(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> Any:
        if (found := generation(request, storage)) != "0":
            response["x-goog-generation"] = found
        return download(request, response, storage, *rest, **more)

    def heeding(handler: Any) -> Any:
        def handle(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> Any:
            wanted = request.query.get("ifGenerationMatch", [None])[0]
            if wanted is not None and generation(request, storage) != wanted:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"message": "conditionNotMet"}})
            return handler(request, response, storage, *rest, **more)

        return handle

    objects.download = telling
    objects.insert, objects.delete = heeding(objects.insert), heeding(objects.delete)


if __name__ == "__main__":
    _heed_generations()
    from gcp_storage_emulator.__main__ import main  # after the patch, as it looks up the handlers

    main()
