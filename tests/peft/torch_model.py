"""A small decoder in torch under the original's module names, for PEFT to put adapters on.

It knows nothing of this library. Positions count from 0 and stay below the length at which dynamic
NTK and LogN set in.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig


class Settings(PretrainedConfig):
    model_type = "qwen"


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, rope_base: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * heads * head_dim)
        self.c_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.heads, self.rope_base = heads, rope_base

    def turn(self, x: Tensor) -> Tensor:
        """Rotary embedding: element i of a head turns with element i + half."""
        length, half = x.shape[-2], x.shape[-1] // 2
        rates = self.rope_base ** (-torch.arange(half) / half)
        angles = torch.arange(length)[:, None] * rates
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Layer(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        width, eps = settings["width"], settings["eps"]
        self.ln_1 = nn.RMSNorm(width, eps)
        self.attn = Attention(width, settings["heads"], settings["head_dim"], settings["rope_base"])
        self.ln_2 = nn.RMSNorm(width, eps)
        self.mlp = FeedForward(width, settings["inner"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(settings["vocabulary"], settings["width"])
        self.h = nn.ModuleList(Layer(settings) for _ in range(settings["layers"]))
        self.ln_f = nn.RMSNorm(settings["width"], settings["eps"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x)


class Model(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = Settings()
        self.transformer = Transformer(settings)
        self.lm_head = nn.Linear(settings["width"], settings["vocabulary"], bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.lm_head(self.transformer(input_ids))

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> Any:
        """PEFT asks every causal language model for one."""
        raise NotImplementedError
