"""What is installed, and the commands of a checkout beside it."""

import fnmatch
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.support.conversion import ROOT

COMMANDS = [
    "convert/from_hf.py", "convert/to_hf.py", "train/pretrain.py", "train/sft.py",
    "train/perplexity.py", "train/plan.py", "train/tokenizer.py",
]  # fmt: skip


def test_qwen_jax_alone_is_installed():
    """`train` and `convert` are names that other packages have, too. What the package reads beside
    its modules goes with it.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == {"find": {"include": ["qwen_jax", "qwen_jax.*"]}}
    found = [x for x in (ROOT / "qwen_jax").rglob("*") if x.is_file()]
    page = ROOT / "qwen_jax/serve/page"  # a folder of static files, in whole
    assert settings["package-data"]["qwen_jax.serve"] == ["page/**"]
    files = [x for x in found if "__pycache__" not in x.parts and page not in x.parents]
    patterns = ["*.py", *settings["package-data"]["*"]]
    lost = [x for x in files if not any(fnmatch.fnmatch(x.name, p) for p in patterns)]
    assert files and not lost
    assert all((x.parent / "__init__.py").exists() for x in files)


def test_a_wheel_holds_qwen_jax_alone(tmp_path):
    """As built from the checkout, with the files that the package reads."""
    source = tmp_path / "source"
    for folder in ("qwen_jax", "train", "convert"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"qwen_jax"}
    files = {x.relative_to(source) for x in (source / "qwen_jax").rglob("*") if x.is_file()}
    assert {str(x) for x in files} <= names


def test_the_demo_installs_the_package_alone(tmp_path):
    """And says before what that takes. What the tests need comes on top, into the same folder."""

    def told(target: str) -> list[str]:
        command = ["make", "--no-print-directory", "-n", target, f"VENV={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    lines = told("demo")
    assert re.search(r"\d+ minutes, [\d.]+ GB", lines[0]), "before anything else"
    assert [x.split()[-1] for x in lines if "pip install" in x] == ["."]
    (tmp_path / ".installed-demo").touch()
    assert not [x for x in told("demo") if "pip install" in x]
    assert [x.split()[-1] for x in told("pytest") if "pip install" in x] == ["'.[test]'"]
    (tmp_path / ".installed-demo").unlink()
    (tmp_path / ".installed").touch()
    assert not [x for x in told("demo") if "pip install" in x]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_from_a_checkout(command, monkeypatch, capsys):
    """As files, and as modules of the folder that they are run in: with the checkout first on the
    path, whatever is installed; and they are spelled in one way.
    """
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / command.partition("/")[0]), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / command), run_name="__main__")
    assert not ended.value.code and sys.path[0] == str(ROOT)
    module = command.removesuffix(".py").replace("/", ".")
    usage = capsys.readouterr().out.split()[1:4]
    assert usage[:2] == ["python", command] or usage == ["python", "-m", module]
