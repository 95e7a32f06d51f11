"""Plan a run on absent accelerators: the memory, work and time that its programs need.

    python train/plan.py --model qwen-72b --topology v5p:8x8x8 --mesh fsdp=64,tp=8 \\
        --length 4096 --batch 512

compiles the real training step (with --decode, prefill and the decode loop) on any machine, and
prints memory per device, FLOPs, collectives and a lower bound of time. Needs the `aot` extra.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started as a file: the root of the checkout is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qwen_jax.runtime import command
from train.planning import glossary
from train.planning.plan_options import parser, refuse_idle


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code. argv: None for the process's command line."""
    return command.run(parser(), _work, argv=argv)


def _work(args: argparse.Namespace) -> None:
    """Print the plan that the arguments ask for, or the glossary."""
    if args.glossary:
        print(glossary.text())
        return
    if missing := [f"--{name}" for name in ("model", "topology") if getattr(args, name) is None]:
        raise command.UsageError(f"a plan also needs {' and '.join(missing)}")
    refuse_idle(args)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing of this machine is used
    if not args.debug:  # C++ has traces of its own for what is handled, or said in a line, here
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from train.planning import planner

    planner.run(args)


if __name__ == "__main__":
    sys.exit(main())
