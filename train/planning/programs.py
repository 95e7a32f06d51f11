"""Compiles the programs of a plan, for devices that need not exist.

A training step, a decode step, and the prefill of a chunk are lowered from shapes alone, just as
the library runs them. The memory of their arguments is known by name; the compiler reports the
rest. This module knows no hardware rates and prints nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from qwen_jax import attention, meshes, model
from qwen_jax.attention import cache as kv
from qwen_jax.attention import workloads
from qwen_jax.attention.workloads import Case
from qwen_jax.config import Config
from qwen_jax.decoding import choosing, decode, sampling
from qwen_jax.meshes import sharding
from qwen_jax.model import Decoder, running
from qwen_jax.model.context import Context
from train import step
from train.planning import stored_weights
from train.planning.compilation import Program, compile_program
from train.planning.flops import nbytes
from train.run import parameters
from train.run.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, batch and options that a program is compiled for.

    config: the model's architecture.
    batch: the number of rows, over all devices.
    length: the number of tokens in a row; for decoding, of the tokens in the cache.
    attention: a registered implementation, or "auto" if the plan is to choose.
    remat: what the backward pass recomputes, a name in `step.REMAT`.
    sequence_parallel: whether training splits the residual stream by tokens over `tp`; None splits
        it where the tokens divide.
    cache_dtype: the dtype of the KV cache when decoding; None is the weights' dtype.
    accumulate: the number of parts that a training batch is split into.
    adapters: the recipe of a LoRA training; None trains all weights.
    by_auto: whether the plan has chosen `attention`.
    passed_over: the kernels that `auto` cannot use here, each with the reason.
    gradient_dtype: the dtype in which training sums gradients over devices.
    weights: how the matrices of layers are stored, one of `stored_weights.FORMS`; integers are not
        trained.
    kernel: the kernel that multiplies by integers; None makes floats of them for each product.
    """

    config: Config
    _: dataclasses.KW_ONLY
    batch: int
    length: int
    attention: str
    remat: str = "full"
    sequence_parallel: bool | None = None
    cache_dtype: str | None = None
    accumulate: int = 1
    adapters: Recipe | None = None
    by_auto: bool = False
    passed_over: tuple[str, ...] = ()
    gradient_dtype: str = "float32"
    weights: str = "float"
    kernel: str | None = None

    def decoder(self, dtype: DTypeLike) -> Decoder:
        """Return the decoder as shapes on the mesh in force. dtype: of plain weights."""
        return stored_weights.decoder(self.config, dtype, form=self.weights, kernel=self.kernel)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError if model, batch or length does not divide over axes of these sizes."""
        lengths = {**self.config.sizes, "B": self.batch // self.accumulate, "T": self.length}
        meshes.check(lengths, sizes, sequence_parallel=self.splits_tokens(sizes)[0])

    def splits_tokens(self, sizes: Mapping[str, int]) -> tuple[bool, str]:
        """Return whether training splits the residual stream by tokens over `tp`, and why."""
        return meshes.splits_tokens(self.sequence_parallel, self.length, mesh=sizes)


def training(setting: Setting, mesh: Mesh) -> Program:
    """Compile a training step. Raises ValueError if the setting does not divide over the mesh."""
    setting.check(mesh.shape)
    optimizer = step.Optimizer()
    trained = parameters.abstract(setting.config, setting.adapters)
    with jax.set_mesh(mesh):
        state, base = trained.abstract_state(optimizer), trained.abstract_base()
        if base is not None and setting.weights != "float":
            separate = setting.decoder(jnp.bfloat16)
            base = sharding.on_devices(mesh, jax.eval_shape(model.stack, separate))
    batch = step.abstract_batch(setting.batch, setting.length, mesh=mesh)
    run = step.make_step(
        optimizer,
        attention.get(setting.attention),
        remat=setting.remat,
        sequence_parallel=setting.splits_tokens(mesh.shape)[0],
        accumulate=setting.accumulate,
        attach=trained.attach,
        gradient_dtype=setting.gradient_dtype,
    )
    weights = {"weights": nbytes(state.weights)}
    if base is not None:
        weights = {"weights": nbytes(base), "adapters": nbytes(state.weights)}
    held = {**weights, "optimiser": nbytes((state.moments, state.step)), "batch": nbytes(batch)}
    return compile_program(
        lambda: run.trace(state, batch, base), mesh, held=held, layers=setting.config.num_layers
    )


def decoding(setting: Setting, mesh: Mesh, *, dtype: DTypeLike = jnp.bfloat16) -> Program:
    """Compile the loop that decodes tokens, with a KV cache of `setting.length` tokens per row."""
    meshes.check({**setting.config.sizes, "B": setting.batch}, mesh)
    config = setting.config
    with jax.set_mesh(mesh):
        decoder = setting.decoder(dtype)
        shapes = jax.eval_shape(lambda: decode_state(setting, dtype))
    decoder = stored_weights.on_devices(mesh, decoder)
    rules, state, cache = sharding.on_devices(mesh, shapes)
    limit = sharding.on_devices(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    held = {"weights": nbytes(decoder), "cache": nbytes(cache.layers)}
    held["batch"] = nbytes((state, cache)) - held["cache"] + nbytes((rules, limit))
    attend = attention.get(setting.attention)
    leaves, tree = jax.tree.flatten(decoder)
    given = {"cache": cache, "sampler": sampling.Greedy(), "rules": rules, "limit": limit}
    return compile_program(
        lambda: decode.run_stride.trace(leaves, state, **given, tree=tree, attend=attend),
        mesh,
        held=held,
        layers=config.num_layers,
    )


def decode_state(
    setting: Setting, dtype: DTypeLike
) -> tuple[choosing.Rules, choosing.DecodeState, kv.Cache]:
    """Return decoding's rules, its state and its cache between tokens, as placeholders of zeros."""
    config, batch = setting.config, setting.batch

    def zeros(letters: str, *shape: int, dtype: DTypeLike = jnp.int32) -> Shaped[Array, "..."]:
        return jnp.zeros(shape, dtype, out_sharding=sharding.spec(letters))

    rules = choosing.Rules(
        jnp.ones(config.vocab_size, bool), jnp.zeros((1, 1), jnp.int32), jnp.int32(0)
    )
    start = zeros("B", batch)
    cache = kv.empty(config, start, capacity=setting.length, dtype=dtype, kind=setting.cache_dtype)
    state = choosing.DecodeState(
        frequencies=zeros("BH", batch, config.head_dim // 2, dtype=jnp.float32),
        token=zeros("B", batch),
        seen=choosing.unseen(batch, config.vocab_size),
        recent=zeros("BT", batch, 1),
        done=zeros("B", batch, dtype=bool),
        fault=zeros("B", batch),
        seeds=zeros("B", batch, dtype=jnp.uint32),
        step=jnp.int32(0),
    )
    return rules, state, dataclasses.replace(cache, fresh=False)


def prefill(
    setting: Setting, mesh: Mesh, *, chunk: int, dtype: DTypeLike = jnp.bfloat16
) -> Program:
    """Compile the prefill of a chunk by one group of layers, with a KV cache of `length` tokens.

    chunk: the tokens of the prompt per pass. Prefill runs this program for one group of layers
    after the other. The returned memory is that of all layers, and a smaller last group counts as a
    fraction of a run.
    """
    config = setting.config
    meshes.check({**config.sizes, "B": setting.batch}, mesh)
    with jax.set_mesh(mesh):
        decoder = setting.decoder(dtype)
        given = jax.eval_shape(
            lambda x: _of_a_group(setting, chunk, dtype=dtype, decoder=x), decoder
        )
    given = stored_weights.on_devices(mesh, given)
    decoder = sharding.on_devices(mesh, decoder)
    _, _, tree = running.grouped(decoder.layers).parts[0]
    group = {"weights": nbytes(given["leaves"]), "cache": nbytes(given["layers"])}
    group["batch"] = nbytes(given) - sum(group.values())
    one = compile_program(
        lambda: running.run_group.trace(**given, tree=tree), mesh, held=group, layers=0
    )
    runs = config.num_layers / len(given["layers"])
    parts = {
        **one.memory.parts,
        "weights": nbytes(decoder),
        "cache": round(runs * group["cache"]),
        "padding": round(runs * one.memory.parts.get("padding", 0)),
    }
    memory = dataclasses.replace(one.memory, parts=parts)
    return dataclasses.replace(one, memory=memory, runs=runs)


def _of_a_group(
    setting: Setting, chunk: int, *, dtype: DTypeLike, decoder: Decoder
) -> dict[str, Any]:
    """Return arguments of `running.run_group` for the first layers, in the middle of a prompt.

    chunk: the tokens of the prompt per pass. dtype: the dtype of the weights.
    """
    _, state, cache = decode_state(setting, dtype)
    tokens = jnp.zeros((setting.batch, chunk), jnp.int32, out_sharding=sharding.spec("BT"))
    places, segments = decode.positions(cache.start, cache.index, length=chunk)
    x, (_, leaves, _) = decoder.embed(tokens), running.grouped(decoder.layers).parts[0]
    layers, windows = cache.layers[: running.GROUP], jnp.array(decoder.windows[: running.GROUP])
    context = Context.of_pass(
        setting.config,
        places,
        segments=segments,
        frequencies=state.frequencies,
        cache=cache,
        attend=attention.get(setting.attention),
    )
    given = {"x": x, "leaves": leaves, "layers": layers, "windows": windows}
    return {**given, "first": jnp.int32(0), "context": context}


def compile_calls(cases: Sequence[Case], name: str, *, mesh: Mesh) -> None:
    """Compile the attention calls by which `auto` verifies a kernel, for a device of the mesh.

    name: the kernel's name in the registry. Raises NotImplementedError if the kernel does not
    support a call, and jax's JaxRuntimeError if the compiler refuses it.
    """
    for case in cases:
        run, shapes = workloads.call(case, name)
        with jax.set_mesh(mesh):
            jax.jit(run).lower(*sharding.on_devices(mesh, shapes)).compile()
