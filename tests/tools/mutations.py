"""Puts a fault into each important module, one at a time; the quick tests must catch it.

    .venv/bin/python -m tests.tools.mutations [MODULE ...]

Each fault is put into a copy of the tree, in which the named tests then run. The exit code is 1 if
a fault is not caught, or if its place no longer exists. It takes about ten minutes on two cores.
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
FAILED = 1  # pytest's exit code if tests ran and some failed


class Fault(NamedTuple):
    """A fault to put into a module.

    text: occurs once in the module, and is replaced by `wrong`.
    tests: arguments of pytest.
    """

    module: str
    text: str
    wrong: str
    tests: str


FAULTS = [
    Fault(
        "convert/names.py",
        '"model.layers.{L}.mlp.gate_proj.weight": ("layers.{L}.ffn.gate",)',
        '"model.layers.{L}.mlp.gate_proj.weight": ("layers.{L}.ffn.up",)',
        "tests/convert/test_qwen2.py",
    ),
    Fault(
        "qwen_jax/chat/tokenizer_json.py",
        "        for j in (i - 1, i):",
        "        for j in (i,):",
        "tests/convert/test_qwen2.py",
    ),
    Fault(
        "qwen_jax/model/rope.py",
        "first, last = self._pair(self.beta_fast), self._pair(self.beta_slow)",
        "last, first = self._pair(self.beta_fast), self._pair(self.beta_slow)",
        "tests/model/test_rope.py",
    ),
    Fault(
        "qwen_jax/decoding/sampling.py",
        "    temperature = jnp.clip(temperature, _TINY, _HOTTEST)\n",
        "",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "qwen_jax/decoding/decode.py",
        "        return (written < limit) & wanted & ~faulty",
        "        return (written < limit) & wanted",
        "tests/decoding/test_decode.py",
    ),
    Fault(
        "qwen_jax/attention/cache.py",
        "segments = jnp.where(again, 0, segments)",
        "segments = segments",
        "tests/attention/test_cache.py",
    ),
    Fault(
        "qwen_jax/model/running.py",
        "kept(x, block, windows[i], first + i,",
        "kept(x, block, windows[0], first + i,",
        "tests/model/test_model.py -k stacked_is_looped",
    ),
    Fault(
        "qwen_jax/kernels/mask.py",
        "same & real & (distance >= 0)",
        "same & real & (distance > 0)",
        "tests/attention/test_attention.py -k xla",
    ),
    Fault(
        "qwen_jax/model/lora.py",
        "whole = leaf[...].astype(jnp.float32) + adapters.scale * added",
        "whole = leaf[...].astype(jnp.float32) + added",
        "tests/leaves/test_lora.py -k on_a_mesh",
    ),
    Fault(
        "qwen_jax/leaves/weights.py",
        "return (sums * jnp.asarray(scale, wide)).astype(dtype)",
        "return sums.astype(dtype)",
        "tests/leaves/test_int8.py",
    ),
    Fault(
        "qwen_jax/leaves/weights.py",
        "return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None",
        "return None",
        "tests/model/test_precision.py",
    ),
    Fault(
        "train/step/optimizer.py",
        "bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise",
        "bits = jax.lax.bitcast_convert_type(x, jnp.uint32)",
        "tests/train/step/test_step.py -k moments",
    ),
    Fault(
        "train/step/loss.py",
        "share = weights / jnp.maximum(targets if total is None else total, 1)",
        "share = weights / weights.size",
        "tests/train/step/test_loss.py",
    ),
    Fault(
        "train/data/packing.py",
        "total = min(total, max(1, total // row) * row)",
        "total = min(total, max(1, total // row) * row - row)",
        "tests/train/data/test_packing.py",
    ),
    Fault(
        "qwen_jax/checkpoint/tensor_names.py",
        'mlp.w1.weight": ("layers.{L}.ffn.up",)',
        'mlp.w1.weight": ("layers.{L}.ffn.gate",)',
        "tests/test_golden.py -k full_pass",
    ),
    Fault(
        "qwen_jax/runtime/lock.py",
        "            raise Busy(_busy(place, _read(text))) from None",
        "            return open(os.devnull, 'a+')",
        "tests/runtime/test_lock.py",
    ),
    Fault(
        "qwen_jax/chat/tokenizer.py",
        "        return len(ranks) == PUBLISHED_RANKS and rank >= first",
        "        return len(ranks) == PUBLISHED_RANKS and rank > first",
        "tests/chat/test_tokenizer.py",
    ),
    Fault(
        "qwen_jax/chat/prompt.py",
        "enumerate(reversed(_questions(turns)))",
        "enumerate(_questions(turns))",
        "tests/chat/test_chat.py",
    ),
    Fault(
        "qwen_jax/chat/conversation.py",
        "turns[replied[-1] - 1 if replied else -1]",
        "turns[0]",
        "tests/chat/test_conversation.py",
    ),
    Fault(
        "qwen_jax/chat/markers.py",
        "            if marker is None and begins and not last:",
        "            if False:",
        "tests/chat/test_replies.py",
    ),
    Fault(
        "qwen_jax/attention/prove.py",
        "right = error <= agreement.TOLERANCE[case.dtype]",
        "right = True",
        "tests/attention/test_prove.py",
    ),
    Fault(
        "train/run/loop.py",
        '        self._save(position, state)\n        return f"the state',
        '        return f"the state',
        "tests/train/run/test_run.py -k none_stops",
    ),
    Fault(
        "qwen_jax/attention/ring.py",
        "shares = jnp.exp(lse - largest)",
        "shares = jnp.exp(lse - largest + 0.01 * (lse == largest))",
        "tests/attention/test_cache.py tests/attention/test_ring.py",
    ),
    Fault(
        "qwen_jax/runtime/errors.py",
        "        or _devices(error, words)\n",
        "",
        "tests/runtime/test_command.py",
    ),
    Fault(
        "qwen_jax/checkpoint/adapter_config.py",
        "return any(own(path) != common for path in self.paths)",
        "return False",
        "tests/leaves/test_lora.py -k refused_by_name",
    ),
    Fault(
        "train/data/shared_cache.py",
        "mine = [n for n in range(share, len(parts), shares)",
        "mine = [n for n in range(share, len(parts) - 1, shares)",
        "tests/train/data/test_packing.py -k share_the",
    ),
    Fault(
        "qwen_jax/meshes/gathering.py",
        "places.append(P(joined(first), *others, reduced=summed))\n    for name",
        "places.append(P(joined(first), *others))\n    for name",
        "tests/meshes/test_sharding.py tests/train/step/test_step_collectives.py",
    ),
    Fault(
        "qwen_jax/generate/description.py",
        "        if new > left:",
        "        if new > left + 1:",
        "tests/generate/test_language_model.py -k room",
    ),
    Fault(
        "qwen_jax/checkpoint/safetensors_header.py",
        "            if begin != position:",
        "            if begin < position:",
        "tests/convert/test_convert_input.py -k bad_source",
    ),
    Fault(
        "train/run/recipes.py",
        "        if self.rows % self.accumulate:",
        "        if False:",
        "tests/train/run/test_run.py tests/train/step/test_step.py -k 'recipe or parts'",
    ),
    Fault(
        "qwen_jax/attention/pages.py",
        "        page = jnp.where(places.count > 0, page, 0)\n",
        "",
        "tests/engine/test_engine.py",
    ),
    Fault(
        "qwen_jax/attention/pages.py",
        "    new = jnp.where(jnp.isfinite(new), new, 0)\n",
        "",
        "tests/attention/test_pages.py",
    ),
    Fault(
        "qwen_jax/engine/scheduler.py",
        "return found[: len(found) // pages * pages]",
        "return found",
        "tests/engine/test_engine.py tests/engine/test_scheduler.py",
    ),
    Fault(
        "qwen_jax/engine/scheduler.py",
        "            self.forced[row.index] = row.request.tokens[number]",
        "            pass",
        "tests/engine/test_engine.py tests/engine/test_scheduler.py",
    ),
    Fault(
        "qwen_jax/engine/scheduler.py",
        "        self._oldest_first[replica] = not self._oldest_first[replica]\n",
        "",
        "tests/engine/test_scheduler.py",
    ),
    Fault(
        "qwen_jax/engine/running_request.py",
        "identity = alpha, settings.salt, settings.adapter",
        "identity = settings.salt, settings.adapter",
        "tests/engine/test_engine.py",
    ),
    Fault(
        "qwen_jax/engine/drawing.py",
        "add = jnp.where(active, 2, 0)",
        "add = 2",
        "tests/engine/test_engine.py",
    ),
    Fault(
        "qwen_jax/engine/drawing.py",
        "    return jax.lax.cond(jnp.any(on), some, lambda scores: scores, scores)",
        "    return jax.lax.cond(jnp.any(on), change, lambda scores: scores, scores)",
        "tests/engine/test_engine.py",
    ),
    Fault(
        "qwen_jax/serve/gate.py",
        "hmac.compare_digest(given, known) for known in self._keys",
        "True for known in self._keys",
        "tests/serve/test_limits.py",
    ),
    Fault(
        "qwen_jax/serve/connection.py",
        "return_when=asyncio.FIRST_COMPLETED",
        "return_when=asyncio.ALL_COMPLETED",
        "tests/serve/test_server.py -k goes_takes",
    ),
    Fault(
        "qwen_jax/serve/jobs.py",
        "                if job.after is None:\n                    self._submit(job)",
        "                self._submit(job)",
        "tests/serve/test_api.py -k n_replies",
    ),
    Fault(
        "qwen_jax/serve/drafts.py",
        "        rest = self._stream.flush()",
        '        rest = ""',
        "tests/serve/test_streams.py",
    ),
    Fault(
        "qwen_jax/serve/grammars.py",
        "[rule, *(rule.copy() for _ in range(count - 1))]",
        "[rule] * count",
        "tests/serve/test_grammars.py",
    ),
    Fault(
        "qwen_jax/serve/chats.py",
        'if not calls or draft.reason == "length":',
        "if not calls:",
        "tests/serve/test_tool_calls.py",
    ),
    Fault(
        "qwen_jax/serve/server.py",
        "        if self._served.draining and not self._served.answering:",
        "        if self._served.draining:",
        "tests/serve/test_server.py",
    ),
    Fault(
        "qwen_jax/quantise/factor.py",
        "return hessian + last * mean * identity, root, known",
        "return hessian + last * identity, root, known",
        "tests/quantise/test_algorithm.py -k damped_hessian",
    ),
    Fault(
        "qwen_jax/quantise/grid.py",
        "/ 2 ** (bits + 1)",
        "/ 2**bits",
        "tests/quantise/test_algorithm.py -k best_of",
    ),
    Fault(
        "qwen_jax/quantise/quality.py",
        "start_index=start",
        "start_index=0",
        "tests/quantise/test_quality.py",
    ),
    Fault(
        "qwen_jax/quantise/calibration.py",
        "itertools.islice(packed, _CHOICE * most)",
        "itertools.islice(packed, most)",
        "tests/quantise/test_calibration.py",
    ),
    Fault(
        "qwen_jax/quantise/run.py",
        "zip(self.stream, self.calibration",
        "zip(self.float_stream, self.calibration",
        "tests/quantise/test_run.py -k inputs_are",
    ),
    Fault(
        "qwen_jax/quantise/run.py",
        "counted=moves.place(real & (part.segments > 0)",
        "counted=moves.place(part.segments > 0",
        "tests/quantise/test_run.py -k filled_up",
    ),
    Fault(
        "qwen_jax/quantise/output.py",
        "if not (self.root / REPORT).exists():",
        "if not self._check(resume=True):",
        "tests/quantise/test_run.py -k died_early",
    ),
    Fault(
        "qwen_jax/leaves/grouped.py",
        "return math.gcd(group_size, inputs // parts)",
        "return group_size",
        "tests/leaves/test_grouped.py -k shards_do_not_cut",
    ),
    Fault(
        "qwen_jax/leaves/grouped_calls.py",
        "return jax.lax.psum(part, divided)",
        "return part",
        "tests/leaves/test_grouped.py -k through_a_kernel",
    ),
    Fault(
        "qwen_jax/kernels/grouped_xla.py",
        "(_field(words, j, bits) - zero[:, None]) * scale[:, None]",
        "_field(words, j, bits) * scale[:, None]",
        "tests/kernels/test_grouped_xla.py -k gradient",
    ),
    Fault(
        "qwen_jax/kernels/grouped_tpu.py",
        "size = inputs // groups if groups > 1 else round_up(inputs, _DEPTH)",
        "size = _DEPTH",
        "tests/leaves/test_grouped.py -k a_decoder_through_a_kernel",
    ),
    Fault(
        "qwen_jax/generate/integer_products.py",
        "if own < floats:",
        "if own > 0:",
        "tests/generate/test_integers.py -k faster",
    ),
    Fault(
        "convert/gptq.py",
        'words = qzeros + ones(bits) if convention == "v1" else qzeros',
        "words = qzeros",
        "tests/convert/test_gptq.py -k gptqmodel",
    ),
    Fault(
        "convert/gptq.py",
        "        codes <<= np.uint32(place * bits)\n",
        "",
        "tests/convert/test_gptq.py -k byte_for_byte",
    ),
    Fault(
        "convert/gptq_settings.py",
        'return asked or ("v2" if own else "v1")',
        'return asked or "v1"',
        "tests/convert/test_gptq.py -k convention",
    ),
    Fault(
        "qwen_jax/checkpoint/kinds.py",
        "repeat=field.repeat,",
        "repeat=1,",
        "tests/generate/test_integers.py -k mesh_cuts",
    ),
    Fault(
        "qwen_jax/quantise/__main__.py",
        "found.pop(pattern, None)",
        "pass",
        "tests/quantise/test_quantise_command.py -k options",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(
        description="Faults put in by hand, which the quick tests must catch."
    )
    parser.add_argument("module", nargs="*", help="of the package, e.g. qwen_jax/model/rope.py")
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
    """Copy the files that git tracks, in their present state, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def outcome(fault: Fault, tree: Path) -> str:
    """Run the tests on the tree with the fault; returns whether it is caught. The fault is then
    removed.
    """
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
