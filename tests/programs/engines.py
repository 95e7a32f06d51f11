"""An engine on several processes, in whose random schedules process 0 looks for other bits."""

import argparse
import random

from qwen_jax import attention, meshes
from qwen_jax.engine.following import Leader, follow
from qwen_jax.engine.steps import Steps
from qwen_jax.meshes import options
from qwen_jax.runtime import process_options, processes
from tests.support import engines
from tests.support.tiny import tiny_decoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-dtype")
    parser.add_argument("--schedules", type=int, required=True)
    process_options.add(parser)
    args = parser.parse_args()
    process_options.join(args)
    mesh = meshes.make(options.mesh_sizes(args.mesh))
    with meshes.entered(mesh):
        decoder = tiny_decoder(engines.CONFIG, args.dtype)
    kind = Leader if processes.index() == 0 else Steps
    shape = engines.SHAPE._replace(cache_dtype=args.cache_dtype)
    steps = kind(decoder, attention.xla, mesh=mesh, shape=shape)
    if processes.index():
        follow(steps)
        return
    assert isinstance(steps, Leader)
    rng, preemptions = random.Random(0), 0
    for _ in range(args.schedules):
        requests = engines.schedule(rng.randrange(2**32))
        crowd = engines.engine(steps)
        for request, found in zip(requests, engines.events(crowd, requests), strict=True):
            wanted = engines.alone(steps, request)
            if request.cancelled is not None:
                found, wanted = found[:-1], wanted[: len(found) - 1]
            assert found == wanted, (request, found, wanted)
        preemptions += crowd.load().preemptions
        print("a schedule", flush=True)
    steps.close()
    print(f"{args.schedules} schedules, {preemptions} preemptions: the same bits")


if __name__ == "__main__":
    main()
