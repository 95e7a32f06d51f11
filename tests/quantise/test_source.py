"""The weights that are quantised: merged with an adapter as an export merges them, on any mesh."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import meshes
from qwen_jax.leaves.weights import Weight
from qwen_jax.quantise.source import Source
from tests.support.conversion import back, there
from tests.support.gptq import GPTQ, folder
from tests.support.tiny import on_mesh

ADAPTER = GPTQ / "qlora" / "adapter"


def weights(root: Path, adapter: Path | None = None) -> dict[str, np.ndarray]:
    """All weights of a directory, on the mesh in force."""
    source = Source(root, meshes.current(), adapter=adapter)
    return {path: np.asarray(source.weight(path)[...]) for path in source.leaves}


def test_merged_weights_are_those_of_an_export(tmp_path: Path) -> None:
    folder(tmp_path / "hf", bits=4, group=64, act=True, sym=False)
    there(tmp_path / "hf", tmp_path / "ckpt", "--head", "int8")
    options = ("--dequantise", "--dtype", "float32", "--adapter", str(ADAPTER))
    back(tmp_path / "ckpt", tmp_path / "floats", *options)
    there(tmp_path / "floats", tmp_path / "merged")
    with on_mesh():
        wanted = weights(tmp_path / "merged")
        found = weights(tmp_path / "ckpt", ADAPTER)
    with on_mesh(data=2, fsdp=2, tp=2):
        divided = weights(tmp_path / "ckpt", ADAPTER)
    for path, array in wanted.items():
        for each in (found[path], divided[path]):
            assert np.array_equal(each, array), path
    plain = {path for path, array in found.items() if array.dtype == np.float16}
    assert "embedding" in plain and "head" not in plain and len(plain) == 2 + 3 * 5


def test_what_stays_floats_has_the_dtype_of_the_directory(tmp_path: Path) -> None:
    there(GPTQ / "int4", tmp_path / "ckpt")
    with on_mesh():
        source = Source(tmp_path / "ckpt", meshes.current(), adapter=ADAPTER)
        merged = source.weight("layers.1.ffn.down")
        assert merged.dtype == jnp.float32
        kept = source.stored("layers.1.ffn.down", merged)
        assert np.array_equal(kept[...], merged[...].astype(jnp.float16))
        assert source.stored("x", kept) is kept
        large = Weight(jnp.full((2, 2), 1e5), letters="FD")
        with pytest.raises(
            ValueError, match=r"^layers\.1\.ffn\.down with the adapter of .* float16"
        ):
            source.stored("layers.1.ffn.down", large)
        assert source.generation_config is None
