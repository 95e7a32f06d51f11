"""Output of the command line program: one text printed as it grows, or several in batches.

Texts go to stdout, with --json as one object per line; progress and rates go to stderr.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from qwen_jax.generate import completion
from qwen_jax.generate.completion import Request, Row, TextRules
from qwen_jax.generate.language_model import LanguageModel
from qwen_jax.runtime import command, processes, progress

_SHOWN = 60  # characters of a prompt in a heading


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A text to generate.

    index: the index of its prompt, from 0.
    sample: the index of this text among those of the prompt, from 0.
    prompt: the prompt as it was given.
    request: the prompt's token ids, with seed and limit.
    """

    index: int
    sample: int
    prompt: str
    request: Request


def report(task: TextTask, row: Row) -> dict[str, Any]:
    """Return the JSON object that --json prints for a text."""
    return {
        "index": task.index,
        "sample": task.sample,
        "seed": task.request.seed,
        "text": row.text,
        "tokens": row.tokens,
        "prompt_tokens": len(task.request.ids),
        "new_tokens": len(row.tokens),
        "finish_reason": row.finish_reason,
    }


def write_one(model: LanguageModel, task: TextTask, *, rules: TextRules, as_json: bool) -> None:
    """Generate one text and print it as it grows, or with `as_json` once it is complete."""
    started, times = time.perf_counter(), []
    row, request = Row(model.need_tokenizer(), rules), task.request

    def show(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    parts = model.stream(
        [request.ids],
        max_new_tokens=request.new,
        sampler=rules.sampler,
        stop=rules.stops,
        seed=request.seed,
        ntk=rules.ntk,
    )
    for part in parts:
        times.append((time.perf_counter(), part.shape[1]))
        show(row.push(part[0].tolist()))
        if row.stopped:
            break
    show(row.finish())
    result = (
        {"prompt": task.prompt}
        | report(task, row)
        | {
            "seconds_to_first_token": round(times[0][0] - started, 4),
            "decode_tokens_per_second": rate(times),
        }
    )
    if as_json:
        print(json.dumps(result))  # in ASCII, which every encoding of stdout has
        return
    print(flush=True)
    command.say(
        f"{result['prompt_tokens']} prompt tokens, first token after "
        f"{result['seconds_to_first_token']:.2f} s (compilation included); {result['new_tokens']} "
        f"new tokens, {result['decode_tokens_per_second'] or '-'} tokens/s; ended by "
        f"{result['finish_reason']}"
    )


def write_many(
    model: LanguageModel, wanted: Sequence[TextTask], *, rules: TextRules, width: int, as_json: bool
) -> None:
    """Generate several texts in batches of `width`, and print each batch once it is complete."""
    started, waiting, new = time.perf_counter(), iter(wanted), 0
    batches = completion.run(
        model, [task.request for task in wanted], rules=rules, batch_size=width
    )
    hidden = processes.index() > 0
    with progress.bar(
        desc="generate", total=len(wanted), unit="text", leave=False, disable=hidden
    ) as bar:
        for rows in batches:
            done = [(next(waiting), row) for row in rows]
            texts = [
                json.dumps({"prompt": task.prompt, **report(task, row)})
                if as_json
                else f"{_heading(task, wanted)}\n{row.text}\n"
                for task, row in done
            ]
            tqdm.write("\n".join(texts), file=sys.stdout)
            sys.stdout.flush()
            new += sum(len(row.tokens) for row in rows)
            bar.update(len(rows))
    seconds = time.perf_counter() - started
    command.say(
        f"{len(wanted)} texts, {new} new tokens in {seconds:.1f} s: {new / seconds:.1f} tokens/s "
        "(compilation included)"
    )


def _heading(task: TextTask, wanted: Sequence[TextTask]) -> str:
    """Return the line above a text: its prompt, with the numbers of prompt and sample if several.

    wanted: all tasks of the run.
    """
    last, shown = wanted[-1], " ".join(task.prompt.split())
    parts = []
    if last.index:
        parts.append(f"prompt {task.index + 1} of {last.index + 1}")
    if last.sample:
        of = f"sample {task.sample + 1} of {last.sample + 1}"
        parts.append(f"{of} (seed {task.request.seed})")
    if len(shown) > _SHOWN:
        shown = f"{shown[: _SHOWN - 3]}..."
    return f"=== {', '.join(parts)}: {shown}"


def rate(times: list[tuple[float, int]]) -> float | None:
    """Return tokens/s from pairs (time in s, number of tokens), or None for too few pairs.

    The first two pairs are left out, because they include compilation.
    """
    if len(times) < 3 or times[-1][0] == times[1][0]:
        return None
    return round(sum(count for _, count in times[2:]) / (times[-1][0] - times[1][0]), 2)
