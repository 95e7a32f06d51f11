"""A decoder written into a model directory, by all processes, from whatever mesh it is on.

    config.json, generation_config.json, tokenizer files    as the checkpoint's author wrote them
    params/          an Orbax tree with a leaf for each layer, `layers` -> `0` -> `attn` -> `q`
    manifest.json    written last: the size of every file of params/, shapes, dtype, versions

A mesh decides how the files are cut, and nothing else.
"""

import contextlib
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.checkpoint import store
from qwen_jax.checkpoint.directory import (
    CONFIG,
    MANIFEST,
    PARAMS,
    SAVED_BY,
    UNFINISHED,
    CheckpointError,
    carried,
    carry,
    differences,
    existing,
    file_sizes,
    mismatch,
    names,
    remove_drafts,
    write_json,
    write_manifest,
)
from qwen_jax.checkpoint.loading import abstract_leaves
from qwen_jax.config import Config, hf_config
from qwen_jax.runtime import lock, paths, values
from qwen_jax.runtime.texts import read_json

if TYPE_CHECKING:
    import jax

    from qwen_jax.model import Decoder

_WRITERS = 4  # leaves at the same time


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

    with store.one_line(root, "written"), held:
        _together(begin, alone=True)
        _together(write)
        _together(end, alone=True)


def finish(root: Path, leaves: Mapping[str, store.StoredLeaf], facts: Mapping[str, Any]) -> None:
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
) -> "dict[str, tuple[store.StoredLeaf, jax.Array, int | None]]":
    """What is stored of a decoder, by path: the leaf, the array that holds it, and its layer there.

    Raises CheckpointError when the decoder is not of this config.
    """
    from qwen_jax.leaves.weights import named_leaves

    pieces: dict[str, tuple[store.StoredLeaf, jax.Array, int | None]] = {}
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
            pieces[name] = (store.StoredLeaf(name, shape, chunks, str(array.dtype)), array, layer)
    dtypes = {leaf.dtype for leaf, _, _ in pieces.values()}
    if len(dtypes) > 1 or not dtypes <= set(store.DTYPES):
        raise CheckpointError(
            f"the decoder has leaves of dtype {', '.join(sorted(dtypes))}: a directory holds one "
            f"of {', '.join(store.DTYPES)}; cast the decoder first"
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
