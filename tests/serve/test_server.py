"""The server at a port: clients that go, that do not read; signals; the engine's end; metrics."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.engine.settings import Load
from qwen_jax.serve import server as server_module
from qwen_jax.serve.served import Limits
from qwen_jax.serve.server import Server, address, bind
from tests.support.served_app import HELLO, Served, listening, opened, until

CHAT = "/v1/chat/completions"


def send(url: str, **body: Any) -> socket.socket:
    """A connection that has sent a chat request."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps({"messages": HELLO, **body}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    found = b""
    with connection:
        while data := connection.recv(65536):
            found += data
    return found


def get(url: str, path: str) -> tuple[int, str]:
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_sequences_along(stream: bool) -> None:
    """Within a step: the engine makes none here before it hears of it."""
    one = Served("abc", stepwise=True)
    with listening(one) as (_, url):
        connection = send(url, stream=stream, n=2)
        until(lambda: len(one.engine.submitted) == 1)
        one.engine.step()
        until(lambda: len(one.engine.submitted) == 2)
        connection.close()
        until(lambda: len(one.engine.cancelled) == 2)
        until(lambda: one.served.live == one.served.answering == 0)


def test_a_client_that_does_not_read_is_given_up() -> None:
    limits = Limits(unread=500, send_seconds=30)
    one = Served("x" * 2000, limits=limits, longest=10**6, defaults={"max_new_tokens": 10**5})
    with listening(one) as (_, url):
        connection = send(url, stream=True, ignore_eos=True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda: one.engine.cancelled == [0])
        assert one.served.live == 0
        connection.close()


def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    one = Served("abc", stepwise=True, limits=Limits(ping_seconds=0.02))
    with listening(one) as (_, url):
        connection = send(url, stream=True)
        found = b""
        while b": ping\n\n" not in found:
            found += connection.recv(1000)
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    one = Served(limits=Limits(body_seconds=0.05))
    with listening(one) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_end_waits_for_requests_that_were_taken() -> None:
    one = Served("abc", stepwise=True)
    with listening(one, drain_seconds=30) as (server, url):
        taken = [send(url, stream=True), send(url)]
        until(lambda: len(one.engine.submitted) == 2)
        server.drain(signal.SIGTERM)
        status, text = get(url, "/health")
        assert status == 503 and "about to end" in text
        late = send(url)
        assert late.recv(1000).startswith(b"HTTP/1.1 503")
        late.close()
        time.sleep(0.3)  # three looks at whether it ends
        assert not server.should_exit
        for _ in range(4):
            one.engine.step()
        for connection in taken:
            assert b"HTTP/1.1 200" in (found := received(connection)) and b"stop" in found
        until(lambda: server.should_exit)
    assert server.ended_by == signal.SIGTERM


def test_the_end_comes_after_a_time_or_a_second_signal() -> None:
    for seconds, signals in ((0.01, 1), (60, 2)):
        one = Served("abc", stepwise=True)
        with listening(one, drain_seconds=seconds) as (server, url):
            connection = send(url)
            until(lambda one=one: len(one.engine.submitted) == 1)
            for _ in range(signals):
                server.drain(signal.SIGTERM)
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 503") and b"the server has ended" in answer


def test_figures_have_the_names_that_dashboards_know() -> None:
    with opened("xyz") as one:
        one.chat(n=2)
        one.refused(CHAT, messages=[])
        answer = one.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        found = dict(
            line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")
        )
        value = {name.replace('{model_name="tiny"}', ""): float(x) for name, x in found.items()}
        success = 'vllm:request_success_total{finished_reason="stop",model_name="tiny"}'
        assert value[success] == 2
        for name, wanted in {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "prefix_cache_hits_total": 0,
            "num_preemptions_total": 0,
            "generation_tokens_total": 8,
            "time_to_first_token_seconds_count": 2,
            "inter_token_latency_seconds_count": 6,
            "request_time_per_output_token_seconds_count": 2,
            "e2e_request_latency_seconds_count": 2,
            "request_queue_time_seconds_count": 2,
            "request_prefill_time_seconds_count": 2,
            "request_decode_time_seconds_count": 2,
            "request_generation_tokens_sum": 8,
            "request_params_n_sum": 2,
            "iteration_tokens_total_count": value["vllm:engine_steps_total"],
        }.items():
            assert value[f"vllm:{name}"] == wanted, name
        assert value["vllm:prefix_cache_queries_total"] == value["vllm:request_prompt_tokens_sum"]
        assert value["vllm:prompt_tokens_total"] == value["vllm:request_prompt_tokens_sum"]
        assert value["vllm:request_params_max_tokens_sum"] == 4000
        tokens = value["vllm:prompt_tokens_total"] + value["vllm:generation_tokens_total"]
        assert value["vllm:iteration_tokens_total_sum"] == tokens


def test_the_tokens_of_steps_are_counted_up_to_each_bound() -> None:
    with opened() as one:
        load = Load(step_tokens={0: 2, 1: 3, 9: 4, 16: 5, 16385: 6})
        one.engine.load = lambda: load
        name, labels = "vllm:iteration_tokens_total", 'model_name="tiny"'
        lines = one.client.get("/metrics").text.splitlines()
        assert f"# TYPE {name} histogram" in lines
        for bound, wanted in (
            *(("1.0", 5), ("8.0", 5), ("16.0", 14), ("32.0", 14)),
            *(("16384.0", 14), ("+Inf", 20)),
        ):
            assert f'{name}_bucket{{le="{bound}",{labels}}} {wanted}.0' in lines
        assert f"{name}_count{{{labels}}} 20.0" in lines
        assert f"{name}_sum{{{labels}}} {3 + 4 * 9 + 5 * 16 + 6 * 16385}.0" in lines


def serve(one: Served, meanwhile: Callable[[str], object]) -> Server:
    """Serve in this thread, which signals come to, while another does something."""
    taken = bind("127.0.0.1", 0)
    server = Server(one.app, one.served, drain_seconds=20)

    def act() -> object:
        try:
            until(lambda: server.started)
            return meanwhile(address(taken))
        except BaseException:
            server.should_exit = True
            raise

    with ThreadPoolExecutor(1) as thread:
        acted = thread.submit(act)
        server.serve_at(taken)
        acted.result()
    one.engine.close()
    return server


def test_sigterm_under_load_loses_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    one = Served("abc", pause=0.002)
    answers: list[bytes] = []

    def load(url: str) -> None:
        many = {"n": 3, "ignore_eos": True, "max_tokens": 50}
        taken = [send(url, stream=i % 2 == 0, **many) for i in range(10)]
        until(lambda: one.served.live == 30)
        os.kill(os.getpid(), signal.SIGTERM)
        answers.extend(map(received, taken))

    serve(one, load).raise_end()
    assert len(answers) == 10
    for answer in answers:
        assert b"HTTP/1.1 200" in answer and answer.count(b'"finish_reason":"length"') == 3
    assert capsys.readouterr().err.startswith("ending: 10 requests are answered first")


def test_ctrl_c_is_told_from_an_end_in_order() -> None:
    server = serve(Served(), lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        server.raise_end()


def test_a_dead_engine_ends_the_server_after_it_has_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "_FAILURE_SECONDS", 0.2)
    one = Served("abc", stepwise=True)
    said: list[tuple[int, str]] = []
    waiting: list[bytes] = []

    def die(url: str) -> None:
        connections = [send(url), send(url, stream=True)]
        until(lambda: len(one.engine.submitted) == 2)
        one.engine.step()
        one.engine.fail("no device")
        said.append(get(url, "/health"))
        waiting.extend(map(received, connections))

    with pytest.raises(RuntimeError, match="the engine has stopped: no device"):
        serve(one, die).raise_end()
    assert said[0][0] == 503 and "no device" in said[0][1]
    assert waiting[0].startswith(b"HTTP/1.1 500") and b"no device" in waiting[1]


def test_a_port_that_is_taken_is_named() -> None:
    first = bind("127.0.0.1", 0)
    first.listen()
    port = first.getsockname()[1]
    with pytest.raises(OSError, match=rf"^127\.0\.0\.1:{port} cannot be served: .*in use"):
        bind("127.0.0.1", port)
    first.close()


@pytest.mark.slow
def test_exit_codes_of_the_process() -> None:
    """0 after SIGTERM, 130 after Ctrl-C, 1 when the engine has died."""
    for number, code, said in (
        (signal.SIGTERM, 0, ""),
        (signal.SIGINT, 130, "interrupted\n"),
        (None, 1, "error: RuntimeError: the engine has stopped: it was told to"),
    ):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.programs.serving"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            until(lambda url=url: answers(url))
            if number is not None:
                process.send_signal(number)
            _, err = process.communicate(None if number else "fail\n", timeout=60)
            assert process.returncode == code and err.startswith(said)


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        return get(url, "/health")[0] == 200
    except OSError:
        return False
