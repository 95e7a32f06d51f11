"""Prefill and decode rates beside a plain torch implementation of the same shapes, in one run.

    python benchmarks/generate.py HF_FOLDER CKPT --torch-python .venv-torch/bin/python

HF_FOLDER is the safetensors folder, CKPT its conversion; `torch_qwen.py` says how to make the torch
environment. Each variant runs in a process of its own, in turn, `--rounds` times. The medians are
printed as a table for docs/benchmarks.md. Nothing else should run on the machine.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def ours(args: argparse.Namespace, dtype: str, new_tokens: int) -> list[str]:
    """The command line of this project's benchmark."""
    bench = ["--bench", "--json", "--dtype", dtype, "--max-new-tokens", str(new_tokens)]
    return [sys.executable, "-m", "qwen_jax.generate", "--ckpt", args.ckpt, *bench]


def torchs(args: argparse.Namespace, dtype: str, *extra: str) -> list[str]:
    """The command line of the torch benchmark."""
    script = str(ROOT / "benchmarks/torch_qwen.py")
    sizes = ["--prompt-length", "128", "--new-tokens", str(args.new_tokens)]
    threads = ["--threads", str(os.cpu_count()), "--json"]
    return [args.torch_python, script, args.hf, "--dtype", dtype, *sizes, *threads, *extra]


def processor() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(command: list[str]) -> dict[str, Any]:
    """Run a benchmark; returns the JSON object in the last line of its output."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Prefill and decode rates beside torch.")
    parser.add_argument("hf", help="safetensors folder")
    parser.add_argument("ckpt", help="its conversion")
    parser.add_argument("--torch-python", required=True, help="python of the torch environment")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    variants = {
        "qwen_jax float32": ours(args, "float32", args.new_tokens),
        "torch float32": torchs(args, "float32"),
        "torch float32, weights by column": torchs(args, "float32", "--columns"),
        "torch bfloat16": torchs(args, "bfloat16"),
        # XLA's CPU backend is very slow in bfloat16: a few tokens are enough.
        "qwen_jax bfloat16": ours(args, "bfloat16", 4),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for turn in range(args.rounds):
        for name, command in variants.items():
            print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
            results[name].append(measure(command))

    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in results[name])

    print(f"{processor()}, {os.cpu_count()} cores and threads, ", end="")
    versions = {
        key: r[-1][key] for r in results.values() for key in ("jax", "torch") if key in r[-1]
    }
    print(", ".join(f"{k} {v}" for k, v in versions.items()), datetime.date.today(), sep=", ")
    rival = median("torch float32", "decode_tokens_per_second")
    print("\n| | prefill tokens/s | decode tokens/s | to torch float32 |\n|---|---|---|---|")
    for name in variants:
        prefill, decode = (median(name, f"{x}_tokens_per_second") for x in ("prefill", "decode"))
        print(f"| {name} | {prefill:.1f} | {decode:.2f} | {decode / rival:.2f} |")
    first = results["qwen_jax float32"]
    print(
        "\nDecoding in float32 reads "
        f"{median('qwen_jax float32', 'decode_gb_per_second'):.1f} GB/s, "
        f"{100 * median('qwen_jax float32', 'share_of_bandwidth'):.0f} % of the "
        f"{median('qwen_jax float32', 'matvec_gb_per_second'):.1f} GB/s of float32 matrix-vector "
        f"products in the same run; time to the first token after start-up "
        f"{first[0]['seconds_to_first_token_cold']:.1f} s in the first round, "
        f"{first[-1]['seconds_to_first_token_cold']:.1f} s with the compilation cache filled."
    )


if __name__ == "__main__":
    main()
