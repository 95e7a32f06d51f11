"""Loads the model that a command's options describe: `--ckpt` and the group "model".

`generate_options.model_options` adds the group to a parser. jax is imported on first use, so that
`--help` and usage errors do not wait for it.
"""

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen_jax.runtime import caches, command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.generate.description import Description
    from qwen_jax.generate.language_model import LanguageModel


def describe(args: argparse.Namespace) -> "Description":
    """Read the model directory without its weights, with --set and --max-length applied."""
    from qwen_jax.generate import description

    about = description.read(
        args.ckpt,
        command.overrides(args.set),
        max_length=args.max_length,
        adapter=_adapter(args),
    )
    if not about.config.dynamic_ntk:
        how = (
            "applies only to dynamic NTK, which this model's config.json turns off: leave it out, "
        )
        command.refuse(args, ("ntk",), why=f"{how}or add --set use_dynamic_ntk=true")
    return about


def load(
    args: argparse.Namespace, about: "Description", *, sizes: Mapping[str, int]
) -> "LanguageModel":
    """Load the model with the command line's dtypes and attention, on a mesh of `sizes`."""
    import jax

    from qwen_jax.generate import from_directory

    caches.use_compilation_cache(args.compilation_cache)
    started = time.perf_counter()
    with jax.set_mesh(mesh(args, about, sizes=sizes)):
        names = ("dtype", "attention", "cache_dtype", "dequantise")
        chosen = {name: getattr(args, name) for name in names}
        model = from_directory.with_weights(args.ckpt, about, **chosen, adapter=_adapter(args))
    took = f"{time.perf_counter() - started:.1f} s"
    command.say(f"loaded {model.config.num_params():,} weights in {took}")
    return model


def _adapter(args: argparse.Namespace) -> str | None:
    """Return the folder of `--adapter DIR`; None for commands without this option."""
    return getattr(args, "adapter", None)


def mesh(args: argparse.Namespace, about: "Description", *, sizes: Mapping[str, int]) -> "Mesh":
    """Make --mesh (`sizes`) or the default. Raises UsageError if a process has no device in it."""
    import jax

    from qwen_jax import meshes
    from qwen_jax.meshes import options

    meshes.check(about.config.sizes, sizes)
    options.virtual_cpu_devices(sizes)
    if args.mesh is None:
        here, lengths = jax.devices(), {**about.config.sizes, "B": 1}  # one prompt at a time
        sizes = meshes.default(lengths, len(here), slices=meshes.count_slices(here))
    made = meshes.make(sizes)
    options.check_used(made)
    return made
