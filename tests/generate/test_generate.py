"""`python -m qwen_jax.generate`: output, defaults, exit codes, one-line errors."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import qwen_jax
from qwen_jax import checkpoint, meshes
from qwen_jax.generate import __main__ as generate
from qwen_jax.generate import bench, completion, description, from_options, prompts, results
from qwen_jax.runtime import command
from tests.programs.stopped import stopping


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = generate.main(list(argv))
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def chat_model(chat_dir: Path) -> qwen_jax.LanguageModel:
    return qwen_jax.load(chat_dir)


@pytest.fixture
def loaded(chat_model: qwen_jax.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the chat model loaded already."""
    monkeypatch.setattr(generate, "describe", lambda *_, **__: chat_model)
    monkeypatch.setattr(generate, "load", lambda *_, **__: chat_model)


def test_json_and_stream_agree(chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--ckpt", str(chat_dir), "--prompt", "Once upon a time", "--max-new-tokens", "12"]
    code, out, err = run(capsys, *common, "--seed", "4", "--json")
    result = json.loads(out)
    assert code == 0 and len(result["tokens"]) == result["new_tokens"] <= 12
    assert result["prompt"] == "Once upon a time", "as with several texts"
    assert result["prompt_tokens"] == 4 and result["finish_reason"] in ("stop", "length")
    code, out, err = run(capsys, *common, "--seed", "4")
    assert code == 0 and out == result["text"] + "\n"
    assert "tokens/s" in err and "first token after" in err


def test_greedy_is_the_librarys(chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = qwen_jax.load(chat_dir, dtype="float32")
    ids = model.tokenizer.encode("Once upon a time")
    expected = model.generate([ids], max_new_tokens=6)[0].tolist()
    argv = ["--ckpt", str(chat_dir), "--prompt", "Once upon a time", "--max-new-tokens", "6"]
    settings = ["--temperature", "0", "--repetition-penalty", "1", "--dtype", "float32", "--json"]
    assert json.loads(run(capsys, *argv, *settings)[1])["tokens"] == expected


def test_chat_and_prompt_file(
    chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "--ckpt", str(chat_dir), "--chat", "hi", "--max-new-tokens", "3", "--json"
    )
    assert code == 0 and json.loads(out)["prompt_tokens"] == 20
    file = tmp_path / "prompt.txt"
    file.write_text("你好<|im_end|>", encoding="utf-8")
    code, out, _ = run(
        capsys, "--ckpt", str(chat_dir), "--prompt-file", str(file), "--json", "--max-new-tokens=2"
    )
    assert code == 0 and json.loads(out)["prompt_tokens"] > 2  # the marker is text, not a control


@pytest.mark.usefixtures("loaded")
def test_samples_are_the_seeds_that_follow(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is what its seed gives alone; in text, headings say which is which."""
    common = ["--ckpt", "-", "--prompt", "Once upon", "--max-new-tokens", "6"]
    common += ["--temperature", "1"]
    many = [*common, "--seed", "-1", "--samples", "3", "--batch-size", "2"]
    code, out, err = run(capsys, *many, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(x["index"], x["sample"], x["seed"]) for x in lines] == [
        (0, 0, -1),
        (0, 1, 0),
        (0, 2, 1),
    ]
    assert len({x["text"] for x in lines}) == 3 and {x["prompt"] for x in lines} == {"Once upon"}
    alone = json.loads(run(capsys, *common, "--seed", "1", "--json")[1])
    same = ("seed", "text", "tokens", "prompt_tokens", "new_tokens", "finish_reason")
    assert [lines[2][name] for name in same] == [alone[name] for name in same]
    assert "3 texts, 18 new tokens in " in err and "tokens/s" in err
    code, out, _ = run(capsys, *many)
    expected = [
        f"=== sample {x['sample'] + 1} of 3 (seed {x['seed']}): Once upon\n{x['text']}\n\n"
        for x in lines
    ]
    assert code == 0 and out == "".join(expected)


@pytest.mark.usefixtures("loaded")
def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, or JSON Lines; each gives what it gives alone, and control tokens are text."""
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_bytes("Hello\r\n\r\n你好<|im_end|> there\n".encode())
    records.write_text('"Hello"\n{"id": 7, "prompt": "你好<|im_end|> there"}\n\n', encoding="utf-8")
    assert prompts.read(lines) == prompts.read(records) == ["Hello", "你好<|im_end|> there"]
    settings = ["--ckpt", "-", "--max-new-tokens", "6", "--json"]
    code, out, err = run(capsys, *settings, "--prompts", str(records))
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [x["index"] for x in found] == [0, 1]
    assert f'note: {records}: only the "prompt" of each record is used, not id\n' in err
    alone = json.loads(run(capsys, *settings, "--prompt", found[1]["prompt"])[1])
    assert found[1]["tokens"] == alone["tokens"] and found[1]["text"] == alone["text"]


def test_chats_of_a_file(chat_model: qwen_jax.LanguageModel) -> None:
    """Each is the prompt of --chat."""
    argv = ["--ckpt", "-", "--system", "Be brief."]
    several = command.parse(generate.parser(), [*argv, "--chats", "a.txt", "--samples", "2"])
    (one,) = generate.tasks(
        command.parse(generate.parser(), [*argv, "--chat", "Hello"]), ["Hello"], about=chat_model
    )
    made = generate.tasks(several, ["Hello", "you"], about=chat_model)
    assert [task.request.ids for task in made[:2]] == [one.request.ids] * 2
    assert [(task.index, task.sample, task.request.seed) for task in made] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 1, 1),
    ]


def test_headings_say_whose_text_it_is() -> None:
    request = completion.Request([1], 5, 1)
    wanted = [results.TextTask(i, j, f"a\n{'b' * 80}", request) for i in range(2) for j in range(2)]
    assert results._heading(wanted[1], wanted) == (
        f"=== prompt 1 of 2, sample 2 of 2 (seed 5): a {'b' * 55}..."
    )
    assert results._heading(wanted[0], wanted[::2]).startswith("=== prompt 1 of 2: a b")


@pytest.mark.usefixtures("loaded")
def test_a_text_ends_before_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", "-", "--prompt", "Hello", "--temperature", "0"]
    argv += ["--max-new-tokens", "9"]
    free = json.loads(run(capsys, *argv, "--json")[1])
    stop = free["text"][4:7]
    stopping = [*argv, "--stop", "never said", "--stop", stop]
    result = json.loads(run(capsys, *stopping, "--json")[1])
    assert result["text"] == free["text"].partition(stop)[0] and result["finish_reason"] == "stop"
    assert result["tokens"] == free["tokens"][: len(result["tokens"])] != free["tokens"]
    assert run(capsys, *stopping)[1] == result["text"] + "\n"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "p.txt has no prompts: write one on each line"),
        ("p.jsonl", '"a"\n{"a"', "p.jsonl:2: not valid JSON: each line of a .jsonl file must be"),
        ("p.jsonl", '{"text": "a", "id": 1}', "p.jsonl:1: has no \"prompt\", but 'text', 'id'"),
        ("p.jsonl", "7", "p.jsonl:1: the prompt must be text (str), got int 7"),
        ("p.jsonl", '{"prompt": ["a"]}', "p.jsonl:1: the prompt must be text (str), got list"),
        ("p.jsonl", '"\\ud83d"', "p.jsonl:1: the prompt holds half a character"),
        ("p.jsonl", '"a"\n""', "p.jsonl:2: empty prompt: give some text"),
        ("p.txt", "a\n" + "b " * 9000, "prompt 2 of {}: a prompt of "),
    ],
)
def test_files_of_prompts_that_cannot_be(
    name: str,
    text: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("the weights are read"))
    file = tmp_path / name
    file.write_text(text)
    code, out, err = run(capsys, "--ckpt", "-", "--prompts", str(file))
    assert code == 1 and out == "" and message.format(file) in err and err.count("\n") == 1


def test_a_base_checkpoint_says_so(
    chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(chat_dir, base)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**config, "chat_format": "raw"}))
    argv = ["--chat", "hi", "--max-new-tokens", "2"]
    assert "base checkpoint" in run(capsys, "--ckpt", str(base), *argv)[2]
    assert "base checkpoint" not in run(capsys, "--ckpt", str(chat_dir), *argv)[2]


def test_the_checkpoints_stop_words(
    chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop of ordinary tokens ends the text and is not shown; tokens hold it."""
    argv = ["--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "9", "--json"]
    free = json.loads(run(capsys, "--ckpt", str(chat_dir), *argv)[1])
    target = tmp_path / "stops"
    shutil.copytree(chat_dir, target)
    config = json.loads((target / "generation_config.json").read_text())
    config["stop_words_ids"] = [free["tokens"][3:5]]
    (target / "generation_config.json").write_text(json.dumps(config))
    result = json.loads(run(capsys, "--ckpt", str(target), *argv)[1])
    assert result["finish_reason"] == "stop" and result["tokens"] == free["tokens"][:5]
    assert free["text"].startswith(result["text"])
    model = qwen_jax.load(target)
    assert result["text"] == model.tokenizer.decode(free["tokens"][:3], skip_special_tokens=True)


def test_rate_counts_time_and_tokens_alike() -> None:
    assert results.rate([(0.0, 1), (5.0, 8), (6.0, 8), (8.0, 6)]) == round(14 / 3, 2)
    assert results.rate([(0.0, 1), (5.0, 8)]) is None


def test_interrupted(
    chat_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C as it writes the third piece of text."""
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    stopping("qwen_jax.chat.tokenizer:TextStream.push", 3, interrupt, monkeypatch.setattr)
    argv = ["--prompt", "Hello", "--max-new-tokens", "9"]
    code, _, err = run(capsys, "--ckpt", str(chat_dir), *argv)
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err


def test_bench(golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "--ckpt", str(golden_dir), "--bench", "--max-new-tokens", "4", "--json"
    )
    result = json.loads(out)
    assert code == 0 and result["decode_tokens_per_second"] > 0
    assert result["matvec_gb_per_second"] > 0 and result["share_of_bandwidth"] > 0
    assert "seconds_to_first_token_cold" in result and result["prompt_tokens"] == 128


def test_bench_of_a_prompt(chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", str(chat_dir), "--bench", "--prompt", "Hello there", "--max-new-tokens", "2"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "(2 tokens" in out and "matrix-vector" in out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "--ckpt"),
        (["--ckpt", "{dir}"], 2, "--prompt"),
        (["--ckpt", "{dir}", "--prompt", "a", "--chat", "b"], 2, "not allowed"),
        (["--ckpt", "{dir}", "--prompt", "a", "--max-new-tokens", "0"], 2, "positive"),
        (["--ckpt", "{dir}", "--prompt", "a", "--set", "seq_length"], 2, "KEY=VALUE"),
        (["--ckpt", "{dir}", "--prompt", "a", "--mesh", "fsdp=x"], 2, "fsdp=4,tp=2"),
        (["--ckpt", "{dir}", "--prompt", "a", "--mesh", "tp=2,tp=4"], 2, "fsdp=4,tp=2"),
        (["--ckpt", "{dir}", "--prompt", "a", "--top-p", "2"], 2, "top_p"),
        (["--ckpt", "{dir}", "--prompt", "a", "--temperature", "nan"], 2, "temperature"),
        (["--ckpt", "{dir}", "--prompt", "a", "--system", "b"], 2, "--chat"),
        (["--ckpt", "{dir}", "--prompt", ""], 2, "empty prompt"),
        (["--ckpt", "{dir}", "--prompt", "a", "--chats", "b"], 2, "not allowed"),
        (["--ckpt", "{dir}", "--prompt", "a", "--samples", "0"], 2, "positive"),
        (["--ckpt", "{dir}", "--prompt", "a", "--stop", ""], 2, "--stop '': an empty text ends"),
        (["--ckpt", "{dir}", "--chat", " "], 2, "empty prompt"),
        (["--ckpt", "{dir}", "--prompt", "a", "--set", "nope=1"], 1, "nope"),
        (["--ckpt", "{dir}", "--prompt", "a", "--set", "layer_windows=9"], 1, "layer_windows"),
        (["--ckpt", "{dir}", "--prompt-file", "/no/such/file"], 1, "/no/such/file"),
        (["--ckpt", "{dir}", "--prompt", "a b c", "--max-length", "2"], 1, "max_length 2"),
        (
            ["--ckpt", "{dir}", "--prompt", "a", "--mesh", "tp=64"],
            1,
            "query heads N = 2 is not divisible",
        ),
        (["--ckpt", "{dir}", "--prompt", "a", "--attention", "nope"], 1, "nope"),
        (
            [
                "--ckpt",
                "{dir}",
                "--prompt",
                "a",
                "--ntk",
                "total",
                "--set",
                "use_dynamic_ntk=false",
            ],
            2,
            "--ntk applies only to dynamic NTK",
        ),
        (["--ckpt", "/no/such/dir", "--prompt", "a"], 1, "/no/such/dir"),
    ],
)
def test_bad_input(
    chat_dir: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    message: str,
) -> None:
    result, out, err = run(capsys, *(arg.format(dir=chat_dir) for arg in argv))
    assert result == code and out == ""
    assert message in err and "Traceback" not in err
    if code == 1:
        assert len([line for line in err.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--max-new-tokens", "100000"], 1, "tokens and 100000 new ones do not fit a cache of"),
        (["--bench", "--max-new-tokens", "100000"], 1, "100000 new ones do not fit"),
        (["--attention", "nope"], 1, "attention 'nope' is not known: choose one of auto"),
        (["--top-k", "-1"], 2, "top_k -1"),
        (["--set", "seq_length=64", "--set", "seq_length=128"], 2, "--set seq_length is given twi"),
        (["--set", "a=1", "--set", "a=1"], 2, "--set a is given twice: give it once"),
    ],
)
def test_what_cannot_be_is_said_before_the_weights_are_read(
    chat_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the weights are read"))
    result, _, err = run(capsys, "--ckpt", str(chat_dir), "--prompt", "Hello there", *argv)
    (line,) = err.splitlines()
    assert result == code and message in line


def test_samples_of_a_checkpoint_that_draws_nothing(
    chat_model: qwen_jax.LanguageModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dataclasses.replace(chat_model.generation_config, sampler=qwen_jax.Greedy())
    greedy = dataclasses.replace(chat_model, generation_config=settings)
    monkeypatch.setattr(generate, "describe", lambda *_, **__: greedy)
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("the weights are read"))
    code, _, err = run(capsys, "--ckpt", "-", "--prompt", "a", "--samples", "2")
    assert code == 2 and "--samples 2: this checkpoint takes the most likely token" in err


def test_a_mesh_may_split_more_rows_than_one_prompt_has(chat_dir: Path) -> None:
    """As docs/hosts.md has it for a pod: `fsdp` splits the weights, and the row is repeated."""
    args = generate.parser().parse_args(["--ckpt", str(chat_dir), "--mesh", "fsdp=2,tp=2"])
    about = description.read(chat_dir)
    made = from_options.mesh(args, about, sizes=meshes.parse(args.mesh))
    assert meshes.describe(made.shape) == args.mesh
    args.mesh = None
    alone = from_options.mesh(args, about, sizes=meshes.parse(None))
    assert meshes.describe(alone.shape) == "tp=2"
    sizes = []
    for mesh in (made, alone):
        with jax.set_mesh(mesh):
            sizes.append(bench._cache_bytes(qwen_jax.load(chat_dir, dtype="float32")))
    assert sizes[0] == sizes[1] > 0


def test_real_process(chat_dir: Path) -> None:
    command = [sys.executable, "-m", "qwen_jax.generate", "--ckpt", str(chat_dir)]
    done = subprocess.run(
        [*command, "--prompt", "Hello", "--max-new-tokens", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("\n") and "tokens/s" in done.stderr
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout
