"""Attacks a running server, and says how it stood: `python -m tests.attacks.attack --server URL`.

Schemathesis sends requests that it makes of the server's own description (--cases of them, where
the package is installed; the extra `clients` has it). The rest is written here. After each attack
the server must still be well, and no answer may be an error of its own (500) or take too long.
Before a release: --cases 10000 --connections 10000.
"""

import argparse
import contextlib
import http.client
import importlib.util
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 60.0  # seconds for an answer; what comes later counts as a hang
HELLO = [{"role": "user", "content": "x"}]
JSON = {"Content-Type": "application/json"}


class Target:
    """The server that is attacked."""

    def __init__(self, url: str, key: str | None):
        parts = urllib.parse.urlsplit(url)
        self.url, self.host, self.port = url, parts.hostname or "", parts.port or 80
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def send(
        self, path: str, data: bytes, *, headers: dict[str, str] = JSON, method: str = "POST"
    ) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, data, {**self.headers, **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def ask(self, path: str, **body: Any) -> int:
        """The status of a request with these fields."""
        return self.send(path, json.dumps(body).encode())[0]

    def raw(self, data: bytes) -> bytes:
        """What comes back for bytes that may be no HTTP."""
        with socket.create_connection((self.host, self.port), timeout=PATIENCE) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(100)

    def is_well(self) -> bool:
        """Whether it answers, and works on nothing any more."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            status, _ = self.send("/health", b"", method="GET")
            load = json.loads(self.send("/load", b"", method="GET")[1])["server_load"]
            if status == 200 and load == 0:
                return True
            time.sleep(0.1)
        return False


def refused(status: int) -> str | None:
    """What is wrong with a status that should tell of a mistake."""
    return None if 400 <= status < 500 else f"status {status}"


def taken(status: int) -> str | None:
    """What is wrong with a status that may tell anything but a failure."""
    return None if status < 500 else f"status {status}"


def doubled(depth: int, word: str) -> dict[str, Any]:
    """A schema of a few lines that spells out 2 ** depth."""
    names = {f"d{i}": {word: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": {**names, f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def bodies(target: Target) -> list[tuple[str, Callable[[], str | None]]]:
    """Attacks by what a request says."""

    def send(path: str, data: bytes) -> Callable[[], str | None]:
        return lambda: refused(target.send(path, data)[0])

    def ask(path: str, **body: Any) -> Callable[[], str | None]:
        return lambda: taken(target.ask(path, **body))

    def chat(**body: Any) -> Callable[[], str | None]:
        return ask(CHAT, messages=HELLO, max_tokens=8, **body)

    def held(**grammar: Any) -> Callable[[], str | None]:
        return chat(structured_outputs=grammar)

    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]
    rules = [*(f'r{i}: "a" r{i + 1} | "b"' for i in range(1000)), 'r1000: "c"', "start: r0"]
    emoji = [{"role": "user", "content": "😀" * 10**6}]
    nines = b"9" * 10**6
    deep = b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    return [
        ("a prompt of a million characters", ask(TEXT, prompt="a" * 10**6)),
        ("a million spaces", ask(TEXT, prompt=" " * 10**6)),
        ("a message of a million emoji", ask(CHAT, messages=emoji)),
        ("a hundred thousand messages", ask(CHAT, messages=HELLO * 100_000)),
        ("a million ids", ask(TEXT, prompt=[1] * 10**6)),
        ("ten thousand prompts", ask(TEXT, prompt=["a"] * 10_000)),
        ("n of a million", chat(n=10**6)),
        ("ten thousand stops", chat(stop=["a"] * 10_000)),
        ("a stop of a million characters", chat(stop="ab" * 500_000)),
        ("a logit_bias of ten thousand ids", chat(logit_bias={str(i): 1 for i in range(10_000)})),
        ("a thousand tools", chat(tools=tools, tool_choice="required")),
        ("a body of a hundred megabytes", send(TEXT, b"x" * 10**8)),
        ("deep JSON", send(TEXT, deep)),
        ("deeper JSON", send(TEXT, b"[" * 4_000_000)),
        ("NaN", send(TEXT, b'{"prompt": "x", "temperature": NaN}')),
        ("an infinite number", send(TEXT, b'{"prompt": "x", "temperature": 1e999}')),
        ("a number of a million digits", send(TEXT, b'{"prompt": "x", "seed": ' + nines + b"}")),
        ("invalid UTF-8", send(TEXT, b'{"prompt": "\xff\xfe"}')),
        ("half a character", send(TEXT, b'{"prompt": "\\ud800"}')),
        ("a zero", ask(TEXT, prompt="\x00", max_tokens=1)),
        ("an anyOf bomb", held(json=doubled(40, "anyOf"))),
        ("an allOf bomb", held(json=doubled(25, "allOf"))),
        ("a oneOf bomb", held(json=doubled(25, "oneOf"))),
        ("a deep schema", held(json=nested(25))),
        ("a schema without an end", held(json={"$ref": "#"})),
        ("a schema elsewhere", held(json={"$ref": "http://127.0.0.1:1/x"})),
        ("a list of a million items", held(json={"type": "array", "minItems": 10**6, "items": {}})),
        ("a text of a million characters", held(json={"type": "string", "minLength": 10**6})),
        ("an enumeration of fifty thousand", held(json={"enum": [f"v{i}" for i in range(50_000)]})),
        ("a pattern bomb", held(json={"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"})),
        ("a backtracking pattern", held(regex="(a|a)*(a|a)*(a|a)*b")),
        ("a pattern with many states", held(regex="[ab]*a[ab]{2000}c")),
        ("a Unicode pattern", held(regex=r"(\p{L}{1,200}[^\p{L}]){1,200}")),
        ("a grammar of a thousand rules", held(grammar="\n".join(rules))),
        ("a left-recursive grammar", held(grammar='start: start start | "a" | ""')),
        ("an ambiguous grammar", held(grammar="start: x*\nx: y* | \"a\"\ny: x* | \"a\"")),
        ("a GBNF of brackets", held(grammar="root ::= " + "(" * 50_000)),
    ]  # fmt: skip


def sockets(target: Target, count: int) -> list[tuple[str, Callable[[], str | None]]]:
    """Attacks by how a client behaves."""

    def head(extra: str = "") -> bytes:
        return f"POST {CHAT} HTTP/1.1\r\nHost: {target.host}\r\n{extra}".encode()

    def opened(data: bytes, number: int) -> Callable[[], str | None]:
        """Open many connections that send something, and then nothing."""

        def attack() -> str | None:
            connections = []
            try:
                for _ in range(number):
                    one = socket.create_connection((target.host, target.port), timeout=PATIENCE)
                    one.sendall(data)
                    connections.append(one)
                begun = time.monotonic()
                status = target.ask(CHAT, messages=HELLO, max_tokens=2)
                took = time.monotonic() - begun
                return None if status == 200 and took < PATIENCE else f"status {status}"
            finally:
                for one in connections:
                    one.close()

        return attack

    def gone(stream: bool) -> str | None:
        body = {"messages": HELLO, "stream": stream, "ignore_eos": True, "max_tokens": 1000}
        data = json.dumps(body).encode()
        length = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        for _ in range(100):
            with socket.create_connection((target.host, target.port)) as connection:
                connection.sendall(head(length) + data)
        return None

    def wrong_keys() -> str | None:
        if not target.headers:
            return None
        for key in ("", "x", "é", "x" * 5000):
            given = {"Authorization": f"Bearer {key}".encode("latin1").decode("latin1")}
            if (status := target.send(CHAT, b"{}", headers=given)[0]) != 401:
                return f"status {status} for the key {key[:5]!r}"
        return None

    def garbage() -> str | None:
        for data in (
            b"\x00" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"a" * 100_000,
            head("Content-Length: -1\r\n\r\n"),
            head("Content-Length: 99999999999999999999999999\r\n\r\n"),
            head("Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
            head("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            head("".join(f"X-{i}: y\r\n" for i in range(10_000)) + "\r\n"),
        ):
            with contextlib.suppress(ConnectionError):
                if b" 500 " in target.raw(data):
                    return f"status 500 for {data[:30]!r}"
        return None

    unread = json.dumps({"messages": HELLO, "stream": True, "ignore_eos": True, "n": 8}).encode()
    length = f"Content-Type: application/json\r\nContent-Length: {len(unread)}\r\n\r\n"
    begun = head("Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    return [
        ("bytes that are no HTTP", garbage),
        ("wrong keys", wrong_keys),
        ("clients that go from streams", lambda: gone(True)),
        ("clients that go from whole answers", lambda: gone(False)),
        (f"{count} connections that say nothing", opened(b"", count)),
        ("200 heads that do not end", opened(head(), 200)),
        ("200 bodies that do not come", opened(begun, 200)),
        ("20 streams that nobody reads", opened(head(length) + unread, 20)),
    ]


def by_description(target: Target, cases: int) -> str | None:
    """Requests that schemathesis makes of the server's description."""
    description = json.loads(target.send("/openapi.json", b"", method="GET")[1])
    every = [one for path in description["paths"].values() for one in path.values()]
    operations = sum("requestBody" in one or "parameters" in one for one in every)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{target.url}/openapi.json"]
    command += ["--phases", "coverage,fuzzing", "--max-examples", str(-(-cases // operations))]
    command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    command += ["--request-timeout", str(PATIENCE), "--continue-on-failure", "--no-color"]
    command += ["--suppress-health-check", "all", "--generation-deterministic"]
    for name, value in target.headers.items():
        command += ["-H", f"{name}: {value}"]
    with tempfile.TemporaryDirectory() as folder:  # for what it keeps of a run
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print("\n".join(found.stdout.splitlines()[-40:]))
    return None if found.returncode == 0 else f"exit code {found.returncode}"


def main() -> int:
    """Run all attacks, print a line for each, and return the number that hurt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--key", metavar="KEY")
    parser.add_argument("--cases", type=int, default=500, metavar="N")
    parser.add_argument("--connections", type=int, default=500, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="attacks that have this in name")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    target, hurt = Target(args.server.rstrip("/"), args.key), 0
    attacks = [*bodies(target), *sockets(target, args.connections)]
    if importlib.util.find_spec("schemathesis"):
        attacks.append(
            (f"{args.cases} cases of schemathesis", lambda: by_description(target, args.cases))
        )
    for name, attack in attacks:
        if args.only not in name:
            continue
        begun = time.monotonic()
        try:
            problem = attack()
        except Exception as error:
            # A server may close a connection whose request it has refused before reading all of it.
            closed = isinstance(error, ConnectionError) and "hundred megabytes" in name
            problem = None if closed else f"{type(error).__name__}: {error}"
        took = time.monotonic() - begun
        if not target.is_well():
            problem = f"{problem or ''}; the server is not well any more"
        hurt += problem is not None
        print(
            f"{'HURT' if problem else 'stood':5} {took:7.2f} s  {name}  {problem or ''}", flush=True
        )
    print(f"{hurt} of {len(attacks)} attacks hurt")
    return min(hurt, 1)


if __name__ == "__main__":
    sys.exit(main())
