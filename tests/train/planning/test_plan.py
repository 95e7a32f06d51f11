"""Plans on eight virtual CPU devices: programs are read as those of absent accelerators are."""

import dataclasses
import json
import math
import os
import pathlib
import re
import threading
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from qwen_jax import PRESETS, attention, meshes
from qwen_jax.attention import cache, prove
from qwen_jax.kernels import choice
from qwen_jax.meshes import hardware
from qwen_jax.runtime import progress
from tests.support.tiny import tiny_config
from train import plan, step
from train.planning import (
    attempts,
    compilation,
    estimate,
    flops,
    glossary,
    planner,
    programs,
    report,
    search,
    topology,
)
from train.planning.bounds import Bound, Term
from train.planning.compilation import Memory, Program, compile_program
from train.planning.programs import Setting
from train.planning.topology import Link
from train.run import recipes

SIZES = meshes.parse("fsdp=2,tp=2")
CONFIG = tiny_config()
SETTING = Setting(CONFIG, batch=4, length=16, attention="xla")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `v5e:2x2` whose four devices are CPUs, on links of 1 GB/s."""
    monkeypatch.setattr(topology, "mesh", lambda _, sizes: meshes.make(sizes))
    monkeypatch.setattr(topology, "links", lambda *_, **__: [Link("ICI", 1e9, 1e9, 2, 2)])
    monkeypatch.setattr(topology, "prepare", lambda _: None)


@pytest.fixture(scope="module")
def trained() -> estimate.Estimate:
    """The plan of a step, compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "mesh", lambda _, sizes: meshes.make(sizes))
        patch.setattr(topology, "links", lambda *_, **__: [Link("ICI", 1e9, 1e9, 2, 2)])
        return estimate.training(SETTING, topology.parse("v5e:2x2"), sizes=SIZES)


@pytest.fixture
def uncompiled(on_cpu: None, trained: estimate.Estimate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan of a step is that of `trained`, but for what it was asked for."""

    def training(setting: Setting, where: Any, sizes: Any) -> estimate.Estimate:
        return dataclasses.replace(trained, setting=setting, topology=where, mesh=sizes)

    monkeypatch.setattr(estimate, "training", training)


def total(program: Program, compiled: Any) -> None:
    """The parts are what the compiler says, within 1 %."""
    said = compiled.memory_analysis()
    expected = said.argument_size_in_bytes + said.temp_size_in_bytes
    expected += said.output_size_in_bytes - said.alias_size_in_bytes
    expected += said.generated_code_size_in_bytes
    assert program.memory.needed == pytest.approx(expected, rel=0.01)


def test_memory_of_training_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = meshes.make(SIZES)
    seen = []
    compile_it = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda x, **_: seen.append(compile_it(x)) or seen[-1]
    )
    program = programs.training(SETTING, mesh)
    total(program, seen[-1])
    parts = program.memory.parts
    # All weights divide over the four devices but norms and biases, which are split over one axis.
    least = 4 * CONFIG.num_params() // 4
    assert least <= parts["weights"] < 1.1 * least
    assert parts["optimiser"] == 2 * parts["weights"] + 2 * 4  # and two counts of steps
    assert parts["batch"] == 5 * (4 // 2) * 16 * 4
    # Of each of 2 layers, the residual [2, 16, 32] in bfloat16, its tokens split over tp.
    assert parts["residuals"] == 2 * 2 * (16 // 2) * 32 * 2
    assert abs(parts["padding"]) < 0.01 * program.memory.needed


def test_flops_of_training_by_hand(on_cpu: None, trained: estimate.Estimate) -> None:
    setting = Setting(CONFIG, batch=4, length=16, attention="xla", remat="none")
    x = estimate.training(setting, topology.parse("v5e:2x2"), sizes=SIZES)
    # Weights without norms and biases; the reference attends to all 16 keys where the model needs
    # half; logits are made twice.
    tokens = 4 * 16
    blocks = 2 * (4 * 32 * 64 + 3 * 32 * 44)
    attention = 2 * 12 * 4 * 16 * 16
    assert x.hardware_flops == tokens * (6 * blocks + 8 * 68 * 32 + attention)
    assert x.model_flops == tokens * CONFIG.flops_per_token(16)
    # Recomputing everything: each block's products once more, but the last, whose result it has.
    again = 2 * blocks + attention / 3 - 2 * 2 * 32 * 44
    assert trained.hardware_flops == x.hardware_flops + tokens * again
    assert trained.program.work.kept < x.program.work.kept


@pytest.mark.slow
@pytest.mark.parametrize(("base", "size"), [("same", 2), ("int8", 1)])
def test_training_of_adapters_by_hand(on_cpu: None, base: str, size: int) -> None:
    """Nothing is kept or computed for weights that are not trained but their products."""
    recipe = dataclasses.replace(recipes.sft_lora(), lora_rank=4, base_dtype=base)
    setting = Setting(
        CONFIG, batch=4, length=16, attention="xla", remat="none", accumulate=2, adapters=recipe
    )
    x = estimate.training(setting, topology.parse("v5e:1x1"), sizes=meshes.parse(None))
    parts = x.program.memory.parts
    matrices = 2 * (4 * 32 * 64 + 3 * 32 * 44)
    rows = 2 * (3 * 64 + 32 + 2 * 44 + 32)  # of matrices; each has a scale of two bytes
    others = 2 * (CONFIG.num_params() - matrices) + (2 * rows if base == "int8" else 0)
    assert parts["weights"] == size * matrices + others
    shared = 2 * (3 * 32 + 64 + 44)  # a: one for queries, keys and values
    trained = 4 * (shared + rows)
    assert parts["adapters"] == 4 * trained and parts["optimiser"] == 8 * trained + 2 * 4
    # Of a matrix, 4 FLOPs for each weight and token, and not the first one's for its input, which
    # is nobody's; of an adapter 6. `a` of queries, keys and values is multiplied with thrice.
    tokens, attention = 4 * 16, 2 * 12 * 4 * 16 * 16
    products = 6 * 4 * (shared + 2 * 2 * 32 + rows)
    done = tokens * (4 * matrices + products + 6 * 68 * 32 + attention)
    assert x.hardware_flops == pytest.approx(done, rel=0.01)
    assert x.model_flops == tokens * (CONFIG.flops_per_token(16) - 2 * CONFIG.num_multiplied())


def test_a_step_of_the_whole_vocabulary_never_holds_the_logits() -> None:
    """One row of 2048 tokens: 1.24 GB in float32, of which a fifth is there at a time."""
    optimizer, mesh = step.Optimizer(), meshes.make(meshes.parse(None))
    state = step.abstract_state(tiny_config(vocab_size=151_936), optimizer, mesh=mesh)
    run = step.make_step(optimizer, attention.get("xla"))
    with jax.set_mesh(mesh):
        compiled = run.lower(state, step.abstract_batch(1, 2048, mesh=mesh)).compile()
    logits = 2048 * 151_936
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest <= logits / 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * logits / 2


def test_products_count_by_device_and_by_loop() -> None:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), (AxisType.Explicit,) * 2)

    def run(x: jax.Array, w: jax.Array) -> Any:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.einsum("bd,df->bf", x, w)  # [4, 8] x [8, 4] on each device

            @jax.shard_map(out_specs=P("fsdp", "tp"))
            def local(y: jax.Array) -> jax.Array:
                return y @ jnp.ones((4, 4))

            y = local(y)
            return jnp.einsum("bf,df->bd", y, w, out_sharding=P("fsdp", None)), y

        jnp.einsum("bd,ldf->lbf", x, w)  # of which nothing comes
        return jax.lax.scan(layer, x, w)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    w = jax.ShapeDtypeStruct(
        (3, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "tp"))
    )
    with jax.set_mesh(mesh):
        found = flops.work(jax.jit(run).trace(x, w), layers=3)
    assert found.dots == 3 * 2 * (4 * 8 * 4 + 4 * 4 * 4 + 4 * 4 * 8)
    assert found.kept == 3 * 4 * 4 * 4
    assert flops.nbytes((x, w)) == 4 * 8 * 4 + 3 * 8 * 4 * 4


@pytest.mark.parametrize("kind", [None, "int8"])
def test_decoding(on_cpu: None, kind: str | None) -> None:
    setting = Setting(CONFIG, batch=4, length=8192, attention="xla", cache_dtype=kind)
    x = estimate.decoding(setting, topology.parse("v5e:2x2"), sizes=SIZES)
    parts = x.program.memory.parts
    if kind is None:  # it is not there in another dtype too
        assert parts["temporaries"] < parts["cache"] / 8
    each = CONFIG.kv_bytes_per_token(kind or "float32")  # as a CPU holds it
    assert parts["cache"] == 4 * 8192 * each // 4  # rows over fsdp, heads over tp
    least = 2 * CONFIG.num_params() // 4
    assert least <= parts["weights"] < 1.1 * least
    assert x.tokens == 4
    assert x.bound is not None and {"compute", "HBM"} <= {term.name for term in x.bound.terms}
    # A token: every weight but the table twice, and two products with 8192 keys.
    attention = 2 * 2 * 2 * 8192 * 4 * 16
    assert x.model_flops == 4 * (2 * CONFIG.num_multiplied() + attention)


def test_prefill_holds_all_layers(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "CHUNK", 32)
    x = estimate.prefill(
        Setting(CONFIG, batch=4, length=256, attention="xla"),
        topology.parse("v5e:2x2"),
        sizes=SIZES,
    )
    parts = x.program.memory.parts
    assert parts["cache"] == 4 * 256 * CONFIG.kv_bytes_per_token("float32") // 4
    assert parts["weights"] >= 2 * CONFIG.num_params() // 4
    assert x.tokens == 4 * 256
    assert x.bound is not None
    (reduced,) = (c for c in x.program.collectives or [] if c.kind == "all-reduce")
    # For each of 8 chunks, two all-reduces of [2, 32, 32] over tp in each of 2 layers, at 1 GB/s; a
    # CPU sums bfloat16 in float32.
    term = next(term for term in x.bound.terms if term.name == "ICI tp")
    assert reduced.bytes == 2 * 2 * 2 * 32 * 32 * 4
    assert term.seconds == pytest.approx(8 * reduced.bytes / 1e9)


def test_prefill_needs_the_padding_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def compiled(trace: Any, mesh: Any, *, held: Any, layers: int) -> Program:
        given.update(held)
        parts = {**held, "padding": 1000, "temporaries": 10}
        return Program(Memory(parts), flops.Work(0, Counter(), 0), collectives=None, seconds=1)

    monkeypatch.setattr(programs, "compile_program", compiled)
    setting = Setting(
        tiny_config(num_layers=6), batch=4, length=256, attention="xla"
    )  # a group of four, and half of one
    memory = programs.prefill(setting, meshes.make(SIZES), chunk=32).memory
    assert memory.parts["padding"] == 1.5 * 1000
    expected = memory.parts["weights"] + 1.5 * (given["cache"] + 1000) + given["batch"] + 10
    assert memory.needed == expected


def test_what_does_not_divide_is_refused() -> None:
    mesh = meshes.make({"fsdp": 8})
    with pytest.raises(ValueError, match="batch B = 4"):
        programs.training(SETTING, mesh)


HELD = {"weights": 2 * 2**30, "batch": 2**20}


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (448.00G) exceeds available HBM (15.25G). HLO",
            448,
            15.25,
        ),
    ],
)
def test_what_a_compiler_refuses_is_read(message: str, needed: float, available: float) -> None:
    memory = compilation._refused(message, HELD)
    assert memory is not None
    assert memory.needed == pytest.approx(needed * 2**30)
    assert memory.available == available * 2**30
    assert memory.parts["weights"] == 2 * 2**30


def test_other_errors_stay_errors() -> None:
    assert compilation._refused("INTERNAL: Mosaic failed to compile", HELD) is None


def test_a_program_that_is_refused_is_reported(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    x = estimate.training(SETTING, topology.parse("v5e:2x2"), sizes=SIZES)
    assert not x.fits
    assert x.over == pytest.approx(4.75 * 2**30)
    assert "does not fit, 5.100 GB over (the compiler refused it)" in report.text(x, "tiny")
    assert "does not fit: 5.10 GB over" in report.ranking([x])
    assert x.to_json()["seconds"] is None


def test_a_program_that_jaxlib_cannot_print_is_read_from_the_compiler(
    trained: estimate.Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = meshes.make(SIZES)
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tp")))

    def compiled() -> Program:
        with jax.set_mesh(mesh):
            summed = jax.jit(lambda x: jnp.sum(x, 0))  # over fsdp
        return compile_program(lambda: summed.trace(x), mesh, held={}, layers=0)

    def fail(_: Any) -> str:
        raise jax.errors.JaxRuntimeError(
            "INTERNAL: RET_CHECK failure (hlo.cc:390) async\n*** trace"
        )

    expected = compiled()
    assert expected.collectives and expected.collectives[0].axes == ("fsdp",)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    unread = compiled()
    reason = "cannot be read (INTERNAL: RET_CHECK failure (hlo.cc:390) async)"
    assert unread.collectives is None and unread.unread.endswith(reason)
    monkeypatch.setattr(compilation, "_PRINTED_BY_COMPILER", ("cpu",))
    assert compiled().collectives == expected.collectives
    # jaxlib, which would write a trace, is not asked either where the compiler writes nothing.
    monkeypatch.setattr(compilation, "_PRINTED", "no such file")
    unread = compiled()
    assert unread.collectives is None and "the compiler wrote 0 files" in unread.unread
    told = report.text(dataclasses.replace(trained, program=unread), "tiny")
    assert "collectives: not known: the text of the compiled program cannot be read (the" in told


def test_collectives_that_are_not_known_are_said(trained: estimate.Estimate) -> None:
    program = dataclasses.replace(trained.program, collectives=None, unread="for a reason")
    x = dataclasses.replace(trained, program=program)
    assert x.fits
    text = report.text(x, "tiny")
    assert "collectives: not known: for a reason\n  so the times below lack" in text
    assert text.count("; links not known") == 2
    assert report.ranking([x, trained]).count("(links not known)") == 1
    assert "links not known" not in report.text(trained, "tiny")
    found = x.to_json()
    assert found["collectives"] is None and not found["links_known"]
    assert found["collectives_unread"] == "for a reason"
    assert trained.to_json()["links_known"]


def test_time_between_hosts_or_slices_is_said(trained: estimate.Estimate) -> None:
    terms = (
        Term("compute", 0.5),
        Term("NVLink fsdp", 0.02),
        Term("InfiniBand fsdp", 0.01, 0.01),
        Term("InfiniBand data", 0.004, 0.001),
        Term("DCN", 0.0),
    )
    x = dataclasses.replace(trained, bound=Bound(terms), topology=topology.parse("h100:2x2"))
    lines = [" ".join(line.split()) for line in report.text(x, "tiny").splitlines()]
    assert "NVLink fsdp 20.000" in lines
    assert "InfiniBand fsdp 10.000 in step with a slower link, not in serial" in lines
    assert "InfiniBand data 4.000 1.000 of it in step with a slower link" in lines
    assert "DCN 0.000 nothing goes over it" in lines
    assert x.to_json()["terms_in_step"] == {"InfiniBand fsdp": 0.01, "InfiniBand data": 0.001}
    program = dataclasses.replace(trained.program, collectives=None, unread="for a reason")
    unread = dataclasses.replace(x, program=program, bound=Bound(terms[:1]))
    assert re.search(r"\n  InfiniBand +not known\n", report.text(unread, "tiny"))


def test_a_plan_has_the_link_between_slices(on_cpu: None) -> None:
    """Also where no collective goes over it, and not where they are unknown."""
    hosts, mesh = topology.parse("v5e:2x1*2"), meshes.make(SIZES)
    program = Program(Memory({}), flops.Work(0, Counter(), 0), collectives=[], seconds=1)
    names = []
    for found in ([], None):
        one = dataclasses.replace(program, collectives=found)
        bound = estimate._bound(one, hosts, mesh=mesh, flops=1.0, moved=1.0, found=found)
        names.append([term.name for term in bound.terms] if bound else [])
    assert names == [["compute", "HBM", "DCN"], ["compute", "HBM"]]


def test_what_is_too_large_for_the_chip_does_not_fit(trained: estimate.Estimate) -> None:
    assert trained.fits and "fits" in report.text(trained, "tiny")
    chip = dataclasses.replace(trained.topology.chip, usable=1000)
    x = dataclasses.replace(trained, topology=dataclasses.replace(trained.topology, chip=chip))
    assert not x.fits and x.over == x.program.memory.needed - 1000
    assert "GB over" in report.text(x, "tiny")
    assert "(the compiler refused it)" not in report.text(x, "tiny")


def test_a_search_tries_what_may_fit() -> None:
    # 72B in float32 with two moments and a gradient is 1.2 TB: 16 chips of a v5p have 1.6.
    setting = Setting(PRESETS["qwen-72b"], batch=16, length=2048, attention="pallas_tpu")
    found = search.candidates(setting, topology.parse("v5p:2x2x4"))
    assert found and all(x.mesh["fsdp"] * x.mesh["context"] * x.mesh["tp"] == 16 for x in found)
    assert found == sorted(found, key=lambda x: x.seconds)
    slices = search.candidates(setting, topology.parse("v5p:4x4x4*2"))
    assert slices and all(x.mesh["data"] == 2 for x in slices)
    hosts = search.candidates(setting, topology.parse("h200:8x8"))
    assert hosts and all(x.mesh["tp"] <= 8 for x in hosts)


def test_a_search_tries_copies_over_hosts() -> None:
    # 7B: 140 GB of state are too much for a GPU, and not for the eight of a host.
    hosts = topology.parse("h100:8x8*2")
    found = search.candidates(
        Setting(PRESETS["qwen-7b"], batch=512, length=2048, attention="xla"), hosts
    )
    assert {x.mesh["data"] for x in found} == {2, 16}
    # Decoding: no host waits for weights of another.
    setting = Setting(PRESETS["qwen-72b"], batch=64, length=2048, attention="xla")
    fastest = search.candidates(setting, hosts, decode=True)[0]
    assert (fastest.mesh["data"], fastest.mesh["tp"]) == (16, 8)
    # Nor does a chip, of one slice: copies of all weights where they fit.
    for where, tp in (("v6e:8x8", 16), ("v5p:4x4x8*2", 16)):
        chips = topology.parse(where)
        fastest = search.candidates(setting, chips, decode=True)[0]
        assert (fastest.mesh["data"], fastest.mesh["tp"]) == (chips.devices // tp, tp)


def test_copies_are_slower_by_their_sums() -> None:
    setting = Setting(PRESETS["qwen-1.8b"], batch=16, length=512, attention="xla")
    hosts = topology.parse("h100:2x8")
    chip = dataclasses.replace(hosts.chip, network=hosts.chip.network / 100)
    slower, sizes = dataclasses.replace(hosts, chip=chip), meshes.parse("data=2,fsdp=8")
    assert (
        search._rough(setting, slower, sizes=sizes)[1]
        > search._rough(setting, hosts, sizes=sizes)[1]
    )


def test_where_nothing_fits_the_smallest_are_tried() -> None:
    # 16 chips of 16 GiB hold neither the state nor an activation more than they must.
    setting = Setting(PRESETS["qwen-72b"], batch=16, length=2048, attention="pallas_tpu")
    found = search.candidates(setting, topology.parse("v5e:4x4"))
    assert [x.bytes for x in found] == sorted(x.bytes for x in found) and len(found) == 3
    least, chip = found[0], hardware.TPUS["v5e"]
    assert least.bytes > 18 * PRESETS["qwen-72b"].num_params() / 16 > chip.usable
    assert least.setting.remat == "full" and least.setting.batch == least.mesh["fsdp"]


@pytest.mark.parametrize("rows", [["--batch", "4"], ["--batch", "3"]])
def test_a_search_that_finds_nothing_says_why(
    uncompiled: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[str],
) -> None:
    chip = dataclasses.replace(hardware.TPUS["v5e"], usable=1000)
    monkeypatch.setitem(hardware.CHIPS, "v5e", chip)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=3))
    options = ["--model", "tiny", "--topology", "v5e:2x2", "--attention", "xla", "--search"]
    code, out, error = run(capsys, *options, *rows)
    if rows == ["--batch", "3"]:
        assert code == 2 and "no mesh of 4 devices divides" in error
    else:
        assert code == 0 and "does not fit" in out.splitlines()[1] and "GB over" in out


def test_what_lacks_least_comes_first(trained: estimate.Estimate) -> None:
    def lacking(size: int) -> estimate.Estimate:
        program = dataclasses.replace(trained.program, memory=Memory({"weights": size}, 1e9))
        return dataclasses.replace(trained, program=program, bound=None)

    found = sorted([lacking(3 * 10**9), lacking(2 * 10**9), trained], key=planner.rank)
    assert [x.over for x in found] == [0, 1e9, 2e9]


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
def test_what_is_faster_comes_first(trained: estimate.Estimate, scale: float) -> None:
    def rated(rate: float, serial: float) -> estimate.Estimate:
        """With `rate` tokens/s where all overlaps."""
        longest = trained.tokens / (rate * scale)
        terms = (Term("compute", longest), Term("HBM", longest * serial))
        return dataclasses.replace(trained, bound=Bound(terms))

    slow, fast, sure = rated(2.0, 0.1), rated(3.0, 0.9), rated(2.999, 0.5)
    assert sorted([slow, fast, sure], key=planner.rank) == [sure, fast, slow]


def test_a_table_has_the_best_or_what_the_smallest_lacks(
    trained: estimate.Estimate, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    fits = trained.to_json()
    large, larger = ({**fits, "fits": False, "over": x} for x in (2.5e9, 3e9))

    def row(*plans: Any) -> str:
        monkeypatch.setattr(scaling, "plans", lambda *_, **__: plans)
        best = scaling._best(scaling.TASKS[0], "tiny", "v5e:2x2", 3, tmp_path)
        return scaling._row("tiny", "v5e:2x2", best)

    assert row(larger, fits) == row(fits) and "does not fit" not in row(fits)
    assert row(larger, large).endswith("| does not fit: 2.5 GB over |")
    assert "the compiler failed" in row()


def test_a_search_for_decoding_knows_the_cache() -> None:
    # 8 GPUs of 80 GB hold the 145 GB of weights, and 80 GiB of cache for each row of 32k.
    setting = Setting(PRESETS["qwen-72b"], batch=64, length=32768, attention="pallas_triton")
    chips = topology.parse("h100:8")
    found = search.candidates(setting, chips, decode=True)
    assert {x.setting.batch for x in found} == {4, 2}
    int8 = dataclasses.replace(setting, cache_dtype="int8")
    found = search.candidates(int8, chips, decode=True)
    assert {x.setting.batch for x in found} == {8, 4}
    assert all(x.mesh["context"] == 1 for x in found)


def test_a_search_splits_tokens_only_without_rows() -> None:
    setting = Setting(PRESETS["qwen-7b"], batch=4, length=32768, attention="pallas_tpu")
    found = search.candidates(setting, topology.parse("v5p:2x2x4"))
    assert any(x.mesh["context"] > 1 for x in found)
    assert all(x.mesh["context"] == 1 or x.setting.batch == x.mesh["fsdp"] for x in found)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = plan.main([*options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(
    uncompiled: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    options = ["--model", "tiny", "--topology", "v5e:2x2", "--attention", "xla"]
    options += ["--batch", "4", "--length", "16"]
    code, out, error = run(capsys, *options, "--mesh", "fsdp=2,tp=2")
    assert code == 0
    assert "compiling for v5e:2x2: training, 4 rows of 16 tokens, remat full, mesh fsdp" in error
    assert "mesh fsdp=2,tp=2" in out and "bound" in out and "residuals" in out
    code, out, _ = run(capsys, *options, "--json")
    (found,) = json.loads(out)["plans"]
    assert found["mesh"] == "fsdp=4" and found["fits"] and found["memory"]["needed"] > 0
    code, out, error = run(capsys, *options, "--search", "--tries", "2")
    assert code == 0 and len(out.splitlines()) == 3
    assert "1 of 2: compiling" in error and "2 of 2: compiling" in error


@pytest.mark.parametrize(
    ("options", "taken", "said"),
    [
        ([], True, "yes (the default where tokens divide, as 16 do over tp=2)"),
        (["--sequence-parallel"], True, "yes (as asked for)"),
        (["--no-sequence-parallel"], False, "no (as asked for)"),
        (["--length", "15"], False, "no (length T = 15 is not divisible by tp=2)"),
        (["--mesh", "fsdp=4"], False, "no (the mesh has no tp)"),
        (["--mesh", "fsdp=4", "--no-sequence-parallel"], False, "no (as asked for)"),
    ],
)
def test_a_plan_splits_the_residual_as_a_run_does(
    uncompiled: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    taken: bool,
    said: str,
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    given = ["--model", "tiny", "--topology", "v5e:2x2", "--attention", "xla", "--batch", "4"]
    given += ["--length", "16", "--mesh", "fsdp=2,tp=2", *options]
    code, out, _ = run(capsys, *given)
    assert code == 0 and f"\nsequence parallel: {said}\n" in out
    code, out, _ = run(capsys, *given, "--json")
    assert json.loads(out)["plans"][0]["sequence_parallel"] == taken


def test_a_step_is_planned_with_its_residual_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def make_step(*_: Any, sequence_parallel: bool, **__: Any) -> Any:
        asked.append(sequence_parallel)
        raise ValueError("far enough")

    monkeypatch.setattr(step, "make_step", make_step)
    for setting in (SETTING, dataclasses.replace(SETTING, sequence_parallel=False)):
        with pytest.raises(ValueError, match="far enough"):
            programs.training(setting, meshes.make(SIZES))
    assert asked == [True, False]
    # And a search counts with it.
    wide = Setting(PRESETS["qwen-72b"], batch=512, length=2048, attention="xla")
    whole = dataclasses.replace(wide, sequence_parallel=False)
    where, sizes = topology.parse("v5p:8x8x8"), meshes.parse("fsdp=64,tp=8")
    assert search._rough(wide, where, sizes=sizes)[0] < search._rough(whole, where, sizes=sizes)[0]


def test_time_is_shown_while_a_program_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on although nothing else happens, and ends with what was waited for."""
    again, refresh = threading.Semaphore(0), progress.tqdm.refresh

    def counted(bar: Any, *args: Any, **options: Any) -> Any:
        again.release()
        return refresh(bar, *args, **options)

    monkeypatch.setattr(progress.tqdm, "refresh", counted)
    with pytest.raises(ValueError), report.waiting("compiling", every=0.001):
        assert all(again.acquire(timeout=60) for _ in range(3))
        raise ValueError
    assert "compiling: 00:" in capsys.readouterr().err


def test_what_auto_takes_there_is_planned(
    uncompiled: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    options = ["--model", "tiny", "--topology", "v5e:2x2", "--batch", "4", "--length", "16"]
    code, out, _ = run(capsys, *options)
    said = "attention: pallas_tpu (what auto takes on TPU v5e once it has proved itself there; else"
    assert code == 0 and f"{said} xla)\n" in out
    code, out, _ = run(capsys, *options, "--attention", "auto", "--search", "--tries", "2")
    assert code == 0 and len(out.splitlines()) == 4 and out.count(said) == 1
    code, out, _ = run(capsys, *options, "--json")
    (found,) = json.loads(out)["plans"]
    assert found["attention"] == "pallas_tpu" and found["attention_by_auto"]
    code, out, _ = run(capsys, *options, "--attention", "xla")
    assert code == 0 and "attention: xla\n" in out and "auto" not in out


def test_a_kernel_that_cannot_there_is_passed_over(
    uncompiled: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declined in the trace, or refused by the compiler, as `auto`'s self-test is; with the reason
    in the report.
    """
    tried = []
    training = estimate.training
    error: Exception = NotImplementedError("head dim 16, only 128")

    def refusing(setting: Setting, *rest: Any, **named: Any) -> estimate.Estimate:
        tried.append(setting.attention)
        if setting.attention in refused:
            raise error
        return training(setting, *rest, **named)

    def proving(_: Any, name: str, mesh: Any) -> None:
        assert mesh.size == 1
        if name in refused:
            raise error

    refusing.__name__ = "training"
    monkeypatch.setattr(estimate, "training", refusing)
    monkeypatch.setattr(programs, "compile_calls", proving)
    where = topology.parse("h100:4")
    setting = dataclasses.replace(SETTING, attention="auto")
    refused = {"pallas_hopper", "pallas_tpu"}
    (found,) = attempts.estimates(setting, where, sizes=SIZES, decode=False)
    assert found.setting.attention == "pallas_triton" and found.setting.by_auto
    assert tried[0] == "pallas_hopper"
    told = report.text(found, "tiny")
    assert "attention: pallas_triton (what auto takes on H100 once" in told
    assert "\n  not pallas_hopper: head dim 16, only 128\n" in told
    assert "\n  not pallas_hopper: head dim 16, only 128" in report.ranking([found])
    error, refused = jax.errors.JaxRuntimeError("INTERNAL: Mosaic"), {*attention.IMPLEMENTATIONS}
    refused.remove("xla")
    (found,) = attempts.estimates(setting, where, sizes=SIZES, decode=False)
    told = report.text(found, "t")
    assert "xla (what auto takes on H100: no kernel there takes this)" in told
    assert told.count("INTERNAL: Mosaic") == 3
    assert len(found.to_json()["attention_passed_over"]) == 3
    # A name that was asked for is not replaced.
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        list(
            attempts.estimates(
                dataclasses.replace(SETTING, attention="pallas_tpu"), where, sizes=SIZES, decode=0
            )
        )


@pytest.mark.parametrize("where", ["hbm", "smem"])
def test_a_program_too_large_for_a_kernel_is_not_planned_with_another(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """`auto` would take the kernel there, as its self-test is small, and the run would fail."""
    error = f"RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G {where}."

    def refuse(_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr(programs, "compile_calls", lambda *_, **__: None)
    monkeypatch.setattr(prove, "candidates", lambda _: (["dot_product"], True))
    setting = dataclasses.replace(SETTING, attention="auto")
    planned = attempts.estimates(setting, topology.parse("v5e:2x2"), sizes=SIZES, decode=False)
    if where == "hbm":
        (found,) = planned
        assert found.setting.attention == "dot_product" and not found.fits
    else:
        with pytest.raises(
            ValueError, match=r"with dot_product, which auto .* smem\.; take a small"
        ):
            list(planned)
        tried = [search.Candidate(setting, SIZES, 0, 0)] * 2
        with pytest.raises(attempts.NotCompiled):
            planner.compiled(tried, topology.parse("v5e:2x2"), decode=False)


def test_the_calls_of_a_self_test_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are timed: forward, backward, and decoding with an int8 cache."""
    calls = prove.passes(CONFIG, "bfloat16", rows=2, length=16, backward=True)
    calls += prove.decoding(CONFIG, "bfloat16", rows=2, slots=16, cache="int8")
    compiled: list[jax.stages.Lowered] = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda x: compiled.append(x))
    one = meshes.make({}, jax.devices()[:1])
    programs.compile_calls(calls, "xla", mesh=one)
    results = [[x.shape for x in jax.tree.leaves(each.out_info)] for each in compiled]
    rows = (2, 256, 4, 16)
    assert results == [[rows], [rows] * 3, [(2, 1, 4, 16)]]
    with pytest.raises(NotImplementedError, match="head dim 16"):
        programs.compile_calls(calls, "pallas_tpu", mesh=one)


def test_a_plan_is_compiled_with_what_auto_takes(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured lines of the chip decide, and the programs themselves take the name."""
    lines = [
        {"device": "cpu", "kernel": name, "task": task, "head_dim": 16, "dtype": "bfloat16"}
        | {"length": 256, "milliseconds": milliseconds}
        for name, task, milliseconds in (
            ("flash", "forward", 0.5),  # a step needs both
            ("splash", "forward", 1.0),
            ("splash", "backward", 1.0),
            ("pallas_tpu", "forward", 2.0),
            ("pallas_tpu", "backward", 2.0),
            ("xla", "forward", 3.0),
            ("xla", "backward", 3.0),
        )
    ]
    monkeypatch.setattr(choice, "measured", lambda: lines)
    compiled = []

    def training(setting: Setting, mesh: Any) -> Any:
        compiled.append(setting.attention)
        raise ValueError("far enough")

    monkeypatch.setattr(programs, "training", training)
    setting = dataclasses.replace(SETTING, attention="auto")
    with pytest.raises(ValueError, match="far enough"):
        list(attempts.estimates(setting, topology.parse("v5e:2x2"), sizes=SIZES, decode=False))
    assert compiled == ["splash"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "fsdp=4"], "a plan also needs --model and --topology"),
        (["--model", "qwen-7b"], "a plan also needs --topology"),
        (["--model", "qwen-1b", "--topology", "v5e:2x2"], "qwen-1.8b, qwen-7b"),
        (["--model", "qwen-7b", "--topology", "v5e"], "CHIP:SIZE"),
        (["--model", "qwen-7b", "--topology", "v5e:2x2", "--remat", "some"], "full, projections"),
        (["--model", "qwen-7b", "--topology", "v5e:2x2", "--attention", "best"], "pallas_tpu"),
        (
            ["--model", "qwen-7b", "--topology", "v5e:2x2", "--decode", "--cache-dtype", "int4"],
            cache.DTYPES[0],
        ),
        (["--model", "qwen-7b", "--topology", "v5e:2x2", "--mesh", "foo=2"], "(axes: data, fsdp"),
        (
            ["--model", "qwen-7b", "--topology", "v5e:2x2", "--decode", "--mesh", "context=2,tp=2"],
            "context splits training only",
        ),
        (
            ["--model", "qwen-7b", "--topology", "v5e:2x2", "--base-dtype", "int8"],
            "--base-dtype applies only to adapters: leave it out, or add --lora-rank N",
        ),
    ],
)
def test_usage_errors(
    on_cpu: None, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, _, error = run(capsys, *options)
    assert code == 2
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("options", "level"), [([], "3"), (["--debug"], None)])
def test_traces_of_cpp_do_not_reach_the_user(
    uncompiled: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    level: str | None,
) -> None:
    """But with --debug. `tests/aot` has the command itself."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")  # so that it is put back
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    given = ["--model", "tiny", "--topology", "v5e:2x2", "--attention", "xla", "--batch", "4"]
    code, _, _ = run(capsys, *given, *options)
    assert code == 0 and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == level


def test_the_words_of_a_plan_are_explained(
    trained: estimate.Estimate, capsys: pytest.CaptureFixture[str]
) -> None:
    """By an option that --help names, and by the page, which are equal."""
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    assert plan.main(["--glossary"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "explained by --glossary, and in docs/scaling.md" in told
    page = (pathlib.Path(scaling.__file__).parents[1] / "docs/scaling.md").read_text()
    for word, meaning in glossary.WORDS.items():
        assert f"{word} {meaning}" in told and f"| {word} | {meaning} |" in page
        assert meaning.split()[0] not in ("What", "Whether", "How", "In"), "a word is a noun"
    words = " ".join(glossary.WORDS)
    said = [*trained.program.memory.parts, "serial", "bound", "MFU", "collective", "count"]
    said += ["sequence parallel", "attention", "ICI", "DCN", "NVLink", "InfiniBand", "on chip"]
    assert [word for word in said if word not in words] == []


@pytest.mark.parametrize(
    ("where", "package"), [("v5e:2x2", "libtpu"), ("h100:8", "jax-cuda13-plugin")]
)
def test_a_missing_compiler_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    package: str,
) -> None:
    monkeypatch.setattr(topology, "_is_installed", lambda _: False)
    code, _, error = run(capsys, "--model", "qwen-7b", "--topology", where)
    assert code == 1
    assert package in error and "'.[aot]'" in error and len(error.splitlines()) == 1
