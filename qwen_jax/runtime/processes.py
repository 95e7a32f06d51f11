"""Runs several processes as one program: joins them, watches them, and ends them together.

`jax.distributed` recognises TPU pods, Slurm and Kubernetes, joins the processes and watches their
heartbeats. This module adds what it lacks: the names of processes that did not start
(`rendezvous.py`), one line instead of an abort when a process is lost (`watch.py`), and an orderly
end. It knows no models or commands, and imports jax only if there are several processes.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from qwen_jax.runtime import rendezvous, watch

_T = TypeVar("_T")

_PROPOSED = "qwen_jax/proposed/end"
_FOREVER = 7 * 24 * 3600.0  # seconds
_WAIT = int(1000 * _FOREVER)  # ms; if another process is lost, the watch thread ends this one
# Messages of the runtime about a collective in which a process is gone.
_BROKEN = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|INTERNAL|DEADLINE_EXCEEDED): ")


_joined: watch.Joined | None = None


def index() -> int:
    """Return the index of this process, from 0; 0 if there is only one process."""
    return _joined.index if _joined else 0


def count() -> int:
    """Return the number of processes of this program."""
    return len(_joined.hosts) if _joined else 1


def name(process: int) -> str:
    """Return the name of a process for messages, with its host if there are several processes.

    process: the index of the process.
    """
    return _joined.name(process) if _joined else f"process {process}"


def first_host() -> str:
    """Return the name or address at which the other processes reach process 0.

    It is the coordinator's. The name that the host has for itself may be unknown to others, as that
    of a pod is in Kubernetes.
    """
    return rendezvous.address(_joined.coordinator)[0] if _joined else "localhost"


def count_here() -> int:
    """Return the number of processes of this program on this host, this one included."""
    return _joined.hosts.count(_joined.hosts[_joined.index]) if _joined else 1


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = 300,
    heartbeat_timeout: float = 30,
) -> None:
    """Join the processes of this program. Call it in each of them before any other use of jax.

    coordinator: HOST:PORT of process 0.
    processes: the number of processes.
    process: the index of this process, from 0.
    timeout: seconds to wait for all processes to start.
    heartbeat_timeout: seconds without a sign of life after which a process counts as lost; the
        others then end with exit code 1 and one line that names it.

    An argument that is None is taken from the TPU pod's metadata, from Slurm, or from another
    cluster that jax recognises. With one process, nothing is done. Raises ValueError if the
    environment describes no processes, or if some have not started (the message names them).
    """
    global _joined
    if _joined:
        raise ValueError("initialize has been called already: once for each process")
    if "jax" not in sys.modules:
        # When a process is lost, jax's runtime prints a stack trace and aborts. It reads this level
        # when it is loaded; if it is loaded already, the trace precedes our line.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
    coordinator, processes, process, devices = _find(
        coordinator, processes, process=process, timeout=timeout
    )
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: numbers are 0 to {processes - 1}")
    if processes == 1:
        return
    if _in_use():
        raise ValueError("jax has been used already: call initialize before anything else")
    hosts = rendezvous.hold(coordinator, processes, process=process, timeout=timeout)
    _joined = watch.Joined(process, hosts, coordinator, heartbeat_timeout)
    watch.catch_abort(_joined)
    _start_jax(_joined, devices, timeout=timeout)
    thread = threading.Thread(target=watch.look_after, args=(_joined,), daemon=True, name="watch")
    thread.start()
    sys.excepthook = _excepthook(sys.excepthook)
    atexit.register(
        _leave, _joined, thread
    )  # runs before jax's own handler, which does not wait for the other processes


def _find(
    coordinator: str | None, processes: int | None, *, process: int | None, timeout: float
) -> tuple[str, int, int, Any]:
    """Fill in the arguments of `initialize` that are None, by jax's own cluster detection.

    timeout: seconds for the detection.

    Returns the coordinator's HOST:PORT, the number of processes, the index of this process, and the
    ids of its local devices (None for all). Raises ValueError if no cluster is recognised.
    """
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, int(timeout)
        )
    except Exception as error:  # the detection may query metadata servers, DNS or Kubernetes
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
    """Whether jax has created its devices already, after which processes cannot be joined."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _start_jax(me: watch.Joined, devices: Any, *, timeout: float) -> None:
    """Connect this process to jax's coordination service, and keep the service's client in `me`.

    devices: the ids of the local devices that this process uses, None for all.
    timeout: seconds to wait for the other processes.
    """
    import jax
    from jax._src import distributed

    # Otherwise the service aborts every process before one can print the reason.
    jax.config.update("jax_enable_recoverability", True)
    # It would catch SIGTERM without ending the process.
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
    """Wait until every process has called this; all must call it equally often.

    timeout: seconds.
    """
    if (me := _joined) is None:
        return
    me.barriers += 1
    try:
        me.client.wait_at_barrier(f"qwen_jax/{me.barriers}", int(1000 * timeout))
    except Exception as error:
        await_verdict(error)
        raise


def agree(what: str, value: str) -> None:
    """Raise ValueError if this process has another value than process 0, which would block the run.

    what: the kind of value, such as "arguments", for the key and the message.
    value: the value as text.

    All processes must call this.
    """
    if (me := _joined) is None:
        return
    key = f"qwen_jax/agree/{what}"
    if me.index == 0:
        me.client.key_value_set(key, value)
    elif (first := me.client.blocking_key_value_get(key, _WAIT)) != value:
        raise ValueError(f"process 0 was started with other {what}: {first}; here: {value}")


def gather(text: str) -> list[str]:
    """Collect a text from each process, in order of their indices.

    All processes must call this equally often.
    """
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
    """Propose a number, such as a run's last step; return the first that any process proposed.

    There is one number for as long as the processes run.
    """
    if (me := _joined) is None:
        return number
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is there already
        me.client.key_value_set(_PROPOSED, str(number))
    return int(me.client.blocking_key_value_get(_PROPOSED, _WAIT))


def proposed() -> int | None:
    """Return the number that some process was the first to propose (`propose`), or None so far."""
    if (me := _joined) is None:
        return None
    found = dict(me.client.key_value_dir_get(_PROPOSED.rpartition("/")[0] + "/"))
    return int(next(iter(found.values()))) if found else None


def first(work: Callable[[], _T]) -> _T:
    """Call `work` in process 0, then in the others, which find the files process 0 has made."""
    if index():
        barrier()
        return work()
    result = work()
    barrier()
    return result


def failed(reason: str, code: int = 1) -> NoReturn:
    """End this process with an exit code, and report the reason to the user and to other processes.

    If process 0 fails with the same reason, as with a wrong argument of the command, only process 0
    prints it.
    """
    me = _joined
    assert me is not None
    me.ending, me.reason = code, reason if me.index == 0 else f"{me.name(me.index)}: {reason}"
    reasons: dict[str, str] = {}
    try:
        me.client.key_value_set(f"{watch.FAILED}{me.index}", reason, allow_overwrite=True)
        reasons = dict(me.client.key_value_dir_get(watch.FAILED)) if watch.meet(me) else {}
    except Exception:
        pass  # a process that cannot be reached notices the missing heartbeat
    if me.index == 0 or reasons.get(f"{watch.FAILED}0") != reason:
        watch.say(me, me.reason)
    sys.stdout.flush()
    os._exit(code)  # a normal exit would run handlers that wait for the other processes


def await_verdict(error: BaseException) -> None:
    """If an error may come from the loss of a process, wait for the watch thread to find out which.

    The watch thread (`watch.look_after`) then ends this process with a message. Returns if no
    process is lost, or if the error has another cause, so that the caller can report the error.
    """
    if (me := _joined) is not None and _BROKEN.search(str(error)):
        time.sleep(me.heartbeat_timeout + 10)


def _excepthook(previous: Callable[..., Any]) -> Callable[..., Any]:
    """Return an exception hook for user programs, which ends this process and informs the others.

    previous: the hook that prints the traceback, which is called first.
    """

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        await_verdict(error)
        previous(kind, error, trace)
        failed(f"{kind.__name__}: {error}")

    return hook


def _leave(me: watch.Joined, thread: threading.Thread) -> None:
    """At exit, wait for the other processes; process 0, which runs jax's service, ends last.

    thread: the watch thread of this process.
    """
    import jax

    try:
        me.client.wait_at_barrier("qwen_jax/end", int(_FOREVER * 1000))
        me.ending = 0
        if me.index == 0:
            # jax answers a query once all living nodes have asked. The watch threads of the others
            # need one more answer before they end, so this process keeps asking.
            while set(me.client.get_live_nodes(list(range(len(me.hosts))))) != {0}:
                time.sleep(0.05)
        thread.join()
        jax.distributed.shutdown()
    except Exception as error:
        watch.end(me, f"{me.name(me.index)} could not end with the others: {error}")
