"""The programs of a serving engine copy no pool: their temporaries do not grow with its pages."""

import dataclasses
import functools

import pytest

from qwen_jax import PRESETS, meshes
from qwen_jax.engine import from_model
from tests.aot.conftest import parameter
from train.planning import engine_programs, topology
from train.planning.engine_programs import Engine, Serving

FEW, MANY = 256, 1024  # pages
# The heads and widths of the 7B; its vocabulary has no part in this.
CONFIG = dataclasses.replace(PRESETS["qwen-7b"], num_layers=2, vocab_size=8192)


@functools.cache
def compiled(where: str, kind: str | None, name: str, pages: int) -> Engine:
    """One program of an engine of 64 rows, on one device."""
    target = topology.parse(where)
    mesh = meshes.make({}, topology.devices(target)[:1])
    serving = Serving(
        config=CONFIG, max_length=2048, attention=target.chip.kernel, cache_dtype=kind
    )
    shape = serving.shape(mesh, room=1 << 62)._replace(pages=pages)
    return engine_programs.engine(serving, shape, mesh=mesh, only=[name])


@pytest.mark.parametrize(
    ("where", "kind", "name", "most"),
    [
        parameter("v5e:2x2", None, "_decode", 8e6),
        parameter("v5e:2x2", None, "run_group", 32e6),
        parameter("v5e:2x2", "int8", "_decode", 8e6, release=True),
        parameter("h100:1", None, "_decode", 64e6),
        parameter("h100:1", None, "run_group", 64e6, release=True),
        parameter("h100:1", "int8", "_decode", 64e6, release=True),
    ],
)
def test_temporaries_do_not_grow_with_the_pool(
    where: str, kind: str | None, name: str, most: float
) -> None:
    few, many = (
        compiled(where, kind, name, pages).runs[0].program.memory.parts for pages in (FEW, MANY)
    )
    pool = few["cache"]
    assert pool == FEW * from_model.page_bytes(CONFIG, 128, dtype="bfloat16", kind=kind, tp=1)
    assert many["cache"] == MANY / FEW * pool and pool > 4 * most
    assert abs(many["temporaries"] - few["temporaries"]) < 2**20
    assert many["temporaries"] < most
    # All pages are given back in their place.
    assert many["outputs"] < most and abs(many["padding"]) < pool / 100
