"""A model directory: its config, tokenizer and decoder read, and a decoder written, on any mesh.

    config.json, generation_config.json, tokenizer files    as the checkpoint's author wrote them
    params/          an Orbax tree with a leaf for each layer, `layers` -> `0` -> `attn` -> `q`
    manifest.json    written last: the size of every file of params/, shapes, dtype, versions

A directory without its manifest is unfinished and is never read. A mesh decides how the files are
cut, and nothing else: what was saved on one is restored on any other, by any number of processes.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.checkpoint import store
from qwen_jax.checkpoint.directory import (
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    PARAMS,
    SAVED_BY,
    TOKENIZER,
    UNFINISHED,
    CheckpointError,
    carried,
    carry,
    check_shapes,
    differences,
    existing,
    file_sizes,
    mismatch,
    names,
    remove_drafts,
    verify_whole,
    write_json,
    write_manifest,
)
from qwen_jax.config import Config, hf_config
from qwen_jax.runtime import lock, paths, values
from qwen_jax.runtime.texts import read_json

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from qwen_jax.chat.tokenizer import Tokenizer
    from qwen_jax.checkpoint.generation_config import GenerationConfig
    from qwen_jax.leaves.weights import Weight
    from qwen_jax.model import Decoder

__all__ = [
    "CONFIG",
    "MANIFEST",
    "PARAMS",
    "UNFINISHED",
    "CheckpointError",
    "check_shapes",
    "finish",
    "load",
    "load_config",
    "load_generation_config",
    "load_tokenizer",
    "save",
    "verify_whole",
    "write_json",
    "write_manifest",
]
_TOKENIZER_CONFIG = "tokenizer_config.json"
DTYPES = tuple(store.ITEM_BYTES)  # that a directory may have
_READERS, _WRITERS = 2, 4  # leaves at the same time


def load_config(path: str | Path) -> Config:
    """The architecture of a model directory. Raises CheckpointError or ValueError."""
    return Config.read(existing(path) / CONFIG)


def load_generation_config(path: str | Path) -> "GenerationConfig":
    """The directory's generation_config.json, checked; without one, as in transformers, what its
    config.json says of how to generate.
    """
    from qwen_jax.checkpoint import token_ids
    from qwen_jax.checkpoint.generation_config import GenerationConfig

    root = existing(path)
    file = root / GENERATION_CONFIG
    if not file.exists():
        file = root / CONFIG
        return GenerationConfig.from_hf(hf_config.generation(read_json(file)), file)
    made = GenerationConfig.from_hf(read_json(file), file)
    token_ids.check_range(file, Config.read(root / CONFIG).vocab_size)
    return made


def load_tokenizer(path: str | Path) -> "Tokenizer | None":
    """The directory's tokenizer, None where it has no vocabulary file.

    An expansion of the vocabulary is the file of the directory that `extra_vocab_file` of
    tokenizer_config.json names. Warns of what that file, special_tokens_map.json and
    added_tokens.json ask for and is not done. Raises ValueError where the vocabulary is not that of
    the other files (`token_ids.check`).
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
    tokenizer_config.warn(root, said, tokenizer)
    token_ids.check(root, tokenizer)
    return tokenizer


def load(
    path: str | Path,
    config: Config | None = None,
    dtype: str | None = None,
    mesh: "Mesh | None" = None,
    keep: "Callable[[str, Weight], Any] | None" = None,
) -> "Decoder":
    """The decoder of a model directory, every leaf restored straight into its place on the mesh.

    config: the directory's own, or one with overrides of it. dtype: None is the stored one; the
    cast happens while reading. mesh: None is the mesh in force, or (1, 1). A process reads and
    holds its own shards, and beside them a few chunks of the files. keep: what becomes of each leaf
    by its path as soon as it is read, as `int8.of_layers`; None keeps it.

    Raises CheckpointError when the directory is not whole or does not match the config.
    """
    from qwen_jax import meshes
    from qwen_jax.leaves.weights import Weight, map_leaves
    from qwen_jax.meshes import sharding

    values.choice("dtype", dtype, DTYPES, or_none=True)
    own = None if config is None else values.instance("config", config, Config)
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
    check_shapes(root, manifest, {name: tuple(leaf.shape) for name, leaf in leaves.items()})
    meshes.check(config.sizes, mesh)

    def restore(name: str, leaf: Weight) -> Any:
        place = sharding.named(leaf.letters, mesh, config.sizes)
        array = store.restore(root / PARAMS, name, tuple(leaf.shape), leaf.dtype, place)
        restored = Weight(array, letters=leaf.letters)
        if keep is None:
            return restored
        with meshes.entered(mesh):  # of this thread
            return keep(name, restored)

    with _one_line(root, "read"), ThreadPoolExecutor(_READERS) as executor:
        restored = {name: executor.submit(restore, name, x) for name, x in leaves.items()}
        return map_leaves(lambda name, _: restored[name].result(), decoder)


def abstract_leaves(config: Config, dtype: str) -> "tuple[Decoder, dict[str, Weight]]":
    """The decoder without its values, and its leaves by path; not yet on the mesh of anyone."""
    from qwen_jax import meshes, model
    from qwen_jax.leaves.weights import named_leaves

    with meshes.entered(meshes.make()):
        decoder = model.abstract(config, dtype)
    return decoder, named_leaves(decoder)


def save(
    path: str | Path, config: Config, decoder: "Decoder", like: str | Path | None = None
) -> None:
    """Write a decoder, from whatever mesh it lives on, as the model directory `path`.

    decoder: with a leaf for each layer, or stacked. like: a model directory or checkpoint folder
    whose tokenizer, generation_config and other small files come along, and its config.json where
    that says the same as `config`. Every process of a run calls this with the same arguments; each
    writes its own shards, into a file system they share, and returns when all is written. Beside
    the weights, a process holds a few chunks of the files.

    Without its manifest, which comes last, nothing that was written counts: remains of a save that
    was stopped are never read, and are removed by the next one. Raises CheckpointError where `path`
    holds anything else: an earlier directory is never touched. Raises `lock.Busy` while another
    program writes there.
    """
    from qwen_jax.model import Decoder

    root = paths.absolute(path)
    paths.check_name(root)
    values.instance("config", config, Config)
    values.instance("decoder", decoder, Decoder)
    settings = _settings(config, like)
    pieces = _pieces(config, decoder)
    leaves = {name: leaf for name, (leaf, _, _) in pieces.items()}
    held = contextlib.ExitStack()
    check: Callable[[], None]  # from `begin` on, where the lock is
    facts = {
        "made_by": SAVED_BY,
        "dtype": next(iter(leaves.values())).dtype,
        "mesh": _mesh_sizes(decoder),
        "id": uuid.uuid4().hex,  # another save of other weights has another manifest
    }

    def begin() -> None:
        nonlocal check
        _refuse_whole(root)
        check = held.enter_context(lock.alone(root))
        _clear(root)
        files = [] if like is None else [file.name for file in carried(existing(like))]
        write_json(root / UNFINISHED, {**facts, "files": [*files, CONFIG]})
        if like is not None:
            carry(existing(like), root)
        write_json(root / CONFIG, settings)
        store.write_metadata(root / PARAMS, leaves)

    def write() -> None:
        with ThreadPoolExecutor(_WRITERS) as executor:
            jobs = [executor.submit(store.write_shards, root / PARAMS, *p) for p in pieces.values()]
            for job in jobs:
                job.result()

    def end() -> None:
        check()
        finish(root, leaves, facts)

    with _one_line(root, "written"), held:
        _together(begin, alone=True)
        _together(write)
        _together(end, alone=True)


def finish(root: Path, leaves: Mapping[str, store.Leaf], facts: Mapping[str, Any]) -> None:
    """Declare a directory whole that has every chunk of these leaves; facts: see `write_manifest`.

    Raises CheckpointError where a chunk is missing or has another size, or a file is too many.
    """
    wanted = store.chunk_files(leaves)
    found = {n: size for n, size in file_sizes(root).items() if Path(n).name[0].isdecimal()}
    if problems := differences(found, {f"{PARAMS}/{n}": wanted[n] for n in wanted}):
        raise CheckpointError(f"{root} was not written as it should be: {problems}; write it again")
    write_manifest(root, {name: leaf.shape for name, leaf in leaves.items()}, **facts)
    (root / UNFINISHED).unlink()


def _pieces(
    config: Config, decoder: "Decoder"
) -> "dict[str, tuple[store.Leaf, jax.Array, int | None]]":
    """What is stored of a decoder, by path: the leaf, the array that holds it, and its layer there.

    Raises CheckpointError when the decoder is not of this config.
    """
    from qwen_jax.leaves.weights import named_leaves

    pieces: dict[str, tuple[store.Leaf, jax.Array, int | None]] = {}
    for path, weight in named_leaves(decoder).items():
        array = weight.get_value()
        shape, shard = array.shape, array.sharding.shard_shape(array.shape)
        names: dict[str, int | None] = {path: None}
        step, _, rest = path.partition(".")
        if step == "layers" and not rest.split(".")[0].isdecimal():
            names = {f"layers.{i}.{rest}": i for i in range(shape[0])}
            shape, shard = shape[1:], shard[1:]
        chunks = store.chunk_shape(shard, array.dtype.itemsize)
        for name, layer in names.items():
            pieces[name] = (store.Leaf(name, shape, chunks, str(array.dtype)), array, layer)
    dtypes = {leaf.dtype for leaf, _, _ in pieces.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise CheckpointError(
            f"the decoder has leaves of dtype {', '.join(sorted(dtypes))}: a directory holds one "
            f"of {', '.join(DTYPES)}; cast the decoder first"
        )
    wanted = {n: tuple(leaf.shape) for n, leaf in abstract_leaves(config, "float32")[1].items()}
    if problems := mismatch({name: leaf.shape for name, (leaf, _, _) in pieces.items()}, wanted):
        raise CheckpointError(
            f"the decoder is not one of the config given: {problems}; give its own, decoder.config"
        )
    return {name: pieces[name] for name in wanted}


def _mesh_sizes(decoder: "Decoder") -> dict[str, int]:
    from jax.sharding import NamedSharding

    place = decoder.embedding.get_value().sharding
    return dict(place.mesh.shape) if isinstance(place, NamedSharding) else {}


def _refuse_whole(root: Path) -> None:
    if (root / MANIFEST).exists():
        raise CheckpointError(
            f"{root} is a whole model directory already: save to another place, or remove it first"
        )


def _clear(root: Path) -> None:
    """An empty folder; what a save left that was stopped is removed, and nothing else."""
    _refuse_whole(root)
    found = names(root)
    stopped = read_json(root / UNFINISHED) if UNFINISHED in found else {}
    left: set[str] = set()
    if stopped.get("made_by") == SAVED_BY:
        files = {*stopped.get("files", []), MANIFEST}
        left = found & {*files, *(f"{name}.tmp" for name in files), PARAMS}
        found -= left | {UNFINISHED}
    if found:
        raise CheckpointError(
            f"{root} holds {sorted(found)[0]}, which no save left there: save to an empty place"
        )
    remove_drafts(root)
    # Its mark is written over, so that a kill here leaves what can be removed again.
    for name in left - {PARAMS}:
        (root / name).unlink()
    if PARAMS in left:
        paths.remove_tree(root / PARAMS)


def _settings(config: Config, like: str | Path | None) -> dict[str, Any]:
    """The config.json to write: that of `like`, as it is, where it says what `config` says."""
    if like is not None:
        file = existing(like) / CONFIG
        said = read_json(file)
        if Config.from_hf(said, file) == config:
            return said
        return config.to_hf() | hf_config.generation(said)
    return config.to_hf()


def _together(work: Callable[[], None], alone: bool = False) -> None:
    """Every process does its part (alone: the first one only), and goes on when all have.

    An error anywhere is one everywhere: nobody waits for a process that has gone.
    """
    import jax

    error: Exception | None = None
    try:
        if not alone or jax.process_index() == 0:
            work()
    except Exception as caught:
        error = caught
    failed = np.array([error is not None])
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(failed)
    if error is not None:
        raise error
    if np.any(failed):
        raise CheckpointError(f"process {int(np.argmax(failed))} could not write: see its error")


@contextlib.contextmanager
def _one_line(root: Path, what: str) -> Iterator[None]:
    """TensorStore reports trouble in many ways; here it is one."""
    try:
        yield
    except (CheckpointError, lock.Busy):
        raise
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{root / PARAMS} cannot be {what}: {detail}") from error
