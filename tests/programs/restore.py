"""Restore a model directory on a mesh, and print what came of it as JSON (process 0).

`leaves`: a digest of all leaves. With --generate also `tokens`, the new tokens, and `compiled`, how
    many programs are compiled by strides after the first and by fetching an array a second time.
"""

import argparse
import hashlib
import json
import sys

from qwen_jax.runtime import command, process_options


def work(args: argparse.Namespace) -> None:
    """Restore the model, and print the result."""
    process_options.join(args)
    import jax

    import qwen_jax
    from qwen_jax import meshes
    from qwen_jax.leaves.weights import named_leaves
    from qwen_jax.meshes import moves, options
    from tests.support import compilations

    sizes = meshes.parse(args.mesh)
    options.virtual_cpu_devices(sizes)
    mesh = meshes.make(sizes)
    with jax.set_mesh(mesh):
        model = qwen_jax.load(args.ckpt, dtype=args.dtype)
        digest = hashlib.sha256()
        for name, leaf in named_leaves(model.decoder).items():
            digest.update(name.encode() + moves.fetch(leaf[...]).tobytes())
    result = {"leaves": digest.hexdigest()}
    if args.generate:
        prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
        sampler = qwen_jax.Nucleus(temperature=0.8, top_p=0.9)
        settings = {"sampler": sampler, "seed": [1, 2], "at_once": 1}
        parts = model.stream(prompts, max_new_tokens=6, **settings)
        made = [next(parts), next(parts)]
        with compilations.counted() as programs:
            made.extend(parts)
            moves.fetch(model.decoder.embedding[...])
        result["tokens"] = [[int(part[row, 0]) for part in made] for row in range(2)]
        result["compiled"] = len(programs)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt")
    parser.add_argument("--mesh")
    parser.add_argument("--dtype")
    parser.add_argument("--generate", action="store_true")
    process_options.add(parser)
    command.add_debug(parser)
    return command.run(parser, work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
