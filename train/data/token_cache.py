"""Builds token caches: examples encoded once, kept on disk, and read at random by later runs.

A cache is a folder named by a hash of all that it depends on: files, tokenizer and encoding. The
folder appears only when it is complete. Knows no batches.
"""

import collections
import contextlib
import dataclasses
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

import numpy as np
from jaxtyping import Bool, UInt
from tqdm import tqdm

from qwen_jax.chat.tokenizer import Tokenizer
from qwen_jax.runtime import caches, lock, paths, processes, records
from qwen_jax.runtime import progress as bars
from train.data.batch import IGNORED
from train.data.token_files import (
    FLAG,
    ID,
    Counts,
    TokenCache,
    Writer,
    closed,
    is_whole,
    write_counts,
)

_FORMAT = 2
_AT_A_TIME = 64  # records that a thread encodes
NAMED = 10  # bad records that are named one by one; the rest are counted
Encode = Callable[[records.Record], tuple[Sequence[int], Sequence[int] | None]]
# A record, its ids, whether each of them is trained, and its problem or "".
_Encoded = tuple[records.Record, UInt[np.ndarray, " n"], Bool[np.ndarray, " n"], str]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How records of data files become examples of a token cache.

    encode: a function from a record to (ids, labels); labels None trains all ids. It raises
        ValueError for a bad record.
    name: values that distinguish this encoding from others, part of the cache's fingerprint.
    longest: the most ids of an example; None for any number.
    drop: whether longer examples are left out instead of cut.
    strict: whether to stop at the first bad record instead of leaving it out.
    """

    encode: Encode
    name: Mapping[str, str]
    _: dataclasses.KW_ONLY
    longest: int | None = None
    drop: bool = False
    strict: bool = False


def make(
    files: Sequence[Path], tokenizer: Tokenizer, *, encoding: Encoding, home: Path | None = None
) -> TokenCache:
    """Open the token cache of these data files; if it is missing or incomplete, build it.

    home: the folder of all caches; None for the default. Processes of one host wait for the one
    that builds the cache; hosts that share the folder may each build it, and all use the first to
    finish. Raises ValueError if the files hold no example, or for a bad record if
    `encoding.strict`.
    """
    home = home or default_home()
    folder = home / fingerprint(files, tokenizer, encoding=encoding)
    parts = [records.FilePart(file, size=paths.size(file)) for file in files]
    appear(folder, is_whole, fill=lambda draft: _fill(draft, parts, encoding=encoding))
    return opened(folder, encoding)


def opened(folder: Path, encoding: Encoding) -> TokenCache:
    """Open a complete token cache, and log how many of its records were kept, cut or left out.

    Raises ValueError for a bad record if `encoding.strict`.
    """
    cache = TokenCache(folder)
    if encoding.strict and cache.counts.bad:
        raise ValueError(cache.counts.problems[0])
    _report(cache.counts)
    return cache


def appear(folder: Path, whole: Callable[[Path], bool], *, fill: Callable[[Path], object]) -> None:
    """Build a folder so that it appears only when it is complete, unless a complete one exists.

    whole: tells whether an existing folder is complete; if not, the folder is removed first. fill:
    writes the contents into a draft folder, which is then renamed. Processes of one host wait for
    the one that builds the folder.
    """
    home = folder.parent
    with lock.alone(folder, home / f"{folder.name}.lock", wait=True):
        # In this order, as the lock may hold for this host alone, and another host may publish the
        # folder at any time.
        if folder.exists() and not whole(folder):
            shutil.rmtree(folder)
        if folder.exists():
            return
        host = socket.gethostname()
        # Drafts of killed processes; drafts of parts have other names (`shared_cache`).
        for left in home.glob(f"{folder.name}.[0-9]*@{host}.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        draft = home / f"{folder.name}.{os.getpid()}@{host}.tmp"
        draft.mkdir()
        try:
            fill(draft)
            publish(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, folder: Path) -> None:
    """Flush a draft folder to disk, and rename it to `folder`.

    Nothing is renamed if another host has built `folder` meanwhile.
    """
    for path in (
        *draft.iterdir(),
        draft,
    ):  # so that a crash cannot leave a folder with its name but without its content
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def default_home() -> Path:
    """Return the folder of token caches to use if the user gives none."""
    return caches.own_cache("tokens")


def fingerprint(files: Sequence[Path], tokenizer: Tokenizer, *, encoding: Encoding) -> str:
    """Return a token cache's folder name: a hash of the files, the vocabulary and the encoding."""
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


# A problem of a record: the record's `where` and `line` (as in `Record`), and a message.
Problem = tuple[str, int, str]


def _fill(folder: Path, parts: Sequence[records.FilePart], *, encoding: Encoding) -> None:
    """Encode whole data files into an empty folder, which becomes a token cache."""
    with progress(parts) as bar:
        counts, problems = encode(folder, parts, encoding=encoding, bar=bar)
    finish(
        folder,
        counts,
        problems=[f"{where}: {problem}" for where, _, problem in problems],
        parts=parts,
    )


def finish(
    folder: Path, counts: Counts, *, problems: Sequence[str], parts: Sequence[records.FilePart]
) -> None:
    """Complete a token cache by writing its counts.

    problems: descriptions of the bad records, of which the first ones are stored too. parts: the
    encoded parts of files, for the error message. Raises ValueError if no example is left.
    """
    if not counts.examples:
        reason = f"; the first: {problems[0]}" if problems else ""
        files = dict.fromkeys(str(part.path) for part in parts)
        raise ValueError(f"no example in {', '.join(files)}{reason}")
    write_counts(folder, dataclasses.replace(counts, problems=tuple(problems[:NAMED])))


def encode(
    folder: Path, parts: Sequence[records.FilePart], *, encoding: Encoding, bar: tqdm
) -> tuple[Counts, list[Problem]]:
    """Encode data files, or one part of a file, into the files of a token cache in `folder`.

    Returns the counts of records and tokens, and the first problems. bar: shows the progress.
    Raises ValueError for a bad record if `encoding.strict`.
    """
    found: collections.Counter[str] = collections.Counter()
    problems: list[Problem] = []
    longest = encoding.longest
    with contextlib.closing(Writer(folder)) as writer:
        where, line, problem, size, begun = "", 0, "", 0, False
        for record, ids, learned, wrong in _encoded(parts, encoding, bar=bar):
            # An example is a record, or pieces of a text.
            if not begun or (wrong and not problem):
                where, line, problem = record.where, record.line, wrong
            begun = True
            room = len(ids) if longest is None else max(0, longest - size)
            writer.add(ids[:room], learned[:room])
            size += len(ids)
            if not record.ends:
                continue
            found["records"] += 1
            too_long = not problem and longest is not None and size > longest
            if too_long:
                found["dropped" if encoding.drop else "cut"] += 1
                if not encoding.drop and not writer.learned:
                    problem = f"nothing to learn in the first {longest} tokens"
            if problem:
                found["bad"] += 1
                if encoding.strict:
                    raise ValueError(f"{records.place(parts[0], where, line=line)}: {problem}")
                problems += [(where, line, problem)][: NAMED - len(problems)]
            if problem or (too_long and encoding.drop):
                writer.discard()
            else:
                writer.keep()
            size, begun = 0, False
        return closed(folder, writer, found=found), problems


def progress(parts: Sequence[records.FilePart], what: str = "encode") -> tqdm:
    """Make a progress bar of the bytes read, which only process 0 shows. what: its label."""
    return bars.bar(
        desc=what,
        total=sum(part.size for part in parts),
        unit="B",
        unit_scale=True,
        disable=processes.index() > 0,
    )


def _encoded(
    parts: Sequence[records.FilePart], encoding: Encoding, *, bar: tqdm
) -> Iterator[_Encoded]:
    """Encode all records in threads; yield (record, ids, learned, problem) for each, in order.

    ids, learned: uint32 [n] and bool [n], the ids and whether each is trained. problem: why the
    record is bad, else "".
    """
    nothing = np.zeros(0, ID), np.zeros(0, FLAG)

    def work(batch: Sequence[records.Record]) -> list[_Encoded]:
        done = []
        for record in batch:
            (ids, learned), problem = nothing, record.problem
            try:
                if not problem:
                    given, labels = encoding.encode(record)
                    ids = np.array(given, ID)
                    all_learned = np.ones(len(ids), FLAG)
                    learned = all_learned if labels is None else np.array(labels) != IGNORED
            except ValueError as error:
                problem = str(error)
            done.append((record, ids, learned, problem))
        return done

    threads = max(1, (os.cpu_count() or 1) // processes.count_here())
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[list[_Encoded]]] = collections.deque()
        for part in parts:
            start = bar.n
            found = records.read(part.path, part.number, count=part.count)
            while batch := list(itertools.islice(found, _AT_A_TIME)):
                waiting.append(pool.submit(work, batch))
                while len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
                bar.update(start + min(batch[-1].position, part.size) - bar.n)
            bar.update(start + part.size - bar.n)
        while waiting:
            yield from waiting.popleft().result()


def _report(counts: Counts) -> None:
    """Log the counts of a cache and the problems of its first bad records."""
    log = logging.getLogger("qwen_jax").info
    for problem in counts.problems:
        log(f"left out: {problem}")
    kept = f"{counts.examples:,} examples of {counts.records:,} records, {counts.tokens:,} tokens"
    losses = {"left out as bad": counts.bad, "cut": counts.cut, "dropped": counts.dropped}
    parts = [f"{count:,} {what}" for what, count in losses.items() if count]
    log("; ".join([kept, *parts]))
