"""A training step in plain torch, as the rival of `train.py`, which starts and controls this
process.

It knows nothing of this library: weights, batch and settings come in one safetensors file, orders
as lines on stdin, and answers go to stdout as lines of JSON. `begin` restores the weights of the
file; `eager N` and `compiled N` take N steps. The environment is that of `torch_qwen.py`.

It uses torch's fused operations where they exist: attention, RMSNorm, AdamW. The logits are
computed whole; `F.linear_cross_entropy` was not tried.
"""

# pyright: reportMissingImports=false
# torch is installed in the other environment only.

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of `x` [B, T, N, H]; cos, sin: [T, 1, H]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, weights: dict[str, Tensor], width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        # Queries, keys and values are one matrix, as in the original.
        for name in ("attn.{}", "attn.{}_bias"):
            parts = [weights[name.format(letter)] for letter in "qkv"]
            self.register_parameter(
                f"qkv{name[7:]}", nn.Parameter(torch.cat(parts), requires_grad=True)
            )
        for name in ("attn_norm", "attn.o", "ffn_norm", "ffn.gate", "ffn.up", "ffn.down"):
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(weights[name].clone()))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = F.rms_norm(x, x.shape[-1:], self.attn_norm, self.eps)
        qkv = F.linear(h, self.qkv, self.qkv_bias)
        q, k, v = qkv.view(batch, length, 3, -1, self.width).unbind(2)
        q, k, v = (a.transpose(1, 2) for a in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).flatten(2), self.o)
        h = F.rms_norm(x, x.shape[-1:], self.ffn_norm, self.eps)
        return x + F.linear(F.linear(h, self.up) * F.silu(F.linear(h, self.gate)), self.down)


class Decoder(nn.Module):
    """The decoder with its loss."""

    def __init__(self, weights: dict[str, Tensor], settings: dict[str, Any], length: int) -> None:
        super().__init__()
        self.eps: float = settings["eps"]
        width = settings["head_dim"]
        layers = {k.removeprefix("layers."): x for k, x in weights.items() if "layers." in k}
        self.blocks = nn.ModuleList(
            Block({k: x[i] for k, x in layers.items()}, width, self.eps)
            for i in range(len(layers["attn.q"]))
        )
        for name in ("embedding", "final_norm", "head"):
            self.register_parameter(name, nn.Parameter(weights[name].clone()))
        inverse = settings["rope_base"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos()[:, None])
        self.register_buffer("sin", angles.sin()[:, None])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over the whole vocabulary. tokens, targets: [B, T]."""
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.final_norm, self.eps)
        return F.cross_entropy(F.linear(x, self.head).flatten(0, 1), targets.flatten())


class Trainer:
    """The model and optimizer, shared by both kinds of steps so that memory holds them once."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.settings: dict[str, Any] = json.loads(file.metadata()["settings"])
            self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.batch = [self.weights.pop(name).long() for name in ("tokens", "targets")]
        self.decoder = Decoder(self.weights, self.settings, self.batch[0].shape[1])
        self.fresh = {name: x.clone() for name, x in self.decoder.state_dict().items()}
        self.weights.clear()
        self.ways = {"eager": self.decoder, "compiled": torch.compile(self.decoder)}
        self.begin()

    def begin(self) -> None:
        """Restore the first weights, with a new optimizer."""
        self.decoder.load_state_dict(self.fresh)
        settings = self.settings
        matrices = [x for x in self.decoder.parameters() if x.ndim > 1]
        others = [x for x in self.decoder.parameters() if x.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings["learning_rate"],
            betas=(settings["b1"], settings["b2"]),
            eps=settings["adam_eps"],
            fused=True,
        )

    def step(self, way: str) -> tuple[Tensor, Tensor]:
        """Take a step; returns the loss, and the gradients' norm before clipping.

        way: "eager" or "compiled".
        """
        loss = self.ways[way](*self.batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            self.decoder.parameters(), self.settings["clip_norm"], foreach=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


def main() -> None:
    """Answer the orders on stdin."""
    parser = argparse.ArgumentParser(description="A training step in torch; see train.py.")
    parser.add_argument("file", type=Path, help="what train.py wrote")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.file)
    answer: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        way, _, count = line.partition(" ")
        if way.strip() == "begin":
            trainer.begin()
            answer = {}
        else:
            try:
                begin = time.perf_counter()
                reports = [trainer.step(way) for _ in range(int(count))]
                seconds = (time.perf_counter() - begin) / int(count)
                answer = {
                    "seconds": seconds,
                    "losses": [float(loss) for loss, _ in reports],
                    "norms": [float(norm) for _, norm in reports],
                }
            except Exception as error:  # torch.compile fails in ways of its own
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
