"""Several processes as one program: joined, watched, and ended with a line that says who is lost.

`jax.distributed` does the work: it recognises TPU pods, Slurm and Kubernetes, joins the processes
and hears their heartbeats. Here is what it leaves out: who is missing at the start
(`rendezvous.py`), one line in place of its abort when a process is lost, and an end in step.
Nothing here knows of models or commands, and jax is imported only where several processes are.
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
from typing import Any, NoReturn

from qwen_jax.runtime import rendezvous, watch

_PROPOSED = "qwen_jax/proposed/end"
_FOREVER = 7 * 24 * 3600.0  # seconds
_WAIT = int(1000 * _FOREVER)  # for another process: where one is lost, the watch ends this one
# How the runtime reports a collective whose other end has gone.
_BROKEN = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|INTERNAL|DEADLINE_EXCEEDED): ")


_joined: watch.Joined | None = None


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
    _joined = watch.Joined(process, hosts, coordinator, heartbeat_timeout)
    watch.catch_abort(_joined)
    _start_jax(_joined, devices, timeout)
    thread = threading.Thread(target=watch.look_after, args=(_joined,), daemon=True, name="watch")
    thread.start()
    sys.excepthook = _excepthook(sys.excepthook)
    atexit.register(
        _leave, _joined, thread
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


def _start_jax(me: watch.Joined, devices: Any, timeout: float) -> None:
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
        me.client.key_value_set(f"{watch.FAILED}{me.index}", reason, allow_overwrite=True)
        reasons = dict(me.client.key_value_dir_get(watch.FAILED)) if watch.meet(me) else {}
    except Exception:
        pass  # who cannot be told learns it from the missing heartbeat
    if me.index == 0 or reasons.get(f"{watch.FAILED}0") != reason:
        watch.say(me, me.reason)
    sys.stdout.flush()
    os._exit(code)  # what else happens at the end of a process would wait for the others


def await_verdict(error: BaseException) -> None:
    """Where an error may come from the loss of another process, wait until it is known whose.

    The process then ends from another thread; this returns when nobody turns out to be lost.
    """
    if (me := _joined) is not None and _BROKEN.search(str(error)):
        time.sleep(me.heartbeat_timeout + 10)


def _excepthook(previous: Callable[..., Any]) -> Callable[..., Any]:
    """For programs of the user's own: what `command.run` does for commands."""

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        await_verdict(error)
        previous(kind, error, trace)
        failed(f"{kind.__name__}: {error}")

    return hook


def _leave(me: watch.Joined, thread: threading.Thread) -> None:
    """End in step: jax's service lives in process 0, which therefore goes last."""
    import jax

    try:
        me.client.wait_at_barrier("qwen_jax/end", int(_FOREVER * 1000))
        me.ending = 0
        if me.index == 0:
            # Each of the others leaves as soon as its thread has this answer.
            while set(me.client.get_live_nodes(list(range(len(me.hosts))))) != {0}:
                time.sleep(0.05)
        thread.join()
        jax.distributed.shutdown()
    except Exception as error:
        watch.end(me, f"{me.name(me.index)} could not end with the others: {error}")
