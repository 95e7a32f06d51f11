"""File operations on local disks and in Google Cloud Storage; only this module tells them apart.

A local path is a `pathlib.Path`. A path in `gs://` is an `etils.epath.Path`, which has the same
methods for names, `exists`, `is_dir`, `glob`, `iterdir`, `read_text`, `read_bytes` and `unlink`;
the functions here do the rest. A local file is written under a temporary name (a draft) and renamed
when complete. An object in `gs://` appears complete or not at all, needs no draft, and cannot be
appended to.
"""

import contextlib
import functools
import importlib.util
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, cast

DRAFTS = f"*.{'[0-9a-f]' * 8}.tmp"  # a glob pattern for the names of drafts
_PART = 16 * 2**20  # bytes of an upload per request


def parse(text: "str | os.PathLike[str]") -> Path:
    """Turn text into a local or `gs://` path.

    Raises ValueError if it is invalid, or if `gs://` cannot be read because gcsfs is not installed.
    """
    if not isinstance(text, str | os.PathLike) or not isinstance(os.fspath(text), str):
        raise ValueError(f"a path must be a str or a Path, got {type(text).__name__} {text!r}")
    name = os.fspath(text)
    if not name or "\0" in name:
        what = "holds a zero" if name else "is empty"
        raise ValueError(f"the path {name!r} {what}: name a file or a folder (. is this folder)")
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", name)
    if scheme is None:
        _check_links(Path(text))
        return Path(text)
    if scheme[1] != "gs":
        raise ValueError(f"{name}: only local paths and gs://BUCKET/... can be used")
    if not re.match(r"gs://[^/]", name):
        raise ValueError(f"{name}: no bucket: write gs://BUCKET/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{name} needs gcsfs: pip install -e '.[gcs]'")
    from etils import epath

    return cast(Path, epath.Path(text))


def _check_links(path: Path) -> None:
    """Raise ValueError if the path goes through a dangling symbolic link.

    Nothing can be read behind such a link, and no folder created.
    """
    if os.path.exists(path):
        return
    for step in (path, *path.parents):
        if os.path.islink(step) and not os.path.exists(step):
            raise ValueError(
                f"{path}: {step} is a symbolic link to {os.readlink(step)}, which leads nowhere: "
                "make what it leads to, or remove it"
            )


def is_remote(path: Path) -> bool:
    """Return whether the path is in Google Cloud Storage (`gs://`)."""
    return not isinstance(path, Path)


def absolute(path: "str | os.PathLike[str]") -> Path:
    """Turn text into an absolute local or `gs://` path. Raises ValueError if it is invalid."""
    path = parse(path)
    return path if is_remote(path) else path.absolute()


def is_within(folder: Path, name: str) -> bool:
    """Return whether a file name, resolved in a folder, stays inside that folder.

    A name does not if it is absolute, contains `..`, or leads outside through a symbolic link. In
    the cache of the Hugging Face hub every file is a link into the folder `blobs` beside
    `snapshots`; such a link counts as inside.
    """
    plain = PurePath(name)
    if plain.is_absolute() or ".." in plain.parts:
        return False
    if is_remote(folder):
        return True
    own = [root := folder.resolve()]
    if root.parent.name == "snapshots":
        own.append(root.parents[1] / "blobs")
    return any((folder / name).resolve().is_relative_to(place) for place in own)


def make_folder(path: Path) -> None:
    """Create a local folder and its parents. Does nothing in `gs://`, which has no folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def is_place(file: Path) -> bool:
    """Return whether the folder of a file to be created exists; in `gs://` it always does."""
    return is_remote(file) or file.parent.is_dir()


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _objects().rm(str(path), recursive=True)
        else:
            shutil.rmtree(path)


def size(path: Path) -> int:
    """Return the size of a file in bytes. Raises FileNotFoundError if there is no such file."""
    return _objects().info(str(path))["size"] if is_remote(path) else path.stat().st_size


def stamp(path: Path) -> list[int]:
    """Return two numbers that change when a file is rewritten: size, and time or generation.

    The second number is the mtime in ns of a local file, or the generation that `gs://` counts.
    """
    if is_remote(path):
        found = _objects().info(str(path))
        return [found["size"], int(found["generation"])]
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def sizes(root: Path) -> dict[str, int]:
    """Return the size in bytes of every file under `root`, by its path relative to `root`.

    A remote folder takes one listing. Files that are moved or removed meanwhile may be missing.
    """
    if is_remote(root):
        top = str(root).removeprefix("gs://") + "/"
        found = _objects().find(str(root), detail=True)
        return {name.removeprefix(top): entry["size"] for name, entry in sorted(found.items())}
    local = {}
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                local[file.relative_to(root).as_posix()] = file.stat().st_size
    return dict(sorted(local.items()))


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Yield an empty local file, which becomes `path` if the block ends without an exception.

    `path` may be remote. Every writer has a draft of its own, and the last writer to finish
    determines the content. A writer that is killed leaves its draft behind. A local `path` gets the
    permissions of any new file in its folder, even if a library has restricted those of the draft.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder, path.name)
            own.touch()
            yield own
            upload(own, path)
        return
    own = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        own.touch(exist_ok=False)
        mode = own.stat().st_mode
        yield own
        if own.stat().st_mode != mode:
            own.chmod(stat.S_IMODE(mode))
        own.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            own.unlink()
        if isinstance(error, OSError) and error.filename in (own, str(own)):
            error.filename, error.filename2 = str(path), None  # the name that the caller knows
        raise


def write(path: Path, data: bytes) -> None:
    """Write a small file, completely or not at all."""
    if is_remote(path):
        _objects().pipe_file(str(path), data)
        return
    with draft(path) as own:
        own.write_bytes(data)


def copy(source: Path, target: Path) -> None:
    """Copy a small file."""
    write(target, source.read_bytes())


def create(path: Path, data: bytes) -> None:
    """Create a small object in `gs://`. Raises FileExistsError if an object of that name exists."""
    _objects().pipe_file(str(path), data, mode="create")


def rewrite(path: Path, data: bytes, *, generation: int) -> int:
    """Overwrite a small object in `gs://` if its generation (see `stamp`) is the given one.

    Returns the new generation. Raises FileExistsError if the object has another generation, and
    FileNotFoundError if there is no object.
    """
    bucket, _, key = str(path).removeprefix("gs://").partition("/")
    system, wanted = _objects(), {"uploadType": "media", "name": key}
    address = f"{system._location}/upload/storage/v1/b/{bucket}/o"
    wanted["ifGenerationMatch"] = str(generation)
    return int(system.call("POST", address, data=data, json_out=True, **wanted)["generation"])


def remove_generation(path: Path, generation: int) -> None:
    """Remove an object in `gs://`, unless its generation (`stamp`) has changed."""
    bucket, _, key = str(path).removeprefix("gs://").partition("/")
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        _objects().call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)


def upload(source: Path, target: Path) -> None:
    """Copy a local file of any size to `gs://`, where it appears only when it is complete."""
    _objects().put_file(str(source), str(target))


def upload_folder(source: Path, target: Path) -> None:
    """Copy the files of a local folder and of its subfolders to a folder in `gs://`."""
    for name in sizes(source):
        upload(source / name, target / name)


def download(source: Path, target: Path) -> None:
    """Copy a file of any size from `gs://` to a local path."""
    _objects().get_file(str(source), str(target))


class Object:
    """A file in `gs://` that is read by ranges of bytes."""

    def __init__(self, path: Path):
        self._path = str(path)

    def read(self, offset: int, count: int) -> bytes:
        """Return at most `count` bytes of the file from `offset` on, fewer at its end."""
        return _objects().cat_file(self._path, start=offset, end=offset + count)


class Upload:
    """A file in `gs://` that is written from front to back, and appears when it is complete."""

    def __init__(self, path: Path):
        self._file: Any = _objects().open(str(path), "wb", block_size=_PART)

    def write(self, data: Any) -> int:
        """Append bytes, and return their number."""
        return self._file.write(data)

    def finish(self) -> None:
        """Complete the upload, so that the file appears."""
        self._file.close()

    def abandon(self) -> None:
        """Give the upload up: its parts expire. Closing the file as usual would complete it."""
        self._file.closed = True


def open_binary(path: Path) -> IO[bytes]:
    """Open a local or remote file for reading from front to back."""
    return _objects().open(str(path), "rb") if is_remote(path) else open(path, "rb")


@contextlib.contextmanager
def reader(path: Path) -> Iterator[int | Object]:
    """Open a file for reading ranges: yields a local descriptor, or an `Object` for `gs://`."""
    if is_remote(path):
        yield Object(path)
        return
    with open(path, "rb", buffering=0) as file:
        yield file.fileno()


@contextlib.contextmanager
def writer(path: Path) -> Iterator[int | Upload]:
    """Open a file for writing front to back: yields a local descriptor, or an `Upload` for `gs://`.

    The file gets its name only if the block ends without an exception, so a file of that name is
    complete.
    """
    if is_remote(path):
        upload = Upload(path)
        try:
            yield upload
        except BaseException:
            upload.abandon()
            raise
        upload.finish()
        return
    with draft(path) as own, open(own, "r+b", buffering=0) as file:
        yield file.fileno()


def read(path: Path, offset: int, *, count: int) -> bytes:
    """Read at most `count` bytes of a file from `offset` on, fewer at its end."""
    if is_remote(path):
        return Object(path).read(offset, count)
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(count)


def check_name(folder: Path) -> None:
    """Raise ValueError if TensorStore (and so Orbax) cannot open the folder because of its path.

    TensorStore refuses paths that are not UTF-8 or contain a backslash.
    """
    whole = str(folder if is_remote(folder) else folder.resolve())
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{folder}: its name is not UTF-8, which TensorStore cannot open: choose another"
        ) from None
    if "\\" in whole and os.sep != "\\":
        raise ValueError(
            f"{folder}: its name has a backslash, which TensorStore cannot open: choose another"
        )


def kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's key-value spec of a folder. Raises ValueError if it cannot open the path."""
    check_name(folder)
    if is_remote(folder):
        bucket, _, path = str(folder).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{folder.resolve()}{os.sep}"}  # it refuses ".."


@functools.cache
def _objects() -> Any:
    """The fsspec file system for `gs://` that epath uses, with its cache of listings turned off.

    Other processes write to the bucket, and so does TensorStore by its own means, so a cached
    listing would be wrong.
    """
    from etils.epath import backend

    system = backend.fsspec_backend.fs("gs://")
    system.dircache.use_listings_cache = False
    return system
