"""Loads a model directory, ready to generate: first its small files, then its weights on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qwen_jax import checkpoint, meshes, model
from qwen_jax.checkpoint import adapter_files
from qwen_jax.config import Config
from qwen_jax.generate import backend, description, integers, keywords
from qwen_jax.generate.description import Description
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder, adapted
from qwen_jax.runtime import paths


@keywords.explained
def load(
    path: str | Path,
    dtype: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    attention: str = "auto",
    cache_dtype: str | None = None,
    max_length: int | None = None,
    *,
    adapter: str | Path | None = None,
    dequantise: bool | None = None,
) -> LanguageModel:
    """Load a model directory written by `convert/from_hf.py` or `checkpoint.save`.

    It is loaded on the current mesh (`jax.set_mesh`), or on one device if there is none.

    dtype: "float32", "bfloat16" or "float16"; None for the default on this device.
    overrides: config values by their Hugging Face names, `layer_windows` and `rope_scaling`.
    attention: a name of `qwen_jax.attention.IMPLEMENTATIONS`; "auto" tests the kernels on this
        device, once, and takes the fastest that agrees with the XLA reference (`prove.py`).
    cache_dtype: the dtype of the KV cache: None (= dtype), "int8" (symmetric) or "int8_asymmetric".
    max_length: the largest number of tokens in a sequence, prompt and new tokens together; None for
        the larger of the config's max_position_embeddings and seq_length.
    adapter: the folder of a LoRA adapter in PEFT's format, such as RUN/adapter of a training run,
        which is put on the model without merging it. Its generation_config.json, if it has one,
        takes the place of the model's.
    dequantise: whether the weights of a quantised directory become floats of `dtype`. None: on a
        CPU, if half of its memory holds them, as it multiplies floats several times faster; on
        accelerators not, as they read integers in less time.

    Raises ValueError for an incomplete directory or an argument that is not allowed, and
    NotImplementedError if the attention cannot run this model on this device.
    """
    backend.check_names(dtype, attention, cache_dtype=cache_dtype)
    about = description.read(path, overrides, max_length=max_length, adapter=adapter)
    return with_weights(
        path,
        about,
        dtype=dtype,
        attention=attention,
        cache_dtype=cache_dtype,
        adapter=adapter,
        dequantise=dequantise,
    )


def with_weights(
    path: str | Path,
    about: Description,
    *,
    dtype: str | None = None,
    attention: str = "auto",
    cache_dtype: str | None = None,
    adapter: str | Path | None = None,
    dequantise: bool | None = None,
) -> LanguageModel:
    """Load the weights of a model directory, whose small files have been read.

    path: the model directory.
    about: the description of the model that `description.read` returned.
    dtype, attention, cache_dtype: as in `load`, already checked.
    adapter, dequantise: as in `load`.

    A mesh, an attention or an adapter that does not fit this model is refused before any weight is
    read.
    """
    mesh, config = meshes.current(), about.config
    if sharding.axis_sizes(mesh)[sharding.CONTEXT] > 1:
        raise ValueError("a context axis is for training: decode with tp and fsdp")
    meshes.check(config.sizes, mesh)
    dtype = dtype or backend.default_dtype()
    attend = backend.attention_for(
        attention, config, dtype=dtype, length=about.max_length, cache_dtype=cache_dtype, mesh=mesh
    )
    put = None if adapter is None else _read_adapter(adapter, config, dtype=dtype, mesh=mesh)
    keep = integers.converter(path, config, dtype=dtype, dequantise=dequantise)
    decoder = checkpoint.load(path, config, dtype=dtype, mesh=mesh, keep=keep)
    if put is not None:
        decoder = put(decoder)
    fields = {field.name: getattr(about, field.name) for field in dataclasses.fields(about)}
    return LanguageModel(
        **fields, decoder=decoder, mesh=mesh, attend=attend, cache_dtype=cache_dtype
    )


def _read_adapter(
    folder: str | Path, config: Config, *, dtype: str, mesh: Mesh
) -> Callable[[Decoder], Decoder]:
    """Read an adapter; return the function that puts it on the decoder of this config.

    dtype: the dtype of the decoder.
    """
    with meshes.entered(mesh):
        adapters = adapter_files.read(paths.parse(folder), model.abstract(config, dtype))

    def put(decoder: Decoder) -> Decoder:
        with meshes.entered(mesh):
            return adapted.attach_one(decoder, adapters)

    return put
