"""What decoding and prefill need beside the cache does not grow with it, on TPUs and GPUs.

A compiler that lays a loop's cache out in another order than its arguments copies all of it, and
one that dequantises or transposes it holds it twice.
"""

import dataclasses

import pytest

from qwen_jax import meshes
from qwen_jax.model import running
from tests.aot.conftest import parameter
from tests.support.tiny import tiny_config
from train.planning import programs, topology
from train.planning.programs import Setting

# Both so long that a pass goes through them in pieces, and the need is level (H100, prefill,
# int8 and xla: 31 MB with 4096 slots, 44 with 12288 and with 24576).
SHORT, LONG, ROWS, CHUNK = 16384, 32768, 8, 32
CONFIG = tiny_config(
    vocab_size=1024, hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=128,
    intermediate_size=256, num_layers=1,
)  # fmt: skip
KERNELS = {"v5e:2x2": "pallas_tpu", "v5p:2x2x1": "pallas_tpu", "h100:1": "pallas_hopper"}
# Each of the three ways in which a cache was there twice.
QUICK = {
    ("decoding", "v5e:2x2", "xla", None),
    ("decoding", "h100:1", "xla", "int8"),
    ("prefill", "h100:1", "xla", "int8"),
}


CASES = [
    parameter(task, where, kernel, kind, smoke=quick)
    for task in ("decoding", "prefill")
    for where, own in KERNELS.items()
    for kernel in ("xla", own)
    for kind in (None, "int8")
    for quick in [(task, where, kernel, kind) in QUICK]
]


@pytest.mark.parametrize(("task", "where", "kernel", "kind"), CASES)
def test_temporaries_do_not_grow_with_the_cache(
    task: str, where: str, kernel: str, kind: str | None
) -> None:
    mesh = meshes.make({}, topology.devices(topology.parse(where))[:1])

    def memory(length: int) -> dict[str, int]:
        setting = Setting(CONFIG, batch=ROWS, length=length, attention=kernel, cache_dtype=kind)
        if task == "decoding":
            return programs.decoding(setting, mesh).memory.parts
        return programs.prefill(setting, mesh, chunk=CHUNK).memory.parts

    short, long = memory(SHORT), memory(LONG)
    leaf = (long["cache"] - short["cache"]) / (2 * CONFIG.num_layers)
    assert long["temporaries"] - short["temporaries"] < leaf / 4
    assert long["padding"] < long["cache"] / 100


def test_layers_of_a_program_share_their_temporaries() -> None:
    """Prefill runs four layers a program: they need what one needs, and what goes between them, x
    [B, T, D].
    """
    mesh = meshes.make({}, topology.devices(topology.parse("h100:1"))[:1])
    rows, chunk = 16, 2048

    def temporaries(layers: int) -> int:
        config = dataclasses.replace(CONFIG, hidden_size=512, num_layers=layers)
        setting = Setting(config, batch=rows, length=4096, attention="pallas_hopper")
        return programs.prefill(setting, mesh, chunk=chunk).memory.parts["temporaries"]

    x = rows * chunk * 512 * 2
    assert temporaries(running.GROUP) < temporaries(1) + 1.1 * x
