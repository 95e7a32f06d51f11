"""Faults put in by hand, one in each module that matters, which the quick tests must catch.

    .venv/bin/python -m tests.tools.mutations [MODULE ...]

Each is put into a copy of the tree, where the named tests then run; a fault that no test catches,
or whose place is no longer there, ends this with 1. Some ten minutes on two cores.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FAILED = 1  # pytest's code for tests that ran and failed


class Fault(NamedTuple):
    """text: that is there once, and becomes `wrong`. tests: arguments of pytest."""

    module: str
    text: str
    wrong: str
    tests: str


FAULTS = [
    Fault(
        "qwen_jax/rope.py",
        "first, last = self._pair(self.beta_fast), self._pair(self.beta_slow)",
        "last, first = self._pair(self.beta_fast), self._pair(self.beta_slow)",
        "tests/test_rope.py",
    ),
    Fault(
        "qwen_jax/sampling.py",
        "    temperature = jnp.clip(temperature, _TINY, _HOTTEST)\n",
        "",
        "tests/test_sampling.py",
    ),
    Fault(
        "qwen_jax/decode.py",
        "        return (written < limit) & wanted & ~faulty",
        "        return (written < limit) & wanted",
        "tests/test_decode.py",
    ),
    Fault(
        "qwen_jax/cache.py",
        "segments = jnp.where(again, 0, segments)",
        "segments = segments",
        "tests/test_cache.py",
    ),
    Fault(
        "qwen_jax/model.py",
        "kept(x, block, windows[i], first + i,",
        "kept(x, block, windows[0], first + i,",
        "tests/test_model.py -k stacked_is_looped",
    ),
    Fault(
        "qwen_jax/attention.py",
        "same & real & (distance >= 0)",
        "same & real & (distance > 0)",
        "tests/test_attention.py -k xla",
    ),
    Fault(
        "qwen_jax/lora.py",
        "whole = leaf[...].astype(jnp.float32) + adapters.scale * added",
        "whole = leaf[...].astype(jnp.float32) + added",
        "tests/test_lora.py -k on_a_mesh",
    ),
    Fault(
        "qwen_jax/weights.py",
        "return (sums * jnp.asarray(scale, wide)).astype(dtype)",
        "return sums.astype(dtype)",
        "tests/test_int8.py",
    ),
    Fault(
        "qwen_jax/weights.py",
        "return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None",
        "return None",
        "tests/test_precision.py",
    ),
    Fault(
        "train/step.py",
        "bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise",
        "bits = jax.lax.bitcast_convert_type(x, jnp.uint32)",
        "tests/test_step.py -k moments",
    ),
    Fault(
        "train/loss.py",
        "share = weights / jnp.maximum(targets if total is None else total, 1)",
        "share = weights / weights.size",
        "tests/test_loss.py",
    ),
    Fault(
        "train/packing.py",
        "total = min(total, max(1, total // row) * row)",
        "total = min(total, max(1, total // row) * row - row)",
        "tests/test_packing.py",
    ),
    Fault(
        "convert/names.py",
        'mlp.w1.weight": ("layers.{L}.ffn.up",)',
        'mlp.w1.weight": ("layers.{L}.ffn.gate",)',
        "tests/test_golden.py -k full_pass",
    ),
    Fault(
        "qwen_jax/lock.py",
        "            raise Busy(_busy(place, _read(text))) from None",
        "            return open(os.devnull, 'a+')",
        "tests/test_lock.py",
    ),
    Fault(
        "qwen_jax/tokenizer.py",
        "        return len(ranks) == PUBLISHED_RANKS and rank >= first",
        "        return len(ranks) == PUBLISHED_RANKS and rank > first",
        "tests/test_tokenizer.py",
    ),
    Fault(
        "qwen_jax/chat.py",
        "for past_query, past_reply in reversed(pairs):",
        "for past_query, past_reply in pairs:",
        "tests/test_chat.py",
    ),
    Fault(
        "qwen_jax/prove.py",
        "right = error <= timing.TOLERANCE[case.dtype]",
        "right = True",
        "tests/test_prove.py",
    ),
    Fault(
        "train/loop.py",
        '        self._save(position, state)\n        return f"the state',
        '        return f"the state',
        "tests/test_run.py -k none_stops",
    ),
    Fault(
        "qwen_jax/ring.py",
        "shares = jnp.exp(lse - largest)",
        "shares = jnp.exp(lse - largest + 0.01 * (lse == largest))",
        "tests/test_cache.py tests/test_ring.py",
    ),
    Fault(
        "qwen_jax/errors.py",
        "        or _devices(error, words)\n",
        "",
        "tests/test_command.py",
    ),
    Fault(
        "convert/adapter_config.py",
        "return any(own(path) != common for path in self.paths)",
        "return False",
        "tests/test_lora.py -k refused_by_name",
    ),
    Fault(
        "train/shared_cache.py",
        "mine = [n for n in range(share, len(parts), shares)",
        "mine = [n for n in range(share, len(parts) - 1, shares)",
        "tests/test_packing.py -k share_the",
    ),
    Fault(
        "qwen_jax/sharding.py",
        "places.append(P(_entry(first), *others, reduced=summed))\n    for name",
        "places.append(P(_entry(first), *others))\n    for name",
        "tests/test_sharding.py tests/test_step_collectives.py",
    ),
    Fault(
        "qwen_jax/description.py",
        "        if new > left:",
        "        if new > left + 1:",
        "tests/test_language_model.py -k room",
    ),
    Fault(
        "convert/folder.py",
        "            if begin != position:",
        "            if begin < position:",
        "tests/test_convert_input.py -k bad_source",
    ),
    Fault(
        "train/recipes.py",
        "        if self.rows % self.accumulate:",
        "        if False:",
        "tests/test_run.py tests/test_step.py -k 'recipe or parts'",
    ),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Faults put in by hand, which the quick tests must catch."
    )
    parser.add_argument("module", nargs="*", help="of the package, e.g. qwen_jax/rope.py")
    wanted = parser.parse_args(argv).module
    faults = [fault for fault in FAULTS if not wanted or fault.module in wanted]
    uncaught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        for fault in faults:
            begun = time.monotonic()
            said = outcome(fault, tree)
            uncaught += not said.startswith("caught")
            print(f"{fault.module}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(faults) - uncaught} of {len(faults)} caught")
    return int(uncaught > 0)


def copied(folder: Path) -> Path:
    """The files that git knows, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def outcome(fault: Fault, tree: Path) -> str:
    """What the tests say of the tree with the fault in it; it is taken out again."""
    file = tree / fault.module
    right = file.read_text(encoding="utf-8")
    if right.count(fault.text) != 1:
        return f"{fault.text!r} is there {right.count(fault.text)} times"
    file.write_text(right.replace(fault.text, fault.wrong), encoding="utf-8")
    try:
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow"]
        ran = subprocess.run(
            [*pytest, *shlex.split(fault.tests)], cwd=tree, capture_output=True, text=True
        )
    finally:
        file.write_text(right, encoding="utf-8")
    if ran.returncode != FAILED:
        return f"NOT CAUGHT: pytest ended with {ran.returncode}: {fault.tests}"
    failed = [x for x in ran.stdout.splitlines() if x.startswith(("FAILED ", "ERROR "))]
    return f"caught by {failed[0].split()[1]}" if failed else "NOT CAUGHT: no test has failed"


if __name__ == "__main__":
    sys.exit(main())
