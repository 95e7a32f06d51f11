"""Whole steps of quantised models write no weight as floats, or as wider integers.

Each is compiled as the library runs it. The compiler tells its memory, and its text every array
that it writes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import aot
from qwen_jax import PRESETS, meshes
from qwen_jax.config import Config
from qwen_jax.kernels import grouped_triton
from tests.aot.conftest import parameter
from train.planning import collectives, hlo, programs, stored_weights, topology
from train.planning.compilation import Program
from train.planning.programs import Setting
from train.run import recipes

BITS = {"int4": 4, "int8": 8}
SLOTS = 128  # of a cache in decoding, so that a layer's is smaller than any matrix
PROMPT = 512  # tokens of a pass of many rows, so that its activations are, too
# Instructions that write nothing, but give an array another name. The first half of a copy
# ("copy-start") names the array that its second half returns.
NAMES = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier"),
    *("while", "conditional"),
)
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")  # in the text of a type, such as "u32[8,128]{1,0}"

# Compiles a task for devices of a kind.
Compile = Callable[..., tuple[Program, str]]


@dataclasses.dataclass(frozen=True)
class Written:
    """An array that an instruction writes. dtype: XLA's name for it, such as "bf16"."""

    name: str
    opcode: str
    dtype: str
    elements: int


def written(text: str) -> Iterator[Written]:
    """Yield the arrays that a compiled program writes: none within a fusion, but its results."""
    program = hlo.parse(text)
    every = [(x.name, y) for x in program.computations.values() for y in x.instructions]
    fused = {name for _, x in every if x.opcode == "fusion" for name in x.called}
    for computation, x in every:
        if computation in fused or x.opcode in NAMES or x.opcode.endswith("-start"):
            continue
        for dtype, dims in ARRAY.findall(x.shape):
            elements = math.prod(int(n) for n in dims.split(",") if n)
            yield Written(x.name, x.opcode, dtype, elements)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Compile a task for a topology; returns the program, and its text, which plans only read."""
    texts: list[str] = []
    of = collectives.of
    monkeypatch.setattr(collectives, "of", lambda x, mesh: (texts.append(x), of(x, mesh))[1])

    def run(
        task: str, where: str, config: Config, form: str, *, rows: int = 1, tp: int = 1
    ) -> tuple[Program, str]:
        target = topology.parse(where)
        mesh = meshes.make({"tp": tp}, topology.devices(target)[:tp])
        setting = Setting(
            config,
            batch=rows,
            length=SLOTS if task == "decoding" else PROMPT,
            attention=target.chip.kernel,
            weights=form,
            kernel=stored_weights.KERNELS[target.chip.platform],
            adapters=recipes.sft_lora() if task == "training" else None,
        )
        more = {"chunk": PROMPT} if task == "prefill" else {}
        program = getattr(programs, task)(setting, mesh, **more)
        return program, texts.pop()

    return run


def smallest(config: Config, tp: int = 1) -> int:
    """The elements on a device of a layer's smallest matrix."""
    return config.hidden_size * min(config.num_heads, config.num_kv_heads) * config.head_dim // tp


def largest(config: Config) -> int:
    """The elements of a layer's largest matrix."""
    return config.hidden_size * config.intermediate_size


def as_large(text: str, elements: int) -> list[Written]:
    """The arrays of a program that are as large as a weight, of any dtype."""
    arrays = list(written(text))
    assert len(arrays) > 50  # the text was understood
    return [x for x in arrays if x.elements >= elements]


def shortened(name: str, layers: int, **sizes: int) -> Config:
    return dataclasses.replace(PRESETS[name], num_layers=layers, **sizes)


WHERE = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "h100:1")
FORMS = [(where, form) for where in WHERE for form in BITS]
# Whole models: the 1.8B, and before a release the 7B in every form.
STEPS = [
    parameter("v5e:2x2", "qwen-1.8b", "int4", 1),
    parameter("h100:1", "qwen-1.8b", "int8", 8),
    *(
        parameter(where, "qwen-7b", form, rows, release=True)
        for where, form in FORMS
        for rows in (1, 8)
    ),
]


def forms(*quick: tuple[str, str]) -> list[Any]:
    """Every form as a parameter, of which all but the quick ones are for a release."""
    return [parameter(*form, release=form not in quick) for form in FORMS]


@pytest.mark.parametrize(("where", "name", "form", "rows"), STEPS)
def test_decoding(where: str, name: str, form: str, rows: int, compiled: Compile) -> None:
    config = PRESETS[name]
    with aot.gpu_kernels("h100") as kernels:
        program, text = compiled("decoding", where, config, form, rows=rows)
    found = as_large(text, smallest(config))
    assert not found
    # Some arrays of logits, and less than one matrix in bfloat16.
    logits = rows * config.vocab_size * 4
    assert program.memory.parts["temporaries"] < 4 * logits + 2 * smallest(config)
    if where == "h100:1":
        assert kernels and not any(x.spilled for x in kernels)
        assert rows == 1 or any(grouped_triton.NAME in x.name for x in kernels)


@pytest.mark.parametrize(("where", "form"), forms(("v5e:2x2", "int4"), ("h100:1", "int8")))
def test_prefill(where: str, form: str, compiled: Compile) -> None:
    config = shortened("qwen-7b", 1)
    program, text = compiled("prefill", where, config, form)
    found = as_large(text, smallest(config))
    assert not found
    assert program.memory.parts["temporaries"] < 2 * largest(config)


@pytest.mark.parametrize(("where", "form"), forms(("h100:1", "int4")))
def test_training_of_adapters(where: str, form: str, compiled: Compile) -> None:
    """Forward and backward."""
    config = shortened("qwen-7b", 2, vocab_size=8192)
    _, text = compiled("training", where, config, form)
    found = as_large(text, smallest(config))
    assert not found


@pytest.mark.parametrize("where", [parameter("v5e:2x2"), parameter("v6e:2x2", release=True)])
def test_words_are_used_as_they_lie(where: str, compiled: Compile) -> None:
    """With 2752 outputs on a device, which XLA would lay out inputs last, and turn in every pass.

    XLA may fetch words into VMEM before a kernel needs them: that is no instruction of these.
    """
    config = shortened("qwen-7b", 2)
    _, text = compiled("decoding", where, config, "int4", tp=4)
    words = [x for x in written(text) if x.dtype == "u32"]
    least = smallest(config, tp=4) * BITS["int4"] // 32
    turned = [x for x in words if x.elements >= least and x.opcode in ("copy", "fusion")]
    assert not turned
