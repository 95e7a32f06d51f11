"""The speed of a training step, and how close it comes to the device's matrix products.

    python benchmarks/train.py                                          # on a CPU: a small model
    python benchmarks/train.py --torch-python .venv-torch/bin/python    # beside torch
    python benchmarks/train.py --vocab 151936 --layers 4 --length 1024  # another small model
    python benchmarks/train.py --lora 64                                # adapters alone
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python benchmarks/train.py --profile trace   # on a GPU

On a GPU or TPU the models are the 1.8B and the 7B, with as many layers as fit into memory, at 2048
and 8192 tokens, in bfloat16 with float32 weights and moments. On a CPU everything is float32, and
the ratio to torch is printed if --torch-python names an environment with it (`torch_qwen.py` says
how to make one): eager or compiled, whichever is faster. Both begin with the same weights, and
nothing is timed before their first losses and gradient norms agree.

There is one line for each model, length and kind of step: `full`, `projections` and `none` say what
the backward pass recomputes (`none` stores everything, as torch does). `of product` relates the
FLOPs that the model needs, without recomputation, to a large matrix product timed in the same run.
Everything takes turns, a step at a time; figures are medians over rounds, `to torch` the median of
each round's ratio. Nothing else should run on the device.

--profile also prints the time by scope and pass. On a GPU, kernels in a CUDA graph may have no name
there; XLA_FLAGS=--xla_gpu_enable_command_buffer= turns graphs off.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: this folder has a `train`, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks import section
from benchmarks.generate import processor
from qwen_jax import meshes, model
from qwen_jax.attention import prove, timing
from qwen_jax.checkpoint import adapter_config
from qwen_jax.config import Config
from qwen_jax.config.presets import PRESETS
from qwen_jax.kernels import choice
from qwen_jax.leaves.weights import named_leaves
from qwen_jax.meshes import hardware
from qwen_jax.model import lora
from qwen_jax.runtime import caches, command, progress
from train import step
from train.data.batch import Batch
from train.data.batches import batch_of, place
from train.run import parameters, recipes
from train.step import Optimizer

SMALL = "small"
TORCH = Path(__file__).with_name("torch_train.py")
COLUMNS = (
    "model", "T", "rows", "step", "ms (fastest, slowest)", "tokens/s", "of product", "memory",
    "to torch",
)  # fmt: skip
CHECKED = 3  # steps whose losses and norms must agree
# Relative, for a loss and a gradient norm. In bfloat16, recomputed values are rounded differently.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}
_STATE_BYTES = 16  # per trained weight: the weight, its gradient and two moments in float32
_STATE_SHARE = 0.75  # of the memory; the rest is for activations and temporaries
# Named scopes of a step, by a part of an operation's name.
SCOPES = {
    "attention": "attention",
    "feed_forward": "feed_forward",
    "vocabulary": "vocabulary",
    "optimizer": "optimizer",
    "_embed": "embedding",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to time. rank: of the adapters, 0 to train all weights."""

    name: str
    config: Config
    rows: int
    length: int
    dtype: str
    attention: str
    rank: int

    @property
    def tokens(self) -> int:
        """The tokens of a step."""
        return self.rows * self.length

    def flops(self) -> float:
        """The FLOPs that the model needs for a step."""
        adapters = dataclasses.replace(
            recipes.sft_lora(), lora_rank=self.rank, train_embeddings=False
        )
        trained = parameters.abstract(self.config, adapters if self.rank else None)
        return self.tokens * trained.flops_per_token(self.length)

    def batch(self) -> Batch:
        """A batch of random tokens on the host, every one with a target."""
        ids = np.random.default_rng(0).integers(
            0, self.config.vocab_size, (self.rows, self.length + 1)
        )
        return jax.tree.map(lambda x: x[:, :-1], batch_of(ids, ids))


class Row(NamedTuple):
    """The cells of a line, under COLUMNS."""

    model: str
    length: str
    rows: str
    step: str
    milliseconds: str
    rate: str
    share: str
    memory: str
    ratio: str


class Ours:
    """This project's step with each remat policy, on one shared state: a second would not fit a
    GPU.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.optimizer = case, Optimizer()
        self.batch = place(case.batch())
        self.base = _decoder(case.config, case.dtype) if case.rank else None
        self.state: Any = None
        self._start = jax.jit(
            lambda weights: step.state_of(weights, self.optimizer), donate_argnums=0
        )
        self.programs: dict[str, Any] = {}

    def begin(self) -> None:
        """Create the state before the first step; the last state is freed first."""
        self.state = None
        config, rank = self.case.config, self.case.rank
        weights = _adapters(config, rank, self.base) if rank else _decoder(config, "float32")
        self.state = self._start(weights)

    def compile(self, remat: str) -> None:
        """Compile the step with a remat policy."""

        def attach(weights: Any, base: Any, key: Any) -> Any:
            return lora.attach(base, weights)

        run = step.make_step(
            self.optimizer,
            self._attend(),
            dtype=self.case.dtype,
            remat=remat,
            attach=attach if self.case.rank else None,
        )
        self.programs[remat] = run.lower(self.state, self.batch, self.base).compile()

    def _attend(self) -> Callable[..., Any]:
        """The attention implementation of the case."""
        case = self.case
        calls = prove.passes(
            case.config, case.dtype, rows=case.rows, length=case.length, backward=True
        )
        return prove.resolve(case.attention, calls)

    def step(self, remat: str) -> Any:
        """Take a step; returns its report."""
        self.state, report = self.programs[remat](self.state, self.batch, self.base)
        return report

    def first(self, remat: str) -> list[tuple[float, float]]:
        """Losses and gradient norms of the first steps."""
        self.begin()
        reports = [self.step(remat) for _ in range(CHECKED)]
        return [(float(x.metrics.loss), float(x.gradient_norm)) for x in reports]

    def memory(self, remat: str) -> float:
        """The bytes that a step needs, as reported by the compiler; the state is counted once."""
        found = self.programs[remat].memory_analysis()
        both = found.argument_size_in_bytes + found.output_size_in_bytes
        return both - found.alias_size_in_bytes + found.temp_size_in_bytes


class Torch:
    """torch's step, in a process of its own that waits for orders."""

    def __init__(self, python: str, file: Path) -> None:
        argv = [python, str(TORCH), str(file), "--threads", str(threads())]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()["torch"]

    def _answer(self) -> dict[str, Any]:
        """Read an answer. Raises ValueError if it is an error, or the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the torch process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def order(self, line: str) -> dict[str, Any]:
        """Send an order, and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def first(self, way: str) -> list[tuple[float, float]]:
        """Losses and gradient norms of the first steps. way: "eager" or "compiled"."""
        self.order("begin")
        answer = self.order(f"{way} {CHECKED}")
        return list(zip(answer["losses"], answer["norms"], strict=True))

    def end(self) -> None:
        """Close the process."""
        self.process.communicate()


def threads() -> int:
    """The number of processors that this process may use; jax uses as many, and so does
    torch here.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decoder(config: Config, dtype: str) -> Any:
    """Random weights, with stacked layers."""
    return step.stacked(model.create(config, jax.random.key(0), dtype=dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adapters(config: Config, rank: int, base: Any) -> Any:
    """Random adapters of this rank for all projections of the base."""
    groups = adapter_config.targets(("c_attn", "c_proj", "w1", "w2"), config.num_layers)
    return lora.create(base, groups, rank=rank, alpha=16, key=jax.random.key(1))


def write(case: Case, path: Path) -> None:
    """Write the weights, batch and settings that the torch process begins with."""
    arrays = {
        k: np.asarray(x[...]) for k, x in named_leaves(_decoder(case.config, "float32")).items()
    }
    batch, optimizer = case.batch(), Optimizer()
    arrays |= {"tokens": batch.tokens, "targets": batch.targets}
    settings = {
        "head_dim": case.config.head_dim,
        "eps": case.config.norm_eps,
        "rope_base": case.config.rope_base,
        "adam_eps": optimizer.eps,
        **{
            name: getattr(optimizer, name)
            for name in ("learning_rate", "b1", "b2", "weight_decay", "clip_norm")
        },
    }
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(arrays, path, {"settings": json.dumps(settings)})


@contextlib.contextmanager
def rival(python: str | None, case: Case) -> Iterator[Torch | None]:
    """The torch process, for as long as the context lasts; None without a `python`."""
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "begin.safetensors")
        write(case, file)
        other = Torch(python, file)
        file.unlink()
        try:
            yield other
        finally:
            other.end()


def difference(
    got: list[tuple[float, float]], wanted: list[tuple[float, float]]
) -> tuple[float, float]:
    """The largest relative difference of losses, and of norms; inf if one is not finite."""
    pairs = np.array(got, np.float64), np.array(wanted, np.float64)
    worst = np.max(np.abs(pairs[0] - pairs[1]) / np.abs(pairs[1]), axis=0)
    loss, norm = (float(x) if np.isfinite(x) else float("inf") for x in worst)
    return loss, norm


def same(name: str, got: Any, wanted: Any, dtype: str) -> None:
    """Print how far the first steps differ. Raises ValueError if that is too far."""
    found = difference(got, wanted)
    line = f"{name}: first {CHECKED} losses differ by {found[0]:.1e}, norms by {found[1]:.1e}"
    if not all(x <= most for x, most in zip(found, TOLERANCE[dtype], strict=True)):
        raise ValueError(f"{line}: not the same step")
    command.say(line)


def measure(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each program, by round; in a round each takes its turn. A first call of
    each does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in progress.bar(
        range(rounds + 1), unit="round", disable=len(programs) < 2, leave=False
    ):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def rows(case: Case, remats: list[str], python: str | None, rounds: int, trace: Any) -> list[Row]:
    """Check the kinds of steps against each other, time them, and return their lines."""
    ours = Ours(case)
    ours.begin()
    wanted, works = None, []
    for remat in remats:
        try:
            ours.compile(remat)
            got = ours.first(remat)
        except Exception as error:  # compilers and allocators fail in ways of their own
            command.say(f"{case.name}: not {remat}: {' '.join(str(error).split())[:200]}")
            ours.begin()
            continue
        wanted = wanted or got
        same(f"{case.name}, {remat}", got, wanted, case.dtype)
        works.append(remat)
    if wanted is None:
        return []
    programs: dict[str, Callable[[], Any]] = {
        remat: functools.partial(ours.step, remat) for remat in works
    }
    version, ways = "", []
    with rival(python, case) as other:
        if other is not None:
            version = other.version
            for way in ("eager", "compiled"):
                try:
                    got = other.first(way)
                except ValueError as error:
                    command.say(f"not torch {way}: {' '.join(str(error).split())[:200]}")
                    continue
                same(f"torch {version}, {way}", got, wanted, case.dtype)
                ways.append(f"torch {way}")
                programs[ways[-1]] = functools.partial(other.order, f"{way} 1")
        product, amount = timing.product(case.dtype)
        calls = max(1, round(0.2 / _seconds(product)))  # long enough to average out other load
        programs["product"] = lambda: [product() for _ in range(calls)][-1]
        times = measure(programs, rounds)
        if trace is not None:
            for remat in works:
                profile(ours, remat, trace / f"{case.name}-{case.length}-{remat}")
    return lines(case, times, calls * amount, {x: ours.memory(x) for x in works}, ways)


def _seconds(program: Callable[[], Any]) -> float:
    """The median seconds of a call."""
    return statistics.median(measure({"": program}, 5)[""])


def lines(
    case: Case, times: dict[str, list[float]], flops: float, memory: dict[str, float], ways: Any
) -> list[Row]:
    """The lines of a case.

    times: seconds of each program by round; flops: of a call of the product; memory: bytes of each
        of this project's programs; ways: the names of torch's programs.
    """
    seconds = {name: statistics.median(each) for name, each in times.items()}
    peak = flops / seconds.pop("product")
    fastest = min(ways, key=lambda way: seconds[way], default=None)
    result = []
    for name, each in seconds.items():
        rounds = times[name]
        against = times[fastest] if fastest else []
        ratios = [x / y for x, y in zip(against, rounds, strict=False)]
        result.append(
            Row(
                f"{case.name}, {case.config.num_layers} layers",
                str(case.length),
                str(case.rows),
                f"lora {case.rank}, {name}" if case.rank else name,
                f"{1e3 * each:.4g} ({1e3 * min(rounds):.4g}, {1e3 * max(rounds):.4g})",
                f"{case.tokens / each:.4g}",
                f"{100 * case.flops() / each / peak:.1f} %",
                f"{memory[name] / 1e9:.2f} GB" if name in memory else "",
                f"{statistics.median(ratios):.2f}" if ratios else "",
            )
        )
    what = f"{peak / 1e12:.4g} TFLOP/s"
    result.append(Row("", "", "", "a product", "", what, "100 %", "", ""))
    return result


def profile(ours: Ours, remat: str, folder: Path, steps: int = 3) -> None:
    """Record a few steps for TensorBoard, xprof or Perfetto, and print where their time goes."""
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            jax.block_until_ready(ours.step(remat))
    command.say(f"trace of {steps} steps: {folder}")
    file = max(folder.rglob("*.xplane.pb"), key=lambda x: x.stat().st_mtime)
    found = by_scope(file, ours.programs[remat].as_text())
    total = sum(found.values())
    for (scope, part), seconds in found.most_common():
        command.say(
            f"{scope:12} {part:10} {1e3 * seconds / steps:9.3f} ms {100 * seconds / total:5.1f} %"
        )


def by_scope(file: Path, program: str) -> Counter[tuple[str, str]]:
    """Seconds of a trace by (scope, pass), summed over the threads of a CPU.

    program: the compiled program as text, which has the scope of each operation.
    """
    lines = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", program, re.MULTILINE)
    scopes = {name: _scope(rest) for name, rest in lines}
    found: Counter[tuple[str, str]] = Counter()
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    with warnings.catch_warnings():
        # jaxlib's types of statistics warn on Python 3.12; as an error, that ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in (e for plane in planes for line in plane.lines for e in line.events):
            name = str(dict(event.stats).get("hlo_op", ""))
            # The time of a loop is counted by the operations in it.
            if name and not name.startswith(("while", "conditional")):
                found[scopes.get(name, ("other", ""))] += event.duration_ns / 1e9
    return found


def _scope(instruction: str) -> tuple[str, str]:
    """The scope and the pass of a line of HLO."""
    (name,) = re.findall(r'op_name="([^"]*)"', instruction)[:1] or [""]
    scope = next((x for part, x in SCOPES.items() if part in name), "other")
    if "rematted" in name:
        return scope, "again"
    if "transpose(" in name:
        return scope, "backward"
    return scope, "forward" if "jvp(" in name else ""


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments select."""
    on_cpu = choice.device().platform == "cpu"
    chip = hardware.of_kind(choice.device().device_kind)
    result = []
    for name in args.model or ([SMALL] if on_cpu else ["qwen-1.8b", "qwen-7b"]):
        config = small(args.hidden) if name == SMALL else PRESETS[name]
        config = dataclasses.replace(config, vocab_size=args.vocab or config.vocab_size)
        layers = args.layers or _layers_that_fit(config, bool(args.lora))
        config = dataclasses.replace(config, num_layers=layers)
        for length in args.length or ([512] if on_cpu else [2048, 8192]):
            tokens = args.tokens or (1024 if on_cpu else 32768)
            dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
            # Not "auto", which may choose the reference: the kernel is to be measured.
            attend = args.attention or (chip.kernel if chip else "auto")
            rows = max(1, tokens // length)
            result.append(Case(name, config, rows, length, dtype, attend, args.lora))
    return result


def small(hidden: int) -> Config:
    """A Qwen of this width with 4 layers and 32768 tokens; everything else is as in the 1.8B."""
    like = PRESETS["qwen-1.8b"]
    head_dim = min(like.head_dim, hidden // 2)
    if hidden % 16 or hidden % head_dim:
        raise command.UsageError(f"--hidden {hidden}: a multiple of 16, above 256 of 128")
    return dataclasses.replace(
        like,
        vocab_size=32768,
        hidden_size=hidden,
        num_layers=4,
        num_heads=hidden // head_dim,
        num_kv_heads=hidden // head_dim,
        head_dim=head_dim,
        intermediate_size=hidden * like.intermediate_size // like.hidden_size,
    )


def _layers_that_fit(config: Config, frozen: bool) -> int:
    """As many layers as leave room for the rest, or all if the device reports no limit.

    frozen: whether only adapters are trained, which leaves room for all layers.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit or frozen:
        return config.num_layers
    one = dataclasses.replace(config, num_layers=1).num_params()
    two = dataclasses.replace(config, num_layers=2).num_params()
    fitting = (_STATE_SHARE * limit / _STATE_BYTES - one) / (two - one)
    return max(1, min(config.num_layers, 1 + int(fitting)))


def head(argv: list[str]) -> str:
    """Where and when this runs; the load is that before anything is timed."""
    here = choice.device()
    name = processor() if here.platform == "cpu" else here.device_kind
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return section.title("train.py", argv, f"{name}, {threads()} threads{load}")


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    summary, _, detail = (__doc__ or "").partition("\n\n")
    result = command.Parser(description=summary, epilog=detail)
    add, count = result.add_argument, {"type": command.positive, "metavar": "N"}
    names = [SMALL, *PRESETS]
    add("--model", nargs="+", choices=names, help="default: small on a CPU, else 1.8B and 7B")
    add("--length", nargs="+", help="default: 512 on a CPU, else 2048 8192", **count)
    add("--tokens", help="of a step; default: 1024 on a CPU, else 32768", **count)
    add("--layers", help="default: all, or as many as memory takes", **count)
    add("--hidden", default=512, help="width of the small model (default: %(default)s)", **count)
    add("--vocab", help="rows of the vocabulary; default: 32768 of the small model", **count)
    add("--lora", default=0, help="train adapters of that rank alone", **count)
    add("--dtype", choices=list(TOLERANCE), help="default: bfloat16, on a CPU float32")
    add("--attention", metavar="NAME", help="default: the kernel for the device")
    add("--remat", nargs="+", choices=list(step.REMAT), help="default: all; on a CPU full, none")
    add("--torch-python", metavar="PYTHON", help="of an environment with torch; on a CPU only")
    add("--rounds", default=9, help="default: %(default)s", **count)
    add("--profile", type=Path, metavar="DIR", help="record a trace of each step that is timed")
    add("--markdown", type=Path, metavar="FILE", help="write a section for docs/benchmarks.md")
    command.add_debug(result)
    return result


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Time the selected cases, and print a table."""
    on_cpu = choice.device().platform == "cpu"
    caches.use_compilation_cache()
    if args.profile:  # otherwise a cached program may have the scopes of another version
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    wanted = cases(args)
    if all(case.name != SMALL for case in wanted):
        command.refuse(args, ("hidden",), why=f"applies to the small model: add --model {SMALL}")
    if args.torch_python and (args.lora or {x.dtype for x in wanted} != {"float32"} or not on_cpu):
        raise command.UsageError("--torch-python: on a CPU, in float32, without --lora")
    title, found = head(argv), []
    print(f"{title}\n{'  '.join(COLUMNS)}", flush=True)
    remats = args.remat or (["full", "none"] if on_cpu else list(step.REMAT))
    with meshes.entered(meshes.make()):
        for case in wanted:
            new = rows(case, remats, args.torch_python, args.rounds, args.profile)
            gc.collect()  # a state in a reference cycle would occupy the next one's memory
            found += new
            for row in new:
                print("  ".join(filter(None, row)), flush=True)
            section.write(args.markdown, title, COLUMNS, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    return command.run(parser(), functools.partial(work, argv=given), argv=given)


if __name__ == "__main__":
    sys.exit(main())
