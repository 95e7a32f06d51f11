"""One training run from start to finish: data, state and steps, resumable bit for bit.

    OUT/run.json          recipe, model and data of the run; a resumed run must match them
    OUT/files/            configuration and tokenizer, as they go into OUT/model
    OUT/checkpoints/      states with their position in the data (`checkpoints.py`)
    OUT/tokens/           encoded data, if hosts share no other disk (`shared_cache.py`)
    OUT/metrics.jsonl, OUT/events/      figures of each step (`logs.py`)
    OUT/model/            the trained model, written at the end

The order of data, dropout and fresh weights follow from the recipe's seed and the step alone, so a
state and a position are enough to resume from.
"""

import dataclasses
import hashlib
import json
import math
import shlex
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import attention, checkpoint, meshes
from qwen_jax.attention import prove
from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.checkpoint import directory
from qwen_jax.config import Config
from qwen_jax.meshes import sharding
from qwen_jax.runtime import command, processes, records
from train import data, step
from train.data import packing, shared_cache, token_cache
from train.data.batches import Batches
from train.data.packing import Rows
from train.run import advice, parameters, run_folder
from train.run.checkpoints import Checkpoints
from train.run.logs import EVENTS, Log
from train.run.loop import Loop, Settings, signals
from train.run.parameters import Adapted, Whole
from train.run.recipes import Recipe
from train.step import Optimizer, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and the recipe to train it by.

    recipe, config: the recipe, and the architecture of the model.
    ckpt: the model directory to start from; None for fresh weights.
    tokenizer, tokenizer_file: the tokenizer, and the file that it was read from.
    files: the data files to train on.
    held_out, share: the files to evaluate on, or else the share of examples to hold out for this.
    strict: whether to stop at a bad record.
    start: the facts about this start for run.json (`resuming.record`).
    """

    recipe: Recipe
    config: Config
    ckpt: Path | None
    tokenizer: Tokenizer
    tokenizer_file: Path
    files: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    share: float = 0.0
    strict: bool = False
    start: Mapping[str, object] = dataclasses.field(default_factory=dict)


def train(task: Task, settings: Settings) -> None:
    """Train by the recipe on the current mesh, until the last step or a signal.

    Raises ValueError for data, a model or a folder that cannot be used, and KeyboardInterrupt after
    Ctrl-C, once the state is saved.
    """
    with run_folder.locked(settings.out) as check:
        _train(_settled(task), settings, check=check)


def _train(task: Task, settings: Settings, *, check: Callable[[], None]) -> None:
    """Train by a settled task (`_settled`) in a folder that only this run uses (`check`)."""
    recipe, out = task.recipe, settings.out
    # Errors in these are raised before anything is encoded.
    attention.get(recipe.attention)
    trained = parameters.of(task.config, task.ckpt, recipe=recipe, merge=settings.merge)
    if processes.index() == 0:
        run_folder.check(out, settings.resume)
    rows, held_out = _rows(task, settings)
    steps = _steps(recipe, len(rows))
    _check_steps(steps, recipe, profile=settings.profile)
    optimizer = recipe.optimizer(steps)
    run, evaluate = _programs(task, optimizer, trained=trained)
    like = trained.abstract_state(optimizer)
    files = _claim(task, settings, rows=rows, steps=steps)
    checkpoints = Checkpoints(
        out / run_folder.CHECKPOINTS, settings.keep_last, best=settings.keep_best
    )
    if settings.resume and checkpoints.latest is not None:
        state, facts = checkpoints.restore(like)
        finished = checkpoints.latest == steps and run_folder.has_results(out)
        also = ", the last: the run was already finished" if finished else ""
        command.say(f"resumed from step {checkpoints.latest}{also}")
    else:
        _advise_at_step_0(task, settings, rows=rows)
        state, facts = trained.create_state(optimizer), {"position": 0}
    if said := advice.other_length(recipe, task.config, fresh=task.ckpt is None):
        command.say(said)
    command.say(f"curves: tensorboard --logdir {shlex.quote(str(out / EVENTS))}")
    position = facts["position"]
    evaluation_due = bool(facts.get("owed")) and held_out is not None
    if position < steps:
        processes.first(lambda: run_folder.remove_results(out))
    loop = Loop(
        settings=settings,
        run=run,
        evaluate=evaluate,
        base=trained.base,
        batches=Batches(rows, recipe.length, size=recipe.rows, seed=recipe.seed, position=position),
        held_out=held_out,
        held_out_rows=recipe.rows // recipe.accumulate,
        checkpoints=checkpoints,
        check=check,
        log=Log(out, position, steps=steps, evaluation_due=evaluation_due),
        steps=steps,
        position=position,
        tokens=recipe.rows * recipe.length * rows.efficiency,
        flops=trained.flops_per_token(recipe.length),
        evaluation_due=evaluation_due,
    )
    state = _run(loop, state)
    if state is not None:
        check()
        weights, loop.base = state.weights, None
        del state  # frees its moments, as is the base: a merged model may need their memory
        command.say(f"done: {trained.save(weights, out, files=files, merge=settings.merge)}")


def _check_steps(steps: int, recipe: Recipe, *, profile: tuple[int, int] | None) -> None:
    """Raise ValueError if the steps to profile come after the last; warn of too long a warm-up."""
    if profile and profile[0] > steps:
        first, last = profile
        raise ValueError(f"--profile-steps {first}-{last}: the run has {steps} steps")
    if (warm := recipe.warmup_steps(steps)) >= steps:
        command.say(f"warning: {warm} steps of warm-up in a run of {steps}: see --warmup")


def _programs(
    task: Task, optimizer: Optimizer, *, trained: Whole | Adapted
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Build the step and the evaluation of a task, with its recipe's implementation of attention.

    If the recipe says `auto`, the implementation is chosen here.
    """
    recipe, dtype = task.recipe, jnp.dtype(task.recipe.dtype)
    rows = recipe.rows // recipe.accumulate
    calls = prove.passes(task.config, dtype, rows=rows, length=recipe.length, backward=True)
    attend = prove.resolve(recipe.attention, calls)
    parallel = bool(recipe.sequence_parallel)  # `_settled` has decided it if the recipe has not
    run = step.make_step(
        optimizer,
        attend,
        dtype=dtype,
        remat=recipe.remat,
        sequence_parallel=parallel,
        accumulate=recipe.accumulate,
        z_loss=recipe.z_loss,
        dropout=recipe.dropout,
        seed=recipe.seed,
        attach=trained.attach,
        gradient_dtype=recipe.gradient_dtype,
    )
    return run, step.make_evaluation(
        attend, dtype=dtype, sequence_parallel=parallel, attach=trained.attach
    )


def _claim(task: Task, settings: Settings, *, rows: Rows, steps: int) -> Path:
    """Register the run in its folder; returns the folder's copies of the model's other files."""
    out, identity = settings.out, _identity(task, rows)
    # The other processes find the run that process 0 has registered.
    resume = settings.resume or processes.index() > 0
    start = {**task.start, "rows": len(rows)}
    processes.first(
        lambda: run_folder.claim(out, identity, steps=steps, resume=resume, start=start)
    )
    return processes.first(
        lambda: run_folder.write_files(
            out,
            ckpt=task.ckpt,
            config=task.config,
            tokenizer_file=task.tokenizer_file,
            end=task.tokenizer.eod_id,
            chat_format="chatml" if task.recipe.data == "chat" else "raw",
        )
    )


def _advise_at_step_0(task: Task, settings: Settings, *, rows: Rows) -> None:
    """Say that training begins at step 0 if it should have resumed, and what would waste less."""
    if settings.resume:
        command.say(f"{settings.out} has no checkpoint: training begins at step 0")
    if better := advice.less_waste(
        rows, task.recipe, sizes=sharding.axis_sizes(), platform=jax.default_backend()
    ):
        command.say(f"less work for the same examples: {'; '.join(better)}")


def _run(loop: Loop, state: State) -> State | None:
    """Run the loop from a state to its last step, and return the last state.

    Returns None if any process got a signal and the run stopped early. Raises KeyboardInterrupt
    after Ctrl-C.
    """
    with signals() as stop:
        try:
            state = loop.go(state, stop)
        finally:
            loop.log.close()
            loop.checkpoints.wait()
        stopped = loop.stopped(stop)
    loop.checkpoints.close()
    if not stopped:
        return state
    command.say(
        f"saved at step {loop.position}; --out {loop.settings.out} --resume goes on from there"
    )
    if stop.get("signal") == signal.SIGINT:
        raise KeyboardInterrupt
    return None


def _settled(task: Task) -> Task:
    """Return the task with the recipe's open fields decided for its model and the current mesh.

    These are whether the residual stream is split by tokens, and whether adapters also train the
    embeddings.
    """
    recipe = task.recipe
    parallel, why = meshes.splits_tokens(recipe.sequence_parallel, recipe.length)
    if sharding.axis_sizes()[sharding.TENSOR] > 1:
        command.say(f"sequence parallel: {'yes' if parallel else 'no'} ({why})")
    recipe = dataclasses.replace(recipe, sequence_parallel=parallel)
    task = dataclasses.replace(task, recipe=recipe)
    if not recipe.lora_rank or task.ckpt is None:
        return task
    settings = checkpoint.load_generation_config(task.ckpt)
    foreign = recipe.data == "chat" and settings.chat_format != "chatml"
    if recipe.train_embeddings is None:
        if foreign:
            command.say("the model has not seen ChatML: its embedding and head are trained, too")
        recipe = dataclasses.replace(recipe, train_embeddings=foreign)
    elif foreign and not recipe.train_embeddings:
        command.say(
            "warning: the model has not seen ChatML, and its control tokens stay as they are: "
            "without --train-embeddings it will hardly learn where replies end"
        )
    return dataclasses.replace(task, recipe=recipe)


def _rows(task: Task, settings: Settings) -> tuple[Rows, Rows | None]:
    """Encode and pack the data; return the rows to train on, and the held-out rows or None."""
    recipe = task.recipe
    encoding, common = _encoding(task), settings.out / run_folder.TOKENS

    def encoded(files: tuple[Path, ...]) -> token_cache.TokenCache:
        folder = settings.token_cache
        return shared_cache.make(
            files, task.tokenizer, encoding=encoding, folder=folder, common=common
        )

    cache = encoded(task.files)
    kept, out = packing.split(len(cache), task.share, seed=recipe.seed)
    rows = Rows(
        cache,
        recipe.length,
        pack=recipe.pack,
        seed=recipe.seed,
        examples=kept if len(out) else None,
    )
    held = f"; {len(out):,} examples held out" if len(out) else ""
    command.say(
        f"{len(rows):,} rows of {recipe.length} tokens, {rows.efficiency:.1%} of their places used"
        f"{held}"
    )
    if task.held_out:
        return rows, Rows(encoded(task.held_out), recipe.length, pack=recipe.pack)
    if len(out):
        return rows, Rows(cache, recipe.length, pack=recipe.pack, seed=0, examples=out)
    return rows, None


def _encoding(task: Task) -> token_cache.Encoding:
    """Return how records become examples: as documents or chats, as the recipe says."""
    recipe, tokenizer = task.recipe, task.tokenizer
    options = {"drop": recipe.too_long == "drop", "strict": task.strict}
    if recipe.data == "text":

        def text(record: records.Record) -> tuple[list[int], None]:
            ids = data.text_example(tokenizer, record.value, field=recipe.field, ends=record.ends)
            return ids, None

        name = {"data": "text", "field": recipe.field}
        longest = recipe.length if recipe.pack != "joined" else None
        return token_cache.Encoding(text, name, longest=longest, **options)

    def chat(record: records.Record) -> tuple[list[int], list[int]]:
        return data.chat_example(
            tokenizer, record.value, system=recipe.system, max_len=None, loss_on=recipe.loss_on
        )

    name = {"data": "chat", "system": recipe.system, "loss_on": recipe.loss_on}
    return token_cache.Encoding(chat, name, longest=recipe.length, **options)


def _steps(recipe: Recipe, rows: int) -> int:
    """Return the number of steps of a recipe over `rows` rows, given directly or as epochs."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None  # a recipe has one of the two
    steps = math.ceil(recipe.epochs * rows / recipe.rows)
    if steps >= 2**31:
        raise ValueError(f"{recipe.epochs:g} epochs are {steps:g} steps: an int32 counts them")
    return steps


def _identity(task: Task, rows: Rows) -> dict[str, Any]:
    """Return all that changes what a run computes, and must be equal for the run to resume."""
    recipe = dataclasses.asdict(task.recipe)
    for name in run_folder.ROUNDINGS:
        del recipe[name]
    if not (recipe["dropout"] or (recipe["lora_rank"] and recipe["lora_dropout"])):
        del recipe["accumulate"]  # without dropout, parts of a batch change roundings alone
    manifest = task.ckpt and (task.ckpt / directory.MANIFEST).read_bytes()
    identity = {
        "recipe": recipe,
        "config": task.config.to_hf(),
        "ckpt": manifest and hashlib.sha256(manifest).hexdigest(),
        "data": rows.fingerprint,
    }
    return json.loads(json.dumps(identity))
