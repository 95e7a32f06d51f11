"""Replicas of the server behind Ray Serve's proxy, which gives each request to the least busy one.

    pip install 'qwen-jax[ray]'
    python examples/ray_serve.py --ckpt DIR --replicas 2 --gpus 1 --port 8000

takes all options of `python -m qwen_jax.serve`, but for those of several processes. On a cluster,
`serve deploy` and KubeRay take `app` as import path, docs/serving.md shows how. A replica whose
process dies, or whose engine stops, is started again by Ray.
"""

import argparse
import shlex
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from qwen_jax.runtime import command
from qwen_jax.serve import serve_options


@serve.ingress()
class Replica:
    """One server with its own copy of the model.

    options: those of `python -m qwen_jax.serve`.
    """

    def __init__(self, options: list[str]):
        # Here, so that jax starts in the replica only, which has the devices that Ray gives it.
        from qwen_jax.generate import from_options
        from qwen_jax.meshes import options as mesh_options
        from qwen_jax.runtime import caches
        from qwen_jax.serve import __main__ as server
        from qwen_jax.serve.app import application

        args = serve_options.parser().parse_args(options)
        caches.use_compilation_cache(args.compilation_cache)
        keys = server.keys(args)
        about = from_options.describe(args)
        sizes = mesh_options.mesh_sizes(args.mesh)
        engine = server.engine(args, from_options.load(args, about, sizes=sizes))
        assert engine is not None  # as in every first process
        self._engine = engine
        self._app, self._served = application(
            self._engine,
            about.need_tokenizer(),
            vocab_size=about.config.vocab_size,
            names=server.names(args),
            defaults=server.defaults(about),
            limits=server.limits(args),
            keys=keys,
            hosts=server.hosts(args, with_keys=bool(keys)),
        )
        server.freeze()
        self._engine.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, which Ray calls for each request."""
        return self._app

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has stopped; Ray then starts another replica."""
        if (failure := self._engine.failure) is not None:
            raise RuntimeError(f"the engine has stopped: {failure}")

    def __del__(self) -> None:
        """End the engine's thread."""
        if hasattr(self, "_engine"):
            self._engine.close()


def app(settings: dict[str, Any]) -> serve.Application:
    """Return the application, for `serve.run`, `serve run`, `serve deploy` and KubeRay.

    settings: "options", the server's options in one text; and "replicas", "gpus" (of each) and
        "tpus" (chips of each).
    """
    options = shlex.split(settings["options"])
    args = serve_options.parser().parse_args(options)  # what is wrong with them is told here
    return (
        serve.deployment(Replica)
        .options(
            num_replicas=int(settings.get("replicas", 1)),
            ray_actor_options={
                "num_cpus": 1,
                "num_gpus": float(settings.get("gpus", 0)),
                "resources": {"TPU": tpus} if (tpus := int(settings.get("tpus", 0))) else {},
            },
            max_ongoing_requests=100_000,  # the server itself refuses what is too much
            graceful_shutdown_timeout_s=args.drain_seconds,
            health_check_period_s=5,
        )
        .bind(options)
    )


def main() -> None:
    """Start Ray here, or join a cluster that RAY_ADDRESS names, and serve until a signal."""
    parser = argparse.ArgumentParser(
        description="Serve replicas of a model behind Ray Serve.",
        epilog="All other options are those of python -m qwen_jax.serve.",
        allow_abbrev=False,
    )
    parser.add_argument("--replicas", type=command.positive, default=1, metavar="N")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="GPUs of each replica")
    parser.add_argument("--tpus", type=int, default=0, metavar="N", help="TPU chips of each")
    own, options = parser.parse_known_args()
    args = serve_options.parser().parse_args(options)
    if args.distributed or args.coordinator is not None:
        parser.error("a replica is one process: leave out --distributed and --coordinator")
    ray.init(log_to_driver=True)
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(app({**vars(own), "options": shlex.join(options)}), name="qwen", route_prefix="/")
    command.say(f"serving {own.replicas} replicas at http://{args.host}:{args.port}")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()  # requests that were taken are answered first
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
