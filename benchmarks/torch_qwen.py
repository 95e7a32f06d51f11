"""The same decoder in plain torch, as the rival in this project's benchmarks.

It knows nothing of this library, and reads the same safetensors folder. Lengths must stay below the
one at which dynamic NTK and LogN begin. Install torch in an environment of its own:

    python3 -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 numpy safetensors
    .venv-torch/bin/python benchmarks/torch_qwen.py DIR --dtype float32 --threads 2 --json
"""

# pyright: reportMissingImports=false
# torch is installed in the other environment only.

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32. x: [..., D], weight: [D]."""
    return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of `x` [T, N, H] in float32; cos, sin: [T, 1, H]."""
    x = x.float()
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Decoder:
    """The decoder for one sequence, with a cache allocated once for `length` tokens.

    columns: store matrices with more rows than columns in column order.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, length: int, columns: bool = False
    ) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.width: int = config["kv_channels"]
        self.eps: float = config["layer_norm_epsilon"]
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    # Copy even without a cast: mapped weights would be unaligned, and might not
                    # stay resident.
                    tensor = file.get_tensor(name).to(dtype, copy=True)
                    if (
                        columns
                        and tensor.ndim == 2
                        and "wte" not in name
                        and tensor.shape[0] > tensor.shape[1]
                    ):
                        tensor = tensor.t().contiguous().t()
                    self.weights[name.removeprefix("transformer.")] = tensor
        base = config["rotary_emb_base"]
        inverse = base ** (-torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]
        shape = (self.layers, self.heads, length, self.width)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def attention(self, x: Tensor, layer: int, start: int) -> Tensor:
        """Attention of one layer. x: [T, D] at positions from `start` on."""
        prefix = f"h.{layer}.attn."
        qkv = F.linear(
            x, self.weights[prefix + "c_attn.weight"], self.weights[prefix + "c_attn.bias"]
        )
        end = start + len(x)
        q, k, v = qkv.view(len(x), 3, self.heads, self.width).unbind(1)
        cos, sin = self.cos[start:end], self.sin[start:end]
        q = rotate(q, cos, sin).to(self.dtype).transpose(0, 1)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, start:end] = rotate(k, cos, sin).transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q[None], keys[None, :, :end], values[None, :, :end], is_causal=len(x) > 1
        )
        return F.linear(out[0].transpose(0, 1).flatten(1), self.weights[prefix + "c_proj.weight"])

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        """The feed-forward of one layer. x: [T, D]."""
        w1, w2, c_proj = (
            self.weights[f"h.{layer}.mlp.{name}.weight"] for name in ("w1", "w2", "c_proj")
        )
        return F.linear(F.linear(x, w1) * F.silu(F.linear(x, w2)), c_proj)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start: int, every: bool = False) -> Tensor:
        """Logits [T or 1, V] of `tokens` [T] at positions from `start`; a prompt has start 0.

        every: whether to return the logits of all tokens, or of the last one.
        """
        h = F.embedding(tokens, self.weights["wte.weight"])
        for layer in range(self.layers):
            x = rms_norm(h, self.weights[f"h.{layer}.ln_1.weight"], self.eps)
            h = h + self.attention(x, layer, start)
            x = rms_norm(h, self.weights[f"h.{layer}.ln_2.weight"], self.eps)
            h = h + self.feed_forward(x, layer)
        h = rms_norm(h if every else h[-1:], self.weights["ln_f.weight"], self.eps)
        return F.linear(h, self.weights["lm_head.weight"]).float()


def measure(decoder: Decoder, prompt: Tensor, new_tokens: int, repeats: int) -> dict[str, float]:
    """Median tokens/s of `repeats` prefills after a first one, and of greedy decode steps."""
    logits = decoder(prompt, 0)
    prefill = []
    for _ in range(repeats):
        begin = time.perf_counter()
        logits = decoder(prompt, 0)
        prefill.append(time.perf_counter() - begin)
    steps = []
    for position in range(len(prompt), len(prompt) + new_tokens):
        begin = time.perf_counter()
        logits = decoder(logits[-1:].argmax(-1), position)
        steps.append(time.perf_counter() - begin)
    return {
        "prefill_tokens_per_second": len(prompt) / statistics.median(prefill),
        "decode_tokens_per_second": 1 / statistics.median(steps),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Prefill and decode rates of plain torch.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a safetensors folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="prefills measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--columns",
        action="store_true",
        help="store matrices with more rows than columns by columns (faster in float32 on some "
        "machines, far slower in bfloat16)",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length = args.prompt_length + args.new_tokens
    decoder = Decoder(args.folder, getattr(torch, args.dtype), length, args.columns)
    prompt = torch.randint(
        len(decoder.weights["wte.weight"]),
        (args.prompt_length,),
        generator=torch.Generator().manual_seed(0),
    )
    result = {
        "torch": torch.__version__,
        "dtype": args.dtype,
        "columns": args.columns,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
    } | measure(decoder, prompt, args.new_tokens, args.repeats)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:26} {value:.2f}" if isinstance(value, float) else f"{name:26} {value}")


if __name__ == "__main__":
    main()
