"""Several processes as one program: joined, watched, and ended with a line that says who is lost.

`jax.distributed` does the work: it recognises TPU pods, Slurm and Kubernetes, joins the processes
and hears their heartbeats. Here is what it leaves out: who is missing at the start
(`roll_call.py`), one line in place of its abort when a process is lost, and an end in step.
Nothing here knows of models or commands, and jax is imported only where several processes are.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

from qwen_jax.runtime import rendezvous

_FAILED = "qwen_jax/failed/"  # key: process, value: what it ended with
_PROPOSED = "qwen_jax/proposed/end"
_FOREVER = 7 * 24 * 3600.0  # seconds
_WAIT = int(1000 * _FOREVER)  # for another process: where one is lost, the watch ends this one
_SECOND = 1.0  # between two looks at the others
# How the runtime reports a collective whose other end has gone.
_BROKEN = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|INTERNAL|DEADLINE_EXCEEDED): ")


@dataclasses.dataclass
class _Joined:
    """What this process knows of the others. client: jax's, to its coordination service."""

    index: int
    hosts: tuple[str, ...]
    coordinator: str
    heartbeat_timeout: float
    client: Any = None
    ending: int | None = None  # the exit code, once this process is about to end
    reason: str = ""  # why, while that has not been said
    barriers: int = 0
    gatherings: int = 0

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"


_joined: _Joined | None = None
_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[Any] = []  # the handler, which C calls
_last_words = threading.Lock()  # taken by the thread that ends the process


def index() -> int:
    """The number of this process; 0 where there is one alone."""
    return _joined.index if _joined else 0


def count() -> int:
    return len(_joined.hosts) if _joined else 1


def name(process: int) -> str:
    """A process for people, with its host where there are several."""
    return _joined.name(process) if _joined else f"process {process}"


def count_here() -> int:
    """How many processes of this program are on this host, itself among them."""
    return _joined.hosts.count(_joined.hosts[_joined.index]) if _joined else 1


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = 300,
    heartbeat_timeout: float = 30,
) -> None:
    """Join the processes of this program; before any other use of jax, in each of them.

    coordinator: HOST:PORT of process 0; processes: how many; process: the number of this one, from
    0. What is None comes from the TPU pod's metadata, Slurm, or whatever else jax recognises. One
    process is as if this had not been called. timeout: seconds for all to come.
    heartbeat_timeout: seconds without a sign of life after which a process counts as lost; the
    others then end, with exit code 1 and one line that names it.

    Raises ValueError when the processes cannot be found, or naming those that have not come.
    """
    global _joined
    if _joined:
        raise ValueError("initialize has been called already: once for each process")
    if "jax" not in sys.modules:
        # jax's runtime announces the loss of a process with a stack trace and aborts. It reads this
        # when it is loaded; where it was loaded before, the trace comes before our line.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
    coordinator, processes, process, devices = _find(coordinator, processes, process, timeout)
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: numbers are 0 to {processes - 1}")
    if processes == 1:
        return
    if _in_use():
        raise ValueError("jax has been used already: call initialize before anything else")
    hosts = rendezvous.hold(coordinator, processes, process, timeout)
    _joined = _Joined(process, hosts, coordinator, heartbeat_timeout)
    _catch_abort(_joined)
    _start_jax(_joined, devices, timeout)
    watch = threading.Thread(target=_watch, args=(_joined,), daemon=True, name="watch")
    watch.start()
    sys.excepthook = _excepthook(sys.excepthook)
    atexit.register(
        _leave, _joined, watch
    )  # runs before jax's own, which leaves without waiting for the others


def _find(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> tuple[str, int, int, Any]:
    """What was not given, from the environment, by jax's own detection."""
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, int(timeout)
        )
    except Exception as error:  # of whatever the environment's kind asks: metadata, DNS, Kubernetes
        raise ValueError(
            f"the environment does not say which processes there are: {error}"
        ) from error
    coordinator, processes, process, devices = found
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "no TPU pod, Slurm job or other cluster is recognised here: say --coordinator "
            "HOST:PORT, --processes N and --process I"
        )
    rendezvous.address(coordinator)
    return coordinator, int(processes), int(process), devices


def _in_use() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _start_jax(me: _Joined, devices: Any, timeout: float) -> None:
    import jax
    from jax._src import distributed

    # Otherwise the service makes every process abort before any could say why.
    jax.config.update("jax_enable_recoverability", True)
    # It would catch SIGTERM and tell nobody: the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        me.coordinator,
        len(me.hosts),
        me.index,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout) or 1,
        heartbeat_timeout_seconds=int(me.heartbeat_timeout) or 1,
    )
    me.client = distributed.global_state.client


def barrier(timeout: float = _FOREVER) -> None:
    """Wait until every process is here; all must call this equally often."""
    if (me := _joined) is None:
        return
    me.barriers += 1
    try:
        me.client.wait_at_barrier(f"qwen_jax/{me.barriers}", int(1000 * timeout))
    except Exception as error:
        await_verdict(error)
        raise


def agree(what: str, value: str) -> None:
    """Raise ValueError where process 0 has another value: the processes would wait for ever."""
    if (me := _joined) is None:
        return
    key = f"qwen_jax/agree/{what}"
    if me.index == 0:
        me.client.key_value_set(key, value)
    elif (first := me.client.blocking_key_value_get(key, _WAIT)) != value:
        raise ValueError(f"process 0 was started with other {what}: {first}; here: {value}")


def gather(text: str) -> list[str]:
    """What each process says, by its number; all must call this equally often."""
    if (me := _joined) is None:
        return [text]
    me.gatherings += 1
    key = f"qwen_jax/gathered/{me.gatherings}/"
    try:
        me.client.key_value_set(f"{key}{me.index}", text)
        return [me.client.blocking_key_value_get(f"{key}{i}", _WAIT) for i in range(count())]
    except Exception as error:
        await_verdict(error)
        raise


def propose(number: int) -> int:
    """Tell the others a number, unless one of them has told one before: the number that holds."""
    if (me := _joined) is None:
        return number
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is there already
        me.client.key_value_set(_PROPOSED, str(number))
    return int(me.client.blocking_key_value_get(_PROPOSED, _WAIT))


def proposed() -> int | None:
    """The number that one of the processes has proposed, if any."""
    if (me := _joined) is None:
        return None
    found = dict(me.client.key_value_dir_get(_PROPOSED.rpartition("/")[0] + "/"))
    return int(next(iter(found.values()))) if found else None


def first(work: Callable[[], Any]) -> Any:
    """Do the work in process 0, and then in the others, which find what it has made."""
    if index():
        barrier()
        return work()
    result = work()
    barrier()
    return result


def failed(reason: str, code: int = 1) -> NoReturn:
    """Say why this process ends, to the others too, and end it with an exit code.

    What process 0 says already, such as an error in the command's arguments, is said once.
    """
    me = _joined
    assert me is not None
    me.ending, me.reason = code, reason if me.index == 0 else f"{me.name(me.index)}: {reason}"
    reasons: dict[str, str] = {}
    try:
        me.client.key_value_set(f"{_FAILED}{me.index}", reason, allow_overwrite=True)
        reasons = dict(me.client.key_value_dir_get(_FAILED)) if _meet(me) else {}
    except Exception:
        pass  # who cannot be told learns it from the missing heartbeat
    if me.index == 0 or reasons.get(f"{_FAILED}0") != reason:
        _say(me, me.reason)
    sys.stdout.flush()
    os._exit(code)  # what else happens at the end of a process would wait for the others


def await_verdict(error: BaseException) -> None:
    """Where an error may come from the loss of another process, wait until it is known whose.

    The process then ends from another thread; this returns when nobody turns out to be lost.
    """
    if (me := _joined) is not None and _BROKEN.search(str(error)):
        time.sleep(me.heartbeat_timeout + 10)


def _watch(me: _Joined) -> None:
    """Look after the others until the end. A thread of its own, as the program waits in jax."""
    everyone = list(range(len(me.hosts)))
    while me.ending != 0:
        try:
            # jax knows by heartbeats who lives, and answers when all who do have asked: so even a
            # process that has failed goes on asking, until the others know.
            living = me.client.get_live_nodes(everyone)
            failures = dict(me.client.key_value_dir_get(_FAILED))
        except Exception as error:
            if me.ending is not None:
                return
            if _coordinator_gone(me):
                _end(me, _lost(me, [0]))
            _end(me, f"jax's coordination service does not answer: {error}")
        failures.pop(f"{_FAILED}{me.index}", None)
        lost = [i for i in everyone if i not in living]
        if me.ending is None and failures:
            _end(me, _reason(me, failures), together=True)
        if me.ending is None and lost:
            _end(me, _lost(me, lost))
        time.sleep(_SECOND)


def _reason(me: _Joined, failures: dict[str, str]) -> str:
    key, reason = min(failures.items())
    return f"{me.name(int(key.removeprefix(_FAILED)))} has failed: {reason}"


def _lost(me: _Joined, lost: list[int]) -> str:
    names = ", ".join(me.name(i) for i in lost)
    return (
        f"{names} {'has' if len(lost) == 1 else 'have'} died: its own output may say why; the same "
        "command given again continues from what was finished"
    )


def _coordinator_gone(me: _Joined) -> bool:
    """Whether nothing listens for process 0 any more; its system takes a moment to clear up."""
    if me.index == 0:
        return False
    for _ in range(10):
        if not rendezvous.answers(me.coordinator):
            return True
        time.sleep(0.2)
    return False


def _end(me: _Joined, line: str, together: bool = False) -> NoReturn:
    """End this process at once: its main thread may wait for ever in a collective.

    together: all live, and wait until every one has heard.
    """
    if not _last_words.acquire(blocking=False):
        time.sleep(5)  # another thread is at it
        os._exit(1)
    _say(me, line)
    if together:
        _meet(me)
    elif me.index == 0:
        time.sleep(2 * _SECOND)  # the others hear through the service, which lives here
    os._exit(1)


def _meet(me: _Joined) -> bool:
    """Wait a little for all to know of a failure; whether they do."""
    try:
        me.client.wait_at_barrier("qwen_jax/failed", 3000)
    except Exception:
        return False
    if me.index == 0:
        time.sleep(_SECOND)  # the others have their answer from the service, which lives here
    return True


def _say(me: _Joined, line: str) -> None:
    start = "\n" if "tqdm" in sys.modules and me.index == 0 else ""  # off the line of a bar
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = f"{start}error: {' '.join(line.split())}\n"
    os.write(2, line.encode(encoding, "backslashreplace"))


def _catch_abort(me: _Joined) -> None:
    """One line instead of an abort.

    When process 0 goes, its coordination service goes with it, and jax's client in every other
    process calls `abort()` from a thread of its own: no exception, and too soon for any watching.
    """

    def aborted(number: int) -> None:
        if me.ending is not None:
            if me.reason:
                _say(me, me.reason)
            os._exit(me.ending)
        if _coordinator_gone(me):
            _end(me, _lost(me, [0]))
        if me.client is None:
            _end(me, "jax could not join the processes: one of them has ended meanwhile")
        _end(
            me,
            f"the runtime has aborted {me.name(me.index)}: with TF_CPP_MIN_LOG_LEVEL=0 in the "
            "environment it says why",
        )

    handler = _SIGNAL_HANDLER(aborted)
    _kept.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _SIGNAL_HANDLER)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)


def _excepthook(previous: Callable[..., Any]) -> Callable[..., Any]:
    """For programs of the user's own: what `command.run` does for commands."""

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        await_verdict(error)
        previous(kind, error, trace)
        failed(f"{kind.__name__}: {error}")

    return hook


def _leave(me: _Joined, watch: threading.Thread) -> None:
    """End in step: jax's service lives in process 0, which therefore goes last."""
    import jax

    try:
        me.client.wait_at_barrier("qwen_jax/end", int(_FOREVER * 1000))
        me.ending = 0
        if me.index == 0:
            # Each of the others leaves as soon as its thread has this answer.
            while set(me.client.get_live_nodes(list(range(len(me.hosts))))) != {0}:
                time.sleep(0.05)
        watch.join()
        jax.distributed.shutdown()
    except Exception as error:
        _end(me, f"{me.name(me.index)} could not end with the others: {error}")
