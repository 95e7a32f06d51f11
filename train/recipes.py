"""What is trained, for how long and how: the published recipes, as functions of few arguments.

A recipe's values are those of Qwen's technical report (arXiv 2309.16609, "report"), where the
repository's memo differs those on request ("memo"), or those of its fine-tuning scripts ("script").
What no source states is said at each recipe. Knows no files, devices or programs.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.chat import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from train.step import Optimizer

BASE_DTYPES = ("same", "int8")
_TOKENS = 2048 * 2048  # of a batch of pretraining
# Learning rate and tokens seen: table 1 of the report. For 72B no rate is published.
_PRETRAINED = {"qwen-1.8b": 2.2e12, "qwen-7b": 2.4e12, "qwen-14b": 3e12, "qwen-72b": 3e12}
_CODE_RATES = {"qwen-7b": 3e-5, "qwen-14b": 6e-5}
_CODE_CHAT_RATES = {"qwen-7b": 1e-5, "qwen-14b": 2e-6}


def _about(text: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every field is an option of the commands, by its own name."""

    name: str = _about("what the run calls itself")
    data: str = _about('what records are: "text" or "chat"')
    length: int = _about("tokens of a row")
    rows: int = _about("rows of a batch, over all devices")
    learning_rate: float = _about("the highest")
    steps: int | None = _about("updates; None: by `epochs`", None)
    epochs: float | None = _about("how often every row is seen, where `steps` is None", None)
    warmup: float = _about("steps of linear warm-up; below 1, a share of all steps", 0.0)
    schedule: str = _about('after it: "cosine" or "constant"', "cosine")
    final: float = _about("what is left of the learning rate at the end of a cosine", 0.1)
    b1: float = _about("AdamW's beta 1", 0.9)
    b2: float = _about("AdamW's beta 2", 0.95)
    eps: float = _about("AdamW's epsilon", 1e-8)
    weight_decay: float = _about("of matrices", 0.1)
    clip_norm: float = _about("the largest global norm of the gradients", 1.0)
    dropout: float = _about("of embeddings, and of what blocks add", 0.0)
    z_loss: float = _about("weight of log(Z)^2 in what is minimised", 0.0)
    accumulate: int = _about("parts of a batch that are computed one after the other", 1)
    pack: str = _about('rows hold documents "joined", examples "fitted", or one "alone"', "fitted")
    too_long: str = _about('examples longer than a row: "cut" or "drop"', "cut")
    field: str = _about("where a record of text has its text", "text")
    loss_on: str = _about('of chats: "qwen", as the original, or "assistant"', "assistant")
    system: str = _about("system message of chats that have none", DEFAULT_SYSTEM)
    lora_rank: int = _about("of adapters; 0 trains all weights", 0)
    lora_alpha: float = _about("adapters add alpha / rank times their product", 16.0)
    lora_dropout: float = _about("of what goes into adapters", 0.05)
    lora_targets: tuple[str, ...] = _about(
        "modules that get adapters, as PEFT's target_modules: names, or one pattern",
        ("c_attn", "c_proj", "w1", "w2"),
    )
    train_embeddings: bool | None = _about(
        "with adapters: train embedding and head whole, too; None: if the model knows no ChatML",
        None,
    )
    dtype: str = _about("what steps compute in", "bfloat16")
    base_dtype: str = _about(
        'with adapters: what the weights below are kept in: "int8", or as `dtype` says "same"',
        "same",
    )
    moments: str = _about("what the optimizer's moments are kept in", "float32")
    gradient_dtype: str = _about(
        'what gradients are summed in over the mesh: "float32", or "bfloat16" if that is `dtype`',
        "float32",
    )
    remat: str = _about('what is recomputed: "full", "projections" or "none"', "full")
    sequence_parallel: bool = _about("split the residual over tp by tokens", False)
    attention: str = _about(
        "auto (kernels prove themselves on this device, once) or a name in docs/attention.md",
        "auto",
    )
    seed: int = _about("of fresh weights, the order of data, and dropout", 0)

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be, by name."""
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                said = ", ".join(allowed)
                raise ValueError(f"{name} {getattr(self, name)!r}: allowed are {said}")
        for name, (least, below) in _RANGES.items():
            value = getattr(self, name)
            # A rate that float32 rounds to 1 is 1.
            value = np.float32(value) if below == 1 else value
            if value is not None and not least <= value < below:
                limit = "" if below == float("inf") else f", and below {below:g}"
                raise ValueError(f"{name} {value:g}: a number, at least {least:g}{limit}")
        if self.rows % self.accumulate:
            raise ValueError(f"{self.rows} rows do not fall into {self.accumulate} parts")
        if self.gradient_dtype == "bfloat16" != self.dtype:
            raise ValueError(
                f"gradient_dtype 'bfloat16' with dtype {self.dtype!r}: what is computed in float32 "
                "is summed in float32"
            )

    def warmup_steps(self, steps: int) -> int:
        """Of a run of so many."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def schedule_of(self, steps: int) -> Callable[[Any], Any]:
        """The learning rate by step, for a run of so many."""
        import optax

        warm = self.warmup_steps(steps)
        peak = self.learning_rate
        begin = 0.0 if warm else peak  # optax stays where a warm-up of no steps begins
        if self.schedule == "constant":
            return optax.schedules.warmup_constant_schedule(begin, peak, warm)
        return optax.schedules.warmup_cosine_decay_schedule(
            begin, peak, warm, max(steps, warm + 1), self.final * peak
        )

    def optimizer(self, steps: int) -> "Optimizer":
        from train.step import Optimizer

        return Optimizer(
            self.schedule_of(steps),
            self.b1,
            self.b2,
            self.eps,
            self.weight_decay,
            self.clip_norm,
            self.moments,
        )


_FLOATS = ("float32", "bfloat16")  # float16 would lose small gradients, and their squares
_ALLOWED: dict[str, tuple[str, ...]] = {
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
_MOST, _LEAST = float("inf"), 1e-30  # the least is more than nothing
_INT32 = 2**31  # of what is counted
_RANGES: dict[str, tuple[float, float]] = {
    "length": (2, _INT32),
    "rows": (1, _INT32),
    "accumulate": (1, _INT32),
    "steps": (1, _INT32),
    "epochs": (_LEAST, _MOST),
    "learning_rate": (0, _MOST),
    "warmup": (0, _INT32),
    "final": (0, _MOST),
    "b1": (0, 1),
    "b2": (0, 1),
    "eps": (_LEAST, _MOST),
    "weight_decay": (0, _MOST),
    "clip_norm": (_LEAST, _MOST),
    "dropout": (0, 1),
    "z_loss": (0, _MOST),
    "lora_rank": (0, _INT32),
    "lora_alpha": (_LEAST, _MOST),
    "lora_dropout": (0, 1),
    "seed": (0, 2**32),
}


def pretrain(model: str = "", length: int = 2048, source: str = "report") -> Recipe:
    """Next-token prediction over documents, batches of 4 M tokens (sections 2.3 and 2.4).

    The memo alone has warm-up, weight decay and clipping; it has another epsilon. Steps are those
    that make up the published tokens of the model's size.
    """
    return Recipe(
        name="pretrain",
        data="text",
        length=length,
        rows=max(1, _TOKENS // length),
        learning_rate=3e-4,
        steps=round(_PRETRAINED.get(model, _PRETRAINED["qwen-7b"]) / _TOKENS),
        warmup=2000,
        eps=_eps(source),
        pack="joined",
    )


def sft(model: str = "", source: str = "report") -> Recipe:
    """Supervised fine-tuning on chats (section 3.1). After the warm-up no source states a shape:
    it is pretraining's.

    The memo has a higher learning rate. "script": all weights as the repository's
    `finetune_ds.sh` trains them, on one device: unpacked rows of 512, five epochs.
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
    """Adapters on chats, as the repository's `finetune_lora_single_gpu.sh`: a batch of 2 x 8 rows,
    the original's choice of trained tokens, rows that are not packed.
    """
    _of(source, script=None)
    return Recipe(
        name="sft_lora",
        data="chat",
        length=512,
        rows=16,
        learning_rate=3e-4,
        epochs=5,
        warmup=0.01,
        final=0.0,
        pack="alone",
        loss_on="qwen",
        lora_rank=64,
    )


def code(model: str = "qwen-7b", source: str = "report") -> Recipe:
    """Pretraining continued on 90 B tokens of text and code (section 4): 3 % warm-up, then a
    constant rate, published for 7B and 14B. No batch size is stated: it is pretraining's.
    """
    return dataclasses.replace(
        pretrain(model, 8192, source),
        name="code",
        learning_rate=_CODE_RATES.get(model, _CODE_RATES["qwen-7b"]),
        steps=round(90e9 / _TOKENS),
        warmup=0.03,
        schedule="constant",
    )


def code_chat(model: str = "qwen-7b", source: str = "report") -> Recipe:
    """Fine-tuning after `code` (section 4): a rate of its own, 3 % warm-up, then constant; what is
    not stated is as in `sft`.
    """
    _eps(source)
    return dataclasses.replace(
        sft(model, source),
        name="code_chat",
        learning_rate=_CODE_CHAT_RATES.get(model, _CODE_CHAT_RATES["qwen-7b"]),
        warmup=0.03,
        schedule="constant",
    )


def math(model: str = "", source: str = "report") -> Recipe:
    """Fine-tuning on mathematics (section 5): rows of 1024, 50 000 steps; else as `sft`."""
    _eps(source)
    return dataclasses.replace(
        sft(model, source), name="math", length=1024, learning_rate=2e-5, steps=50_000
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "pretrain": pretrain,
    "sft": sft,
    "sft_lora": sft_lora,
    "code": code,
    "code_chat": code_chat,
    "math": math,
}


def _eps(source: str) -> float:
    return _of(source, report=1e-8, memo=1e-6)


def _of(source: str, **values: Any) -> Any:
    """The value that a source states."""
    if source not in values:
        raise ValueError(f"source {source!r}: allowed here are {', '.join(values)}")
    return values[source]
