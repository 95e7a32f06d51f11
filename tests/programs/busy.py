"""A program of several processes that compute a sum for ever, like a training run, or `--steps`
times.

With --fail I, process I raises an error after ten steps, and a kernel gives wrong results on its
device.
"""

import argparse
import sys
import time

from qwen_jax.runtime import command, process_options, processes


def work(args: argparse.Namespace) -> None:
    """Compute sums over all processes."""
    process_options.join(args)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    if args.fail is not None:
        print(f"attention: {' '.join(attention_of(args.fail))}", flush=True)
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    x = jax.make_array_from_callback(
        (jax.device_count(),),
        NamedSharding(mesh, PartitionSpec("x")),
        lambda index: np.ones(1, np.float32),
    )
    add = jax.jit(lambda x: x.sum())
    for step in range(args.steps):
        total = float(add(x))
        if step == 10:
            print(f"the sum is {total}", flush=True)
            if args.fail == processes.index():
                raise ValueError("this is the end")
        time.sleep(0.01)


def attention_of(wrong: int) -> list[str]:
    """The attention that each process chooses if a kernel is wrong on the device of one of them.

    wrong: the number of that process.
    """
    from types import SimpleNamespace

    from qwen_jax.attention import prove
    from qwen_jax.attention.workloads import Case
    from qwen_jax.kernels import choice

    def self_test(*_: object, **__: object) -> tuple[float, tuple[float, float]]:
        return (0.5 if processes.index() == wrong else 0.0), (1.0, 2.0)

    choice.device = lambda: SimpleNamespace(platform="tpu", device_kind="TPU test")
    prove._self_test = self_test
    prove.verdicts.find = lambda _: None
    return processes.gather(prove._choose([Case("forward", 1, 64, 4, 16, "float32")])[0])


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = argparse.ArgumentParser()
    result.add_argument("--steps", type=int, default=10**9)
    result.add_argument("--fail", type=int)
    process_options.add(result)
    command.add_debug(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), work))
