"""Many requests for hours: `python -m tests.attacks.soak --server URL --requests 20000`.

Each prompt carries a number that a grammar has the reply repeat, so that a lost or mixed up answer
is seen whatever the model's weights are. A fifth of the requests is cancelled on the way, and a
twentieth is malformed. At the end no sequence may be left, no page of the cache may be held, and
with --pid the memory of the server's process must not have grown after the first tenth.
"""

import argparse
import contextlib
import http.client
import json
import random
import sys
import threading
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


_GROWN = 20.0  # MB of the server's memory


class Soak:
    """The requests, and what came of them.

    counts: answers by their kind.
    wrong: what should not have been.
    """

    def __init__(self, url: str, seed: int):
        parts = urllib.parse.urlsplit(url)
        self._host, self._port, self._seed = parts.hostname or "", parts.port or 80, seed
        self._local = threading.local()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def connection(self) -> http.client.HTTPConnection:
        """This thread's connection, which is kept alive."""
        if getattr(self._local, "connection", None) is None:
            self._local.connection = http.client.HTTPConnection(self._host, self._port, timeout=300)
        return self._local.connection

    def get(self, path: str) -> str:
        """The text of an answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def request(self, number: int) -> None:
        """Make the request of this number, and keep what came of it."""
        kind = "error"
        try:
            kind = self._request(number)
        except (OSError, http.client.HTTPException) as error:
            self.wrong.append(f"request {number}: {type(error).__name__}: {error}")
            self._local.connection = None
        self.counts[kind] += 1

    def _request(self, number: int) -> str:
        draw = random.Random(self._seed * 1_000_003 + number)
        stream = draw.random() < 0.5
        if draw.random() < 0.05:
            return self._malformed(draw)
        body: dict[str, Any] = {
            "max_tokens": 64,
            "stream": stream,
            "temperature": draw.choice([0, 1]),
            "seed": number,
            "n": draw.choice([1, 1, 1, 2]),
            "structured_outputs": {"regex": f" ?number {number}\\."},
        }
        if draw.random() < 0.3:
            body["logprobs"] = 1
        shared = "The same beginning for many requests. " * draw.choice([0, 0, 1, 5])
        text = f"{shared}{'word ' * int(draw.lognormvariate(2, 1))}number {number}"
        path = draw.choice([CHAT, TEXT])
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": text}]
            body["logprobs"] = "logprobs" in body
        else:
            body["prompt"] = text
        connection = self.connection()
        connection.request("POST", path, json.dumps(body), JSON)
        if draw.random() < 0.2:
            time.sleep(draw.choice([0, 0.001, 0.02]))
            connection.close()
            self._local.connection = None
            return "cancelled"
        answer = connection.getresponse()
        data = answer.read().decode()
        if answer.status != 200:
            self.wrong.append(f"request {number}: status {answer.status}: {data[:200]}")
            return f"status {answer.status}"
        for found in texts(data, stream=stream, chat=path == CHAT):
            if found.strip() != f"number {number}.":
                self.wrong.append(f"request {number}: {found!r}")
        return "answered"

    def _malformed(self, draw: random.Random) -> str:
        data = draw.choice(
            [b"{", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b'{"prompt": 3}', b"[" * 5000,
             b'{"prompt": "x", "n": -1}', b'{"prompt": "x", "structured_outputs": {"regex": "("}}']
        )  # fmt: skip
        connection = self.connection()
        connection.request("POST", TEXT, data, JSON)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 400:
            self.wrong.append(f"{data!r}: status {answer.status}")
        return "malformed"


def texts(data: str, *, stream: bool, chat: bool) -> list[str]:
    """The text of each choice of an answer."""
    if not stream:
        choices = json.loads(data)["choices"]
        return [x["message"]["content"] if chat else x["text"] for x in choices]
    found: Counter[int] = Counter()
    said: dict[int, str] = {}
    for line in data.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            said[choice["index"]] = said.get(choice["index"], "") + piece
            found[choice["index"]] += choice["finish_reason"] is not None
    assert set(found.values()) == {1}, "each choice ends once"
    return list(said.values())


def memory(pid: int | None) -> float:
    """The memory of a process in MB; 0 without one."""
    if pid is None:
        return 0
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main() -> int:
    """Make all requests, print what came of them, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--clients", type=int, default=24, metavar="N")
    parser.add_argument("--pid", type=int, metavar="PID")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    soak, begun = Soak(args.server, args.seed), time.monotonic()
    first = max(args.requests // 10, 1)
    with ThreadPoolExecutor(args.clients) as threads:
        list(threads.map(soak.request, range(first)))
        before = memory(args.pid)
        list(threads.map(soak.request, range(first, args.requests)))
    time.sleep(2)
    grown, took = memory(args.pid) - before, time.monotonic() - begun
    left = json.loads(soak.get("/load"))["server_load"]
    held = [x for x in soak.get("/metrics").splitlines() if x.startswith("vllm:kv_cache_usage")]
    print(f"{args.requests} requests in {took:.1f} s: {dict(soak.counts)}")
    print(f"sequences left {left}, {held[0].rsplit(' ', 1)[1]} of the pages held, memory grown by "
          f"{grown:.1f} MB from {before:.1f} MB")  # fmt: skip
    for line in soak.wrong[:20]:
        print("WRONG", line)
    print(f"{len(soak.wrong)} wrong")
    return int(bool(soak.wrong) or left > 0 or not held[0].endswith(" 0.0") or grown > _GROWN)


if __name__ == "__main__":
    sys.exit(main())
