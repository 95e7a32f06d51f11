"""`steps.py CKPT FILE`: take training steps on a mesh; process 0 prints each loss and norm.

After `--steps` steps the first moments are written to FILE, an .npz. After one step they are a
tenth of the gradients.
"""

import argparse
import json
import sys

from qwen_jax.runtime import command, process_options, processes


def work(args: argparse.Namespace) -> None:
    """Take the steps."""
    process_options.join(args)
    import numpy as np

    from qwen_jax import checkpoint, meshes
    from qwen_jax.attention import xla
    from qwen_jax.leaves.weights import named_leaves
    from qwen_jax.meshes import moves, options
    from tests.support.golden_figures import arrays
    from train import step
    from train.data import batches

    sizes = meshes.parse(args.mesh)
    options.virtual_cpu_devices(sizes)
    optimizer = step.Optimizer(clip_norm=1e9, b1=0.9)
    with meshes.entered(meshes.make(sizes)):
        state = step.create_state(checkpoint.load(args.ckpt, dtype="float32"), optimizer)
        tokens = arrays()["adamw.batches"][0]
        batch = batches.place(batches.batch_of(tokens, tokens))
        run = step.make_step(optimizer, xla, dtype=np.float32)
        for _ in range(args.steps):
            state, report = run(state, batch)
            said = {"loss": report.metrics.loss, "norm": report.gradient_norm}
            print(json.dumps({name: float(value) for name, value in said.items()}), flush=True)
        moments = state.moments[0].mu
        fetched = {name: moves.fetch(x[...]) for name, x in named_leaves(moments).items()}
        if processes.index() == 0:
            np.savez(args.file, **fetched)


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt")
    parser.add_argument("file")
    parser.add_argument("--mesh")
    parser.add_argument("--steps", type=int, default=1)
    process_options.add(parser)
    command.add_debug(parser)
    return command.run(parser, work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
