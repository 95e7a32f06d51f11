"""A Qwen2 folder in transformers: the logits are equal to float32's rounding, the ids equal."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import to_hf
from qwen_jax import Config, chat, checkpoint
from qwen_jax.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from qwen_jax.config import RopeScaling
from tests.support.tiny import full_logits, on_mesh, tiny_config, tiny_decoder, tiny_tokens
from train.tokenizer import learn

ROOT = Path(__file__).parents[2]
HEADS = {"num_heads": 2, "num_kv_heads": 2}  # so that hidden_size is that of all heads
TOLERANCE = 5e-6  # of the largest logit
SEEN = 1e-3  # what a setting changes at least, so that equality means something


def exported(folder: Path, config: Config) -> Path:
    """A Qwen2 folder with the weights of a tiny decoder."""
    with on_mesh():
        checkpoint.save(folder / "model", config, tiny_decoder(config))
    assert to_hf.main([str(folder / "model"), str(folder / "qwen2"), "--as", "qwen2"]) == 0
    return folder / "qwen2"


def their_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens).long()).logits.numpy()


def our_logits(config: Config, tokens: np.ndarray) -> np.ndarray:
    with on_mesh():
        return full_logits(tiny_decoder(config), tokens)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# Changes of the config, and the length of a text.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "tied": ({"tie_embeddings": True}, 14),
    "dynamic NTK and LogN, to seq_length": ({"dynamic_ntk": True, "logn": True}, 16),
    "linear": ({"rope_scaling": RopeScaling("linear", 4.0)}, 40),
    "NTK-aware": ({"rope_scaling": RopeScaling("ntk", 4.0)}, 40),
    "yarn": ({"rope_scaling": RopeScaling("yarn", 4.0, 16)}, 40),
    "yarn, all keys": (
        {
            "rope_scaling": RopeScaling(
                "yarn", 4.0, 16, 8.0, 2.0, truncate=False, mscale=1.0, mscale_all_dim=0.5
            )
        },
        40,
    ),
    "a temperature": ({"rope_scaling": RopeScaling("yarn", 4.0, 16, attention_factor=1.5)}, 40),
    "windows": ({"layer_windows": (None, 5)}, 14),
    "windows in all layers": ({"layer_windows": (5, 5)}, 14),
    "another base and epsilon": ({"rope_base": 1e6, "norm_eps": 1e-2}, 14),
}


@pytest.mark.parametrize(("changes", "length"), CASES.values(), ids=CASES)
def test_logits_are_ours(tmp_path: Path, changes: dict[str, Any], length: int) -> None:
    config, tokens = tiny_config(**HEADS, **changes), tiny_tokens(3, length)
    ours = our_logits(config, tokens)
    assert distance(their_logits(exported(tmp_path, config), tokens), ours) < TOLERANCE
    if changes.keys() & {"rope_scaling", "layer_windows", "rope_base"}:
        assert distance(our_logits(tiny_config(**HEADS), tokens), ours) > SEEN


def test_what_is_lost_is_lost_beyond_seq_length(tmp_path: Path) -> None:
    config, tokens = tiny_config(**HEADS, dynamic_ntk=True, logn=True), tiny_tokens(1, 17)
    theirs = their_logits(exported(tmp_path, config), tokens)
    assert distance(theirs, our_logits(config, tokens)) > SEEN


@pytest.fixture(scope="module")
def learnt() -> dict[bytes, int]:
    """A vocabulary of 900 ranks: of the golden texts, and of this project's pages."""
    golden = json.loads((ROOT / "tests" / "golden" / "tokenizer.json").read_text())["encode"]
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/design.md")]
    return learn([*(case["text"] for case in golden), *pages], 900)


@pytest.fixture(scope="module", params=["plain", "expanded"])
def pair(request: Any, tmp_path_factory: Any, learnt: dict[bytes, int]) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and transformers' of the folder that holds it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    extra = {b"zq": 1108, b"zqx": 1200}  # which merge, and leave gaps
    ours = Tokenizer(learnt, extra if request.param == "expanded" else None)
    config = tiny_config(**HEADS, vocab_size=1216)
    with on_mesh():
        checkpoint.save(folder / "model", config, tiny_decoder(config))
    lines = [base64.b64encode(token) + b" %d\n" % i for token, i in ours.ranks.items()]
    (folder / "model" / "qwen.tiktoken").write_bytes(b"".join(lines))
    settings = {"chat_format": "chatml", "eos_token_id": ours.eod_id}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert to_hf.main([str(folder / "model"), str(folder / "qwen2"), "--as", "qwen2"]) == 0
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "qwen2")


def test_ids_are_ours(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    golden = json.loads((ROOT / "tests" / "golden" / "tokenizer.json").read_text())["encode"]
    texts = [case["text"] for case in golden] + ["zqx", "the zqxing of zq"]
    for text in texts:
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(
            ids, skip_special_tokens=True
        )
    for name in SPECIAL_TOKENS:
        assert theirs.convert_tokens_to_ids(name) == ours.special_tokens[name]
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert theirs.model_max_length == 16


def rendered(theirs: Any, messages: list[dict[str, str]], **options: Any) -> tuple[str, list[int]]:
    """The prompt of messages, by the folder's template, as text and as ids."""
    options = {"add_generation_prompt": True, **options}
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    return text, theirs.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize("system", [None, "", "Speak as a pirate."])
@pytest.mark.parametrize("history", [[], [("hi", "hello there"), ("你是谁", "我是通义千问")]])
def test_prompts_are_ours(pair: tuple[Tokenizer, Any], system: Any, history: Any) -> None:
    ours, theirs = pair
    messages = [] if system is None else [{"role": "system", "content": system}]
    for query, reply in history:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": " 你好, what is 7 * 8?\nThink. "})
    said = chat.prompt.DEFAULT_SYSTEM if system is None else system
    context = chat.make_context(ours, messages[-1]["content"], history, said)
    assert rendered(theirs, messages) == context


def test_where_prompts_differ(pair: tuple[Tokenizer, Any]) -> None:
    """Their prompt is encoded as one text, in which users can spell control tokens."""
    ours, theirs = pair
    for query in ("<|im_end|>", "\n\nline breaks first"):
        text, ids = chat.make_context(ours, query, (), "x")
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": query}]
        assert rendered(theirs, messages)[0] == text
        assert rendered(theirs, messages)[1] != ids


@pytest.mark.parametrize(
    ("messages", "options", "problem"),
    [
        ([{"role": "tool", "content": "x"}], {}, "roles are system .* not tool"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], {}, "not system"),
        ([{"role": "user", "content": "x"}], {"tools": [{"name": "f"}]}, "no place for tools"),
    ],
)
def test_what_the_template_refuses(
    pair: tuple[Tokenizer, Any], messages: Any, options: Any, problem: str
) -> None:
    with pytest.raises(Exception, match=problem):
        rendered(pair[1], messages, **options)
