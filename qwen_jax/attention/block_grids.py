"""The block sizes that `python -m qwen_jax.kernels.tune` tries, by kernel and task."""

import itertools


def _grid(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """Return every combination of the given values, each as a dict from name to value."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


_MOSAIC = [
    x for x in _grid(q=(256, 512, 1024, 2048), k=(512, 1024, 2048), compute=(256, 512, 1024))
]


_TRITON = {"tile": (64, 128), "block": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)}


def _of(part: str) -> list[dict[str, int]]:
    """Return the block sizes to try for one backward kernel of `pallas_triton`.

    part: the kernel, "dkv" (gradients of keys and values) or "dq" (of queries), with which the name
        of each size begins.
    """
    return _grid(**{f"{part}_{key}": values for key, values in _TRITON.items()})


# kernel -> task -> grids. Each grid is searched with the best blocks of the grids before it.
CANDIDATES: dict[str, dict[str, list[list[dict[str, int]]]]] = {
    "pallas_tpu": {
        "forward": [_MOSAIC],
        "backward": [_MOSAIC],
        "decode": [_grid(block=(256, 512, 1024, 2048))],
    },
    "pallas_triton": {
        "forward": [_grid(**{**_TRITON, "stages": (2, 3, 4)})],
        "backward": [_of("dkv"), _of("dq")],
        "decode": [_grid(block=(16, 32, 64, 128), warps=(2, 4, 8), stages=(2, 3, 4))],
    },
    "pallas_hopper": {
        "forward": [_grid(block=(64, 128), stages=(2, 3, 4))],
        "backward": [
            _grid(dkv_block=(64, 128), dkv_stages=(2, 3, 4)),
            _grid(dq_block=(64, 128), dq_stages=(2, 3, 4)),
        ],
    },  # it decodes with Triton's kernel, whose blocks are pallas_triton's
}


def sweeps(name: str, task: str) -> list[list[dict[str, int]]]:
    """Return the grids of block sizes to try for a kernel and a task, in order; [] if it has none.

    name: the kernel's name in the registry.
    task: "forward", "backward" or "decode".
    """
    return CANDIDATES.get(name, {}).get(task, [])


def steps(name: str, task: str) -> int:
    """Return how many programs are timed for a kernel and a task.

    They are one for the kernel's own choice of block sizes, and one for each entry of its grids.
    """
    return 1 + sum(len(grid) for grid in sweeps(name, task))
