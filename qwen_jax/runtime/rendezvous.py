"""A rendezvous before jax joins the processes: all report to process 0, which sees who is missing.

jax's own start aborts after its timeout without naming the missing processes, and its coordination
service answers nobody before all have started. So the processes first meet at the coordinator's
address: each learns the host names of all, or which processes have not started. One line of JSON
goes each way, and then the port is free for jax. Nothing here knows jax.
"""

import json
import socket
import time
from typing import Any

_RETRY = 0.2  # seconds between two attempts
_LONGEST = 65536  # bytes of a line, at most


class Missing(ValueError):
    """Raised if processes have not started in time, or disagree about their number."""


def hold(coordinator: str, processes: int, *, process: int, timeout: float) -> tuple[str, ...]:
    """Meet the other processes at the coordinator's address; return every process's host name.

    coordinator: HOST:PORT, where process 0 listens.
    processes: the number of processes.
    process: the index of this process.
    timeout: seconds, after which `Missing` is raised.
    """
    host, port = address(coordinator)
    deadline = time.monotonic() + timeout
    mine = {"process": process, "processes": processes, "host": socket.gethostname()}
    if process == 0:
        answer = _listen(port, mine, deadline=deadline, timeout=timeout)
    else:
        answer = _report(host, port, mine=mine, deadline=deadline, timeout=timeout)
    if "error" in answer:
        raise Missing(answer["error"])
    return tuple(answer["hosts"])


def address(coordinator: str) -> tuple[str, int]:
    """Split HOST:PORT or [IPV6]:PORT into host and port. Raises ValueError for other text."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator {coordinator!r}: write it as HOST:PORT")
    return host.strip("[]"), int(port)


def answers(coordinator: str, timeout: float = 3.0) -> bool:
    """Return whether any program listens at `coordinator`, a HOST:PORT. timeout: seconds."""
    try:
        socket.create_connection(address(coordinator), timeout).close()
    except OSError:
        return False
    return True


def _listen(port: int, mine: dict[str, Any], *, deadline: float, timeout: float) -> dict[str, Any]:
    """In process 0, collect a report from every process, and send all of them the same answer.

    port: the port to listen on.
    mine: this process's own report: `process` (its index), `processes` (their number) and `host`.
    deadline: the time to stop waiting, in seconds of the monotonic clock.
    timeout: the seconds from the start to the deadline, for messages.

    Returns the answer: `hosts`, the host name of each process, or `error`, a message. Raises
    `Missing` if the port cannot be used.
    """
    hosts, lines = {0: mine["host"]}, dict[int, socket.socket]()
    problem = None
    try:
        listening = server(port)
    except OSError as error:
        raise Missing(
            f"process 0 cannot listen on port {port} ({error.strerror}): choose another one"
        ) from None
    with listening:
        while len(hosts) < mine["processes"] and problem is None and time.monotonic() < deadline:
            for gone in [i for i, line in lines.items() if not _connected(line)]:
                lines.pop(gone).close()
                del hosts[gone]
            listening.settimeout(_RETRY)
            try:
                line, _ = listening.accept()
            except TimeoutError:
                continue
            report = _receive(line, time.monotonic() + 5)
            number = report.get("process")
            if not isinstance(number, int):  # the peer is no process of this program
                line.close()
                continue
            problem = _conflict(report, mine, hosts)
            hosts.setdefault(number, str(report.get("host")))
            lines[-1 if number in lines else number] = line  # -1: a second process of that number
        answer = {"error": problem or _missing(hosts, mine["processes"], timeout=timeout)}
        if problem is None and len(hosts) == mine["processes"]:
            answer = {"hosts": [hosts[i] for i in range(mine["processes"])]}
        for line in lines.values():
            _send(line, answer)
    for line in lines.values():
        _receive(line, time.monotonic() + 1)  # they hang up first, which leaves the port free
        line.close()
    return answer


def server(port: int) -> socket.socket:
    """Return a socket that listens on a port, for IPv6 and IPv4 where the system can do both.

    port: 0 for any that is free.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _report(
    host: str, port: int, *, mine: dict[str, Any], deadline: float, timeout: float
) -> dict[str, Any]:
    """Send this process's report to process 0, retrying until it answers, and return the answer.

    host, port: the address of process 0.
    mine: the report: `process` (this process's index), `processes` (their number) and `host`.
    deadline: the time to stop trying, in seconds of the monotonic clock.
    timeout: the seconds from the start to the deadline, for messages.

    This process waits for the answer a few seconds longer than process 0 waits for reports. If
    there is no answer, it returns {"error": message}.
    """
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection((host, port), max(left, 0.1))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_RETRY)
            continue
        with line:
            _send(line, mine)
            if answer := _receive(line, deadline + 5):
                return answer
        why = f"not process 0, or process {mine['process']} is there already"
        time.sleep(_RETRY)
    return {"error": f"process 0 has not started within {timeout:g} s at {host}:{port} ({why})"}


def _conflict(report: dict[str, Any], mine: dict[str, Any], hosts: dict[int, str]) -> str | None:
    """Describe how the report of another process contradicts process 0, or return None.

    report: the other process's report.
    mine: process 0's own report.
    hosts: the host names of the processes that have reported so far, by index.
    """
    number, host, count = report["process"], report.get("host"), mine["processes"]
    if report.get("processes") != count:
        return (
            f"process {number} ({host}) was started as one of {report.get('processes')}, "
            f"process 0 ({mine['host']}) as one of {count}: give all the same number"
        )
    if not 0 <= number < count:
        return f"process {number} ({host}): with {count} processes the last one is {count - 1}"
    if number in hosts:
        return (
            f"process {number} was started twice, on {hosts[number]} and on {host}: give each "
            "process a number of its own"
        )
    return None


def _missing(hosts: dict[int, str], count: int, *, timeout: float) -> str:
    """Return the error message that names the processes that have not started.

    hosts: the host names of the processes that have started, by index.
    count: the number of processes.
    timeout: the seconds that were waited.
    """
    missing = [str(i) for i in range(count) if i not in hosts]
    there = ", ".join(f"{i} ({host})" for i, host in sorted(hosts.items()))
    verb = "process {} has" if len(missing) == 1 else "processes {} have"
    return (
        f"{verb.format(', '.join(missing))} not started within {timeout:g} s; "
        f"of {count} there are {there}"
    )


def _connected(line: socket.socket) -> bool:
    """Return whether the process at the other end of a connection is still connected.

    It sends nothing after its report, so a read returns at once only if it has hung up.
    """
    line.setblocking(False)
    try:
        return line.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _send(line: socket.socket, value: dict[str, Any]) -> None:
    """Send a value as one line of JSON; errors of the connection are ignored."""
    try:
        line.settimeout(5)
        line.sendall(json.dumps(value).encode() + b"\n")
    except OSError:
        pass  # the next step notices that the process is gone


def _receive(line: socket.socket, deadline: float) -> dict[str, Any]:
    """Receive one line of JSON; {} if the other side closes, is too slow or sends other data.

    deadline: the time to stop waiting, in seconds of the monotonic clock.
    """
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LONGEST:
            line.settimeout(max(deadline - time.monotonic(), 0.01))
            if not (part := line.recv(4096)):
                return {}
            data += part
        value = json.loads(data)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
