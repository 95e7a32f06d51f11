"""A server over an engine that says abc, slowly: python -m tests.programs.serving.

It prints its address, and takes lines: "fail" has the engine die. Exit codes as of
`python -m qwen_jax.serve`.
"""

import sys
import threading

from qwen_jax.runtime import command
from qwen_jax.serve.server import Server, address, bind
from tests.support.served_app import Served


def work(_: object) -> None:
    """Serve until a signal."""
    one = Served("abc", pause=0.01)
    taken = bind("127.0.0.1", 0)
    print(address(taken), flush=True)

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "fail":
                one.engine.fail("it was told to")

    threading.Thread(target=listen, daemon=True).start()
    server = Server(one.app, one.served, drain_seconds=20)
    server.serve_at(taken)
    server.raise_end()


if __name__ == "__main__":
    parser = command.Parser(prog="served")
    command.add_debug(parser)
    sys.exit(command.run(parser, work))
