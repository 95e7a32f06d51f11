"""Quantises a model block by block, holding the weights of one block at a time.

Two streams of activations pass through the model: that of the float model, and that of the
quantised one, whose inputs each matrix is rounded for. What is compared at the end are the
predictions of the two.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import meshes
from qwen_jax.attention import Attend, prove
from qwen_jax.config import Config
from qwen_jax.leaves.weights import Weight, map_leaves, named_leaves
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import rope, vocabulary
from qwen_jax.model.decoder import Block
from qwen_jax.model.norm import final_norm
from qwen_jax.quantise import algorithm, findings, matrices, observing, output, quality, schemes
from qwen_jax.quantise.algorithm import Scheme
from qwen_jax.quantise.calibration import Rows
from qwen_jax.quantise.observing import Batch
from qwen_jax.quantise.output import Output
from qwen_jax.quantise.source import Source
from qwen_jax.runtime import command

_AT_A_TIME = 4096  # tokens that pass through a block together, where no row is longer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does.

    ckpt, out: the directory of the model, and the one to write.
    scheme: how matrices are rounded.
    bits_of: other bits by a pattern of paths (`schemes.by_path`).
    int8_head: whether the head is stored in int8.
    dtype: the dtype that passes compute in.
    attention: a name of `attention.IMPLEMENTATIONS`.
    resume: whether to go on with unfinished work, or to accept what is whole.
    adapter: the folder of an adapter in PEFT's format that is merged into the model first; the
        directory may then be quantised. None for none.
    """

    ckpt: Path
    out: Path
    scheme: Scheme
    bits_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    int8_head: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    resume: bool = False
    adapter: Path | None = None


def run(settings: Settings, rows: Rows, *, held_out: Rows | None) -> dict[str, Any]:
    """Quantise a model on the mesh in force, and return the figures that its report has.

    rows: the calibration data.
    held_out: other rows, on which the two models are compared; None compares them on `rows`.

    Raises ValueError for input that cannot be used, before anything is written.
    """
    mesh = meshes.current()
    with meshes.entered(mesh):
        return _Run(settings, rows, held_out, mesh=mesh).run()


class _Run:
    """One run: the float model, the directory to write, and the streams of both models."""

    def __init__(self, settings: Settings, rows: Rows, held_out: Rows | None, *, mesh: Mesh):
        self.settings = settings
        self.source = Source(settings.ckpt, mesh, adapter=settings.adapter)
        self.config = config = self.source.config
        if sharding.axis_sizes(mesh)[sharding.CONTEXT] > 1:
            raise ValueError("a context axis is for training: quantise with fsdp, tp and data")
        if settings.int8_head and config.tie_embeddings:
            raise ValueError(f"{settings.ckpt} has no head of its own: leave out --head int8")
        compared = rows if held_out is None else held_out
        _check_rows(config, rows, compared)
        shapes = {path: tuple(leaf.shape) for path, leaf in self.source.leaves.items()}
        self.schemes = schemes.by_path(shapes, settings.scheme, bits_of=settings.bits_of)
        parts = math.prod(sharding.axis_sizes(mesh)[axis] for axis in sharding.BATCH)
        each = max(1, min(_AT_A_TIME // rows.length // parts, -(-len(rows) // parts))) * parts
        self.calibration = list(_batches(rows, config, size=each))
        self.measured = self.calibration
        if held_out is not None:
            self.measured = list(_batches(held_out, config, size=each))
        self.compared_on = "calibration rows" if held_out is None else "held-out rows"
        cases = prove.passes(config, settings.dtype, rows=each, length=rows.length)
        self.attend: Attend = prove.resolve(settings.attention, cases)
        facts = {
            **self.source.facts,
            "scheme": findings.scheme_facts(settings.scheme),
            "bits_of": dict(settings.bits_of),
            "head": "int8" if settings.int8_head else self.source.dtype,
            "dtype": settings.dtype,
            "rows": [rows.digest(), compared.digest()],
        }
        self.output = Output(
            settings.out,
            self.source,
            schemes=self.schemes,
            int8_head=settings.int8_head,
            mesh=mesh,
            facts=facts,
        )
        self.figures: dict[str, Any] = {
            **facts,
            "calibration_tokens": rows.counted,
            "compared_on": self.compared_on,
            "compared_tokens": compared.counted,
            "layers": {},
            "blocks": [],
            "complete": False,
        }

    @property
    def batches(self) -> list[Batch]:
        """All batches, those of calibration first."""
        return self.calibration + ([] if self.measured is self.calibration else self.measured)

    def run(self) -> dict[str, Any]:
        """Quantise the model, or go on where an earlier start was stopped."""
        if self.settings.resume and (found := self.output.made()) is not None:
            return found
        with self.output.begun(resume=self.settings.resume) as earlier:
            self.figures |= {key: earlier[key] for key in ("layers", "blocks") if key in earlier}
            self._embed()
            clock = findings.Clock(self.config.num_layers, done=len(self.figures["blocks"]))
            for number in range(self.config.num_layers):
                self._block(number, clock)
            self._ends()
            self.figures["complete"] = True
            self.output.note(self.figures)
            self.output.finish()
        return self.figures

    def _embed(self) -> None:
        """Look up the embeddings of all tokens, which both streams begin with."""
        embedding = self.source.weight("embedding")
        stored = self.source.stored("embedding", embedding)
        self.output.write("embedding", stored)
        self.float_stream, self.stream = (
            [
                vocabulary.look_up(table[...], batch.tokens, dtype=self.settings.dtype)
                for batch in self.batches
            ]
            for table in (embedding, stored)
        )

    def _block(self, number: int, clock: findings.Clock) -> None:
        """Quantise one block, or read it if it is done, and move both streams past it."""
        given = self.source.block(number)
        window = jnp.int32(self.source.decoder.windows[number])
        done = number < len(self.figures["blocks"])
        block = self._read(number, given) if done else self._rounded(number, given, window=window)
        passing = {"window": window, "config": self.config, "attend": self.attend}
        squares = np.zeros(2)
        measured = len(self.batches) - len(self.measured)
        for i, batch in enumerate(self.batches):
            x = observing.run_block(self.float_stream[i], given, batch=batch, **passing)
            y = observing.run_block(self.stream[i], block, batch=batch, **passing)
            self.float_stream[i], self.stream[i] = x, y
            if i >= measured:
                squares += moves.fetch(observing.difference(y, x, counted=batch.counted))
        _check_finite(f"block {number}: its output", squares)
        if not done:
            self.figures["blocks"].append(_relative(*squares))
            self.output.note(self.figures)
            command.say(clock.line(number, self.figures))

    def _read(self, number: int, given: Block) -> Block:
        """Return a block that an earlier start has quantised, with its matrices as floats."""

        def one(name: str, leaf: Weight) -> Weight:
            path = f"layers.{number}.{name}"
            if path not in self.schemes:
                return self.source.stored(path, leaf)
            found = self.output.rounded(path)
            return matrices.floats(found, leaf, dtype=self.settings.dtype)

        return map_leaves(one, given)

    def _rounded(self, number: int, given: Block, *, window: jax.Array) -> Block:
        """Round the matrices of a block and write them; return it with these as floats."""
        original = named_leaves(given)
        block = map_leaves(functools.partial(self._unrounded, number), given)
        for stage in schemes.STAGES:
            wanted = {name: f"layers.{number}.{name}" for name in stage}
            wanted = {name: path for name, path in wanted.items() if path in self.schemes}
            if not wanted:
                continue
            name = next(iter(wanted))
            hessian = algorithm.no_inputs(original[name].shape[1])
            for x, batch in zip(self.stream, self.calibration, strict=False):
                hessian = observing.observe(
                    hessian,
                    x,
                    block,
                    path=name,
                    batch=batch,
                    window=window,
                    config=self.config,
                    attend=self.attend,
                )
            made = {
                name: self._matrix(path, original[name], hessian=hessian)
                for name, path in wanted.items()
            }
            block = map_leaves(lambda name, leaf, made=made: made.get(name, leaf), block)
        for name, leaf in named_leaves(block).items():
            if (path := f"layers.{number}.{name}") not in self.schemes:
                self.output.write(path, leaf)
        return block

    def _unrounded(self, number: int, name: str, leaf: Weight) -> Weight:
        """Return a weight of a block as it is stored, if it is not one that is to be rounded."""
        path = f"layers.{number}.{name}"
        return leaf if path in self.schemes else self.source.stored(path, leaf)

    def _matrix(self, path: str, weight: Weight, *, hessian: algorithm.Hessian) -> Weight:
        """Round one matrix and write it; return it as floats."""
        scheme = self.schemes[path]
        found = matrices.rounded(weight, hessian, scheme=scheme)
        damping = float(moves.fetch(found.damping))
        error, output = (float(x) for x in moves.fetch(found.squares))
        _check_finite(f"{path}: its input", damping)
        _check_finite(f"{path}: the matrix", output)
        self.figures["layers"][path] = {
            "bits": scheme.bits,
            "relative_output_error": _relative(error, output),
            "damping": damping,
            "mean_squares": [error, output],
        }
        if damping > scheme.damping * 1.01:
            command.say(f"note: {path}: its damping was raised to {damping:.2g}")
        self.output.write(path, found.leaf)
        return matrices.floats(found.leaf, weight, dtype=self.settings.dtype)

    def _ends(self) -> None:
        """Write the final norm and the head, and compare the predictions of both models."""
        norm = self.source.weight("final_norm")
        self.output.write("final_norm", norm)
        path = "embedding" if self.config.tie_embeddings else output.HEAD
        float_head = self.source.weight(path)
        if self.settings.int8_head:
            head = output.int8_head(float_head)
        else:
            head = self.source.stored(path, float_head)
        if not self.config.tie_embeddings:
            self.output.write(output.HEAD, head)
        first = len(self.batches) - len(self.measured)
        totals = np.zeros(4)
        for batch, x, y in zip(
            self.measured, self.float_stream[first:], self.stream[first:], strict=True
        ):
            last = [final_norm(each, norm, eps=self.config.norm_eps) for each in (x, y)]
            found = quality.scores(
                *last,
                float_head=float_head,
                head=head,
                tokens=batch.tokens,
                targets=_targets(batch),
            )
            totals += [float(moves.fetch(each)) for each in jax.tree.leaves(found)]
        _check_finite("the head's output", totals)
        self.figures |= findings.comparison(*totals)


def _relative(error: float, output: float) -> float:
    """Return the square root of the ratio of two sums of squares; 0 if there are none."""
    return math.sqrt(error / output) if output else 0.0


def _check_finite(what: str, figures: float | np.ndarray) -> None:
    """Raise ValueError if a figure of something is not finite."""
    if not np.all(np.isfinite(figures)):
        raise ValueError(
            f"{what} is not finite: quantise with --dtype float32, or look for weights that are "
            "not finite"
        )


def _check_rows(config: Config, rows: Rows, compared: Rows) -> None:
    """Raise ValueError for token ids without an embedding, and for rows that predict no token.

    compared: the rows on which the models are compared.
    """
    if (largest := max(int(part.tokens.max()) for part in (rows, compared))) >= config.vocab_size:
        raise ValueError(
            f"the calibration data has token {largest}, and the model's vocabulary ends before "
            f"{config.vocab_size}: take the tokenizer of this model"
        )
    if not np.any(compared.positions):
        raise ValueError(
            "no row on which the models are compared has two tokens of one text: give longer "
            "texts, or a larger --length"
        )


def _batches(rows: Rows, config: Config, *, size: int) -> Iterator[Batch]:
    """Yield rows in batches of `size`, the last one filled up, on the mesh in force."""
    scheme = rope.from_config(config)
    rates = scheme.frequencies(scheme.alpha(np.array([rows.length])))
    frequencies = np.broadcast_to(rates, (size, rates.shape[-1])).astype(np.float32)
    for first in range(0, len(rows), size):
        part = rows.part(np.minimum(np.arange(first, first + size), len(rows) - 1))
        real = (np.arange(first, first + size) < len(rows))[:, None]
        yield Batch(
            tokens=moves.place(part.tokens, "BT"),
            positions=moves.place(part.positions, "BT"),
            segments=moves.place(part.segments, "BT"),
            counted=moves.place(real & (part.segments > 0), "BT"),
            frequencies=moves.place(frequencies, "BH"),
        )


@jax.jit
def _targets(batch: Batch) -> jax.Array:
    """Return bool [B, T], True for tokens that have a next one of their text in the row."""
    same = batch.segments == jnp.roll(batch.segments, -1, axis=1)
    last = jnp.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1
    return batch.counted & same & ~last
