"""Write a PyTorch-layout Qwen checkpoint with random weights: tiny, demo or a published size.

The code has the original's tensor names, shapes and configuration keys, and uses nothing of this
library, so that it can be a reference for it. Memory stays at one tensor plus 100 MB, whatever the
size.

    python tests/tools/make_checkpoint.py OUT --preset qwen-1.8b --tokenizer
    python tests/tools/make_checkpoint.py OUT --preset qwen-7b --dtype float16 --bits 4
"""

import argparse
import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
    "int32": ("I32", np.dtype(np.int32)),
}
GROUP = 128  # inputs that share a scale where the layers are integers
QUANTISED: dict[str, Any] = {
    "quant_method": "gptq",
    "group_size": GROUP,
    "sym": True,
    "desc_act": False,
}
DRAWN = 2**24 - 3  # larger tensors repeat these values; odd, so that no two rows are equal

# The keys of the 7B's own config.json, which the other presets change.
QWEN_7B: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}


def _config(width: int, layers: int, heads: int, intermediate: int, **changes: Any) -> dict:
    """A preset: the 7B's config with these sizes and changes."""
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "intermediate_size": intermediate,
    }
    return QWEN_7B | sizes | changes


NO_EXTENSION: dict[str, Any] = {"use_dynamic_ntk": False, "use_logn_attn": False}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _config(
        64, 3, 2, 352, vocab_size=320, seq_length=64, max_position_embeddings=2048, **NO_EXTENSION
    ),
    "demo": _config(64, 2, 2, 352, max_position_embeddings=8192),
    "qwen-1.8b": _config(2048, 24, 16, 11008, max_position_embeddings=8192),
    "qwen-7b": QWEN_7B,
    "qwen-14b": _config(
        5120, 40, 40, 27392, vocab_size=152064, seq_length=2048, max_position_embeddings=8192
    ),
    "qwen-72b": _config(
        8192,
        80,
        64,
        49152,
        vocab_size=152064,
        padded_vocab_size=152064,
        max_position_embeddings=8192,
        rope_theta=1000000,
        rotary_emb_base=1000000,
        tokenizer_type="QWenTokenizer",
        **NO_EXTENSION,
    ),
}
del PRESETS["qwen-72b"]["tokenizer_class"]  # as published
SHARD_SIZES = {"qwen-72b": 8 * 10**9}
SHARD_SIZE = 2048 * 10**6
GENERATION: dict[str, Any] = {
    "chat_format": "raw",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "stop_words_ids": [[151643]],
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}
CHAT_GENERATION: dict[str, Any] = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}


def generation(chat: bool, vocab_size: int) -> dict[str, Any]:
    """The published generation settings; in a smaller vocabulary, the last id ends a reply."""
    settings = CHAT_GENERATION if chat else GENERATION
    if vocab_size > settings["eos_token_id"]:
        return settings
    end = vocab_size - 1
    return settings | {"eos_token_id": end, "pad_token_id": end, "stop_words_ids": [[end]]}


def shapes(config: dict[str, Any], bits: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, in the order of the original's modules.

    bits: of the integers of the layers, as AutoGPTQ writes them; None for floats.
    """
    width, vocab = config["hidden_size"], config["vocab_size"]
    inner = config["num_attention_heads"] * config["kv_channels"]
    ffn = config["intermediate_size"] // 2
    block = {
        "ln_1.weight": (width,),
        "attn.c_attn.weight": (3 * inner, width),
        "attn.c_attn.bias": (3 * inner,),
        "attn.c_proj.weight": (width, inner),
        "ln_2.weight": (width,),
        "mlp.w1.weight": (ffn, width),
        "mlp.w2.weight": (ffn, width),
        "mlp.c_proj.weight": (width, ffn),
    }
    if bits is not None:
        block = {key: x for name, shape in block.items() for key, x in packed(name, shape, bits)}
    layers = {
        f"transformer.h.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    head = {"transformer.ln_f.weight": (width,), "lm_head.weight": (vocab, width)}
    return {"transformer.wte.weight": (vocab, width)} | layers | head


def packed(name: str, shape: tuple[int, ...], bits: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of integers in the place of a tensor of a block, with their shapes."""
    if len(shape) == 1:
        yield name, shape
        return
    outputs, inputs = shape
    module, per_word = name.removesuffix(".weight"), 32 // bits
    yield f"{module}.qweight", (inputs // per_word, outputs)
    yield f"{module}.qzeros", (inputs // GROUP, outputs // per_word)
    yield f"{module}.scales", (inputs // GROUP, outputs)
    yield f"{module}.g_idx", (inputs,)
    if module != "attn.c_attn":  # whose bias is a tensor of its own above
        yield f"{module}.bias", (outputs,)


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Distribute tensors to shards in order; a new one begins if the next tensor would exceed
    `limit`.

    sizes, limit: bytes. In module order this gives the published splits, tensor by tensor: the 7B's
        8 files at 2048 MB and the 72B's 19 at 8 GB (units of 1000).
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def parse_size(text: str) -> int:
    """An argparse type: a number of bytes such as 2GB or 500MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def draw(
    name: str,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    config: dict[str, Any],
    bits: int | None = None,
) -> np.ndarray:
    """At most `DRAWN` values, as the original initialises them, or as AutoGPTQ packs integers.

    Norms and biases get noise instead of ones and zeros, so that no two tensors look alike.
    """
    count = min(math.prod(shape), DRAWN)
    if name.endswith("qweight"):
        return rng.integers(0, 2**32, count, np.uint32).view(np.int32)
    if name.endswith("qzeros"):  # of symmetric layers: 7 in every field of 4 bits, less 1
        return np.full(count, {4: 0x77777777, 8: 0x7F7F7F7F}[bits or 4], np.int32)
    if name.endswith("g_idx"):
        return np.arange(count, dtype=np.int32) // GROUP
    if name.endswith(("c_proj.bias", "w1.bias", "w2.bias")):
        return np.zeros(count, np.float32)
    values = rng.standard_normal(count, np.float32)
    if name.endswith("scales"):
        return 0.002 + 0.0005 * np.abs(values)
    values *= config["initializer_range"]
    if name.endswith("c_proj.weight"):
        values /= math.sqrt(2 * config["num_hidden_layers"])
    elif ".ln_" in name:
        values += 1
    return values


def chunks(values: np.ndarray, count: int) -> Iterator[memoryview]:
    """Repeat the values until there are `count` elements, as bytes to write."""
    for start in range(0, count, len(values)):
        yield values[: count - start].view(np.uint8).data


def stored(name: str, dtype: str) -> str:
    """The dtype of a tensor in a file whose floats have `dtype`."""
    return "int32" if name.endswith(("qweight", "qzeros", "g_idx")) else dtype


def write_shard(
    file: BinaryIO,
    names: list[str],
    config: dict[str, Any],
    dtype: str,
    seed: int,
    bits: int | None,
) -> None:
    """Write one safetensors file tensor by tensor; `save_file` would hold all of it in memory."""
    all_shapes = shapes(config, bits)
    order = {name: i for i, name in enumerate(all_shapes)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(names):
        code, storage = DTYPES[stored(name, dtype)]
        end = offset + math.prod(all_shapes[name]) * storage.itemsize
        shape = list(all_shapes[name])
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(names):
        rng = np.random.default_rng([seed, order[name]])  # a tensor is the same in any split
        storage = DTYPES[stored(name, dtype)][1]
        values = draw(name, all_shapes[name], rng, config, bits).astype(storage)
        for chunk in chunks(values, math.prod(all_shapes[name])):
            file.write(chunk)


def find_tiktoken() -> Path:
    """The published vocabulary in the `dashscope` package, found without importing it."""
    spec = importlib.util.find_spec("dashscope")
    for root in (spec and spec.submodule_search_locations) or ():
        path = Path(root) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise SystemExit("qwen.tiktoken not found: pip install dashscope, which carries it")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_checkpoint(
    out: str | Path,
    preset: str | dict[str, Any] = "tiny",
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_size: int | None = None,
    tokenizer: bool = False,
    bits: int | None = None,
) -> Path:
    """Write a checkpoint into the folder `out`.

    preset: a name of `PRESETS`, or a whole config.
    max_shard_size: bytes; None is the published size.
    tokenizer: whether to copy the published qwen.tiktoken.
    bits: of the integers of the layers, with `dtype` float16; None for floats.
    """
    config: dict[str, Any] = dict(PRESETS[preset] if isinstance(preset, str) else preset)
    if bits is not None:
        config["quantization_config"] = QUANTISED | {"bits": bits}
    chat = preset == "demo"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation(chat, config["vocab_size"]))
    if tokenizer or chat:
        shutil.copyfile(find_tiktoken(), out / "qwen.tiktoken")
        length = config["max_position_embeddings"]
        auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
        settings = {"model_max_length": length, "tokenizer_class": "QWenTokenizer"}
        write_json(out / "tokenizer_config.json", settings | {"auto_map": auto_map})
    sizes = {
        name: math.prod(shape) * DTYPES[stored(name, dtype)][1].itemsize
        for name, shape in shapes(config, bits).items()
    }
    shards = split(sizes, max_shard_size or SHARD_SIZES.get(str(preset), SHARD_SIZE))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file_name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file_name = "model.safetensors"
        with open(out / file_name, "wb") as file:
            write_shard(file, names, config, dtype, seed, bits)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}}
        index |= {"weight_map": dict(sorted(weight_map.items()))}
        write_json(out / "model.safetensors.index.json", index)
    return out


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    floats = [name for name in DTYPES if name != "int32"]
    parser.add_argument("--dtype", choices=floats, default="bfloat16")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="layers as AutoGPTQ writes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", type=parse_size, help="such as 2GB or 500MB")
    parser.add_argument("--tokenizer", action="store_true", help="copy the real qwen.tiktoken")
    args = parser.parse_args()
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    make_checkpoint(**vars(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
