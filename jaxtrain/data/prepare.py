"""Tokenises a source into a folder of shards, in parallel and resumable, and finds it again. It makes no batches."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng import zlib_ng

from jaxtrain.data import reading, shards
from jaxtrain.data.reading import Document, Piece
from jaxtrain.data.source import HuggingFace, Jsonl, Parquet, Text
from jaxtrain.data.tokenizer import OpenTokenizer, UndecodableText, open_tokenizer
from jaxtrain.errors import DataError, RunError

FORMAT = 1  # of the shards: another number, another folder
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024  # of one call of the tokenizer: enough to hide the call, little memory
POLL_SECONDS = 0.5
STALL_SECONDS = 1200.0  # longer than a supervisor lets the lead process write nothing: that one is named, not who waits
SPAWN_BYTES = 8 << 20  # of input: below this a process costs more to start (about 0.5 s) than it saves

Source = Text | Jsonl | Parquet


def default_cache(runs_dir: str | Path) -> Path:
    """The folder beside the runs that prepared data lives in; a run's name cannot start with a dot."""
    return Path(runs_dir) / ".data"


def prepared(
    source: Source,
    cache_dir: str | Path,
    *,
    prepare: bool,
    workers: int | None = None,
    stall_seconds: float = STALL_SECONDS,
    moved: Callable[[], None] = lambda: None,
) -> Path:
    """The finished folder of this source under `cache_dir`: at once where it is there, else made now if `prepare`.

    The folder's name is a hash of the files (names, sizes, mtimes), split, tokenizer and format. With prepare=False,
    for all processes but the lead one: waits for another to make it. Raises DataError for bad input, RunError where
    the disk refuses, a worker is killed, or nothing is written in the folder for `stall_seconds`. `moved` is called
    whenever more is seen to be written there, by whichever process: with prepare=True on a thread of its own.
    """
    folder = find(source, cache_dir)
    if (folder / "index.json").exists():
        return folder
    if prepare:
        with _watched(folder, moved):
            _make(source, folder, workers or len(os.sched_getaffinity(0)))
    else:
        _wait(folder, stall_seconds, moved)
    return folder


def find(source: Source, cache_dir: str | Path) -> Path:
    """The folder that `prepared` makes for this source, finished or not."""
    return Path(cache_dir) / _key(source, open_tokenizer(source.tokenizer))


def _key(source: Source, tokenizer: OpenTokenizer) -> str:
    files = [(f.name, f.size, f.mtime_ns) for f in reading.source_files(source)]
    column = getattr(source, "field", getattr(source, "column", None))
    facts = [
        FORMAT,
        [reading.SMALLEST_SHARD, reading.LARGEST_SHARD, reading.NUM_SHARDS],
        type(source).__name__,
        source.split,
        source.holdout,
        column,
        tokenizer.key,
        files,
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _wait(folder: Path, stall_seconds: float, moved: Callable[[], None]) -> None:
    seen, since = _written(folder), time.monotonic()
    while not (folder / "index.json").exists():
        if (written := _written(folder)) != seen:
            seen, since = written, time.monotonic()
            moved()
        if time.monotonic() - since > stall_seconds:
            raise RunError(
                f"no process is preparing the data in {folder}.",
                got=f"nothing written in {stall_seconds:g} s",
                rule="the lead process prepares data while the others wait; all see one file system",
                fix="run `jaxtrain data prepare CONFIG` first, on storage that every host sees",
            )
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _watched(folder: Path, moved: Callable[[], None]) -> Iterator[None]:
    """Calls `moved` for what any process, this one or a worker, writes in the folder meanwhile."""
    done = threading.Event()

    def watch() -> None:
        seen = _written(folder)
        while not done.wait(POLL_SECONDS):
            if (written := _written(folder)) != seen and not done.is_set():
                seen = written
                moved()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(4 * POLL_SECONDS)  # longer it is only where the disk does not answer, and then it calls nobody


def _written(folder: Path) -> dict[str, int]:
    """The folder's files, with the sizes of those that are not finished: of the others they do not change."""
    sizes = {}
    with contextlib.suppress(OSError):  # the folder is not there yet
        for name in os.listdir(folder):
            sizes[name] = 0
            if name.endswith(".tmp"):
                with contextlib.suppress(OSError):  # renamed meanwhile
                    sizes[name] = (folder / name).stat().st_size
    return sizes


def _make(source: Source, folder: Path, workers: int) -> None:
    plan = reading.shards(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise shards.unwritable(folder, error) from error
    todo = {n: pieces for n, pieces in enumerate(plan) if not (folder / f"{n:05}.json").exists()}
    _run(source, folder, todo, workers, total=sum(p.size for pieces in plan for p in pieces))
    if find(source, folder.parent) != folder:
        raise DataError("the source's files changed while they were read.", got=f"{source.files}", fix="prepare again")
    _finish(folder, len(plan), token_dtype(open_tokenizer(source.tokenizer)))


def _run(source: Source, folder: Path, todo: dict[int, list[Piece]], workers: int, total: int) -> None:
    """Writes the shards of `todo`, showing progress in bytes of input. A worker's UserError ends it all."""
    sizes = {number: sum(piece.size for piece in pieces) for number, pieces in todo.items()}
    with _progress(total, done=total - sum(sizes.values())) as advance:
        if workers == 1 or len(todo) < 2 or sum(sizes.values()) < SPAWN_BYTES:
            for number, pieces in todo.items():
                write_shard(source, folder, number, pieces)
                advance(sizes[number])
            return
        context = multiprocessing.get_context("spawn")  # not fork: the parent may hold jax's threads
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_begin_worker)
        try:
            jobs = {pool.submit(write_shard, source, folder, n, pieces): n for n, pieces in todo.items()}
            for job in as_completed(jobs):
                job.result()
                advance(sizes[jobs[job]])
        except BrokenProcessPool as error:
            raise RunError(
                "a worker that tokenised data was killed.",
                rule="each holds the largest single document several times over",
                fix="more memory, or fewer --workers; finished shards are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One thread of tokenising per process, and no life after the parent's: its SIGKILL would leave workers waiting."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _progress:
    """A bar on stderr over bytes of input; entering gives the function that advances it."""

    def __init__(self, total: int, done: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("tokenising"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._total, self._done = total, done

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        task = self._bar.add_task("", total=self._total, completed=self._done)
        return lambda size: self._bar.advance(task, size)

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()


def token_dtype(tokenizer: OpenTokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_shard(source: Source, folder: Path, number: int, pieces: list[Piece]) -> None:
    """Tokenises the pieces into shard `number`; the same bytes whoever does it and whenever."""
    tokenizer = open_tokenizer(source.tokenizer)
    stem = f"{number:05}"
    starts, numbers, owners, total = array("q"), array("q"), [], 0
    with shards.atomic(folder / f"{stem}.tokens") as file:
        for document, arrays in _tokenised(source, tokenizer, pieces):
            if not owners or owners[-1][0] != document.file.name:
                owners.append([document.file.name, _mark(source), len(starts)])
            starts.append(total)
            numbers.append(document.number)
            for ids in arrays:
                file.write(ids)
                total += len(ids)
    tokens = shards.map_tokens(str(folder / f"{stem}.tokens"), total, token_dtype(tokenizer))
    crcs = shards.block_crcs(tokens)
    table = np.stack([np.asarray(starts), np.asarray(numbers)], axis=1).astype("<i8")
    for name, values in (("docs", table), ("crc", crcs)):
        with shards.atomic(folder / f"{stem}.{name}") as file:
            file.write(values)
    counts = {"tokens": total, "documents": len(starts), "docs_crc32": zlib_ng.crc32(table), "crc_crc32": zlib_ng.crc32(crcs)}
    shards.write_json(folder / f"{stem}.json", counts | {"pieces": owners})


def _mark(source: Source) -> str:
    """What stands between a document's file name and its number."""
    return {Text: "", Jsonl: "@", Parquet: "#"}[type(source)]


def _tokenised(
    source: Source, tokenizer: OpenTokenizer, pieces: list[Piece]
) -> Iterator[tuple[Document, Iterator[np.ndarray]]]:
    """Documents with their ids and end, in arrays that are to be taken before the next document."""
    dtype = token_dtype(tokenizer)
    end = np.array([tokenizer.end], dtype)
    stream = itertools.chain.from_iterable(reading.documents(source, piece) for piece in pieces)
    for batch in _batches(stream):
        for index, encoded in itertools.groupby(_encoded(source, tokenizer, batch), key=itemgetter(0)):
            yield batch[index], itertools.chain((ids.astype(dtype, copy=False) for _, ids in encoded), [end])


def _encoded(source: Source, tokenizer: OpenTokenizer, batch: list[Document]) -> Iterator[tuple[int, np.ndarray]]:
    try:
        yield from tokenizer.encode_documents([document.text for document in batch])
    except UndecodableText as error:
        raise not_utf8(source, batch[error.index], error.offset) from error


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def not_utf8(source: Source, document: Document, offset: int) -> DataError:
    """The error for a document that the source's tokenizer refuses at this byte."""
    where = f" of the document {_mark(source)}{document.number}" if _mark(source) else ""
    assert isinstance(source.tokenizer, HuggingFace), "bytes are never refused"
    return DataError(
        f"{document.file.path} is not UTF-8 at byte {offset}{where}.",
        got=f"byte 0x{document.text[offset]:02x}",
        rule="a tokenizer.json reads UTF-8 text",
        fix=f"exclude the file, HuggingFace(file={source.tokenizer.file!r}, errors='replace'), or Bytes()",
    )


def _finish(folder: Path, num_shards: int, dtype: np.dtype) -> None:
    """Joins the finished shards: the table of document starts, then the index that makes the folder whole."""
    records, crc, base = [], 0, 0
    with shards.atomic(folder / "starts") as file:
        for number in range(num_shards):
            record = shards.read_json(folder / f"{number:05}.json")
            record.pop("pieces")
            raw = np.fromfile(folder / f"{number:05}.docs", "<i8").reshape(-1, 2)
            starts = raw[:, 0] + base
            file.write(starts)
            crc, base = zlib_ng.crc32(starts, crc), base + record["tokens"]
            records.append(record)
    documents = sum(record["documents"] for record in records)
    index = {"format": FORMAT, "dtype": dtype.str, "documents": documents, "starts_crc32": crc, "shards": records}
    shards.write_json(folder / "index.json", index)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
