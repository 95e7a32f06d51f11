"""Plans of a serving engine, with a stand-in for the compiler, which needs seconds a program."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from jax.sharding import Mesh

from qwen_jax import PRESETS, meshes
from tests.support.tiny import tiny_config
from train import plan
from train.planning import (
    engine_programs,
    glossary,
    serving,
    serving_planner,
    serving_report,
    topology,
)
from train.planning.compilation import Memory, Program
from train.planning.engine_programs import Serving
from train.planning.flops import Work, nbytes
from train.planning.serving import Plan
from train.planning.topology import Link

CONFIG = tiny_config(num_layers=6)
TINY = Serving(config=CONFIG, max_length=64, attention="xla", rows=4, page=16, chunk=32)
SEVEN = Serving(config=PRESETS["qwen-7b"], max_length=8192, attention="pallas_tpu")
SIZES = meshes.parse("data=2,tp=2")
WHERE = topology.parse("v5e:2x2")
PAGES = 9
EXTRA = {"_decode": 3_000_000, "run_group": 5_000_000}  # temporaries


def stand_in(trace: Callable[[], Any], mesh: Mesh, *, held: dict[str, int], layers: int) -> Program:
    """What a compiler says that pads nothing, and whose programs take what `EXTRA` says."""
    traced = trace()
    given = [x for x, info in zip(traced.jaxpr.in_avals, traced.args_info[0], strict=True)
             if info.donated]  # fmt: skip
    name = traced.fun_name
    parts = {
        **held,
        "padding": 0,
        "temporaries": EXTRA.get(name, 1000),
        "outputs": nbytes(traced.jaxpr.out_avals) - nbytes(given),
        "program": 10,
    }
    return Program(Memory(parts), Work(0, {}, 0), collectives=[], seconds=1.0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planned() -> Plan:
    """The plan of a tiny engine of 9 pages on `SIZES`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "mesh", lambda _, sizes: meshes.make(sizes))
        patch.setattr(engine_programs, "compile_program", stand_in)
        return serving.plan(TINY, WHERE, sizes=SIZES, room=10**9)


@pytest.fixture
def uncompiled(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan is `planned`, but for what it was asked for."""

    def made(asked: Serving, where: Any, sizes: Any, room: int) -> Plan:
        shape = asked.shape(sizes, room=room)
        engine = dataclasses.replace(planned.engine, shape=shape)
        cache = planned.parts["cache"] // PAGES * shape.pages
        parts = {**planned.parts, "cache": cache}
        return dataclasses.replace(
            planned, serving=asked, topology=where, mesh=sizes, engine=engine, parts=parts
        )

    monkeypatch.setattr(serving, "plan", made)
    monkeypatch.setattr(topology, "mesh", lambda _, sizes: meshes.make(sizes))
    monkeypatch.setattr(topology, "links", lambda *_, **__: [Link("ICI", 1e9, 1e9, 2, 2)])
    monkeypatch.setattr(topology, "prepare", lambda _: None)
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)


def test_every_program_of_an_engine_is_planned_once(planned: Plan) -> None:
    found = [(x.call, x.name, x.times) for x in planned.engine.runs]
    assert found == [
        ("state", "_zeros", 6),
        ("state", "make", 1),
        ("admit", "admit", 1),
        ("masks", "set_masks", 1),
        ("prefill", "begin", 1),
        ("prefill", "look_up", 1),
        ("prefill", "_rotary_and_mask", 1),
        ("prefill", "run_group", 1),  # of four layers
        ("prefill", "run_group", 1),  # of two
        ("prefill", "final_norm", 1),
        ("prefill", "end", 1),
        ("prefill, first token", "end", 1),
        ("prefill, scored", "score", 1),
        ("decode", "_decode", 1),
    ]


def test_memory_of_an_engine_by_hand(planned: Plan) -> None:
    runs = {(x.call, x.name): x.program.memory.parts for x in planned.engine.runs}
    decode = runs["decode", "_decode"]
    # A page: keys and values of 2 layers' 16 tokens; half of the 4 heads of 16, in float32 on CPUs.
    pool = PAGES * CONFIG.kv_bytes_per_token("float32") * 16 // 2
    assert decode["cache"] == planned.parts["cache"] == pool
    assert decode["weights"] == planned.parts["weights"] >= CONFIG.num_params()  # half, two bytes
    # Rows are given up and come back: nothing of them is an output.
    told = 4 * (3 + 2 * 20) * 4
    assert decode["outputs"] == told and runs["admit", "admit"]["outputs"] == 0
    assert planned.largest.name == "run_group" and planned.parts["temporaries"] == 5_000_000
    x = 32 * 32 * 2  # a chunk's residual stream, which a group takes and returns
    assert planned.parts["outputs"] == x
    assert planned.parts["program"] == 10 * len(planned.engine.runs)
    assert planned.needed == sum(planned.parts.values()) and planned.fits
    left = planned.available - planned.needed
    assert planned.most == PAGES + left // (pool / PAGES)
    assert planned.tokens(PAGES) == 2 * 8 * 16  # each half of the batch has a page of nobody's


def test_what_fits_and_the_times_by_hand(planned: Plan, uncompiled: None) -> None:
    long = dataclasses.replace(TINY, max_length=16_384)
    some = dataclasses.replace(planned, serving=long, available=planned.needed + 3_000_000)
    pages = some.most - 1
    assert [(x.length, x.fitting, x.rows) for x in some.loads()] == [
        (2048, pages // 128 * 2, min(4, pages // 128 * 2)),
    ]
    one = some.loads()[0]
    weights = CONFIG.num_multiplied()
    read = some.parts["weights"] * weights / CONFIG.num_params()
    read += one.rows / 2 * 2048 * CONFIG.kv_bytes_per_token("float32") / 2
    flops = 2 * weights * 4 + one.rows * 6 * 4 * 4 * 16 * 2048  # of 4 rows, whoever is on
    terms = {x.name: x.seconds for x in one.decoding.terms}
    chip = WHERE.chip
    assert terms["HBM"] == pytest.approx(read / chip.bandwidth)
    assert terms["compute"] == pytest.approx(flops / 4 / chip.flops)
    assert one.tokens_per_second == one.rows / max(terms.values())
    # A prompt: 64 chunks, each reading the weights of the layers; the head is for one token.
    layers = weights - CONFIG.vocab_size * CONFIG.hidden_size
    terms = {x.name: x.seconds for x in one.prefill.terms}
    assert terms["HBM"] > 64 * 2 * layers / 2 / chip.bandwidth
    assert terms["compute"] > 2048 * 2 * layers / 2 / chip.flops


@pytest.mark.parametrize(
    ("model", "where", "cache", "first", "count"),
    [
        ("qwen-7b", "v5e:2x4", None, "tp=8", 3),  # a device holds a half of the weights at most
        ("qwen-7b", "h100:8", None, "tp=8", 4),
        ("qwen-72b", "h100:8", None, "tp=8", 2),
        ("qwen-72b", "v5p:2x2x4", None, "tp=16", 4),
        ("qwen-72b", "v5e:2x4", "int8", None, 0),
    ],
)
def test_meshes_that_may_hold_an_engine(
    model: str, where: str, cache: str | None, first: str | None, count: int
) -> None:
    asked = dataclasses.replace(SEVEN, config=PRESETS[model], cache_dtype=cache)
    found = [meshes.describe(x) for x in serving_planner.likely(asked, topology.parse(where))]
    assert len(found) == count and found[:1] == ([first] if first else [])


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = plan.main(["--serve", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


TINY_OPTIONS = ["--model", "tiny", "--topology", "v5e:2x2", "--max-length", "64", "--page", "16"]
TINY_OPTIONS += ["--chunk", "32", "--rows", "4", "--attention", "xla"]


def test_the_command(uncompiled: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, *TINY_OPTIONS, "--mesh", "data=2,tp=2")
    assert code == 0 and "compiling for v5e:2x2: serving, mesh data=2,tp=2" in error
    assert "mesh data=2,tp=2\n4 rows, requests of 64 tokens at most, pages of 16" in out
    assert "of the program that needs the most: prefill (run_group)" in out
    assert "cache: 256 tokens over all devices by default; at most" in out
    assert "_decode" in out and "mesh " not in out.split("\n", 1)[1]
    words = " ".join(glossary.WORDS)
    for word in ("serving", "weights", "cache", "rows", "padding", "batch", "program", "requests",
                 "prompt"):  # fmt: skip
        assert word in words
    code, out, _ = run(capsys, *TINY_OPTIONS, "--json", "--cache-dtype", "int8")
    found = json.loads(out)["plans"]
    assert [x["mesh"] for x in found] != [] and {x["cache_dtype"] for x in found} == {"int8"}
    assert {"tp=4", "data=2,tp=2", "data=4"} == {x["mesh"] for x in found}
    assert found[0]["requests"][0]["length"] == 64 and found[0]["fits"]
    code, out, error = run(capsys, *TINY_OPTIONS, "--tries", "2")
    assert "2 of 2: compiling" in error
    assert out.count("\nserving: tiny on v5e:2x2 (4 devices), mesh ") == 1  # of the best
    assert "64: requests, tokens/s" in out.splitlines()[0] and out.splitlines()[3] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["qwen-14b", "--topology", "v5e:2x2", "--mesh", "data=4"],
            "weights take 28.33 of 16.91 GB on a device of v5e:2x2, with no room for 2 pages of "
            "128 tokens; the nearest mesh that does is tp=4",
        ),
        (
            ["qwen-72b", "--topology", "v5e:2x4", "--mesh", "tp=8"],
            "weights take 18.07 of 16.91 GB on a device of v5e:2x4, with no room for 2 pages of "
            "128 tokens; no mesh of tp and data over 8 devices of 16.9 GB holds 144.6 GB of weig",
        ),
        (["qwen-72b", "--topology", "v5e:2x4"], "no mesh of tp and data over 8 devices"),
    ],
)
def test_a_mesh_that_does_not_hold_a_model_is_refused(
    uncompiled: None, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, out, error = run(capsys, "--model", *options)
    print(error)
    assert code == 1 and out == "" and message in error and len(error.splitlines()) == 1


def test_what_does_not_fit_after_all_is_said(
    planned: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(planned, available=planned.needed - 10**7, serving=SEVEN)
    serving_planner._warn(small)
    said = capsys.readouterr().err
    assert "mesh data=2,tp=2 does not fit: prefill (run_group) needs 0.01 GB more" in said
    assert "the nearest mesh that does is" in said and len(said.splitlines()) == 1
    assert not small.fits and small.most == 0 and small.to_json()["requests"] == []
    assert "does not fit, 0.010 GB over" in serving_report.text(small, "tiny", by_auto=True)
    # And a request that is longer than the pages of its part of the batch.
    shape = planned.engine.shape._replace(width=100)
    engine = dataclasses.replace(planned.engine, shape=shape)
    long = dataclasses.replace(planned, engine=engine, available=planned.needed, serving=SEVEN)
    serving_planner._warn(long)
    said = capsys.readouterr().err
    assert "a request of --max-length 8192 tokens does not fit" in said
    assert "holds 128 tokens" in said
    assert long.loads() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "context=2,tp=2"], "with --serve use tp, data and fsdp"),
        (["--mesh", "data=2,tp=2", "--rows", "3"], "--rows 3: must be a multiple of the mesh's 2"),
        (["--mesh", "tp=4", "--chunk", "40"], "--chunk 40: must be a multiple of the page, 16"),
        (
            ["--cache-dtype", "int8_asymmetric"],
            "--cache-dtype int8_asymmetric: must be one of int8",
        ),
        (["--dtype", "int4"], "--dtype int4: must be one of float32, bfloat16, float16"),
        (
            ["--batch", "64"],
            "--batch does not apply to serving: leave it out, or leave out --serve",
        ),
        (["--decode"], "--decode does not apply to serving"),
        (["--mesh", "tp=4", "--tries", "2"], "--tries applies only without --mesh"),
    ],
)
def test_usage_errors(
    uncompiled: None, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [*TINY_OPTIONS[:6], "--page", "16", *options]
    code, _, error = run(capsys, *given)
    assert code == 2 and message in error and len(error.splitlines()) == 1
    assert plan.main(["--model", "tiny", "--topology", "v5e:2x2", "--page", "16"]) == 2
    assert "--page applies only to serving" in capsys.readouterr().err
