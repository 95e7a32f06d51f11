"""The decode program: what it allocates and sends; that chunks, capacities and rules hold; that
the device is ahead of the host; and how a row ends for which no token can be chosen.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import core

import qwen_jax
from qwen_jax import attention, meshes
from qwen_jax.decoding import choosing, decode
from qwen_jax.decoding.sampling import Greedy, Nucleus
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import abstract, rope, running
from tests.support import compilations
from tests.support.tiny import QUICK, on_mesh, replace_leaves, tiny_config, tiny_decoder
from train.planning import collectives, programs


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(golden_dir, dtype="float32")


def begun(model: qwen_jax.LanguageModel, new: int, cache_dtype: str | None) -> dict[str, Any]:
    """The arguments of `run_stride` after a prompt of 10, with cache slots for `new` more."""
    frequencies = rope.from_config(model.config).frequencies(np.ones(1))
    rules = choosing.make_rules(np.ones(model.config.vocab_size, bool), (), pad=0)
    state, cache = decode.prefill(
        model.decoder,
        np.ones((1, 10), np.int32),
        lengths=np.array([10]),
        frequencies=frequencies,
        seeds=np.zeros(1, np.uint32),
        rules=rules,
        sampler=Greedy(),
        new=new,
        attend=model.attend,
        cache_dtype=cache_dtype,
    )
    leaves, tree = jax.tree.flatten(model.decoder)
    given = {"leaves": leaves, "state": state, "cache": cache, "tree": tree, "rules": rules}
    return {**given, "sampler": Greedy(), "limit": np.int32(8), "attend": model.attend}


def compiled(model: qwen_jax.LanguageModel, new: int, cache_dtype: str | None):
    """The decode program, and the cache that it is given."""
    with meshes.entered(model.mesh):
        given = begun(model, new, cache_dtype)
        return decode.run_stride.lower(**given).compile(), given["cache"]


def test_the_cache_is_donated_and_not_copied(model: qwen_jax.LanguageModel) -> None:
    """Temporary memory does not grow with the cache, by even one of its leaves."""
    short, _ = compiled(model, 200, None)
    long, cache = compiled(model, 8000, None)
    leaf = cache.layers[0].k.nbytes
    grown = long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes
    assert leaf > 2e6 and grown < leaf / 4


def test_indices_have_one_dtype_with_x64(model: qwen_jax.LanguageModel) -> None:
    """With jax_enable_x64 a Python number is an int64 beside the cache's int32 index."""
    with meshes.entered(model.mesh):
        given = begun(model, 200, None)
        with jax.enable_x64(True):
            wide = decode.run_stride.trace(**given).out_info[:2]
    same = jax.tree.map(
        lambda now, before: now.dtype == before.dtype, wide, (given["state"], given["cache"])
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int8_asymmetric"])
def test_the_cache_is_updated_in_place(
    model: qwen_jax.LanguageModel, cache_dtype: str | None
) -> None:
    program, held = compiled(model, 4000, cache_dtype)
    cache = sum(x.nbytes for x in jax.tree.leaves(held))
    assert program.memory_analysis().alias_size_in_bytes >= cache
    if cache_dtype:
        whole = sum(x.nbytes for x in jax.tree.leaves(compiled(model, 4000, None)[1]))
        assert cache < whole * {"int8": 36, "int8_asymmetric": 40}[cache_dtype] / 128 + 1024


def test_what_prefill_asks_of_the_host_grows_with_groups_of_layers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is run operation by operation, nothing is sent for each layer, and layers share two
    programs whatever their number: one of a whole group, one of the rest.
    """
    eager, groups = [], []
    primitive, run = core.EvalTrace.process_primitive, running.run_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        groups.append(len(kwargs["layers"]))
        return run(*args, **kwargs)

    def seen(trace: Any, which: Any, *args: Any) -> Any:
        eager.append(which.name)
        return primitive(trace, which, *args)

    config = tiny_config(num_layers=10, layer_windows=[3, None] * 5)
    prompt = np.ones((1, 40), np.int32)
    given: dict[str, Any] = {"lengths": np.array([40]), "frequencies": np.ones((1, 8), np.float32)}
    with on_mesh():
        decoder = tiny_decoder(config, jnp.float32)
        rules = choosing.make_rules(np.ones(config.vocab_size, bool), (), pad=0)
        given |= {"seeds": np.zeros(1, np.uint32), "rules": rules, "sampler": Greedy(), "new": 8}
        given["attend"] = attention.xla
        programs = run._cache_size()
        decode.prefill(decoder, prompt, **given)
        assert run._cache_size() - programs == 2
        monkeypatch.setattr(running, "run_group", counted)
        monkeypatch.setattr(core.EvalTrace, "process_primitive", seen)
        _, cache = decode.prefill(decoder, prompt, **given)
    assert groups == [4, 4, 2]
    assert len(cache.layers) == 10
    assert len(eager) <= 3, eager


def test_plan() -> None:
    for length in (1, 31, 32, 33, 511, 512, 513, 2000):
        chunks, capacity = decode.plan(length, 10)
        assert all(chunk in decode.buckets() for chunk in chunks)
        assert sum(chunks) - chunks[0] < length <= sum(chunks)
        assert sum(chunks) + 10 <= capacity <= max(256, 1.25 * (sum(chunks) + 10) + 256)


def test_rules_pad_stops_on_the_left() -> None:
    rules = choosing.make_rules(np.ones(9, bool), [(1,), (2, 3, 4)], pad=7)
    assert rules.stops.tolist() == [[-1, -1, 1], [2, 3, 4]] and rules.pad == 7
    assert choosing.make_rules(np.ones(9, bool), [], pad=0).stops.shape == (0, 1)


# Sampling on a mesh

V = 128
ALLOWED = np.arange(V) % 9 > 0
DRAW = Nucleus(0.9, 30, 0.9, 1.3)


def state_of(ids: np.ndarray, seeds: np.ndarray) -> choosing.DecodeState:
    """A batch about to choose its sixth token, on the mesh in force; ids 0 in [B, T] are padding
    in front of each row.
    """
    rows = len(ids)
    places = [moves.place(x.astype(np.int32), "BT") for x in (ids, ids > 0)]
    return choosing.DecodeState(
        frequencies=None,  # type: ignore[arg-type]
        token=moves.place(np.zeros(rows, np.int32), "B"),
        seen=choosing.mark(choosing.unseen(rows, V), places[0], segments=places[1]),
        recent=moves.place(np.full((rows, 1), -1, np.int32), "BT"),
        done=moves.place(np.zeros(rows, bool), "B"),
        fault=moves.place(np.zeros(rows, np.int32), "B"),
        seeds=moves.place(seeds, "B"),
        step=jnp.int32(5),
    )


def chosen(
    logits: np.ndarray, ids: np.ndarray, seeds: np.ndarray, sampler: Any
) -> choosing.DecodeState:
    rules = choosing.make_rules(ALLOWED, [], pad=0)
    state = state_of(ids, seeds)
    choose = jax.jit(choosing.choose, compiler_options=QUICK)
    return choose(moves.place(logits, "BV"), state, rules=rules, sampler=sampler)


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ({}, 6),
        ({"tp": 8}, 3),  # rows that do not divide over the devices
        ({"data": 2, "tp": 4}, 8),
        ({"data": 2, "fsdp": 2, "tp": 2}, 12),
    ],
    ids=str,
)
def test_draws_on_a_mesh_are_those_of_one_device(sizes: dict[str, int], batch: int) -> None:
    rng = np.random.default_rng(batch)
    logits = 3 * rng.standard_normal((batch, V)).astype(np.float32)
    ids = rng.integers(1, V, (batch, 16)) * (np.arange(16) >= rng.integers(0, 9, (batch, 1)))
    seeds = rng.integers(0, 2**32, batch, np.uint32)
    seen = (ids[:, :, None] == np.arange(1, V)).any(1)
    seen = np.pad(seen, ((0, 0), (1, 0)))  # 0 is padding, and is not counted as seen
    whole = jax.jit(
        lambda sampler, logits, seen, seeds, step: sampler(logits, seen, seeds=seeds, step=step)
    )
    expected = whole(DRAW, np.where(ALLOWED, logits, -np.inf), seen, seeds, 5)
    with on_mesh(**sizes):
        state = chosen(logits, ids, seeds, DRAW)
        np.testing.assert_array_equal(moves.fetch(state.token), expected)
        assert not moves.fetch(state.fault).any()
        # What is seen from now on; rows that fill up a shard lie behind its own.
        shards = np.prod([sizes.get(axis, 1) for axis in sharding.BATCH])
        kept = moves.fetch(state.seen).reshape(shards, -1, V)[:, : batch // shards]
        seen[np.arange(batch), expected] = True
        np.testing.assert_array_equal(kept.reshape(batch, V), seen)
        held = {x.data.shape for x in state.seen.addressable_shards}
        assert held == {(-(-batch // jax.sharding.get_mesh().size), V)}, "each its share"


def test_a_decode_step_gathers_no_logits() -> None:
    """They change hands once, columns for rows; what is gathered is smaller than a row of each."""
    config = tiny_config(num_layers=1, vocab_size=4096)
    batch, mesh = 8, meshes.make({"data": 2, "tp": 4})
    setting = programs.Setting(config, batch=batch, length=256, attention="xla")
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: programs.decode_state(setting, jnp.float32))
        decoder, (rules, state, cache) = (
            sharding.on_devices(mesh, x) for x in (abstract(config, jnp.float32), shapes)
        )
        leaves, tree = jax.tree.flatten(decoder)
        given = {"cache": cache, "sampler": DRAW, "rules": rules, "limit": np.int32(8)}
        step = decode.run_stride.lower(leaves, state, **given, tree=tree, attend=attention.xla)
        sent = list(collectives.each(step.compile(compiler_options=QUICK), mesh))
    exchanged = [x for x in sent if x.kind == "all-to-all"]
    assert [(x.axes, x.bytes) for x in exchanged] == [(("tp",), batch // 2 * 4096 // 4 * 4)]
    assert max(x.bytes // x.count for x in sent if x.kind != "all-to-all") < 4096


# The host


def streamed(model: qwen_jax.LanguageModel, **settings: Any) -> list[list[list[int]]]:
    parts = model.stream(PROMPTS, **{"max_new_tokens": 12, "at_once": 3, **settings})
    return [part.tolist() for part in parts]


PROMPTS = np.random.default_rng(4).integers(0, 320, (2, 9))


class Recorded:
    """What is on its way to the host; says when it is waited for."""

    def __init__(self, x: jax.Array, events: list[str]) -> None:
        self.x, self.events = x, events

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.events.append("fetch")
        return np.asarray(self.x)


def test_a_stride_is_under_way_before_the_one_before_is_fetched(
    model: qwen_jax.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends are as asked: nothing more is started once all rows are known to have ended."""
    plain = streamed(model)
    stop = plain[2][0][0]  # in the second stride
    assert stop not in [i for part in plain[:2] for row in part for i in row]
    stopped = streamed(model, stop=[stop, plain[2][1][0]])
    events: list[str] = []
    run, begin = decode.run_stride, moves.begin_fetch

    def recorded(*arguments: Any, **named: Any) -> Any:
        events.append("start")
        return run(*arguments, **named)

    monkeypatch.setattr(decode, "run_stride", recorded)
    monkeypatch.setattr(moves, "begin_fetch", lambda x: Recorded(begin(x), events))
    assert streamed(model) == plain
    lengths = [len(part[0]) for part in plain]
    assert lengths == [1, 3, 3, 3, 2]
    one = ["start", "fetch"]
    assert events == ["fetch", "start", *one, *one, *one, "fetch"]
    events.clear()
    assert streamed(model, stop=[stop, plain[2][1][0]]) == stopped
    assert [len(part[0]) for part in stopped] == [1, 3, 1]
    assert events == ["fetch", "start", *one, *one], "one stride for nothing"
    events.clear()
    assert len(streamed(model, max_new_tokens=1)) == 1 and events == ["fetch"]


def test_a_stride_takes_no_module_apart(
    model: qwen_jax.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host that costs more than all else of a stride, the more the deeper the model is."""
    given: list[Any] = []
    run = decode.run_stride
    monkeypatch.setattr(
        decode,
        "run_stride",
        lambda *each, **named: given.append((each, named)) or run(*each, **named),
    )
    streamed(model)
    parts = [jax.tree.leaves(each, is_leaf=lambda x: isinstance(x, nnx.Module)) for each in given]
    assert len(parts) == 4 and not any(isinstance(x, nnx.Module) for each in parts for x in each)


def test_nothing_is_compiled_after_the_first_stride(model: qwen_jax.LanguageModel) -> None:
    """Nor by a second call of the same lengths, whatever its sampler, seeds and prompts."""
    parts = model.stream(PROMPTS, max_new_tokens=9, at_once=2, sampler=Nucleus())
    next(parts), next(parts)
    with compilations.counted() as programs:
        assert sum(part.shape[1] for part in parts) == 6
        other = {"sampler": Nucleus(0.5, 7, 0.8, 1.2), "seed": [3, 4]}
        assert len(list(model.stream(PROMPTS[::-1], max_new_tokens=9, at_once=2, **other))) == 5
    assert programs == []


def broken(model: qwen_jax.LanguageModel, leaf: str, row: int, value: float) -> Any:
    """The model with a row of a weight spoiled."""

    def spoiled(name: str, x: Any) -> jax.Array:
        return x[...].at[row].set(value) if name == leaf else x[...]

    with meshes.entered(model.mesh):
        decoder = replace_leaves(model.decoder, spoiled)
    return dataclasses.replace(model, decoder=decoder)


def test_a_row_without_a_token_to_choose_ends_with_an_error(model: qwen_jax.LanguageModel) -> None:
    """After the tokens before, and not before its time: the other row does not suffer from it."""
    free = model.generate(PROMPTS, max_new_tokens=12)
    new = next(i for i in range(5, 12) if free[1, i] not in {*PROMPTS.flat, *free[0], *free[1, :i]})
    sick = broken(model, "embedding", int(free[1, new]), np.nan)
    parts = sick.stream(PROMPTS, max_new_tokens=12, at_once=4)
    made = []
    with pytest.raises(ValueError, match=rf"^row 1, new token {new + 2}: .* NaN or infinite") as e:
        made.extend(parts)
    assert "\n" not in str(e.value)
    np.testing.assert_array_equal(np.concatenate(made, axis=1), free[:, : new + 1])
    # Alone, and where the row has ended before, there is no fault.
    np.testing.assert_array_equal(sick.generate(PROMPTS[:1], max_new_tokens=12), free[:1])
    ended = sick.generate(PROMPTS, max_new_tokens=12, stop=[int(free[1, new])])
    np.testing.assert_array_equal(ended[0], free[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_make_no_first_token(model, value: float) -> None:
    with pytest.raises(ValueError, match=r"^row 0, new token 1: a logit is NaN or infinite"):
        next(broken(model, "head", 3, value).stream(PROMPTS))
