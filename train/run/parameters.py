"""What a run trains: all weights of a decoder, or adapters on one that stays as it is.

Says how they begin, how a step makes a decoder of them, and what becomes of them at the end.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from convert import peft
from qwen_jax import checkpoint, model
from qwen_jax.checkpoint import directory
from qwen_jax.config import Config
from qwen_jax.leaves import int8
from qwen_jax.leaves.weights import Weight, map_leaves, named_leaves
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
    """All weights of a decoder. ckpt: the model directory they come from; None: fresh ones."""

    config: Config
    ckpt: Path | None
    recipe: Recipe

    base: ClassVar[Any] = None
    attach: ClassVar[Any] = None

    def flops_per_token(self, length: int) -> float:
        """Those that a step needs for a token, in rows of `length`."""
        return self.config.flops_per_token(length)

    def abstract_base(self) -> None:
        """Nothing that is not trained."""

    def begin(self, optimizer: Optimizer) -> State:
        """The state before the first step, on the mesh in force."""
        if self.ckpt is not None:
            decoder = checkpoint.load(self.ckpt, self.config, "float32")
        else:
            key = jax.random.key(self.recipe.seed)
            decoder = model.create(self.config, key, jnp.float32)
        return step.state_of(model.stack(decoder, consume=True), optimizer)

    def abstract(self, optimizer: Optimizer) -> State:
        """The state as shapes, with shardings on the mesh in force."""
        return step.abstract_state(self.config, optimizer, mesh=jax.sharding.get_mesh())

    def save(self, weights: Any, out: Path, *, files: Path, merge: bool) -> Path:
        """A model directory that every command reads. files: what goes with the weights."""
        path = out / MODEL
        if not (path / directory.MANIFEST).exists():
            weights = _cast(weights, self.recipe.dtype)
            checkpoint.save(path, self.config, weights, like=files)
        return path


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(weights: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), weights)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Adapters on the decoder of a model directory, which is not trained."""

    config: Config
    ckpt: Path
    recipe: Recipe

    def flops_per_token(self, length: int) -> float:
        """As of all weights, but that one which is not trained needs no gradient: 2 of its 6. What
        the adapters take is left out.
        """
        config = self.config
        head = config.vocab_size * config.hidden_size if self.recipe.train_embeddings else 0
        return config.flops_per_token(length) - 2 * (config.num_multiplied() - head)

    @functools.cached_property
    def base(self) -> Decoder:
        decoder = checkpoint.load(self.ckpt, self.config, self.recipe.dtype, keep=self._kept)
        return model.stack(decoder, consume=True)

    def abstract_base(self) -> Decoder:
        """`base` as shapes, with shardings on the mesh in force."""

        def made(decoder: Decoder) -> Decoder:
            return map_leaves(self._kept, model.stack(decoder))

        decoder = jax.eval_shape(made, model.abstract(self.config, self.recipe.dtype))
        return sharding.on_devices(jax.sharding.get_mesh(), decoder)

    def _kept(self, path: str, leaf: Weight) -> Any:
        return int8.of_layers(path, leaf) if self.recipe.base_dtype == "int8" else leaf

    def attach(self, weights: Any, base: Any, key: jax.Array | None) -> Decoder:
        """`base` with adapters on it. key: of their dropout; None for none."""
        return lora.attach(base, weights, key=key, dropout=self.recipe.lora_dropout)

    def begin(self, optimizer: Optimizer) -> State:
        """The state before the first step: of adapters that change nothing yet."""
        return step.state_of(jax.jit(self._create)(self.base), optimizer)

    def abstract(self, optimizer: Optimizer) -> State:
        make = lambda base: step.state_of(self._create(base), optimizer)  # noqa: E731
        state = jax.eval_shape(make, self.abstract_base())
        return sharding.on_devices(jax.sharding.get_mesh(), state)

    def _create(self, decoder: Decoder) -> lora.Adapters:
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
        """An adapter in PEFT's format, and how to talk to what it makes; with `merge` also that, a
        model directory. The base is loaded again for it, as it is in `ckpt`, and nothing else of
        its size may be left on the devices (`convert/to_hf.py --adapter` merges a few rows at a
        time).
        """
        dropout = self.recipe.lora_dropout
        peft.write(out / ADAPTER, weights, **self._base_named(), lora_dropout=dropout)
        if processes.index() == 0:
            settings = directory.GENERATION_CONFIG
            paths.copy(files / settings, out / ADAPTER / settings)
        if not merge:
            return out / ADAPTER
        if (out / MODEL / directory.MANIFEST).exists():
            return out / MODEL
        self.__dict__.pop("base", None)
        decoder = model.stack(checkpoint.load(self.ckpt, self.config), consume=True)
        merged = jax.jit(lora.merge, donate_argnums=0)(decoder, weights)
        _check_numbers(merged, out / ADAPTER)
        checkpoint.save(out / MODEL, self.config, merged, like=files)
        return out / MODEL

    def _base_named(self) -> dict[str, str | None]:
        """The fields of adapter_config.json by which PEFT finds the base: what was converted into
        `ckpt`. None where that is not known, for nobody else has our folders.
        """
        found = directory.origin(self.ckpt)
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


def _check_numbers(merged: Any, adapter: Path) -> None:
    """Raise ValueError where a merged weight is NaN or infinite."""
    finite = jax.jit(lambda leaves: [jnp.isfinite(x).all() for x in leaves])
    leaves = named_leaves(merged)
    found = finite([leaf[...] for leaf in leaves.values()])
    if spoiled := [name for name, good in zip(leaves, found, strict=True) if not good]:
        raise ValueError(
            f"not all merged weights are numbers: {directory.some(spoiled)}: no model was written; "
            f"python convert/to_hf.py CKPT DST --adapter {adapter} --dtype float32 says whether "
            "they only lack room in the dtype of CKPT"
        )


def _targets(wanted: Sequence[str], layers: int) -> dict[str, tuple[str, ...]]:
    """Names of modules, or one pattern, which PEFT tells from a name by its being no list."""
    pattern = len(wanted) == 1 and re.search(r"[*+?|()\[\]^$\\]", wanted[0])
    return peft.targets(wanted[0] if pattern else wanted, layers)


def of(config: Config, ckpt: Path | None, *, recipe: Recipe) -> Whole | Adapted:
    """What a recipe trains. Raises ValueError for adapters on nothing, or on no module."""
    if not recipe.lora_rank:
        return Whole(config, ckpt, recipe)
    if ckpt is None:
        raise ValueError("adapters go on a trained model: give --ckpt")
    _targets(recipe.lora_targets, config.num_layers)
    return Adapted(config, ckpt, recipe)


def abstract(config: Config, adapters: Recipe | None) -> Whole | Adapted:
    """What is trained, to ask for its shapes alone: the adapters of a recipe, or all weights."""
    if adapters is None:
        return Whole(config, None, recipes.pretrain())
    return Adapted(config, Path(), adapters)
