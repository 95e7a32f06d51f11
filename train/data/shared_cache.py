"""Builds one token cache with several processes, each of which encodes a share of the files.

Files are cut into parts that depend on the files alone. Each part is encoded by one process into a
folder that all processes see, and the parts are joined in order, so the cache has the same bytes
for any number of processes. Processes find out which of them share a disk by creating files on it.
"""

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.runtime import command, lock, paths, processes, records
from train.data import token_cache, token_files
from train.data.token_cache import Encoding
from train.data.token_files import TokenCache

_PROBLEMS = "problems.json"


def make(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    encoding: Encoding,
    folder: Path | None,
    common: Path,
) -> TokenCache:
    """Open the token cache of these data files; if it is missing, all processes build it together.

    encoding: how records become examples.
    folder: the folder of token caches; None is each host's default folder. If it is in `gs://`,
        only encoded parts are stored there, and each host joins them on its own disk.
    common: a folder that all processes see, for the parts if the hosts do not share a cache folder.

    If the hosts' files differ in path or date, each host encodes all of them. Raises ValueError if
    the files hold no example, or for a bad record if `encoding.strict`.
    """
    remote = folder if folder is not None and paths.is_remote(folder) else None
    home = token_cache.default_home() if folder is None or remote else folder
    if processes.count() == 1 and remote is None:
        return token_cache.make(files, tokenizer, encoding=encoding, home=home)
    home.mkdir(parents=True, exist_ok=True)
    name = token_cache.fingerprint(files, tokenizer, encoding=encoding)
    if len(set(processes.gather(name))) > 1:
        command.say("the hosts' data files differ in path or date: each host encodes all of them")
        return token_cache.make(files, tokenizer, encoding=encoding, home=home)
    leaders = _leaders(home)
    own_disk = len(set(leaders)) == 1 and remote is None
    store = (remote or (home if own_disk else common)) / f"{name}.parts"
    with _locked(store) if own_disk else contextlib.nullcontext():
        state = "whole" if token_files.is_whole(home / name) else ""
        whole = [answer == "whole" for answer in processes.gather(state)]
        if not all(whole):
            _make(files, encoding, folder=home / name, store=store, whole=whole, leaders=leaders)
            if own_disk and processes.index() == 0:
                shutil.rmtree(store, ignore_errors=True)
            os.listdir(home)  # NFS remembers that a folder did not exist until its parent is listed
    return token_cache.opened(home / name, encoding)


def _make(
    files: Sequence[Path],
    encoding: Encoding,
    *,
    folder: Path,
    store: Path,
    whole: Sequence[bool],
    leaders: Sequence[int],
) -> None:
    """Encode the parts of the data files, and join them into a token cache on each disk without it.

    folder: the folder of the token cache.
    store: the folder of the encoded parts.
    whole: for each process, whether its disk has the token cache already.
    leaders: for each process, the index of the first process on the same disk, which joins the
        parts.
    """
    parts, index = records.parts(files), processes.index()
    lacking = [i for i, has_it in enumerate(whole) if not has_it]
    if index in lacking:
        encode_share(
            store,
            parts,
            encoding=encoding,
            share=lacking.index(index),
            shares=len(lacking),
            home=folder.parent,
        )
    processes.barrier()
    if leaders[index] == index:
        fill = lambda draft: join(draft, store, parts=parts)  # noqa: E731
        token_cache.appear(folder, token_files.is_whole, fill=fill)
    processes.barrier()


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep other programs off the parts of a cache, which they would remove when they are done.

    Process 0 takes the lock; the other processes wait until it has it.
    """
    with contextlib.ExitStack() as stack:
        if processes.index() == 0:
            file = store.with_name(f"{store.name}.lock")
            stack.enter_context(lock.alone(store, file, wait=True))
        processes.barrier()
        yield


def encode_share(
    store: Path,
    parts: Sequence[records.FilePart],
    *,
    encoding: Encoding,
    share: int,
    shares: int,
    home: Path,
) -> None:
    """Encode one share of the parts of data files: every `shares`-th part, from part `share` on.

    store: the folder that the encoded parts go to; parts that it has already are skipped. home: a
    local folder for drafts, used if `store` is in `gs://`.
    """
    found = paths.sizes(store)
    mine = [n for n in range(share, len(parts), shares) if f"{n}/{_PROBLEMS}" not in found]
    if not paths.is_remote(store):
        paths.make_folder(store)
        home = store
    with token_cache.progress([parts[n] for n in mine]) as bar:
        for number in mine:
            with _draft(home, f"{store.name}-{number}") as draft:
                counts, problems = token_cache.encode(
                    draft, [parts[number]], encoding=encoding, bar=bar
                )
                token_files.write_counts(draft, counts)
                paths.write(draft / _PROBLEMS, json.dumps(problems).encode())
                _put(draft, store / str(number))


@contextlib.contextmanager
def _draft(home: Path, name: str) -> Iterator[Path]:
    """Make an empty draft folder in `home`, and remove it on leaving the context.

    First removes drafts of the same `name` that killed processes on this host have left.
    """
    host = socket.gethostname()
    for left in home.glob(f"{name}.*@{host}.tmp"):
        number = int(left.name.removeprefix(f"{name}.").partition("@")[0])
        if number == os.getpid() or not lock.lives(number):  # a restarted container reuses numbers
            shutil.rmtree(left, ignore_errors=True)
    folder = home / f"{name}.{os.getpid()}@{host}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(draft: Path, folder: Path) -> None:
    """Move an encoded part from its draft to `folder`.

    In `gs://`, problems.json is uploaded last: a part without this file counts as missing.
    """
    if not paths.is_remote(folder):
        token_cache.publish(draft, folder)
        return
    for file in sorted(draft.iterdir(), key=lambda file: file.name == _PROBLEMS):
        paths.upload(file, folder / file.name)


def join(draft: Path, store: Path, *, parts: Sequence[records.FilePart]) -> None:
    """Join the encoded parts in `store` into a token cache, in the folder `draft`.

    parts: all parts of the data files, in order. Raises ValueError if they hold no example, or if
    an encoded part is damaged.
    """
    problems: list[str] = []

    def caches() -> Iterator[TokenCache]:
        bar = token_cache.progress(parts, "join")
        with bar:
            for number, part in enumerate(parts):
                folder = store / str(number)
                if paths.is_remote(store):
                    folder = draft / "part"
                    folder.mkdir()
                    for name in paths.sizes(store / str(number)):
                        paths.download(store / str(number) / name, folder / name)
                if not token_files.is_whole(folder):
                    raise ValueError(f"{store / str(number)} is damaged: remove {store}")
                for where, line, problem in json.loads(
                    (folder / _PROBLEMS).read_text(encoding="utf-8")
                ):
                    if len(problems) < token_cache.NAMED:
                        problems.append(f"{records.place(part, where, line=line)}: {problem}")
                yield TokenCache(folder)
                if paths.is_remote(store):
                    shutil.rmtree(folder)
                bar.update(part.size)

    counts = token_files.merge(draft, caches())
    token_cache.finish(draft, counts, problems=problems, parts=parts)


def _leaders(home: Path) -> list[int]:
    """Return, for each process, the index of the first process that sees the same folder.

    home: the folder's path. Hosts may have different folders under this path.
    """
    sign = f"{processes.gather(uuid.uuid4().hex)[0]}.process"
    own = home / f"{sign}{processes.index()}"
    own.touch()
    try:
        processes.barrier()
        seen = (i for i in range(processes.count()) if (home / f"{sign}{i}").exists())
        leader = next(seen)
        return [int(found) for found in processes.gather(str(leader))]
    finally:
        own.unlink()
