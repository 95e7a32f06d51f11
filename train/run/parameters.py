"""The trained parameters of a run: all weights of a decoder, or adapters on a frozen decoder.

Both classes create the initial state, give a step its decoder, and save the result.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from qwen_jax import checkpoint, model
from qwen_jax.checkpoint import adapter_config, adapter_files, directory
from qwen_jax.config import Config
from qwen_jax.generate import integers
from qwen_jax.leaves import int8
from qwen_jax.leaves.weights import Leaf, Weight, map_leaves, named_leaves
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder, lora
from qwen_jax.runtime import command, paths, processes
from train import step
from train.run import recipes
from train.run.recipes import Recipe
from train.run.run_folder import ADAPTER, MODEL
from train.step import Optimizer, State


@dataclasses.dataclass(frozen=True)
class Whole:
    """All weights of a decoder, as the trained parameters of a run.

    config: the architecture of the decoder.
    ckpt: the model directory to start from; None for fresh weights.
    recipe: the recipe of the run.
    """

    config: Config
    ckpt: Path | None
    recipe: Recipe

    base: ClassVar[None] = None
    attach: ClassVar[None] = None

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of a training step per token, in rows of `length` tokens."""
        return self.config.flops_per_token(length)

    def abstract_base(self) -> None:
        """Return None: there are no frozen weights."""

    def create_state(self, optimizer: Optimizer) -> State:
        """Create the state before the first step, on the current mesh."""
        if self.ckpt is not None:
            decoder = checkpoint.load(self.ckpt, self.config, "float32")
        else:
            key = jax.random.key(self.recipe.seed)
            decoder = model.create(self.config, key, dtype=jnp.float32)
        return step.state_of(model.stack(decoder, consume=True), optimizer)

    def abstract_state(self, optimizer: Optimizer) -> State:
        """Return the state as shapes, with shardings on the current mesh."""
        return step.abstract_state(self.config, optimizer, mesh=jax.sharding.get_mesh())

    def save(self, weights: Decoder, out: Path, *, files: Path, merge: bool) -> Path:
        """Write the trained model into OUT/model, unless it is complete; return its folder.

        files: the folder with the model's configuration and tokenizer.
        """
        path = out / MODEL
        if not (path / directory.MANIFEST).exists():
            weights = _cast(weights, self.recipe.dtype)
            checkpoint.save(path, self.config, weights, like=files)
        return path


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(weights: Decoder, dtype: str) -> Decoder:
    """Cast all weights of a decoder to `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), weights)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """LoRA adapters on the frozen decoder of a model directory, as the trained parameters of a run.

    config: the architecture of the decoder.
    ckpt: the model directory; None for a plan, which needs shapes alone.
    recipe: the recipe of the run.
    """

    config: Config
    ckpt: Path | None
    recipe: Recipe

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of a training step per token, in rows of `length` tokens.

        Frozen weights need no gradient, which saves 2 of their 6 FLOPs. The adapters' own FLOPs are
        left out.
        """
        config = self.config
        head = config.vocab_size * config.hidden_size if self.recipe.train_embeddings else 0
        return config.flops_per_token(length) - 2 * (config.num_multiplied() - head)

    @functools.cached_property
    def base(self) -> Decoder:
        """The frozen decoder, stacked, in the recipe's `base_dtype`; read once."""
        decoder = checkpoint.load(self._source, self.config, self.recipe.dtype, keep=self._kept)
        return model.stack(decoder, consume=True)

    @property
    def _source(self) -> Path:
        """The model directory, which only a plan lacks."""
        assert self.ckpt is not None, "a plan has no weights"
        return self.ckpt

    def abstract_base(self) -> Decoder:
        """Return the frozen decoder as shapes, with shardings on the current mesh."""

        kept = self._kept  # which may test kernels, and so is made before shapes are traced

        def made(decoder: Decoder) -> Decoder:
            return model.stack(map_leaves(kept, decoder))

        dtype = self.recipe.dtype
        if self.ckpt is None:
            shapes = model.abstract(self.config, dtype)
        else:
            shapes = checkpoint.abstract(self.ckpt, self.config, dtype=dtype)
        decoder = jax.eval_shape(made, shapes)
        return sharding.on_devices(jax.sharding.get_mesh(), decoder)

    @functools.cached_property
    def _kept(self) -> integers.Converter:
        """The function that prepares each leaf of the base: in int8 if the recipe says so."""
        recipe = self.recipe
        prepared = None if self.ckpt is None else integers.for_passes(self.ckpt, recipe.dtype)

        def kept(path: str, leaf: Weight | Leaf) -> Weight | Leaf:
            leaf = leaf if prepared is None else prepared(path, leaf)
            return int8.of_layers(path, leaf) if recipe.base_dtype == "int8" else leaf

        return kept

    def attach(self, weights: lora.Adapters, base: Decoder, key: jax.Array | None) -> Decoder:
        """Put the adapters `weights` on the frozen decoder `base`.

        key: the PRNG key of the adapters' dropout; None for no dropout.
        """
        return lora.attach(base, weights, key=key, dropout=self.recipe.lora_dropout)

    def create_state(self, optimizer: Optimizer) -> State:
        """Create the state before the first step: adapters that do not change the model yet."""
        return step.state_of(jax.jit(self._create)(self.base), optimizer)

    def abstract_state(self, optimizer: Optimizer) -> State:
        """Return the state as shapes, with shardings on the current mesh."""
        make = lambda base: step.state_of(self._create(base), optimizer)  # noqa: E731
        state = jax.eval_shape(make, self.abstract_base())
        return sharding.on_devices(jax.sharding.get_mesh(), state)

    def _create(self, decoder: Decoder) -> lora.Adapters:
        """Create the recipe's adapters for a decoder."""
        recipe = self.recipe
        return lora.create(
            decoder,
            _targets(recipe.lora_targets, self.config.num_layers),
            rank=recipe.lora_rank,
            alpha=recipe.lora_alpha,
            key=jax.random.key(recipe.seed),
            embeddings=bool(recipe.train_embeddings),
        )

    def save(self, weights: lora.Adapters, out: Path, *, files: Path, merge: bool) -> Path:
        """Write the adapter into OUT/adapter in PEFT's format, and return the last folder written.

        files: the folder with the model's generation_config.json, which is copied. merge: also
        write OUT/model with the adapter merged. Merging loads the base from `ckpt` again, so no
        other copy may be left on the devices (`convert/to_hf.py --adapter` merges a few matrix rows
        at a time and needs less memory).
        """
        dropout = self.recipe.lora_dropout
        adapter_files.write(out / ADAPTER, weights, **self._base_named(), lora_dropout=dropout)
        if processes.index() == 0:
            settings = directory.GENERATION_CONFIG
            paths.copy(files / settings, out / ADAPTER / settings)
        if not merge:
            return out / ADAPTER
        if (out / MODEL / directory.MANIFEST).exists():
            return out / MODEL
        self.__dict__.pop("base", None)
        decoder = model.stack(checkpoint.load(self._source, self.config), consume=True)
        merged = jax.jit(lora.merge, donate_argnums=0)(decoder, weights)
        _check_numbers(merged, out / ADAPTER)
        checkpoint.save(out / MODEL, self.config, merged, like=files)
        return out / MODEL

    def _base_named(self) -> dict[str, str | None]:
        """Return the fields of adapter_config.json that name the adapter's base model for PEFT.

        This is the Hugging Face model from which `ckpt` was converted. The fields are None if it is
        unknown, because the path of `ckpt` means nothing on another machine.
        """
        found = directory.origin(self._source)
        if "name" not in found:
            command.say(
                f"note: the adapter names no base, for {self.ckpt} was trained since its "
                "conversion, or converted by an earlier version: for PEFT, `python "
                f"convert/to_hf.py {self.ckpt} BASE` makes one"
            )
        return {
            "base_model_name_or_path": found.get("name"),
            "revision": found.get("revision"),
        }


def _check_numbers(merged: Decoder, adapter: Path) -> None:
    """Raise ValueError if a merged weight is NaN or infinite.

    adapter: the adapter's folder, for the error message.
    """

    @jax.jit
    def finite(decoder: Decoder) -> dict[str, jax.Array]:
        arrays = {name: jax.tree.leaves(leaf) for name, leaf in named_leaves(decoder).items()}
        return {
            name: jnp.array([jnp.isfinite(x).all() for x in parts]).all()
            for name, parts in arrays.items()
        }

    if spoiled := [name for name, good in finite(merged).items() if not good]:
        raise ValueError(
            f"not all merged weights are numbers: {directory.some(spoiled)}: no model was written; "
            f"python convert/to_hf.py CKPT DST --adapter {adapter} --dtype float32 says whether "
            "they only lack room in the dtype of CKPT"
        )


def _targets(wanted: Sequence[str], layers: int) -> dict[str, tuple[str, ...]]:
    """Return the modules that get adapters, each with its leaves, from a recipe's `lora_targets`.

    A single name with the characters of a regular expression is passed on as a string, which PEFT
    takes for a pattern; names are passed on as a list. layers: the number of layers of the model.
    """
    pattern = len(wanted) == 1 and re.search(r"[*+?|()\[\]^$\\]", wanted[0])
    return adapter_config.targets(wanted[0] if pattern else wanted, layers)


def of(config: Config, ckpt: Path | None, *, recipe: Recipe, merge: bool) -> Whole | Adapted:
    """Return the parameters that a recipe trains.

    ckpt: the model directory to start from, or None.
    merge: whether adapters are to be merged into the model at the end.

    Raises ValueError for adapters without a model directory, or on a module that does not exist,
    and for what the integers of a quantised model do not allow.
    """
    if ckpt is not None and (found := checkpoint.load_kinds(ckpt)):
        in_layers = any(path.startswith("layers.") for path in found)
        _check_on_integers(ckpt, recipe, in_layers=in_layers, merge=merge)
    if not recipe.lora_rank:
        return Whole(config, ckpt, recipe)
    if ckpt is None:
        raise ValueError("adapters go on a trained model: give --ckpt")
    _targets(recipe.lora_targets, config.num_layers)
    return Adapted(config, ckpt, recipe)


def _check_on_integers(ckpt: Path, recipe: Recipe, *, in_layers: bool, merge: bool) -> None:
    """Raise ValueError for a run that would change the integers of a quantised model.

    in_layers: whether layers have some; otherwise the head alone has.
    """
    how = "with --dequantise" if in_layers else "without --head int8"
    floats = f"convert its checkpoint {how} to have floats"
    if not recipe.lora_rank:
        raise ValueError(
            f"{ckpt} is quantised, and integers cannot be trained: train adapters on them, with "
            f"--recipe sft_lora, or {floats}"
        )
    if in_layers and recipe.base_dtype == "int8":
        raise ValueError(
            f"base_dtype 'int8': {ckpt} is quantised already, and its weights stay as they are: "
            "leave it out"
        )
    if in_layers and merge:
        raise ValueError(
            f"merge: adapters cannot be merged into the integers of {ckpt}: leave it out, and give "
            f"the adapter with --adapter, or {floats}"
        )


def abstract(config: Config, adapters: Recipe | None) -> Whole | Adapted:
    """Return the parameters that a plan trains, of which only shapes are needed.

    adapters: the recipe of a LoRA training; None trains all weights.
    """
    if adapters is None:
        return Whole(config, None, recipes.pretrain())
    return Adapted(config, None, adapters)
