"""Examples that are encoded once, kept on disk, and read at random by every later run.

A cache is a folder named after all that it depends on: files, tokenizer and how records are
encoded. It appears whole or not at all. Knows no batches.
"""

import collections
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_jax import paths, processes
from qwen_jax.tokenizer import Tokenizer
from train import records
from train.loss import IGNORED

_FORMAT = 2
_AT_A_TIME = 64  # records that a thread encodes
_NAMED = 10  # bad records that are named one by one; the rest are counted
_IDS, _ENDS, _FLAGS, _COUNTS = "ids.u4", "ends.i8", "trained.b1", "counts.json"
_ID, _END, _FLAG = np.dtype("<u4"), np.dtype("<i8"), np.dtype("?")
Encode = Callable[[records.Record], tuple[Sequence[int], Sequence[int] | None]]


@dataclasses.dataclass(frozen=True)
class Counts:
    """records: of a long text, the document is one, and is cut, dropped or bad as a whole; examples
    and tokens are those kept; trained: tokens that are learned; cut and dropped: for being too
    long; bad: records that could not be used; problems: what was wrong with the first.
    digest: of the examples, wherever their files lie.
    """

    records: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    problems: tuple[str, ...] = ()
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How records become examples. encode: a record -> ids and labels, or None where all ids are
    learned; ValueError says what is wrong with it. name: says which encoding that is.

    longest: most ids of an example, None for any; what has more is cut, or with `drop` left out.
    strict: stop at the first bad record, which otherwise is left out.
    """

    encode: Encode
    name: Mapping[str, Any]
    longest: int | None = None
    drop: bool = False
    strict: bool = False


class TokenCache:
    """Examples by number: `cache[i]` is (ids, which of them are learned), both [n].

    lengths int64 [examples]; counts: what became of the records.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts = _counts(folder)
        self._ids = _mapped(folder / _IDS, _ID)
        flags = folder / _FLAGS
        self._trained = _mapped(flags, _FLAG) if flags.exists() else None
        self._ends = np.fromfile(folder / _ENDS, _END)
        self.lengths = np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        last = int(self._ends[index])
        part = slice(last - int(self.lengths[index]), last)
        ids = np.asarray(self._ids[part])
        return ids, np.ones(len(ids), bool) if self._trained is None else self._trained[part]


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r")


def _counts(folder: Path) -> Counts:
    return Counts(**json.loads((folder / _COUNTS).read_text(encoding="utf-8")))


def _is_whole(folder: Path) -> bool:
    """Whether a cache is there, and its files are as long as they were made."""
    try:
        counts = _counts(folder)
        sizes = {_IDS: counts.tokens * _ID.itemsize, _ENDS: counts.examples * _END.itemsize}
        if counts.trained < counts.tokens:
            sizes[_FLAGS] = counts.tokens
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, TypeError):
        return False


def make(
    files: Sequence[Path], tokenizer: Tokenizer, encoding: Encoding, home: Path | None = None
) -> TokenCache:
    """The cache of these files, made now unless it is there already, and whole.

    home: the folder of all caches. Processes of one host wait for the one that makes it; hosts that
    share it may each make it, and use that of the first to end. Raises ValueError where the files
    hold no examples at all, or a bad record when strict.
    """
    home = home or _home()
    home.mkdir(parents=True, exist_ok=True)
    folder = home / _fingerprint(files, tokenizer, encoding)
    with open(home / f"{folder.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it does
        if not _is_whole(folder):
            if folder.exists():
                shutil.rmtree(folder)
            host = socket.gethostname()  # over NFS, the lock may hold for this host alone
            for left in home.glob(f"{folder.name}.*@{host}.tmp"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            draft = home / f"{folder.name}.{os.getpid()}@{host}.tmp"
            draft.mkdir()
            try:
                _fill(draft, files, encoding)
                _publish(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    cache = TokenCache(folder)
    if encoding.strict and cache.counts.bad:
        raise ValueError(cache.counts.problems[0])
    _report(cache.counts)
    return cache


def _publish(draft: Path, folder: Path) -> None:
    """Give it its name, unless another host has been quicker."""
    for path in (*draft.iterdir(), draft):  # a crash must not leave the name without the content
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _home() -> Path:
    return paths.own_cache() / "tokens"


def _fingerprint(files: Sequence[Path], tokenizer: Tokenizer, encoding: Encoding) -> str:
    vocabulary = hashlib.sha256()
    for i, token in sorted(tokenizer.id_to_bytes.items()):
        vocabulary.update(b"%d %d " % (i, len(token)) + token)
    known = {
        "format": _FORMAT,
        "files": [(str(paths.absolute(file)), paths.stamp(file)) for file in files],
        "vocabulary": vocabulary.hexdigest(),
        "encoding": dict(encoding.name),
        "longest": [encoding.longest, encoding.drop],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _fill(folder: Path, files: Sequence[Path], encoding: Encoding) -> None:
    found: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    ends: list[int] = []
    digest = hashlib.sha256()
    with open(folder / _IDS, "wb") as ids_file, open(folder / _FLAGS, "wb") as flags:
        for where, ids, learned, problem in _documents(files, encoding):
            found["records"] += 1
            if not problem and encoding.longest is not None and len(ids) > encoding.longest:
                found["dropped" if encoding.drop else "cut"] += 1
                if encoding.drop:
                    continue
                ids, learned = ids[: encoding.longest], learned[: encoding.longest]
                if not learned.any():
                    problem = f"nothing to learn in the first {encoding.longest} tokens"
            if problem:
                found["bad"] += 1
                problems.append(f"{where}: {problem}")
                if encoding.strict:
                    raise ValueError(problems[0])
                continue
            digest.update(b"%d " % len(ids))
            for file, content in ((ids_file, ids), (flags, learned)):
                file.write(content.data)
                digest.update(content.data)
            found["tokens"] += len(ids)
            found["trained"] += int(learned.sum())
            ends.append(found["tokens"])
    if not ends:
        reason = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"no example in {', '.join(map(str, files))}{reason}")
    if found["trained"] == found["tokens"]:
        (folder / _FLAGS).unlink()
    np.array(ends, _END).tofile(folder / _ENDS)
    told = {"problems": tuple(problems[:_NAMED]), "digest": digest.hexdigest()}
    counts = Counts(**found, examples=len(ends), **told)
    paths.write(folder / _COUNTS, json.dumps(dataclasses.asdict(counts)).encode())


def _documents(
    files: Sequence[Path], encoding: Encoding
) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """(where, ids, learned, problem) of what is an example each: pieces of a text are joined."""
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    where = problem = ""
    for record, *piece, wrong in _encoded(files, encoding):
        if not ids or (wrong and not problem):
            where, problem = record.where, wrong
        ids.append(piece[0])
        learned.append(piece[1])
        if record.ends:
            yield where, np.concatenate(ids), np.concatenate(learned), problem
            ids, learned, problem = [], [], ""


def _encoded(
    files: Sequence[Path], encoding: Encoding
) -> Iterator[tuple[records.Record, np.ndarray, np.ndarray, str]]:
    """(record, ids, learned, problem) of every record in order, encoded by threads."""
    nothing = np.zeros(0, _ID), np.zeros(0, _FLAG)

    def work(batch: Sequence[records.Record]) -> list[Any]:
        done = []
        for record in batch:
            (ids, learned), problem = nothing, record.problem
            try:
                if not problem:
                    given, labels = encoding.encode(record)
                    ids = np.array(given, _ID)
                    all_learned = np.ones(len(ids), _FLAG)
                    learned = all_learned if labels is None else np.array(labels) != IGNORED
            except ValueError as error:
                problem = str(error)
            done.append((record, ids, learned, problem))
        return done

    threads = os.cpu_count() or 1
    bar = tqdm(
        desc="encode",
        total=sum(map(paths.size, files)),
        unit="B",
        unit_scale=True,
        mininterval=0.5,
        disable=processes.index() > 0,
    )
    with bar, ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[list[Any]]] = collections.deque()
        for file in files:
            start = bar.n
            found = records.read(file)
            while batch := list(itertools.islice(found, _AT_A_TIME)):
                waiting.append(pool.submit(work, batch))
                while len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
                bar.update(start + batch[-1].position - bar.n)
        while waiting:
            yield from waiting.popleft().result()
        bar.update(bar.total - bar.n)


def _report(counts: Counts) -> None:
    log = logging.getLogger("qwen_jax").info
    for problem in counts.problems:
        log(f"left out: {problem}")
    kept = f"{counts.examples:,} examples of {counts.records:,} records, {counts.tokens:,} tokens"
    told = {"left out as bad": counts.bad, "cut": counts.cut, "dropped": counts.dropped}
    parts = [f"{count:,} {what}" for what, count in told.items() if count]
    log("; ".join([kept, *parts]))
