"""bfloat16 and float16 against float32, on a wide random model; sums of gradients; and that float32
products are computed in float32 in every program.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import attention, meshes, model
from qwen_jax.decoding import decode, sampling
from qwen_jax.leaves.weights import Weight, contract
from qwen_jax.meshes import gathering, moves, sharding
from qwen_jax.model import lora, norm, rope, running, vocabulary
from tests.support.tiny import QUICK, on_mesh, tiny_config
from train import step
from train.planning import programs
from train.run import parameters, recipes

CONFIG = dataclasses.replace(qwen_jax.PRESETS["qwen-1.8b"], num_layers=4, vocab_size=8192)


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs are optimised, as these run for longer than it takes to optimise them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def wide(optimised: None) -> model.Decoder:
    with jax.set_mesh(meshes.make()):
        return jax.jit(lambda key: model.create(CONFIG, key, dtype=jnp.float32))(jax.random.key(0))


def log_probabilities(decoder: model.Decoder, tokens: np.ndarray) -> np.ndarray:
    with jax.set_mesh(meshes.make()):
        start = moves.place(np.zeros(len(tokens), np.int32), "B")
        places, segments = decode.positions(start, 0, length=tokens.shape[1])
        frequencies = rope.from_config(CONFIG).frequencies(np.ones(len(tokens)))
        x = decoder.embed(moves.place(tokens, "BT"))
        output = decoder(x, places, segments=segments, frequencies=moves.place(frequencies, "BH"))
        return np.asarray(jax.nn.log_softmax(decoder.logits(output.last)), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-3), ("float16", 1e-5)])
def test_mean_kl_to_float32(wide: model.Decoder, dtype: str, bound: float) -> None:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 48))
    exact = log_probabilities(wide, tokens)
    narrow = jax.tree.map(lambda x: x.astype(dtype), wide)
    rounded = log_probabilities(narrow, tokens)
    kl = np.sum(np.exp(exact) * (exact - rounded), axis=-1).mean()
    assert 0 < kl < bound


# Sums of gradients over tokens and devices

B, T, D, F = 8, 16, 32, 48
SHAPES = {"FD": (F, D), "DF": (D, F), "D": (D,), "F": (F,), "VD": (128, D)}


def in_bfloat16(seed: int, *shape: int) -> np.ndarray:
    """float32 values that bfloat16 holds."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.asarray(jnp.asarray(drawn, jnp.bfloat16), np.float32)


def of_every_kind(w: dict[str, Weight], wide: Any, narrow: Any, targets: Any, shares: Any) -> Any:
    """Linear in every kind of leaf but the head; products of dtype bfloat16."""
    x, y = (a.astype(jnp.bfloat16) for a in (narrow, wide))
    whole = gathering.unshard(w, x.dtype)
    columns = contract("BTD,FD->BTF", moves.to_columns(x), weight=whole["FD"])
    rows = contract("BTF,DF->BTD", y, weight=whole["DF"], out=sharding.spec("BTD"))
    normed = norm.in_float32(jnp.multiply, x, weight=whole["D"])
    shifted = norm.in_float32(jnp.add, y, weight=whole["F"])
    results = columns, rows, normed, shifted
    factors = wide, narrow, narrow, wide
    loss = sum(jnp.sum(a.astype(jnp.float32) * b) for a, b in zip(results, factors, strict=True))
    found = vocabulary.token_scores(x, w["VD"][...], targets=targets)
    return loss + jnp.sum(shares * (found.lse - found.logit))


@functools.cache
def gradients(kind: str, **sizes: int) -> dict[str, np.ndarray]:
    """Of `of_every_kind`, on leaves of dtype `kind`."""
    with on_mesh(**sizes):
        w = {
            name: Weight(moves.place(in_bfloat16(i, *shape), name).astype(kind), letters=name)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        targets = np.random.default_rng(0).integers(0, SHAPES["VD"][0], (B, T), np.int32)
        given = [moves.place(in_bfloat16(8, B, T, F), "BTF")]
        given += [moves.place(in_bfloat16(9, B, T, D), "BTD"), moves.place(targets, "BT")]
        given += [moves.place(in_bfloat16(7, B, T), "BT")]
        found = jax.jit(jax.grad(of_every_kind), compiler_options=QUICK)(w, *given)
        return {name: np.asarray(leaf[...], np.float64) for name, leaf in found.items()}


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_gradients_are_summed_in_the_dtype_of_their_leaf():
    """Over 8 devices, of products in bfloat16, against float64 (the head: against one device, where
    its logits' gradients are rounded alike).
    """
    sizes = {"data": 2, "fsdp": 2, "tp": 2}
    exact, rounded = gradients("float32", **sizes), gradients("bfloat16", **sizes)
    wide, narrow = (in_bfloat16(8, B, T, F), in_bfloat16(9, B, T, D))
    wide, narrow = wide.astype(np.float64), narrow.astype(np.float64)
    wanted = {
        "FD": np.einsum("btf,btd->fd", wide, narrow),
        "DF": np.einsum("btd,btf->df", narrow, wide),
        "D": np.sum(narrow * narrow, (0, 1)),
        "F": np.sum(wide, (0, 1)),
        "VD": gradients("float32")["VD"],
    }
    for name, value in wanted.items():
        bound = 3e-4 if name == "VD" else 2e-6
        assert off(exact[name], value) < bound, name
        assert off(rounded[name], value) > 1e-3, f"{name}: what the switch is for"


# Every program's products, from what is traced

TINY = tiny_config(num_heads=8, num_kv_heads=8, head_dim=8, intermediate_size=48, vocab_size=72)
EVERY = {"fsdp": 2, "context": 2, "tp": 2}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and of all that are in it, those of kernels too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(part, "jaxpr", part), "eqns"):
                    yield from equations(part)


def training(dtype: str, adapters: recipes.Recipe | None = None, **options: Any) -> Any:
    optimizer = step.Optimizer(moments="bfloat16")
    trained = parameters.abstract(TINY, adapters)
    with on_mesh(**EVERY) as mesh:
        state, base = trained.abstract_state(optimizer), trained.abstract_base()
        run = step.make_step(
            optimizer, attention.xla, dtype=dtype, attach=trained.attach, dropout=0.1, **options
        )
        return run.trace(state, step.abstract_batch(4, 16, mesh=mesh), base).jaxpr


def adapted(base: str) -> recipes.Recipe:
    return dataclasses.replace(
        recipes.sft_lora(), dtype="float32", base_dtype=base, train_embeddings=True, lora_rank=4
    )


def decoding(kernel: str) -> Iterator[Any]:
    config = dataclasses.replace(TINY, head_dim=32)  # the least that kernels take
    setting = programs.Setting(config, batch=2, length=32, attention=kernel)
    attend = attention.get(kernel)
    with on_mesh(tp=2):
        decoder = model.abstract(config, jnp.float32)
        rules, state, cache = jax.eval_shape(lambda: programs.decode_state(setting, jnp.float32))
        limit = jax.ShapeDtypeStruct((), jnp.int32)
        leaves, tree = jax.tree.flatten(decoder)
        chosen = {"cache": cache, "sampler": sampling.Greedy(), "rules": rules, "limit": limit}
        traced = decode.run_stride.trace(leaves, state, **chosen, tree=tree, attend=attend)
        yield traced.jaxpr
        given = jax.eval_shape(
            lambda x: programs._of_a_group(setting, 8, dtype=jnp.float32, decoder=x), decoder
        )
        _, _, tree = running.grouped(decoder.layers).parts[0]
        yield running.run_group.trace(**given, tree=tree).jaxpr
        yield jax.make_jaxpr(model.logits)(given["x"], decoder.unembedding)


def merging() -> Any:
    with on_mesh(fsdp=2):
        decoder = jax.eval_shape(model.stack, model.abstract(TINY, jnp.float32))
        made = functools.partial(lora.create, groups={"x": ("attn.q",)}, rank=4, alpha=1.0)
        adapters = jax.eval_shape(lambda d: made(d, key=jax.random.key(0)), decoder)
        return jax.make_jaxpr(lora.merge)(decoder, adapters)


PROGRAMS = {
    "training": lambda: [training("float32", z_loss=0.1, accumulate=2, sequence_parallel=True)],
    "adapters": lambda: [training("float32", adapted("same"))],
    "adapters on int8": lambda: [training("float32", adapted("int8"))],
    "decoding": lambda: decoding("xla"),
    "decoding with a kernel": lambda: decoding("pallas_tpu"),
    "merging": lambda: [merging()],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_float32_ask_for_full_precision(name):
    """What says nothing is TF32 on a GPU, and bfloat16 on a TPU."""
    products, careless = 0, []
    for jaxpr in PROGRAMS[name]():
        for equation in equations(jaxpr):
            kind = equation.primitive.name
            if kind not in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
                continue
            products += 1
            said = equation.params["precision"]
            said = set(said) if isinstance(said, tuple) else {said}
            wide = any(x.aval.dtype == jnp.float32 for x in equation.invars)
            if wide and not said <= {jax.lax.Precision.HIGHEST}:
                careless.append(str(equation)[:200])
    assert products and not careless


def test_gradients_cross_the_mesh_in_float32():
    """Over the axes that split rows, tokens and weights, a step in bfloat16 adds up float32 alone,
    or on request bfloat16. Over tp it is activations, in what they are computed in.
    """
    across = set(EVERY) - {"tp"}

    def summed(**options: Any) -> set[str]:
        found = set()
        for equation in equations(training("bfloat16", **options)):
            parameters, (first, *_) = equation.params, equation.invars or [None]
            axes: Any = parameters.get("axes", parameters.get("axis_name", ()))
            if equation.primitive.name == "reshard":
                axes = first.aval.sharding.spec.unreduced
            elif equation.primitive.name not in ("psum", "psum_invariant", "reduce_scatter"):
                continue
            axes = {axes} if isinstance(axes, str) else set(axes)
            found |= {str(first.aval.dtype)} if axes & across else set()
        return found

    assert summed() == {"float32"}
    assert summed(gradient_dtype="bfloat16") == {"bfloat16"}
