"""A model directory: what is in it, whether it is whole, and its decoder restored into any mesh.

    config.json, generation_config.json, tokenizer files    as the checkpoint's author wrote them
    params/          an Orbax tree with a leaf for each layer, `layers` -> `0` -> `attn` -> `q`
    manifest.json    written last: the size of every file of params/, shapes, dtype, versions

A directory without its manifest is unfinished and is never read. Writing is `convert/from_hf.py`.
"""

import contextlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.config import Config, read_json

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, NamedSharding

    from qwen_jax.generation_config import GenerationConfig
    from qwen_jax.model import Decoder
    from qwen_jax.tokenizer import Tokenizer
    from qwen_jax.weights import Weight

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MANIFEST = "manifest.json"
PARAMS = "params"
UNFINISHED = "unfinished.json"  # there while a conversion is under way
FORMAT = 2  # 1 had a leaf axis for heads
_TOKENIZER = "qwen.tiktoken"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_READERS = 2  # leaves that are read at the same time


class CheckpointError(ValueError):
    """A model directory that cannot be used; the message says what to do."""


def load_config(path: str | Path) -> Config:
    """The architecture of a model directory. Raises CheckpointError or ValueError."""
    return Config.from_hf(read_json(_directory(path) / CONFIG))


def load_generation_config(path: str | Path) -> "GenerationConfig":
    """The directory's generation_config.json, checked; without one, that of an empty file."""
    from qwen_jax.generation_config import GenerationConfig

    file = _directory(path) / GENERATION_CONFIG
    return GenerationConfig.from_hf(read_json(file) if file.exists() else {})


def load_tokenizer(path: str | Path) -> "Tokenizer | None":
    """The directory's tokenizer, None where it has no vocabulary file.

    An expansion of the vocabulary is the file that `extra_vocab_file` of tokenizer_config.json
    names.
    """
    from qwen_jax.tokenizer import Tokenizer

    root = _directory(path)
    if not (root / _TOKENIZER).exists():
        return None
    settings = root / _TOKENIZER_CONFIG
    extra = read_json(settings).get("extra_vocab_file") if settings.exists() else None
    return Tokenizer.from_file(root / _TOKENIZER, root / extra if extra else None)


def load(
    path: str | Path,
    config: Config | None = None,
    dtype: str | None = None,
    mesh: "Mesh | None" = None,
) -> "Decoder":
    """The decoder of a model directory, every leaf restored straight into its place on the mesh.

    config: the directory's own, or one with overrides of it. dtype: None is the stored one; the
    cast happens while reading. mesh: None is the mesh in force, or (1, 1). A process reads and
    holds its own shards, and beside them a few chunks of the files.

    Raises CheckpointError when the directory is not whole or does not match the config.
    """
    from qwen_jax import sharding
    from qwen_jax.weights import replace_leaves

    root = _directory(path)
    manifest = verify_whole(root)
    mesh = mesh or sharding.current_mesh()
    config = config or load_config(root)
    decoder, leaves = abstract_leaves(config, dtype or manifest["dtype"])
    check_shapes(root, manifest, {name: tuple(leaf.shape) for name, leaf in leaves.items()})
    sharding.check(config.sizes, mesh)
    with _one_line(root), ThreadPoolExecutor(_READERS) as executor:
        restored = {
            name: executor.submit(
                _restore,
                root / PARAMS,
                name,
                leaf,
                sharding.named(leaf.letters, mesh, config.sizes),
            )
            for name, leaf in leaves.items()
        }
        return replace_leaves(decoder, lambda name, leaf: restored[name].result())


def open_leaf(params: Path, name: str) -> Any:
    """The TensorStore of a leaf; a file that is missing is an error, never zeros."""
    import tensorstore

    # The default number of reads at a time would keep gigabytes of chunks in memory.
    context = tensorstore.Context({"file_io_concurrency": {"limit": 2}})
    kvstore = {"driver": "file", "path": f"{params / name}{os.sep}"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def _restore(params: Path, name: str, leaf: "Weight", place: "NamedSharding") -> "jax.Array":
    """One leaf on the mesh.

    Orbax's own restore holds about 1.5 times the weights; here they are read into the memory that
    jax then takes over.
    """
    import jax
    import tensorstore

    stored = tensorstore.cast(open_leaf(params, name), tensorstore.dtype(leaf.dtype))

    def shard(index: Any) -> np.ndarray:
        piece = stored[index]
        memory = _aligned(piece.shape, leaf.dtype)
        tensorstore.array(memory).write(piece[tensorstore.d[:].translate_to[0]]).result()
        return memory

    return jax.make_array_from_callback(tuple(leaf.shape), place, shard)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is; jax copies what begins elsewhere."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count].view(dtype).reshape(shape)


def abstract_leaves(config: Config, dtype: str) -> "tuple[Decoder, dict[str, Weight]]":
    """The decoder without its values, and its leaves by path; not yet on the mesh of anyone."""
    from qwen_jax import model, sharding
    from qwen_jax.weights import named_leaves

    with sharding.entered(sharding.make_mesh()):
        decoder = model.abstract(config, dtype)
    return decoder, named_leaves(decoder)


def verify_whole(path: str | Path) -> dict[str, Any]:
    """The manifest of a model directory all of whose files are there, each with its full size.

    Raises CheckpointError otherwise. The contents are not read: `--verify` of the converters does.
    """
    root = _directory(path)
    if not (root / MANIFEST).exists():
        if (root / UNFINISHED).exists():
            raise CheckpointError(
                f"{root} is an unfinished conversion: give the same convert/ command again, it "
                "continues where it stopped"
            )
        if any(root.glob("*.safetensors")):
            raise CheckpointError(
                f"{root} is a Hugging Face checkpoint: convert it with "
                f"`python convert/from_hf.py {root} DIR` and use DIR"
            )
        raise CheckpointError(f"{root} is not a model directory: it has no {MANIFEST}")
    manifest = read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{root / MANIFEST} has format {manifest.get('format')!r}, this version of qwen_jax "
            f"reads {FORMAT}: update qwen_jax or convert again"
        )
    found, listed = file_sizes(root), manifest.get("files")
    if not isinstance(listed, dict) or not {"dtype", "shapes"} <= manifest.keys():
        raise CheckpointError(f"{root / MANIFEST} is damaged: convert again")
    problems = [f"{name} is missing" for name in listed if name not in found]
    problems += [f"{name} does not belong there" for name in found if name not in listed]
    problems += [
        f"{name} has {found[name]:,} bytes instead of {size:,}"
        for name, size in listed.items()
        if found.get(name, size) != size
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{root} is damaged: {', '.join(problems[:5])}{more}; convert or copy it again"
        )
    return manifest


def write_manifest(path: Path, shapes: Mapping[str, tuple[int, ...]], **facts: Any) -> None:
    """Declare a directory whole: its leaves are there. `facts`: dtype, mesh, source."""
    libraries = ("qwen-jax", "jax", "flax", "orbax-checkpoint")
    write_json(
        path / MANIFEST,
        {
            "format": FORMAT,
            **facts,
            "num_params": sum(math.prod(shape) for shape in shapes.values()),
            "versions": {name: _version(name) for name in libraries},
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "files": file_sizes(path),
        },
    )


def file_sizes(root: Path) -> dict[str, int]:
    """The size of every file under params/, by its path within the directory."""
    sizes = {}
    for folder, _, names in os.walk(root / PARAMS):
        for name in names:
            file = Path(folder, name)
            sizes[file.relative_to(root).as_posix()] = file.stat().st_size
    return dict(sorted(sizes.items()))


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers.0.attn.q": x} -> {"layers": {"0": {"attn": {"q": x}}}}"""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *steps, last = path.split(".")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The inverse of `nested`, as pairs."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _directory(path: str | Path) -> Path:
    root = Path(path).absolute()
    if not root.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    if not (root / CONFIG).is_file():
        raise CheckpointError(f"{path} is not a model directory: it has no {CONFIG}")
    return root


def check_shapes(
    root: Path, manifest: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError when the stored leaves are not those that config.json speaks of."""
    stored = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    if stored == wanted:
        return
    problems = [f"no {name}" for name in wanted if name not in stored]
    problems += [f"{name} is not in the model" for name in stored if name not in wanted]
    problems += [
        f"{name} is {list(stored[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if stored.get(name, shape) != shape
    ]
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise CheckpointError(
        f"the weights in {root} do not match {CONFIG}: {', '.join(problems[:5])}{more}"
    )


@contextlib.contextmanager
def _one_line(root: Path) -> Iterator[None]:
    """TensorStore reports damage in many ways; here it is one."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{root / PARAMS} cannot be read: {detail}") from error


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
