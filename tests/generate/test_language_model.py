"""`qwen_jax.load` and what it returns: arguments, batches, stops, sampling, chat."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import qwen_jax
from qwen_jax import chat, checkpoint
from qwen_jax.decoding import decode, inputs
from qwen_jax.decoding.sampling import Greedy, Nucleus
from tests.support.golden_figures import arrays, worst


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(golden_dir, dtype="float32")


@pytest.fixture(scope="module")
def chat_model(chat_dir: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(chat_dir, dtype="float32")


RNG = np.random.default_rng(7)
PROMPT = RNG.integers(0, 320, (1, 12))


def test_import_is_cheap() -> None:
    code = "import qwen_jax, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"cache_dtype": "int4"}, "int4"),
        ({"attention": "nope"}, "xla"),
        ({"overrides": {"no_such_key": 1}}, "no_such_key"),
        ({"overrides": {"layer_windows": [1]}}, "layer_windows"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": "256"}, "max_length '256': must be a whole number"),
        ({"max_length": 256.5}, "max_length 256.5"),
        ({"max_length": True}, "max_length True: must be a whole number from 2 to 2147483647"),
        ({"dtype": 32}, "dtype 32: allowed are .*float32.* or None"),
        ({"dtype": ["float32"]}, "dtype .*: allowed are"),
        ({"cache_dtype": {}}, "cache_dtype {}: allowed are int8"),
        ({"attention": ["xla"]}, "attention .* is not known"),
        ({"overrides": "a=1"}, "config overrides must map names to values"),
        ({"overrides": {1: 2}}, "config overrides must map names to values"),
    ],
)
def test_load_refuses(golden_dir: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qwen_jax.load(golden_dir, **settings)


def test_whole_numbers_of_numpy(golden_dir: Path) -> None:
    model = qwen_jax.load(golden_dir, max_length=np.int64(64))
    assert model.generate([[1, 2, 3]], max_new_tokens=np.int32(3)).shape == (1, 3)


def test_attention_that_cannot_declines_before_weights_are_read(golden_dir, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(NotImplementedError, match="pallas_hopper is for Hopper GPUs, this is cpu"):
        qwen_jax.load(golden_dir, attention="pallas_hopper")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_near(golden_dir: Path, dtype: str) -> None:
    model = qwen_jax.load(golden_dir, dtype=dtype)
    assert str(model.decoder.embedding[...].dtype) == dtype
    logits = model.logits(arrays()["plain.tokens"])
    assert logits.dtype == np.float32
    exact = arrays()["plain.logits"]
    error = np.sqrt(np.mean(np.square(np.asarray(logits) - exact))) / exact.std()
    # About a dozen roundings of 2**-9 (bfloat16) or 2**-12 (float16) one after another.
    unit = {"bfloat16": 2**-9, "float16": 2**-12}[dtype]
    assert unit < error < 20 * unit


def test_rows_are_what_they_would_be_alone(model: qwen_jax.LanguageModel) -> None:
    """Sampled: equal prompts, seeds and padding must not let rows see each other."""
    lengths = [3, 12, 40]
    width = max(lengths)
    tokens, mask = np.zeros((3, width), int), np.zeros((3, width), int)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = RNG.integers(0, 320, length)
        mask[row, width - length :] = 1
    settings = {"max_new_tokens": 10, "sampler": Nucleus(0.9, 50, 0.9, 1.2)}
    together = model.generate(tokens, mask, seed=[5, 6, 7], **settings)
    rows = [tokens[row, width - length :] for row, length in enumerate(lengths)]
    for unequal in (rows, [row.tolist() for row in rows], np.array([*rows, None], object)[:3]):
        np.testing.assert_array_equal(model.generate(unequal, seed=[5, 6, 7], **settings), together)
    padded, whole = np.asarray(model.logits(rows)), np.asarray(model.logits(tokens, mask))
    np.testing.assert_array_equal(padded, whole)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, width - length :], seed=5 + row, **settings)
        np.testing.assert_array_equal(together[row], alone[0])


def test_seed(model: qwen_jax.LanguageModel) -> None:
    draw = {"max_new_tokens": 12, "sampler": Nucleus(2.0)}
    first = model.generate(PROMPT, seed=1, **draw)
    np.testing.assert_array_equal(first, model.generate(PROMPT, seed=1, **draw))
    assert (first != model.generate(PROMPT, seed=2, **draw)).any()
    rows = model.generate(np.repeat(PROMPT, 3, 0), seed=range(3), **draw)
    assert len({tuple(row) for row in rows}) == 3


def test_any_whole_number_is_a_seed(model: qwen_jax.LanguageModel) -> None:
    for seed in (-1, 2**32 - 1, 2**70):
        assert model.generate(PROMPT, max_new_tokens=2, sampler=Nucleus(), seed=seed).size == 2
    for seed in (np.int8(-1), np.array(2**32 - 1), np.array([-1]), range(-1, 0)):
        assert inputs.seeds(seed, 2).tolist() == [2**32 - 1] * 2


def test_stop(model: qwen_jax.LanguageModel) -> None:
    free = model.generate(PROMPT, max_new_tokens=20)[0]
    assert free.shape == (20,)
    where = next(i for i in range(2, 20) if free[i] not in free[:i])
    one = model.generate(PROMPT, max_new_tokens=20, stop=[int(free[where])])[0]
    np.testing.assert_array_equal(one[: where + 1], free[: where + 1])
    assert (one[where + 1 :] == model.pad_id).all()
    # A sequence stops where its last id comes after its first, not where the last id stands alone.
    pair = (int(free[where - 1]), int(free[where]))
    both = model.generate(PROMPT, max_new_tokens=20, stop=[pair, (int(free[where]), 319, 5)])[0]
    np.testing.assert_array_equal(both, one)
    swapped = model.generate(PROMPT, max_new_tokens=20, stop=[pair[::-1]])[0]
    assert swapped[where + 1] == free[where + 1]


def test_one_row_stops_before_another(model: qwen_jax.LanguageModel) -> None:
    prompts = np.concatenate([PROMPT, PROMPT[:, ::-1]])
    free = model.generate(prompts, max_new_tokens=16)
    stop = int(free[0, 4])
    made = model.generate(prompts, max_new_tokens=16, stop=[stop])
    for row in range(2):
        ends = np.flatnonzero(free[row] == stop)
        kept = ends[0] + 1 if ends.size else 16
        np.testing.assert_array_equal(made[row, :kept], free[row, :kept])
        assert (made[row, kept:] == model.pad_id).all()


def test_stream_is_generate(model: qwen_jax.LanguageModel) -> None:
    parts = list(model.stream(PROMPT, max_new_tokens=70, at_once=9))
    assert [p.shape[1] for p in parts] == [1] + [9] * 7 + [6]
    whole = model.generate(PROMPT, max_new_tokens=70)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_decode_compiles_once(golden_dir: Path) -> None:
    """One program: for every step, and for another temperature, stop, seed or stride."""
    model = qwen_jax.load(golden_dir, dtype="float32")
    decode.run_stride.clear_cache()
    model.generate(PROMPT, max_new_tokens=60, sampler=Nucleus(), stop=[1])
    assert decode.run_stride._cache_size() == 1
    model.generate(PROMPT[:, :7], max_new_tokens=50, sampler=Nucleus(0.5, 9, 0.7), stop=[2], seed=3)
    list(model.stream(PROMPT, max_new_tokens=60, sampler=Nucleus(0.1), stop=[3], at_once=1))
    assert decode.run_stride._cache_size() == 1


def test_few_prefill_buckets() -> None:
    plans = [decode.plan(length, 100) for length in range(1, 6000)]
    assert len({size for chunks, _ in plans for size in chunks}) <= 6
    for length, (chunks, capacity) in enumerate(plans, 1):
        assert length <= sum(chunks) < max(2 * length, length + 32)
        assert capacity >= sum(chunks) + 100
    assert len({capacity for _, capacity in plans}) < 25


def test_chunked_prefill(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of several chunks, the first one padded, past seq_length, with everything on."""
    settings = {"use_dynamic_ntk": True, "use_logn_attn": True, "layer_windows": [30, None, 90]}
    model = qwen_jax.load(golden_dir, dtype="float32", overrides=settings)
    prompt = RNG.integers(0, 320, (2, 203))
    whole = model.generate(prompt, max_new_tokens=12)
    monkeypatch.setattr(decode, "buckets", lambda: [32, 64])
    np.testing.assert_array_equal(model.generate(prompt, max_new_tokens=12), whole)


def test_ntk_from_the_total(golden_dir: Path) -> None:
    model = qwen_jax.load(golden_dir, dtype="float32", overrides={"use_dynamic_ntk": True})
    prompt = RNG.integers(0, 320, (1, 60))  # alpha 1; with 10 new tokens, past 64: alpha 3
    total = model.generate(prompt, max_new_tokens=10, ntk="total")
    np.testing.assert_array_equal(total, model.generate(prompt, max_new_tokens=10, ntk_alpha=3))
    plain = model.logits(prompt, ntk_alpha=1.0)
    assert worst(model.logits(prompt, ntk_alpha=3.0), np.asarray(plain)) > 0.01
    assert worst(model.logits(prompt), np.asarray(plain)) == 0


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (np.zeros((1, 0), int), {}, "empty prompt"),
        ([[5, 320]], {}, "320"),
        ([[-1, 3]], {}, "-1"),
        ([[1.5]], {}, "integers"),
        ([1, 2], {}, "B, T"),
        ([[1, 2]], {"mask": [[1, 0]]}, "left"),
        ([[1, 2]], {"mask": [[0, 0]]}, "empty prompt"),
        ([[1, 2]], {"mask": [[1]]}, "shape"),
        ([[1, 2]], {"mask": [["0", "1"]]}, "mask must be 0 .padding. or 1 for each token"),
        ([[1, 2]], {"mask": [[float("nan"), 1]]}, "mask must be 0 .padding. or 1"),
        ([[1, 2]], {"mask": [[-1, 1]]}, "mask must be 0 .padding. or 1"),
        ([[1, 2]], {"mask": [[1], [1, 1]]}, "mask must be 0 .padding. or 1"),
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1] * 50], {"max_new_tokens": 2000}, "max_length 2048"),
        ([[1, 2]], {"stop": [320]}, "stop"),
        ([[1, 2]], {"stop": [()]}, "stop"),
        ([[1, 2]], {"ntk": "both"}, "ntk"),
        ([[1, 2]], {"ntk_alpha": 0.5}, "ntk_alpha"),
        ([[1, 2]], {"ntk_alpha": [1.0, 3.0]}, "ntk_alpha"),
        ([[1, 2]], {"ntk_alpha": "2"}, "ntk_alpha must be a number of at least 1.* got str '2'"),
        ([[1, 2]], {"ntk_alpha": {}}, "ntk_alpha must be a number"),
        ([[1, 2]], {"ntk_alpha": True}, "ntk_alpha must be a number"),
        ([[1, 2]], {"ntk_alpha": [[1], [1, 2]]}, "ntk_alpha must be a number"),
        ([[1, 2]], {"ntk_alpha": 10**400}, "ntk_alpha must be a number"),
        ([[1, 2]], {"ntk_alpha": float("nan")}, "ntk_alpha .*nan"),
        ([[1, 2]], {"max_new_tokens": True}, "max_new_tokens True: must be a whole number of at"),
        ([[1, 2]], {"max_new_tokens": "5"}, "max_new_tokens '5': must be a whole number of at"),
        ([[1, 2]], {"max_new_tokens": None}, "max_new_tokens None"),
        ([[1, 2]], {"ntk": ["prompt"]}, "ntk .*: allowed are prompt, total"),
        ([[1, 2]], {"stop": {5: 1}}, "stop {5: 1}"),
        ([[1, 2], [1, 2, 3]], {"mask": [[1, 1, 1]] * 2}, "mask: rows of unequal length are padded"),
        ([[1, 2], []], {}, "empty prompt"),
        ([[1, 2], [1, 2, 320]], {}, "tokens, row 1: token id 320 is out of range: from 0 to 319"),
        ([[1, 2], [1.5]], {}, "tokens, row 1 must be whole numbers"),
        ([[1], [[1, 2], [3]]], {}, "tokens, row 1 must be whole numbers"),
        ([1, 2], {}, r"ids of one prompt are \[ids\]"),
        ("Hello", {}, "got text 'Hello': model.generate_text.prompts. takes texts"),
        (["Hello", "you"], {}, "got text 'Hello': model.generate_text.prompts. takes texts"),
        (np.array(["Hello"]), {}, "model.generate_text.prompts. takes texts"),
        ([{"role": "user", "content": "a"}], {}, "got messages: model.chat.query, history. is it"),
        ([[1, 2]], {"stop": "END"}, "model.generate_text.prompts, stop=.... takes texts"),
        ([[1, 2]], {"stop": ["END"]}, "model.generate_text.prompts, stop=.... takes texts"),
        ([[1, 2]], {"max_new_tokens": 2.0}, "max_new_tokens"),
        ([[1, 2]], {"stop": 5}, "stop"),
        ([[1, 2]], {"stop": [1.5]}, "stop"),
        ([[1, 2]], {"sampler": 0.7}, "sampler"),
        ([[1, 2]], {"seed": 1.5}, "seed"),
        ([[1, 2]], {"seed": None}, "seed"),
        ([[1, 2]], {"seed": [1, 2]}, "seed"),
        ([[1, 2]], {"seed": True}, "seed True"),
        ([[1, 2]], {"seed": [False]}, "seed False"),
        ([[1, 2]], {"seed": "7"}, "seed '7'"),
        ([[1, 2]], {"seed": b"1"}, "seed b'1': must be a whole number"),
        ([[1, 2]], {"seed": {1}}, r"seed \{1\}: must be a whole number"),
        ([[1, 2]], {"seed": {1: 2}}, r"seed \{1: 2\}: must be a whole number"),
        ([[1, 2]], {"seed": np.ones((1, 2), int)}, "seed"),
        ([[1, 2]], {"seed": np.array(1.0)}, r"seed 1\.0"),
        ([[1, 2]], {"sampler": Nucleus}, "sampler"),
        ([[1, 2]], {"sampler": Nucleus("hot")}, "temperature 'hot'"),
        ([[1, 2]], {"sampler": Nucleus(temperature=0.0)}, "temperature"),
        ([[1, 2]], {"sampler": Nucleus(top_p=1.5)}, "top_p"),
        ([[1, 2]], {"sampler": Greedy(0.0)}, "repetition_penalty"),
    ],
)
def test_generate_refuses(
    model: qwen_jax.LanguageModel, tokens: object, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, **settings)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (
            "generate",
            {"temperature": 0.7, "top_p": 0.9},
            "generate has no argument 'temperature': give sampler=qwen_jax.Nucleus(temperature=0.7"
            ", top_p=0.9)",
        ),
        ("generate", {"temperature": 0}, "give sampler=qwen_jax.Greedy(), which temperature 0"),
        ("stream", {"top_p": 0.9}, "give sampler=qwen_jax.Nucleus(top_p=0.9)"),
        ("chat", {"repetition_penalty": 1.1}, "Nucleus(repetition_penalty=1.1)"),
        ("generate", {"max_tokens": 5}, "'max_tokens': give max_new_tokens=5"),
        ("chat", {"max_length": 5}, "'max_length': give max_new_tokens=5"),
        ("generate_text", {"max_new_token": 5}, "'max_new_token': give max_new_tokens="),
        ("generate", {"stop_words": ["a"]}, "give stop=: token ids, or sequences of them; gener"),
        ("generate", {"prompt": "a"}, "model.generate_text(prompts) takes texts"),
        ("logits", {"input_ids": [[1]]}, "tokens are ids, rows of any lengths"),
        ("logits", {"attention_mask": [[1]]}, "give mask=, 1 = real"),
        ("generate_text", {"text": "a"}, "prompts are a text, or texts"),
        ("generate_text", {"n": 4}, "repeat the prompt, and give seed=range(4)"),
        ("chat", {"messages": []}, "give query, the last one, and history=, those before it"),
        ("chat_stream", {"system_prompt": "a"}, "give system="),
        ("generate", {"stream": True}, "model.stream and model.chat_stream yield"),
        ("logits", {"colour": 1}, "'colour': it has tokens, mask, ntk_alpha"),
    ],
)
def test_keywords_of_other_libraries(chat_model, method, given, said) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(chat_model, method)(**given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_keywords_of_other_libraries_to_load() -> None:
    for given, said in (
        ({"torch_dtype": "float16"}, "load has no argument 'torch_dtype': give dtype='float16'"),
        ({"max_model_len": 9}, "give max_length=9"),
        ({"device_map": "auto"}, 'jax.set_mesh(meshes.make({"tp": 2}))'),
        ({"temperature": 1}, "'temperature': it has path, dtype, overrides, attention,"),
    ):
        with pytest.raises(TypeError, match=re.escape(said)):
            qwen_jax.load("anywhere", **given)


TEXTS = ["Once upon a time", "Hello", "a <|im_end|> that is text, and a longer prompt", "Hello"]


def test_texts_are_what_they_would_be_alone(chat_model: qwen_jax.LanguageModel) -> None:
    """In batches of unequal prompts: each is what `generate` makes of its ids, until a stop."""
    draw = {"max_new_tokens": 6, "sampler": Nucleus(0.9)}
    tokenizer, expected = chat_model.tokenizer, []
    assert tokenizer is not None
    for seed, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        stops = chat_model.generation_config.stops
        (made,) = chat_model.generate([ids], seed=seed, stop=stops, **draw)
        (kept, *_) = chat.until_stop([made.tolist()], stops)
        expected.append(tokenizer.decode(kept, skip_special_tokens=True))
    assert len(set(expected)) == 4
    assert chat_model.generate_text(TEXTS, seed=range(4), batch_size=2, **draw) == expected
    assert chat_model.generate_text(TEXTS[2], seed=2, **draw) == expected[2]


def test_texts_end_where_a_text_does(chat_model: qwen_jax.LanguageModel) -> None:
    """Wherever tokens begin; other rows go on. The checkpoint's stops hold, too."""
    draw = {"max_new_tokens": 12, "sampler": Greedy(), "batch_size": 2}
    first, second, *_ = free = chat_model.generate_text(TEXTS, **draw)
    stop = first[3:6]
    made = chat_model.generate_text(TEXTS, stop=[stop, "never said"], **draw)
    assert made == [text.partition(stop)[0] for text in free] and made[0] == first[:3]
    assert second in made
    ids = chat_model.tokenizer.encode(TEXTS[0])
    third = int(chat_model.generate([ids], max_new_tokens=3)[0, 2])
    ends = dataclasses.replace(chat_model.generation_config, stops=((third,),))
    ended = dataclasses.replace(chat_model, generation_config=ends).generate_text(TEXTS[0], **draw)
    assert first.startswith(ended) and len(ended) < len(first)


def test_a_text_has_the_room_that_it_would_have_alone(chat_model, monkeypatch) -> None:
    """A batch is of one number of new tokens; one that is not full is filled up."""
    short = dataclasses.replace(chat_model, max_length=12)
    sizes, stream = [], type(short).stream

    def seen(self, tokens, **settings):
        sizes.append((len(tokens), settings["max_new_tokens"]))
        return stream(self, tokens, **settings)

    monkeypatch.setattr(type(short), "stream", seen)
    made = short.generate_text(["Hello", "Hello", "Hello there you"], batch_size=2)
    assert sizes == [(2, 11), (2, 9)] and made[0] == made[1]
    assert made[2] == short.generate_text("Hello there you") and sizes[2:] == [(1, 9)]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("", {}, "^the prompt is empty: give some text"),
        (["a", ""], {}, "^prompt 1 is empty: give some text"),
        ([], {}, "^prompts: there is none"),
        (b"a", {}, "^prompts must be a text, or texts, got bytes"),
        (["a", b"a"], {}, "^prompt 1 must be text .*: decode them first"),
        (["a", "b\ud83d"], {}, "^prompt 1 holds half a character"),
        (
            [1, 2],
            {},
            r"^prompts must be texts, got int 1: model.generate\(tokens\) takes token ids",
        ),
        ([[1, 2]], {}, r"model.generate\(tokens\) takes token ids"),
        ([{"role": "user"}], {}, r"got messages: model.chat\(query, history\) is it"),
        (None, {}, "^prompts must be a text, or texts, got None"),
        (["a", "b"], {"seed": [1, 2, 3]}, "^seed: 3 numbers for 2 rows"),
        ("a", {"stop": [5]}, "^each stop must be text"),
        ("a", {"stop": ""}, "^stop '': an empty text ends nothing"),
        ("a", {"batch_size": 0}, "^batch_size 0"),
        (["a", "b"], {"max_new_tokens": 10**6}, "^prompt 0: a prompt of 1 tokens and 1000000 new"),
    ],
)
def test_generate_text_refuses(chat_model, prompts, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        chat_model.generate_text(prompts, **settings)


def test_padded_ids_are_never_chosen(chat_model: qwen_jax.LanguageModel) -> None:
    """Flat logits over padded rows: what is drawn exists in the vocabulary."""
    tokenizer = chat_model.tokenizer
    assert len(tokenizer) < chat_model.config.vocab_size
    prompt = np.array([tokenizer.encode("hello there")] * 8)
    made = chat_model.generate(prompt, max_new_tokens=24, sampler=Nucleus(1e4), seed=range(8))
    assert made.max() < len(tokenizer) and len(np.unique(made)) > 50


def test_chat(chat_model: qwen_jax.LanguageModel) -> None:
    reply, history = chat_model.chat("hello", max_new_tokens=8, seed=3)
    assert history == [("hello", reply)]
    *_, streamed = chat_model.chat_stream("hello", max_new_tokens=8, seed=3)
    assert streamed.strip() == reply
    _, longer = chat_model.chat("more", history, max_new_tokens=4)
    assert longer[:1] == history and len(longer) == 2
    assert history == [("hello", reply)]


def test_chat_takes_its_defaults_from_the_checkpoint(chat_model: qwen_jax.LanguageModel) -> None:
    assert chat_model.generation_config.sampler == Nucleus(1.0, 0, 0.8, 1.1)
    ends = {stop[0] for stop in chat_model.chat_stops()}
    tokenizer = chat_model.tokenizer
    assert {tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id} <= ends
    assert chat_model.room(10) == 512


def test_room_ends_with_the_cache(chat_model: qwen_jax.LanguageModel) -> None:
    most = chat_model.max_length
    assert chat_model.room(most - 3) == chat_model.room(most - 3, 3) == 3
    for prompt, new in ((most - 3, 4), (most, None)):
        with pytest.raises(ValueError, match=f"do not fit a cache of max_length {most}"):
            chat_model.room(prompt, new)


def test_chat_stops_before_a_stop(chat_model: qwen_jax.LanguageModel) -> None:
    """A stop of several ordinary tokens shows in neither the reply nor the stream."""
    settings = {"sampler": Greedy(1.3), "max_new_tokens": 12}
    free = [
        i
        for part in chat_model._reply(
            "hello", (), system="", **settings, stop=(), seed=0, max_window_size=None
        )
        for i in part
    ]
    stop = tuple(free[4:7])
    expected = chat_model.tokenizer.decode(free[:4], skip_special_tokens=True)
    assert len(set(free[:7])) == 7
    reply, _ = chat_model.chat("hello", None, "", stop=[stop], **settings)
    *_, streamed = chat_model.chat_stream("hello", system="", stop=[stop], **settings)
    assert streamed == expected and reply == expected.strip()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 10**5000}, "^max_new_tokens of thousands of digits: must be a whole"),
        ({"max_new_tokens": True}, "^max_new_tokens True: must be a whole number from 1 to "),
        ({"max_new_tokens": 2.0}, "^max_new_tokens 2.0: must be a whole number"),
        ({"seed": b"1"}, "^seed b'1': must be a whole number"),
        ({"max_window_size": float("nan")}, "^max_window_size nan: must be a number"),
        ({"sampler": "greedy"}, "^sampler 'greedy': must be a Greedy or a Nucleus"),
    ],
)
def test_chat_refuses(chat_model: qwen_jax.LanguageModel, settings: dict, message: str) -> None:
    for work in (chat_model.chat, chat_model.chat_stream):
        with pytest.raises(ValueError, match=message):
            work("hello", **settings)
    with pytest.raises(ValueError, match=r"^at_once 1\.5: must be a whole number"):
        chat_model.stream([[1, 2]], at_once=1.5)  # pyright: ignore


def test_messages_are_no_query(chat_model: qwen_jax.LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"^query must be text .* of messages, give the text of"):
        chat_model.chat([{"role": "user", "content": "hello"}])  # pyright: ignore


def test_chat_takes_zeros_seriously(chat_model: qwen_jax.LanguageModel) -> None:
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        chat_model.chat("hello", max_new_tokens=0)
    short = {"max_new_tokens": 1, "sampler": Greedy()}
    history = [("hi", "hello"), ("you", "me")]
    alone, _ = chat_model.chat("a", history, max_window_size=0, **short)
    assert alone == chat_model.chat("a", **short)[0]


def test_a_base_checkpoint_says_so(chat_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "base"
    shutil.copytree(chat_dir, target)
    config = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**config, "chat_format": "raw"}))
    model = qwen_jax.load(target, dtype="float32")
    with pytest.warns(UserWarning, match="base checkpoint"):
        model.chat("hello", max_new_tokens=2)


def test_without_a_tokenizer(model: qwen_jax.LanguageModel) -> None:
    assert model.tokenizer is None
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"qwen\.tiktoken"):
        warnings.simplefilter("ignore")
        model.chat("hello")
