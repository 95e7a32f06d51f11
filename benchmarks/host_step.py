"""Times what a decode step of the engine costs the host: the CPU time of the thread that starts it.

    JAX_PLATFORMS=cpu python benchmarks/host_step.py

The model is tiny and has as many arrays as a large one, since the cost goes by their number: 32
layers, 64 rows, one array of pages a layer. The results of a step are fetched while the next one
runs, as the engine does. Steps follow each other at once, or with pauses, after which the caches of
the processor are cold. Beside it, in turn, is the least that jax takes: a function of as many
arrays, of which as many are donated, that does nothing.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import section
from qwen_jax import attention, meshes, model
from qwen_jax.config.presets import PRESETS
from qwen_jax.engine.steps import SKIP, Shape, Steps
from qwen_jax.meshes import moves
from qwen_jax.runtime import command

PAUSES = (0.0, 0.004)  # seconds between two steps
QUANTILES = (0, 0.5, 0.9)


def parser() -> command.Parser:
    """The options."""
    parser = command.Parser(description="CPU time of the host for a decode step.")
    add = parser.add_argument
    add("--layers", type=int, default=32)
    add("--rows", type=int, default=64)
    add("--steps", type=int, default=300, help="steps of a round")
    add("--rounds", type=int, default=3, help="rounds of each, in turn")
    add("--out", type=Path, help="write a section of docs/benchmarks.md")
    return parser


def made(layers: int, rows: int) -> Steps:
    """The programs of an engine with a tiny model of some layers."""
    config = dataclasses.replace(
        PRESETS["qwen-1.8b"],
        **{"num_layers": layers, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1},
        **{"head_dim": 8, "intermediate_size": 8, "vocab_size": 64},
    )
    mesh = meshes.make({})
    with meshes.entered(mesh):
        decoder = model.create(config, jax.random.key(0), dtype=jnp.float32)
    shape = Shape(rows=rows, width=32, pages=8, size=16, chunk=16, chunks=1)
    return Steps(decoder, attention.xla, mesh=mesh, shape=shape)


def engine_step(steps: Steps) -> Callable[[], jax.Array]:
    """A decode step whose rows are off."""
    orders = np.tile(np.array([0, -1, SKIP], np.int32), (steps.shape.rows, 1))
    return lambda: steps.decode(orders)


def bare_step(steps: Steps) -> Callable[[], jax.Array]:
    """A call of jax with as many arrays, which does nothing."""
    state = [jnp.zeros((8,)) for _ in jax.tree.leaves(steps._state)]
    weights = [jnp.zeros((8,)) for _ in jax.tree.leaves(steps.decoder)]
    orders = np.zeros((steps.shape.rows, 3), np.int32)

    def nothing(
        weights: list[jax.Array], state: list[jax.Array], orders: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        return [x + 1 for x in state], orders + weights[0].astype(jnp.int32)[0]

    compiled = jax.jit(nothing, donate_argnums=1, keep_unused=True)

    def call() -> jax.Array:
        nonlocal state
        state, told = compiled(weights, state, orders)
        return moves.begin_fetch(told)

    return call


def measure(call: Callable[[], jax.Array], count: int, *, pause: float) -> np.ndarray:
    """The CPU microseconds of this thread for each of some steps. pause: seconds between them."""
    before, found = call(), np.empty(count)
    for i in range(count):
        start = time.thread_time()
        now = call()
        np.asarray(before)
        found[i] = 1e6 * (time.thread_time() - start)
        before = now
        time.sleep(pause)
    return found


def main() -> None:
    """Run the command."""
    args = parser().parse_args()
    steps = made(args.layers, args.rows)
    arrays = len(jax.tree.leaves(steps.decoder)), len(jax.tree.leaves(steps._state))
    calls = {"decode step of the engine": engine_step(steps), "bare call": bare_step(steps)}
    found: dict[tuple[str, float], list[np.ndarray]] = {}
    for _ in range(args.rounds):
        for pause in PAUSES:
            for name, call in calls.items():
                found.setdefault((name, pause), []).append(measure(call, args.steps, pause=pause))
    title = section.title("host_step.py", sys.argv[1:])
    columns = ("CPU microseconds of the host", "pause (ms)", "least", "median", "90 %")
    lines = [
        [name, f"{1000 * pause:g}", *(f"{x:.0f}" for x in np.quantile(values, QUANTILES))]
        for (name, pause), values in found.items()
    ]
    print(f"{arrays[0]} arrays of weights, {arrays[1]} of pages and rows")
    print(section.text(title, columns, lines))
    section.write(args.out, title, columns, lines)


if __name__ == "__main__":
    main()
