"""The cost of choosing a token on many devices: temporaries and collectives of the program.

    JAX_PLATFORMS=cpu python benchmarks/sampling.py [--topology v5e:2x4 --mesh data=2,tp=4 ...]

Compiles what a decode step does with its logits, for devices that need not be attached. Needs the
`aot` extra.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import jax.numpy as jnp

from qwen_jax import PRESETS, meshes
from qwen_jax.decoding import choosing, sampling
from qwen_jax.meshes import sharding
from qwen_jax.runtime import command
from train.planning import collectives, programs, topology


def main() -> None:
    """Run the command."""
    parser = command.Parser(description="Collectives and temporaries of sampling.")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--mesh", default="data=2,tp=4")
    parser.add_argument("--batch", type=int, default=64, help="rows B")
    parser.add_argument("--model", default="qwen-7b", choices=PRESETS, help="whose vocabulary V")
    args = parser.parse_args()
    config = PRESETS[args.model]
    mesh = topology.mesh(topology.parse(args.topology), meshes.parse(args.mesh))
    setting = programs.Setting(config, batch=args.batch, length=256, attention="xla")
    sampler = sampling.Nucleus(0.7, 50, 0.8, 1.1)
    logits = jax.ShapeDtypeStruct(
        (args.batch, config.vocab_size), jnp.float32, sharding=sharding.named("BV", mesh)
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: programs.decode_state(setting, jnp.bfloat16))
        rules, state, _ = sharding.on_devices(mesh, shapes)
        choose = jax.jit(choosing.choose, donate_argnames="state")
        compiled = choose.lower(logits, state, rules=rules, sampler=sampler).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    print(f"B {args.batch}, V {config.vocab_size:,} on {args.topology}, {args.mesh}")
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB a device; jax {jax.__version__}")
    print(collectives.table(collectives.of(compiled, mesh)))


if __name__ == "__main__":
    main()
