"""Recipes: all values that decide what a run trains, for how long and how.

Values are from Qwen's technical report (arXiv 2309.16609, "report"); where the memo in its
repository differs, from it on request ("memo"); or from its fine-tuning scripts ("script"). Each
recipe says which values no source states. Knows no files, devices or programs.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.chat import DEFAULT_SYSTEM
from qwen_jax.runtime import texts, values
from qwen_jax.runtime.command import ATTENTION

if TYPE_CHECKING:
    import optax

    from train.step import Optimizer

BASE_DTYPES = ("same", "int8")
_TOKENS = 2048 * 2048  # tokens of a batch of pretraining
# Learning rate and tokens seen: table 1 of the report. For 72B no rate is published.
_PRETRAINED = {"qwen-1.8b": 2.2e12, "qwen-7b": 2.4e12, "qwen-14b": 3e12, "qwen-72b": 3e12}
_CODE_RATES = {"qwen-7b": 3e-5, "qwen-14b": 6e-5}
_CODE_CHAT_RATES = {"qwen-7b": 1e-5, "qwen-14b": 2e-6}


def _about(text: str, default: object = dataclasses.MISSING) -> Any:
    """Make a field of `Recipe`. text: the help of its option, without the default."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides what a training run computes. Every field is an option of the commands."""

    name: str = _about("name of the recipe")
    data: str = _about('kind of the records: "text" or "chat"')
    length: int = _about("tokens per row, into which the data is cut or packed")
    rows: int = _about("rows per batch, over all devices together")
    learning_rate: float = _about("peak learning rate")
    steps: int | None = _about("number of updates, unless --epochs sets it", None)
    epochs: float | None = _about("number of passes over all rows, in place of --steps", None)
    warmup: float = _about(
        "steps in which the learning rate rises to its peak; below 1: this share of all steps", 0.0
    )
    schedule: str = _about(
        "learning rate after the warm-up: cosine (falls to --final) or constant (stays at its "
        "peak)",
        "cosine",
    )
    final: float = _about("learning rate at the cosine's end, as a share of the peak", 0.1)
    b1: float = _about("AdamW's beta 1, for the mean of gradients", 0.9)
    b2: float = _about("AdamW's beta 2, for the mean of their squares", 0.95)
    eps: float = _about("AdamW's epsilon", 1e-8)
    weight_decay: float = _about("AdamW's weight decay, of matrices only", 0.1)
    clip_norm: float = _about("global norm to which larger gradients are scaled down", 1.0)
    dropout: float = _about("dropout rate of the embeddings and of each branch's output", 0.0)
    z_loss: float = _about("add X log(Z)^2 to the loss, with Z the softmax's denominator", 0.0)
    accumulate: int = _about("accumulate the gradient over N parts of a batch", 1)
    pack: str = _about(
        "packing of examples into rows: joined (end to end, cut at row ends), fitted (as many "
        "whole ones as fit) or alone (one per row)",
        "fitted",
    )
    too_long: str = _about(
        "cut or drop examples that are longer than a row; not with --pack joined of documents",
        "cut",
    )
    field: str = _about("for documents: field of a record that holds its text", "text")
    loss_on: str = _about(
        "for chats: learn the replies alone (assistant), or like the original script also the "
        "control tokens of all turns (qwen)",
        "assistant",
    )
    system: str = _about("for chats: system message of a chat that has none", DEFAULT_SYSTEM)
    lora_rank: int = _about("train adapters of rank N; 0: train all weights", 0)
    lora_alpha: float = _about("scale the adapters' product by X / rank", 16.0)
    lora_dropout: float = _about("dropout rate of the adapters' input", 0.05)
    lora_targets: tuple[str, ...] = _about(
        "modules that get adapters: some of c_attn, c_proj, w1 and w2, or one regular expression, "
        "as PEFT's target_modules",
        ("c_attn", "c_proj", "w1", "w2"),
    )
    train_embeddings: bool | None = _about(
        "beside adapters, also train the whole embedding and head (default: yes for chats, if the "
        "generation_config.json of --ckpt names another chat format than ChatML)",
        None,
    )
    dtype: str = _about("compute in float32 or bfloat16", "bfloat16")
    base_dtype: str = _about(
        "store the frozen weights below adapters in int8, or in the dtype of --dtype (same)", "same"
    )
    moments: str = _about("store the optimizer's moments in float32 or bfloat16", "float32")
    gradient_dtype: str = _about(
        "sum gradients over devices in float32, or in bfloat16 if --dtype is that", "float32"
    )
    remat: str = _about(
        "recompute in the backward pass: full (all of a block), projections (all but the outputs "
        "of its projections) or none",
        "full",
    )
    sequence_parallel: bool | None = _about(
        "split the residual stream by tokens over tp (default: where tp divides --length)", None
    )
    attention: str = _about(
        f"implementation of attention; auto takes the fastest correct one here: {ATTENTION}", "auto"
    )
    seed: int = _about("seed of random weights, of the data's order and of dropout", 0)

    def __post_init__(self) -> None:
        """Raise ValueError naming the first field whose value is not allowed."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name, allowed in _ALLOWED.items():
            values.choice(name, getattr(self, name), allowed=allowed)
        for name, (least, below) in _RANGES.items():
            if (value := getattr(self, name)) is None:
                continue
            rounds_to_1 = below == 1 and 0 < value < 1 and np.float32(value) == 1
            if rounds_to_1 or not least <= value < below:
                limit = "" if below == _MOST else f", and below {below}"
                limit += " in float32" if below == 1 else ""
                shown = texts.shown(value)
                raise ValueError(f"{name} {shown}: a number, at least {least:g}{limit}")
        if self.steps is None and self.epochs is None:
            raise ValueError("steps None and epochs None: give one of them")
        if self.rows % self.accumulate:
            raise ValueError(
                f"rows {self.rows}, accumulate {self.accumulate}: {self.rows} rows do not fall "
                f"into {self.accumulate} parts: accumulate must divide rows"
            )
        if self.gradient_dtype == "bfloat16" != self.dtype:
            raise ValueError(
                f"gradient_dtype 'bfloat16' with dtype {self.dtype!r}: what is computed in float32 "
                "is summed in float32"
            )

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of `steps` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def schedule_of(self, steps: int) -> "optax.Schedule":
        """Return the learning rate as a function of the step, for a run of `steps` steps."""
        import optax

        warm = self.warmup_steps(steps)
        peak = self.learning_rate
        begin = 0.0 if warm else peak  # optax stays at the first value of a warm-up of 0 steps
        if self.schedule == "constant":
            return optax.schedules.warmup_constant_schedule(begin, peak, warm)
        return optax.schedules.warmup_cosine_decay_schedule(
            begin, peak, warm, max(steps, warm + 1), self.final * peak
        )

    def optimizer(self, steps: int) -> "Optimizer":
        """Make AdamW with this recipe's values, for a run of `steps` steps."""
        from train.step import Optimizer

        return Optimizer(
            self.schedule_of(steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            moments=self.moments,
        )


def kind_of(field: "dataclasses.Field[Any]") -> tuple[type, bool]:
    """Return the type of a recipe's field (`tuple` for tuples), and whether it may be None."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else ()
    (kind,) = [k for k in kinds if k is not types.NoneType] or [field.type]
    return typing.get_origin(kind) or kind, types.NoneType in kinds


def _checked(field: "dataclasses.Field[Any]", value: object) -> object:
    """Convert a field's value to the Python type of the field, or raise ValueError."""
    kind, optional = kind_of(field)
    if value is None and optional:
        return None
    if kind is tuple:
        names = values.instance(field.name, value, kind=(tuple, list))
        return tuple(texts.check(f"each of {field.name}", name) for name in names)
    check = {int: values.whole, float: values.number, bool: values.flag, str: texts.check}[kind]
    return check(field.name, value)


_FLOATS = ("float32", "bfloat16")  # float16 would lose small gradients, and their squares
_ALLOWED: dict[str, tuple[str, ...]] = {
    "data": ("text", "chat"),
    "schedule": ("cosine", "constant"),
    "pack": ("joined", "fitted", "alone"),
    "too_long": ("cut", "drop"),
    "loss_on": ("qwen", "assistant"),
    "base_dtype": BASE_DTYPES,
    "dtype": _FLOATS,
    "moments": _FLOATS,
    "gradient_dtype": _FLOATS,
    "remat": ("full", "projections", "none"),
}
_MOST, _LEAST = float("inf"), 1e-30  # bounds of a number; the second is the smallest above 0
_INT32 = 2**31  # the bound of counts
_FIELDS: dict[tuple[float, float], tuple[str, ...]] = {  # (least, below) -> fields
    (2, _INT32): ("length",),
    (1, _INT32): ("rows", "accumulate", "steps"),
    (0, _INT32): ("warmup", "lora_rank"),
    (0, 2**32): ("seed",),
    (0, 1): ("b1", "b2", "dropout", "lora_dropout"),
    (0, _MOST): ("learning_rate", "final", "weight_decay", "z_loss"),
    (_LEAST, _MOST): ("epochs", "eps", "clip_norm", "lora_alpha"),
}
_RANGES = {name: bounds for bounds, names in _FIELDS.items() for name in names}


def pretrain(model: str = "", *, length: int = 2048, source: str = "report") -> Recipe:
    """Make the recipe of pretraining on documents (sections 2.3 and 2.4 of Qwen's report).

    Batches have 4 M tokens. Only the memo states warm-up, weight decay and clipping, and its
    epsilon differs. The steps make up the published number of tokens for the model's size.
    """
    length = values.whole("length", length, least=2)
    return Recipe(
        name="pretrain",
        data="text",
        length=length,
        rows=max(1, _TOKENS // length),
        learning_rate=3e-4,
        steps=round(_of_size(model, _PRETRAINED) / _TOKENS),
        warmup=2000,
        eps=_eps(source),
        pack="joined",
    )


def sft(model: str = "", source: str = "report") -> Recipe:
    """Make the recipe of fine-tuning on chats (section 3.1 of Qwen's report).

    No source states the schedule after warm-up: it is that of pretraining. The memo has a higher
    learning rate. With source "script", all weights are trained as in Qwen's `finetune_ds.sh` on
    one device: unpacked rows of 512, five epochs.
    """
    if source == "script":
        return dataclasses.replace(sft_lora(), name="sft", learning_rate=1e-5, lora_rank=0)
    return Recipe(
        name="sft",
        data="chat",
        length=2048,
        rows=128,
        learning_rate=_of(source, report=2e-6, memo=1e-5),
        steps=4000,
        warmup=1430,
        eps=_eps(source),
        dropout=0.1,
    )


def sft_lora(model: str = "", source: str = "script") -> Recipe:
    """Make the recipe of training adapters on chats as Qwen's `finetune_lora_single_gpu.sh` does.

    Batches have 2 x 8 unpacked rows, and the loss is on the tokens that this script trains.
    """
    return Recipe(
        name="sft_lora",
        data="chat",
        length=512,
        rows=16,
        learning_rate=_of(source, script=3e-4),
        epochs=5,
        warmup=0.01,
        final=0.0,
        pack="alone",
        loss_on="qwen",
        lora_rank=64,
    )


def code(model: str = "qwen-7b", source: str = "report") -> Recipe:
    """Make the recipe of pretraining on 90 B tokens of text and code (section 4 of Qwen's report).

    The rate is constant after 3 % warm-up, and published for 7B and 14B. No source states the batch
    size: it is that of `pretrain`.
    """
    return dataclasses.replace(
        pretrain(model, length=8192, source=source),
        name="code",
        learning_rate=_of_size(model, _CODE_RATES),
        steps=round(90e9 / _TOKENS),
        warmup=0.03,
        schedule="constant",
    )


def code_chat(model: str = "qwen-7b", source: str = "report") -> Recipe:
    """Make the recipe of fine-tuning on chats after `code` (section 4 of Qwen's report).

    It has its own learning rate, constant after 3 % warm-up; all other values are those of `sft`.
    """
    _eps(source)
    return dataclasses.replace(
        sft(model, source),
        name="code_chat",
        learning_rate=_of_size(model, _CODE_CHAT_RATES),
        warmup=0.03,
        schedule="constant",
    )


def math(model: str = "", source: str = "report") -> Recipe:
    """Make the recipe of `sft` on mathematics (report, section 5): rows of 1024, 50 000 steps."""
    _eps(source)
    return dataclasses.replace(
        sft(model, source), name="math", length=1024, learning_rate=2e-5, steps=50_000
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe for recipe in (pretrain, sft, sft_lora, code, code_chat, math)
}


def _eps(source: str) -> float:
    """Return AdamW's epsilon, as the named source states it."""
    return _of(source, report=1e-8, memo=1e-6)


def _of(source: str, **stated: float) -> float:
    """Return the value that `source` states. Raises ValueError if `stated` has none of it."""
    if not isinstance(source, str) or source not in stated:
        raise ValueError(f"source {texts.shown(source)}: allowed here are {', '.join(stated)}")
    return stated[source]


def _of_size(model: str, published: Mapping[str, float]) -> float:
    """Return a hyperparameter for a model's size; for an unknown size, the 7B's.

    model: a name in `config.PRESETS`. published: the values that Qwen's sources state, by name.
    """
    return published.get(texts.check("model", model), published["qwen-7b"])
