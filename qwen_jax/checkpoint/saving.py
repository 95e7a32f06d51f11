"""Saves a decoder as a model directory, by all processes together, from any mesh.

    config.json, generation_config.json, tokenizer files    as the checkpoint's author wrote them
    params/          an Orbax tree with a leaf for each layer, `layers` -> `0` -> `attn` -> `q`
    manifest.json    written last: the size of every file of params/, shapes, dtype, versions

The mesh determines how the files are split, and nothing else.
"""

import contextlib
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qwen_jax.checkpoint import kinds, store
from qwen_jax.checkpoint.directory import (
    CONFIG,
    MANIFEST,
    OF_QUANTISED,
    PARAMS,
    QUANTISATION,
    QUANTIZATION,
    SAVED_BY,
    UNFINISHED,
    CheckpointError,
    carried,
    differences,
    existing,
    file_sizes,
    mismatch,
    names,
    read_manifest,
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

_WRITERS = 4  # leaves that are written at the same time


class _Piece(NamedTuple):
    """A leaf to be stored: its description, and the array that holds it.

    layer: the leaf's index on the first axis of an array of stacked layers, or None if the array is
        the leaf itself.
    """

    leaf: store.StoredLeaf
    array: "jax.Array"
    layer: int | None


def save(
    path: str | Path, config: Config, decoder: "Decoder", like: str | Path | None = None
) -> None:
    """Save a decoder, from whatever mesh it is on, as the model directory `path`.

    config: the architecture of the decoder.
    decoder: a decoder with separate leaves for each layer, or with stacked layers.
    like: a model directory or checkpoint folder. Its tokenizer, generation_config.json and other
        small files are copied, and its config.json if that describes the same `config`. What they
        say of integers is left out where the decoder has floats in their place.

    Every process of a run calls this with the same arguments, on a shared file system. Each writes
    its own shards, holding a few chunks of the files at a time, and returns when all are written.

    The manifest is written last. A save that was interrupted before that is never read, and the
    next save removes its remains. Raises CheckpointError if `path` holds any other file: an earlier
    directory is never changed. Raises `lock.Busy` while another program writes to it.
    """
    from qwen_jax.model import Decoder

    root = paths.absolute(path)
    paths.check_name(root)
    values.instance("config", config, kind=Config)
    values.instance("decoder", decoder, kind=Decoder)
    pieces = _pieces(config, decoder)
    leaves = {name: piece.leaf for name, piece in pieces.items()}
    quantised = _kinds(decoder)
    small = _Small(config, like, in_groups=not kinds.GROUPED.keys().isdisjoint(quantised.values()))
    held = contextlib.ExitStack()
    check: Callable[[], None]  # assigned in `begin`, in the process that holds the lock
    facts = {
        "made_by": SAVED_BY,
        "dtype": leaves["final_norm"].dtype,
        **({kinds.KINDS: quantised} if quantised else {}),
        **({QUANTISATION: small.quantisation} if small.quantisation else {}),
        "mesh": _mesh_sizes(decoder),
        "id": uuid.uuid4().hex,  # makes the manifests of two saves differ
    }

    def begin() -> None:
        nonlocal check
        _refuse_whole(root)
        check = held.enter_context(lock.alone(root))
        _begin(root, small, leaves=leaves, facts=facts)

    def end() -> None:
        check()
        finish(root, leaves, facts=facts)

    with store.one_line(root, "written"), held:
        _together(begin, alone=True)
        _together(lambda: _write(root / PARAMS, pieces.values()))
        _together(end, alone=True)


class _Small:
    """The small files of a model directory that is saved.

    settings: the contents of config.json: those of `like` if these describe `config`, or else new.
    files: the files that are copied. quantisation: of the manifest of `like`.
    """

    def __init__(self, config: Config, like: str | Path | None, *, in_groups: bool):
        """Read the folder `like`, if there is one.

        in_groups: whether weights are integers in groups; else those of `like` have become floats.
        """
        self.settings = config.to_hf()
        self.files: list[Path] = []
        self.quantisation: dict[str, Any] = {}
        if like is not None:
            file = existing(like) / CONFIG
            said = read_json(file)
            others = self.settings | hf_config.generation(said)
            self.settings = said if Config.from_hf(said, file) == config else others
            self.files = carried(existing(like))
            if in_groups and (existing(like) / MANIFEST).exists():
                self.quantisation = read_manifest(existing(like)).get(QUANTISATION, {})
        if not in_groups:
            self.settings.pop(QUANTIZATION, None)
            self.files = [file for file in self.files if file.name not in OF_QUANTISED]


def _begin(
    root: Path,
    small: _Small,
    *,
    leaves: Mapping[str, store.StoredLeaf],
    facts: Mapping[str, Any],
) -> None:
    """Write the small files of a model directory, after removing an interrupted save's remains.

    leaves: the descriptions of the leaves, by path.
    facts: entries of the manifest, by which a later save knows these remains.
    """
    _clear(root)
    files = [file.name for file in small.files]
    write_json(root / UNFINISHED, {**facts, "files": [*files, CONFIG]})
    for file in small.files:
        paths.copy(file, root / file.name)
    write_json(root / CONFIG, small.settings)
    store.write_metadata(root / PARAMS, leaves)


def _write(params: Path, pieces: Iterable[_Piece]) -> None:
    """Write this process's shards of all leaves, a few leaves at a time."""
    with ThreadPoolExecutor(_WRITERS) as executor:
        jobs = [
            executor.submit(
                store.write_shards, params, piece.leaf, array=piece.array, layer=piece.layer
            )
            for piece in pieces
        ]
        for job in jobs:
            job.result()


def finish(root: Path, leaves: Mapping[str, store.StoredLeaf], *, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a model directory, after checking that all its chunks are there.

    root: the directory.
    leaves: the descriptions of the stored arrays, by path.
    facts: further entries of the manifest, such as dtype and mesh; `kinds` for quantised weights.

    Raises CheckpointError if a chunk is missing or has another size, or if there is a file too
    many.
    """
    wanted = store.chunk_files(leaves)
    found = {n: size for n, size in file_sizes(root).items() if Path(n).name[0].isdecimal()}
    if problems := differences(found, {f"{PARAMS}/{n}": wanted[n] for n in wanted}):
        raise CheckpointError(f"{root} was not written as it should be: {problems}; write it again")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    facts = {"format": 2, **facts}
    if facts.get(kinds.KINDS):
        dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
        facts = {**facts, "format": 3, "dtypes": dtypes}
    weights = kinds.shapes({**facts, "shapes": shapes})
    num_params = sum(math.prod(shape) for shape in weights.values())
    write_manifest(root, shapes, num_params=num_params, **facts)
    (root / UNFINISHED).unlink()


def _pieces(config: Config, decoder: "Decoder") -> dict[str, _Piece]:
    """Return the arrays to be stored, by path.

    Raises CheckpointError if the decoder does not belong to this config, or has a weight that
    cannot be stored.
    """
    from qwen_jax.leaves.weights import Leaf, named_leaves

    pieces: dict[str, _Piece] = {}
    plain: set[str] = set()
    for path, weight in named_leaves(decoder).items():
        if isinstance(weight, Leaf):
            if kinds.of_leaf(weight) is None:
                raise CheckpointError(
                    f"{path} is {type(weight).__name__}, a weight that is not stored: save the "
                    "decoder as it was before it got adapters, or merge them (`python "
                    "convert/to_hf.py CKPT DST --adapter DIR`)"
                )
            for name, part in kinds.arrays(path, weight).items():
                pieces |= _pieces_of(name, part.get_value())
        else:
            pieces |= _pieces_of(path, weight.get_value())
            plain.add(str(weight.dtype))
    if len(plain) > 1 or not plain <= set(store.DTYPES):
        raise CheckpointError(
            f"the decoder has leaves of dtype {', '.join(sorted(plain))}: a directory holds one "
            f"of {', '.join(store.DTYPES)}; cast the decoder first"
        )
    shapes = {name: piece.leaf.shape for name, piece in pieces.items()}
    found = kinds.shapes({"shapes": shapes, kinds.KINDS: _kinds(decoder)})
    wanted = {n: tuple(leaf.shape) for n, leaf in abstract_leaves(config, "float32")[1].items()}
    if problems := mismatch(found, wanted):
        raise CheckpointError(
            f"the decoder is not one of the config given: {problems}; give its own, decoder.config"
        )
    rank = {path: number for number, path in enumerate(wanted)}

    def place(name: str) -> int:  # of a leaf, or of the leaf that an array is a field of
        return rank[name if name in rank else name.rpartition(".")[0]]

    return {name: pieces[name] for name in sorted(pieces, key=place)}


def _pieces_of(path: str, array: "jax.Array") -> dict[str, _Piece]:
    """Return the pieces of an array at a path of the decoder: itself, or one for each layer."""
    shape, shard = array.shape, array.sharding.shard_shape(array.shape)
    layers: dict[str, int | None] = {path: None}
    names = _by_layer(path, shape[0])
    if names != [path]:
        layers = {name: i for i, name in enumerate(names)}
        shape, shard = shape[1:], shard[1:]
    chunks = store.chunk_shape(shard, array.dtype.itemsize)
    return {
        name: _Piece(store.StoredLeaf(name, shape, chunks, str(array.dtype)), array, layer)
        for name, layer in layers.items()
    }


def _by_layer(path: str, count: int) -> list[str]:
    """Return the paths of a leaf of stacked layers in each of `count` layers; else the path."""
    step, _, rest = path.partition(".")
    if step != "layers" or rest.split(".")[0].isdecimal():
        return [path]
    return [f"layers.{i}.{rest}" for i in range(count)]


def _kinds(decoder: "Decoder") -> dict[str, str]:
    """Return the kind of each weight of a decoder that is stored as several arrays, by path."""
    from qwen_jax.leaves.weights import Leaf, named_leaves

    count = decoder.config.num_layers
    return {
        name: kind
        for path, leaf in named_leaves(decoder).items()
        if isinstance(leaf, Leaf) and (kind := kinds.of_leaf(leaf)) is not None
        for name in _by_layer(path, count)
    }


def _mesh_sizes(decoder: "Decoder") -> dict[str, int]:
    """Return the axis sizes of the mesh that a decoder is on; {} on a single device."""
    from jax.sharding import NamedSharding

    place = decoder.embedding.get_value().sharding
    return dict(place.mesh.shape) if isinstance(place, NamedSharding) else {}


def _refuse_whole(root: Path) -> None:
    """Raise CheckpointError if the directory `root` is a complete model directory already."""
    if (root / MANIFEST).exists():
        raise CheckpointError(
            f"{root} is a whole model directory already: save to another place, or remove it first"
        )


def _clear(root: Path) -> None:
    """Remove the remains of an interrupted save from a folder.

    Raises CheckpointError if the folder holds other files.
    """
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
    # `unfinished.json` stays until it is overwritten, so a kill here can be cleaned up again.
    for name in left - {PARAMS}:
        (root / name).unlink()
    if PARAMS in left:
        paths.remove_tree(root / PARAMS)


def _together(work: Callable[[], None], alone: bool = False) -> None:
    """Run `work` in every process, or if `alone` in process 0 only, and wait until all are done.

    An error in one process is raised in all of them, so none waits for a process that has failed.
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
