"""A server whose replies are written beforehand: `python -m tests.programs.serving`.

It prints its address, and takes lines: "fail" has the engine die. Exit codes are those of
`python -m qwen_jax.serve`. Real clients talk to it (tests/clients).
"""

import sys
import threading

from qwen_jax.runtime import command
from qwen_jax.serve.server import Server, address, bind
from tests.support.served_app import TOKENIZER, Served

CALL = 'Thought: I look it up.\nAction: weather\nAction Input: {"city": "Rome"}\nObservation: no'
ANSWER = " I now know the final answer.\nFinal Answer: It is sunny in Rome."
FINISH = (
    "Thought: I am done.\nAction: final_answer\n"
    'Action Input: {"answer": "It is sunny in Rome."}\nObservation:'
)


def reply(prompt: str) -> str:
    """What the model says: it calls a tool if there is one, and then answers."""
    if "final_answer: Call this tool" in prompt and "Observation:\nsunny" in prompt:
        return FINISH
    if prompt.endswith("Thought:"):
        return ANSWER
    if "weather: Call this tool" in prompt:
        return CALL
    if "slowly" in prompt:
        return "one two three " * 100
    return "Hello 你好"


def work(_: object) -> None:
    """Serve until a signal."""
    one = Served(pause=0.001, longest=10_000, keys=["secret"] if "--key" in sys.argv else [])
    one.engine.script = lambda prompt, _: TOKENIZER.encode(reply(TOKENIZER.decode(prompt)))
    taken = bind("127.0.0.1", 0)

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "fail":
                one.engine.fail("it was told to")

    threading.Thread(target=listen, daemon=True).start()
    print(address(taken), flush=True)
    server = Server(one.app, one.served, drain_seconds=20)
    server.serve_at(taken)
    server.raise_end()


if __name__ == "__main__":
    parser = command.Parser(prog="serving")
    parser.add_argument("--key", action="store_true")
    command.add_debug(parser)
    sys.exit(command.run(parser, work))
