"""Loads a model directory: its config, tokenizer, generation settings and decoder.

A decoder saved on one mesh can be loaded on any other, by any number of processes. A directory
without its manifest is unfinished and is never read.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.checkpoint import kinds, store
from qwen_jax.checkpoint.directory import (
    CONFIG,
    GENERATION_CONFIG,
    PARAMS,
    TOKENIZER,
    existing,
    finished,
    read_manifest,
    verify_whole,
)
from qwen_jax.config import Config, hf_config
from qwen_jax.runtime import paths, values
from qwen_jax.runtime.texts import read_json

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.chat.tokenizer import Tokenizer
    from qwen_jax.checkpoint.generation_config import GenerationConfig
    from qwen_jax.leaves.weights import Leaf, Weight
    from qwen_jax.model import Decoder


_READERS = 2  # leaves that are read at the same time
_TOKENIZER_CONFIG = "tokenizer_config.json"


def load_config(path: str | Path) -> Config:
    """Load the architecture of a model directory.

    Raises CheckpointError if the path is no model directory, and ValueError for an invalid
    config.json.
    """
    return Config.read(existing(path) / CONFIG)


def load_generation_config(
    path: str | Path, adapter: str | Path | None = None
) -> "GenerationConfig":
    """Load and check the generation settings of a model directory.

    They come from generation_config.json, or without one from config.json, as in transformers.

    adapter: the folder of an adapter on this model; its generation_config.json, if it has one,
        takes the place of the model's.
    """
    from qwen_jax.checkpoint import token_ids
    from qwen_jax.checkpoint.generation_config import GenerationConfig

    root = existing(path)
    file = root / GENERATION_CONFIG
    if adapter is not None and (paths.parse(adapter) / GENERATION_CONFIG).exists():
        file = paths.parse(adapter) / GENERATION_CONFIG
    if not file.exists():
        file = root / CONFIG
        return GenerationConfig.from_hf(hf_config.generation(read_json(file)), file)
    made = GenerationConfig.from_hf(read_json(file), file)
    token_ids.check_range(file, Config.read(root / CONFIG).vocab_size)
    return made


def load_kinds(path: str | Path) -> dict[str, str]:
    """Load the kind of each quantised weight of a model directory, by path; {} if it has none.

    Only the manifest is read: `load` checks that the directory is complete.
    """
    return kinds.of_manifest(read_manifest(finished(path)))


def load_tokenizer(path: str | Path) -> "Tokenizer | None":
    """Load the tokenizer of a model directory; None if it has no vocabulary file.

    If `extra_vocab_file` in tokenizer_config.json names a file of the directory, this file is
    loaded as an expansion of the vocabulary. Warns of entries in tokenizer_config.json,
    special_tokens_map.json and added_tokens.json that are ignored. Raises ValueError if the
    vocabulary does not fit the other files (`token_ids.check`).
    """
    from qwen_jax.chat.tokenizer import Tokenizer
    from qwen_jax.checkpoint import token_ids, tokenizer_config

    root = existing(path)
    if not (root / TOKENIZER).exists():
        return None
    settings = root / _TOKENIZER_CONFIG
    said = read_json(settings) if settings.exists() else {}
    extra = tokenizer_config.extra_vocab_file(root, said)
    tokenizer = Tokenizer.from_file(root / TOKENIZER, extra)
    tokenizer_config.warn(root, said, tokenizer=tokenizer)
    token_ids.check(root, tokenizer)
    return tokenizer


def load(
    path: str | Path,
    config: Config | None = None,
    dtype: str | None = None,
    mesh: "Mesh | None" = None,
    keep: "Callable[[str, Weight | Leaf], Any] | None" = None,
) -> "Decoder":
    """Load the decoder of a model directory, each leaf directly into its shards on the mesh.

    config: the architecture, possibly with overrides; by default the directory's own.
    dtype: the dtype to which plain weights are cast while they are read; by default the stored one.
    mesh: by default the current mesh, or a mesh of one device.
    keep: a function that is given the path of each leaf and the leaf as soon as it is read, such as
        `int8.of_layers`. Its result takes the leaf's place.

    Each process reads and holds its own shards, and a few chunks of the files besides. Raises
    CheckpointError if the directory is not complete or does not match the config.
    """
    from qwen_jax import meshes
    from qwen_jax.leaves.weights import Weight, map_leaves
    from qwen_jax.meshes import sharding

    values.choice("dtype", dtype, allowed=store.DTYPES, or_none=True)
    own = None if config is None else values.instance("config", config, kind=Config)
    root = existing(path)
    manifest = verify_whole(root)
    mesh, config = mesh or meshes.current(), own or load_config(root)
    if config.rope_scaling is not None and config.rope_scaling.type == "yarn":
        logging.getLogger("qwen_jax").warning(
            "%s: rope_scaling yarn has its ramp over the pair index, as Hugging Face and vLLM; "
            "before 2026-11-28 it was the paper's, which is yarn_paper now",
            path,
        )
    decoder, leaves = abstract_leaves(config, dtype or manifest["dtype"])
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    kinds.check_shapes(root, manifest, wanted=shapes)
    meshes.check(config.sizes, mesh)
    of_kind = kinds.of_manifest(manifest)
    fields = {  # of all, before any weight is read
        name: kinds.layout(
            kind,
            leaves[name],
            stored=kinds.fields_of(name, manifest),
            mesh=mesh,
            sizes=config.sizes,
        )
        for name, kind in of_kind.items()
    }

    def restore(name: str, leaf: Weight) -> Any:
        restored: Any
        if name in of_kind:
            restored = kinds.restore(
                root / PARAMS,
                name,
                kind=of_kind[name],
                fields=fields[name],
                mesh=mesh,
                sizes=config.sizes,
            )
        else:
            place = sharding.named(leaf.letters, mesh, lengths=config.sizes)
            array = store.restore(
                root / PARAMS, name, shape=tuple(leaf.shape), dtype=leaf.dtype, place=place
            )
            restored = Weight(array, letters=leaf.letters)
        if keep is None:
            return restored
        with meshes.entered(mesh):  # the mesh is set per thread
            return keep(name, restored)

    with store.one_line(root, "read"), ThreadPoolExecutor(_READERS) as executor:
        restored = {name: executor.submit(restore, name, x) for name, x in leaves.items()}
        return map_leaves(lambda name, _: restored[name].result(), decoder)


def abstract(path: str | Path, config: Config, *, dtype: str) -> "Decoder":
    """Return the decoder of a model directory as shapes with partitionings on the mesh in force.

    config: the architecture, possibly with overrides.
    dtype: the dtype of plain weights.
    """
    import jax

    from qwen_jax import model
    from qwen_jax.leaves.weights import Weight, map_leaves

    manifest = verify_whole(existing(path))
    of_kind, mesh = kinds.of_manifest(manifest), jax.sharding.get_abstract_mesh()

    def one(name: str, leaf: Weight) -> Any:
        if name not in of_kind:
            return leaf
        stored = kinds.fields_of(name, manifest)
        return kinds.abstract(of_kind[name], leaf, stored=stored, mesh=mesh, sizes=config.sizes)

    return map_leaves(one, model.abstract(config, dtype))


def abstract_leaves(config: Config, dtype: str) -> "tuple[Decoder, dict[str, Weight]]":
    """Return the decoder of a config as shapes without values, and its leaves by path.

    The shapes are those of whole leaves, which are not partitioned over a mesh yet.
    """
    from qwen_jax import meshes, model
    from qwen_jax.leaves.weights import named_leaves

    with meshes.entered(meshes.make()):
        decoder = model.abstract(config, dtype)
    return decoder, named_leaves(decoder)
