import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import Config, model
from qwen_jax.attention import IMPLEMENTATIONS, cache
from qwen_jax.config import RopeScaling
from qwen_jax.leaves import weights
from qwen_jax.meshes.moves import place
from qwen_jax.model import Decoder, FeedForward, rms_norm, rope, running
from tests.support.tiny import (
    KERNELS,
    QUICK,
    cached_logits,
    frequencies,
    full_logits,
    full_pass,
    on_mesh,
    replace_leaves,
    tiny_config,
    tiny_decoder,
    tiny_tokens,
)

# Of the logits' standard deviation: room for float32 sums in another order, for nothing else.
NOISE = 2e-5

# Later generations of Qwen: a config value each, no other class.
ARCHITECTURES = {
    "qwen": {},
    "grouped heads": {"num_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "QK-norm": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "all": {"num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True, "qkv_bias": False},
}
LONG = {
    "plain": {},
    "ntk": {"dynamic_ntk": True},
    "logn": {"logn": True},
    "ntk and logn": {"dynamic_ntk": True, "logn": True},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0, 16)},
    "ntk-aware": {"rope_scaling": RopeScaling("ntk", 4.0, 16)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 16)},
    "windows": {"layer_windows": (5, None)},
    "windows and logn": {"layer_windows": (None, 18), "logn": True},
}


stack = jax.jit(model.stack, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def mesh():
    with on_mesh():
        yield


def assert_close(got: np.ndarray, expected: np.ndarray, noise: float = NOISE) -> None:
    """Within `noise` of the standard deviation of what is expected."""
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=noise * expected.std())


def reference_logits(decoder: Decoder, tokens: np.ndarray, alpha: float) -> np.ndarray:
    """Qwen by its report, in float64, one row, head and query at a time."""
    c = decoder.config
    w = {k: np.asarray(x[...], np.float64) for k, x in weights.named_leaves(decoder).items()}
    rates = rope.from_config(c).frequencies(alpha).astype(np.float64)
    temperature = rope.from_config(c).temperature()

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rotated(x: np.ndarray) -> np.ndarray:  # [T, N, H]
        half = c.head_dim // 2
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * rates)
        pairs = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    def attention(x: np.ndarray, at: str, window: int) -> np.ndarray:
        q, k, v = (x @ w[f"{at}.{name}"].T for name in "qkv")
        if c.qkv_bias:
            q, k, v = q + w[f"{at}.q_bias"], k + w[f"{at}.k_bias"], v + w[f"{at}.v_bias"]
        q, k, v = (x.reshape(len(x), -1, c.head_dim) for x in (q, k, v))
        if c.qk_norm:
            q, k = norm(q, w[f"{at}.q_norm"]), norm(k, w[f"{at}.k_norm"])
        q, k, o = rotated(q), rotated(k), np.zeros(q.shape)
        for t, n in np.ndindex(*q.shape[:2]):
            head, seen = n // (c.num_heads // c.num_kv_heads), slice(max(0, t + 1 - window), t + 1)
            longer = c.logn and t + 1 > c.seq_length
            scale = temperature * (math.log(t + 1, c.seq_length) if longer else 1)
            scores = scale * k[seen, head] @ q[t, n] / math.sqrt(c.head_dim)
            probs = np.exp(scores - scores.max())
            o[t, n] = probs / probs.sum() @ v[seen, head]
        return o.reshape(len(o), -1) @ w[f"{at}.o"].T

    def feed_forward(x: np.ndarray, at: str) -> np.ndarray:
        gate, up = x @ w[f"{at}.gate"].T, x @ w[f"{at}.up"].T
        return up * gate / (1 + np.exp(-gate)) @ w[f"{at}.down"].T

    rows = []
    for x in w["embedding"][tokens]:
        for i, window in enumerate(c.layer_windows or [None] * c.num_layers):
            at = f"layers.{i}"
            normed = norm(x, w[f"{at}.attn_norm"])
            x = x + attention(normed, f"{at}.attn", window or len(x))
            x = x + feed_forward(norm(x, w[f"{at}.ffn_norm"]), f"{at}.ffn")
        head = w["embedding" if c.tie_embeddings else "head"]
        rows.append(norm(x, w["final_norm"]) @ head.T)
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_by_config_alone(name):
    """A full pass, and prefill and decoding with a cache, are the formula's."""
    decoder = tiny_decoder(tiny_config(**ARCHITECTURES[name]))
    tokens = tiny_tokens(2, 9)
    expected = reference_logits(decoder, tokens, 1.0)
    assert_close(cached_logits(decoder, tokens, [7, 1, 1]), expected)
    if name in ("qwen", "all"):  # prefill compiles the same block, so that two suffice
        assert_close(full_logits(decoder, tokens), expected)


@pytest.mark.parametrize("name", LONG)
def test_long_context_however_it_is_cut(name):
    """36 tokens, trained on 16: one pass, prefill and decode, prefill in chunks and decode."""
    decoder = tiny_decoder(tiny_config(**LONG[name]))
    tokens = tiny_tokens(3, 36)
    alpha = float(rope.from_config(decoder.config).alpha(np.array(36)))
    assert alpha == (7 if decoder.config.dynamic_ntk else 1)
    logits = full_logits(decoder, tokens, alpha=alpha)
    assert_close(logits, reference_logits(decoder, tokens, alpha))
    assert_close(cached_logits(decoder, tokens, [13, 20, 1, 1, 1], alpha=alpha), logits)
    if name != "plain":
        plain = reference_logits(tiny_decoder(tiny_config()), tokens, 1.0)
        assert np.abs(logits - plain)[:, 20:].max() > 0.1 * plain.std(), "the scheme does nothing"


def test_prefill_below_the_trained_length_and_decode_above_it():
    """The alpha a prompt chose stays while LogN sets in."""
    decoder = tiny_decoder(tiny_config(**LONG["ntk and logn"]))
    tokens = tiny_tokens(3, 36)
    expected = reference_logits(decoder, tokens, 1.0)
    assert_close(cached_logits(decoder, tokens, [13, *[1] * 23], alpha=1.0), expected)


def test_left_padded_rows_are_what_they_are_alone():
    """Each with its own alpha and its own beginning, over one cache."""
    decoder = tiny_decoder(tiny_config(**LONG["ntk and logn"]))
    tokens, start = tiny_tokens(3, 36), np.array([0, 15, 22])
    alphas = rope.from_config(decoder.config).alpha(36 - start)
    assert alphas.tolist() == [7, 3, 1]
    together = cached_logits(decoder, tokens, [13, 20, 1, 1, 1], start=start, alpha=alphas)
    assert np.isfinite(together).all()
    places = np.arange(36) - start[:, None]
    segments = (places >= 0).astype(np.int32)
    whole = full_logits(decoder, tokens, places=places, segments=segments, alpha=alphas)
    assert np.isfinite(whole).all()
    for row, first in enumerate(start):
        expected = reference_logits(decoder, tokens[row : row + 1, first:], alphas[row])
        assert_close(together[row : row + 1, first:], expected)
        assert_close(whole[row : row + 1, first:], expected)


@pytest.mark.parametrize("name", ["plain", "windows and logn"])
def test_packed_segments_are_what_they_are_alone(name):
    decoder = tiny_decoder(tiny_config(**LONG[name]))
    tokens = tiny_tokens(3, 36)
    cuts = [(0, 20), (20, 33)]  # and three tokens of padding
    places, segments = np.zeros((3, 36)), np.zeros((3, 36))
    for i, (first, end) in enumerate(cuts):
        places[:, first:end] = np.arange(end - first)
        segments[:, first:end] = i + 1
    for one in (decoder, stack(decoder)):
        packed = full_logits(one, tokens, places=places, segments=segments)
        assert np.isfinite(packed).all()
        for first, end in cuts:
            alone = reference_logits(decoder, tokens[:, first:end], 1.0)
            assert_close(packed[:, first:end], alone)


def test_stack_and_unstack_are_inverse():
    decoder = tiny_decoder(tiny_config(qk_norm=True))
    stacked = stack(decoder)
    leaves, again = (weights.named_leaves(x) for x in (decoder, jax.jit(model.unstack)(stacked)))
    assert leaves.keys() == again.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf[...], again[name][...], err_msg=name)
        assert leaf.letters == again[name].letters
    shapes = {name: leaf.shape for name, leaf in weights.named_leaves(stacked).items()}
    assert shapes["layers.attn.q"] == (2, 64, 32) and shapes["embedding"] == (68, 32)


def test_stacked_is_looped():
    """Of more layers than a program outside `jit` takes at a time, and not a multiple of them."""
    windows = (3, None, 5, 1, 2, None)
    assert len(windows) > running.GROUP and len(windows) % running.GROUP
    decoder = tiny_decoder(tiny_config(num_layers=6, layer_windows=windows))
    tokens = tiny_tokens(2, 12)
    looped = full_pass(decoder, tokens, hidden_states=True)
    scanned = full_pass(stack(decoder), tokens, hidden_states=True)
    assert len(looped.hidden_states) == len(scanned.hidden_states) == 7
    assert_close(
        np.asarray(full_pass(decoder, tokens, groups=running.grouped(decoder.layers)).last),
        np.asarray(looped.last),
    )
    for x, y in zip(looped.hidden_states, scanned.hidden_states, strict=True):
        assert_close(np.asarray(y), np.asarray(x))
    np.testing.assert_array_equal(looped.hidden_states[0], decoder.embed(place(tokens, "BT")))
    for output in (looped, scanned):
        np.testing.assert_array_equal(output.hidden_states[-1], output.last)
        assert output.cache is None
    before = np.asarray(looped.hidden_states[-2], np.float64)
    # The last entry is not the last block's sum but its norm: its size is the norm's weights'.
    size = np.sqrt(np.mean((np.asarray(looped.last) / decoder.final_norm[...]) ** 2, -1))
    np.testing.assert_allclose(size, 1, atol=1e-4)
    assert np.abs(np.sqrt((before**2).mean(-1)) - 1).min() > 0.05
    assert full_pass(decoder, tokens).hidden_states == ()


def test_a_stacked_decoder_keeps_no_cache():
    decoder = stack(tiny_decoder(tiny_config()))
    held = cache.empty(
        decoder.config, place(np.zeros(2, np.int32), "B"), capacity=8, dtype=jnp.float32, kind=None
    )
    with pytest.raises(ValueError, match="unstack it first"):
        full_pass(decoder, tiny_tokens(2, 4), cache=held)


def test_input_embeddings():
    """Any x goes in: here, the table looked up by hand."""
    decoder, tokens = tiny_decoder(tiny_config()), tiny_tokens(2, 9)
    x = place(np.asarray(decoder.embedding[...])[tokens], "BTD")
    places = place(np.arange(9, dtype=np.int32) + 0 * tokens, "BT")
    output = decoder(
        x,
        places,
        segments=place(np.ones_like(tokens), "BT"),
        frequencies=frequencies(decoder.config, 2),
    )
    np.testing.assert_array_equal(decoder.logits(output.last), full_logits(decoder, tokens))


def gradients(
    decoder: Decoder, tokens: np.ndarray, remat=None, stacked=False, attention="xla"
) -> dict:
    """The logits, and by leaf name the gradients of a loss of them."""
    attend = IMPLEMENTATIONS[attention]
    rng = np.random.default_rng(3)
    wanted = rng.standard_normal((*tokens.shape, decoder.config.vocab_size)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grad(decoder: Decoder, wanted: jax.Array, *arrays: jax.Array):
        def loss(decoder: Decoder) -> tuple[jax.Array, jax.Array]:
            x, places, segments, rates = arrays
            one = model.stack(decoder) if stacked else decoder
            given = {"segments": segments, "frequencies": rates, "attend": attend, "remat": remat}
            output = one(one.embed(x), places, **given)
            logits = one.logits(output.last)
            return jnp.mean(logits * wanted), logits

        return jax.grad(loss, has_aux=True)(decoder)

    places = np.arange(tokens.shape[1], dtype=np.int32) + 0 * tokens
    arrays = [place(x, "BT") for x in (tokens, places, np.ones_like(tokens))]
    rates = frequencies(decoder.config, len(tokens))
    tree, logits = grad(decoder, place(wanted, "BTV"), *arrays, rates)
    leaves = weights.named_leaves(tree)
    return {"logits": np.asarray(logits)} | {k: np.asarray(x[...]) for k, x in leaves.items()}


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert_close(got["logits"], expected["logits"])
    for name, gradient in got.items():
        assert np.abs(gradient).max() > 0, name
        assert_close(gradient, expected[name], 1e-4)


TRAINED = {"num_kv_heads": 2, "qk_norm": True}
POLICIES = jax.checkpoint_policies


@functools.cache
def plain_gradients() -> dict:
    """On one device, looped, without remat: compiled once for the tests below."""
    return gradients(tiny_decoder(tiny_config(**TRAINED)), tiny_tokens(4, 9))


@pytest.mark.parametrize(
    ("remat", "stacked"),
    [(POLICIES.dots_with_no_batch_dims_saveable, False), (POLICIES.nothing_saveable, True)],
)
def test_remat_and_scan_change_neither_values_nor_gradients(remat, stacked):
    decoder = tiny_decoder(tiny_config(**TRAINED))
    assert_same_gradients(gradients(decoder, tiny_tokens(4, 9), remat, stacked), plain_gradients())


@pytest.mark.parametrize("name", KERNELS)
def test_training_through_the_kernels(name):
    """Scanned layers with a window of their own, rematerialised, on four devices."""
    config = tiny_config(**TRAINED, head_dim=32, layer_windows=(5, None))
    expected = gradients(tiny_decoder(config), tiny_tokens(4, 9))
    with on_mesh(fsdp=2, tp=2):
        options = {"remat": POLICIES.nothing_saveable, "stacked": True, "attention": name}
        got = gradients(tiny_decoder(config), tiny_tokens(4, 9), **options)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_remat_saves_what_its_policy_says(stacked):
    """Otherwise a policy that is ignored would pass the test above."""
    decoder, tokens = tiny_decoder(tiny_config()), place(tiny_tokens(2, 8), "BT")
    rates = frequencies(decoder.config, 2)

    def saved(remat) -> int:
        def run(decoder: Decoder) -> jax.Array:
            one = model.stack(decoder) if stacked else decoder
            places = jnp.broadcast_to(jnp.arange(8), (2, 8))
            ones = jnp.ones((2, 8), jnp.int32)
            return one(
                one.embed(tokens), places, segments=ones, frequencies=rates, remat=remat
            ).last

        residuals = jax.eval_shape(lambda decoder: jax.vjp(run, decoder)[1], decoder)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    nothing = saved(POLICIES.nothing_saveable)
    assert nothing < saved(POLICIES.dots_with_no_batch_dims_saveable) < saved(None)


@pytest.mark.parametrize(
    ("sizes", "changes", "trained"),
    [
        ({"fsdp": 2, "tp": 2}, TRAINED, True),
        ({"fsdp": 4, "tp": 2}, {"layer_windows": (5, None)}, False),
        ({"tp": 4}, {"tie_embeddings": True}, False),
    ],
)
def test_meshes_are_one_device(sizes, changes, trained):
    config = tiny_config(**changes)
    tokens, start = tiny_tokens(4, 9), np.array([0, 1, 2, 3])
    if trained:
        expected = plain_gradients()
    with on_mesh(**sizes):
        decoder = tiny_decoder(config)
        leaf = decoder.layers[0].attn.q[...]
        parts = leaf.size // leaf.addressable_shards[0].data.size
        assert parts == math.prod(sizes.values())
        cached = cached_logits(decoder, tokens, [8, 1], start=start)
        if trained:
            assert_same_gradients(gradients(decoder, tokens, stacked=True), expected)
    for row, first in enumerate(start):
        alone = reference_logits(decoder, tokens[row : row + 1, first:], 1.0)
        assert_close(cached[row : row + 1, first:], alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    config = tiny_config(dynamic_ntk=True, logn=True)
    tokens = tiny_tokens(1, 36)
    decoder = tiny_decoder(config, dtype)
    last = full_pass(decoder, tokens, alpha=7.0).last
    logits = np.asarray(decoder.logits(last))
    exact = reference_logits(tiny_decoder(config), tokens, 7.0)
    assert last.dtype == dtype and logits.dtype == np.float32
    # A few roundings one after another, those of the weights included.
    error = np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    assert 0 < error < 4 * float(jnp.finfo(dtype).eps)
    # Not rounded to the compute dtype on the way out.
    assert (np.asarray(jnp.asarray(logits).astype(dtype), np.float32) != logits).any()


def test_rms_norm_casts_back_before_the_weight():
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal((1, 40, 32)), jnp.bfloat16)
    weight = jnp.asarray(1 + 0.5 * rng.standard_normal(32), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    # What float32 may compute a little smaller or larger: the same bfloat16 but for a few.
    least, most = (jnp.asarray(normed * (1 + e), jnp.bfloat16) for e in (-1e-5, 1e-5))
    sure = np.asarray(least == most)
    product = jnp.asarray(np.asarray(least, np.float32) * np.asarray(weight, np.float32))
    got = rms_norm(x, weight, eps=1e-6)
    assert got.dtype == jnp.bfloat16 and sure.mean() > 0.98
    np.testing.assert_array_equal(got[sure], product.astype(jnp.bfloat16)[sure])
    late = jnp.asarray(normed * np.asarray(weight, np.float64), jnp.bfloat16)
    assert (np.asarray(got) != np.asarray(late)).any(), "the order makes a difference here"


def test_rms_norm_of_zeros_and_of_large_values():
    np.testing.assert_array_equal(rms_norm(jnp.zeros((1, 1, 8)), jnp.ones(8), eps=1e-6), 0)
    large = jnp.full((1, 1, 8), 60000.0, jnp.float16)  # its square overflows float16
    np.testing.assert_allclose(rms_norm(large, jnp.ones(8, jnp.float16), eps=1e-6), 1, rtol=1e-3)


def test_the_gate_of_the_feed_forward():
    """silu on the gate alone; the sigmoid is told from the product by a closed gate."""
    decoder = tiny_decoder(tiny_config())
    ffn = decoder.layers[0].ffn
    assert isinstance(ffn, FeedForward)
    x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (ffn.gate, ffn.up, ffn.down))
    opened = x @ gate.T
    expected = (x @ up.T) * (opened / (1 + np.exp(-opened))) @ down.T
    np.testing.assert_allclose(ffn(place(x, "BTD")), expected, atol=1e-5)


def spread(leaf: jax.Array) -> tuple[float, float]:
    """The standard deviation, and five times its own, if n values were drawn independently."""
    values = np.asarray(leaf, np.float64)
    return values.std(), 5 * values.std() / math.sqrt(2 * values.size)


def test_fresh_weights():
    std = 0.05
    config = tiny_config(qk_norm=True, initializer_range=std)
    create = jax.jit(model.create, static_argnames=("config", "dtype"), compiler_options=QUICK)
    leaves = weights.named_leaves(create(config, jax.random.key(1), dtype=jnp.float32))
    into_residual = std / math.sqrt(2 * config.num_layers)
    for name, leaf in leaves.items():
        value = np.asarray(leaf[...])
        if "bias" in name:
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            wanted = into_residual if name.endswith((".o", ".down")) else std
            got, tolerance = spread(value)
            assert abs(got - wanted) < tolerance, name
            assert abs(value.mean()) < 5 * wanted / math.sqrt(value.size), name
    drawn = {name: np.asarray(x[...]).ravel()[:8] for name, x in leaves.items() if x[...].ndim > 1}
    drawn = {name: x / x.std() for name, x in drawn.items() if "bias" not in name}
    assert len({tuple(x.round(3)) for x in drawn.values()}) == len(drawn), "no two are alike"


def test_abstract_is_create_without_the_arrays():
    for changes in ARCHITECTURES.values():
        config = tiny_config(**changes)
        abstract = weights.named_leaves(model.abstract(config, jnp.bfloat16))
        real = weights.named_leaves(jax.eval_shape(lambda c=config: fresh(c)))
        assert abstract.keys() == real.keys()
        for name, leaf in real.items():
            shape = abstract[name]
            assert (leaf.shape, leaf.dtype, leaf.letters) == (
                shape.shape,
                shape.dtype,
                shape.letters,
            )


def fresh(config: Config) -> Decoder:
    return model.create(config, jax.random.key(0), dtype=jnp.bfloat16)


def test_leaves_have_names_and_can_be_replaced():
    decoder = tiny_decoder(tiny_config(num_layers=1, tie_embeddings=True))
    block = [
        *("attn_norm", "attn.q", "attn.k", "attn.v", "attn.o"),
        *("attn.q_bias", "attn.k_bias", "attn.v_bias"),
        *("ffn_norm", "ffn.gate", "ffn.up", "ffn.down"),
    ]
    names = ["embedding", "final_norm", *(f"layers.0.{name}" for name in block)]
    assert sorted(weights.named_leaves(decoder)) == sorted(names)
    doubled = replace_leaves(decoder, lambda name, leaf: 2 * leaf[...])
    for name, leaf in weights.named_leaves(doubled).items():
        np.testing.assert_array_equal(leaf[...], 2 * weights.named_leaves(decoder)[name][...])
    assert dataclasses.asdict(doubled.config) == dataclasses.asdict(decoder.config)
