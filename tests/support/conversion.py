"""Helpers for tests of the converters: the golden checkpoint, damage to it, and its values."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from convert import from_hf, to_hf

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "checkpoint"
INDEX = "model.safetensors.index.json"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint folder, by name."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors have equal names, bytes, dtypes and shapes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def contents(path: Path) -> dict[str, str]:
    """The SHA-256 digest of every file in a folder, by relative path."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def there(source: Path | str, path: Path | str, *options: str) -> None:
    """Convert a checkpoint folder to a model directory."""
    assert from_hf.main([str(source), str(path), *options]) == 0


def back(model: Path | str, path: Path | str, *options: str) -> None:
    """Convert a model directory to a checkpoint folder."""
    assert to_hf.main([str(model), str(path), *options]) == 0


def flip(file: Path, at: int) -> None:
    """Flip a bit of the byte at a position in a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def raises(error: Exception) -> Callable[..., Any]:
    """A function that raises this error."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def last_line(capfd: Any) -> str:
    """The last line that a command printed to stderr; fails if there is a traceback."""
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], Any], number: int = 2) -> None:
    """Change the tensors in one file of the golden checkpoint. number: of the file, 1 or 2."""
    file = path / f"model-0000{number}-of-00002.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, {"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    """Change values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
