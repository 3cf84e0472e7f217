"""Text, JSONL and Parquet files as streams of documents, and how they are cut into shards. It makes no tokens."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from jaxtrain.data.files import COMPRESSED, File, hashed_out, list_files, open_bytes
from jaxtrain.data.source import Jsonl, Parquet, Text
from jaxtrain.errors import DataError, closest

# A shard is one worker's task, and what a kill can cost: NUM_SHARDS of them share the work evenly, within these sizes of
# input (2 s to 2 min of a BPE; 40,000 of 256 MiB for 10 TB). A compressed file is never cut.
SMALLEST_SHARD, LARGEST_SHARD, NUM_SHARDS = 4 << 20, 256 << 20, 256
LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".pq")
NOT_TEXT = (
    ".jsonl",
    ".ndjson",
    *TABLES,
    ".arrow",
    ".bin",
    ".idx",
    ".npy",
    ".npz",
    ".pkl",
    ".zip",
    ".tar",
    ".tgz",
    ".bz2",
    ".xz",
)


class Piece(NamedTuple):
    """A part of a file that is read at once: bytes start:stop, or row groups start:stop of a Parquet file."""

    file: File
    start: int
    stop: int
    size: int  # in bytes


class Document(NamedTuple):
    file: File
    number: int  # byte offset of its line (after decompression), or row, or 0: what names it within the file
    text: bytes


def source_files(source: Text | Jsonl | Parquet) -> list[File]:
    """The files that this split reads. Raises DataError for an extension that the source does not read, or no file."""
    files = list_files(source.files, source.exclude)
    for file in files:
        _check_extension(source, file)
    if isinstance(source, Text) and source.holdout:
        out = source.split == "heldout"
        kept = [f for f in files if hashed_out(f.name.encode(), source.holdout) == out]
        if not kept:
            raise DataError(
                f"none of {len(files)} files falls into the {source.split} split.",
                got=f"holdout = {source.holdout}",
                rule="whole files are held out, by a hash of their names",
                fix="a larger holdout, or more and smaller files",
            )
        return kept
    return files


def _check_extension(source: Text | Jsonl | Parquet, file: File) -> None:
    name = file.name.lower()
    if not isinstance(source, Parquet):
        name = name.removesuffix(".gz").removesuffix(".zst")
    dot = name[name.rfind(".") :] if "." in name else ""
    known = {Jsonl: LINES, Parquet: TABLES}.get(type(source))
    if dot in known if known else dot not in NOT_TEXT:
        return
    owner = next(
        (kind for kind, dots in (("Jsonl", LINES), ("Parquet", TABLES), ("Megatron", (".bin", ".idx"))) if dot in dots),
        "",
    )
    raise DataError(
        f"{file.path} is not read by {type(source).__name__}.",
        got=f"extension {dot or 'none'!r}",
        rule=f"{type(source).__name__} reads {', '.join(known) if known else 'text, plain or .gz or .zst'}",
        fix=f"{owner}(...)" if owner else "a narrower glob, or `exclude`",
    )


def shards(source: Text | Jsonl | Parquet) -> list[list[Piece]]:
    """The source cut into shards: a function of the files alone, so that work can be resumed with any --workers."""
    files = source_files(source)
    size = min(max(sum(file.size for file in files) // NUM_SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    groups: list[list[Piece]] = []
    room = 0
    for piece in (piece for file in files for piece in _pieces(source, file, size)):
        if room <= 0:
            groups.append([])
            room = size
        groups[-1].append(piece)
        room -= piece.size
    return groups


def _pieces(source: Text | Jsonl | Parquet, file: File, size: int) -> Iterator[Piece]:
    if isinstance(source, Parquet):
        yield from _row_groups(file)
    elif isinstance(source, Text) or file.name.lower().endswith(COMPRESSED):
        yield Piece(file, 0, sys.maxsize, file.size)
    else:
        for start in range(0, file.size, size):
            stop = min(start + size, file.size)
            yield Piece(file, start, stop, stop - start)


def _row_groups(file: File) -> Iterator[Piece]:
    with _damage(file):
        meta = _open_parquet(file).metadata
        sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    scale = file.size / max(sum(sizes), 1)
    yield from (Piece(file, i, i + 1, int(size * scale)) for i, size in enumerate(sizes))


def documents(source: Text | Jsonl | Parquet, piece: Piece) -> Iterator[Document]:
    """The piece's documents of the source's split, empty ones left out. Raises DataError for what cannot be read."""
    read = {Text: _text, Jsonl: _jsonl, Parquet: _parquet}[type(source)]
    by_text = source.holdout and not isinstance(source, Text)  # Text chooses whole files, in source_files
    with _damage(piece.file):
        for document in read(source, piece):
            if document.text and not (
                by_text and hashed_out(document.text, source.holdout) != (source.split == "heldout")
            ):
                yield document


class _damage:
    """Turns what libraries raise on damaged or unreadable files into a DataError that names the file."""

    def __init__(self, file: File):
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)) or _raised_by(
            error, "zstandard", "pyarrow", "zstd"
        ):
            raise DataError(
                f"{self.file.path} is damaged or cut short.",
                got=f"{type(error).__name__}: {error}",
                fix="copy the file again, or `exclude` it",
            ) from error
        if isinstance(error, OSError):
            raise DataError(f"{self.file.path} cannot be read.", got=f"{error}") from error


def _raised_by(error: BaseException | None, *libraries: str) -> bool:
    """Without importing the libraries."""
    return type(error).__module__.partition(".")[0] in libraries


def _text(source: Text, piece: Piece) -> Iterator[Document]:
    with open_bytes(piece.file.path) as file:
        yield Document(piece.file, 0, file.read())


def _jsonl(source: Jsonl, piece: Piece) -> Iterator[Document]:
    for offset, line in _lines(piece):
        if not line.isspace():
            text = _field(source, piece.file, offset, line)
            yield Document(piece.file, offset, text.encode("utf-8", "surrogatepass"))


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin within the piece."""
    with open_bytes(piece.file.path) as file:
        offset = piece.start
        if offset:  # a line that begins before the piece belongs to the one before
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < piece.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _field(source: Jsonl, file: File, offset: int, line: bytes) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(file, offset, "is not JSON", f"{error}") from error
    if not isinstance(row, dict):
        raise _bad_line(file, offset, "is not a JSON object", f"{type(row).__name__}: {line[:60]!r}")
    if source.field not in row:
        raise _bad_line(file, offset, f"has no field {source.field!r}", ", ".join(row), closest(source.field, row))
    if not isinstance(row[source.field], str):
        raise _bad_line(file, offset, f"has no text in {source.field!r}", f"{row[source.field]!r:.60}")
    return row[source.field]


def _bad_line(file: File, offset: int, what: str, got: str, fix: str = "") -> DataError:
    with open_bytes(file.path) as text:  # counted only now: a piece does not know its first line's number
        before, number = offset, 1
        while before and (chunk := text.read(min(before, 1 << 20))):
            number, before = number + chunk.count(b"\n"), before - len(chunk)
    rule = "each line is a JSON object with a string in `field`"
    return DataError(f"{file.path}, line {number} {what}.", got=got, rule=rule, fix=fix)


def _open_parquet(file: File) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path)


def _parquet(source: Parquet, piece: Piece) -> Iterator[Document]:
    table = _open_parquet(piece.file)
    _check_column(source, piece.file, table.schema_arrow)
    counts = [table.metadata.row_group(i).num_rows for i in range(piece.start)]
    row = list(accumulate(counts, initial=0))[-1]
    groups = range(piece.start, piece.stop)
    for batch in table.iter_batches(1024, row_groups=groups, columns=[source.column], use_threads=False):
        for text in batch.column(0).cast("string" if _is_dictionary(batch.column(0)) else "binary").to_pylist():
            if text is None:
                raise DataError(
                    f"{piece.file.path}, row {row}: {source.column!r} is null.", rule="every row holds a text"
                )
            yield Document(piece.file, row, text.encode() if isinstance(text, str) else text)
            row += 1


def _is_dictionary(column: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_dictionary(column.type)


def _check_column(source: Parquet, file: File, schema: Any) -> None:
    import pyarrow.types as kinds

    if source.column not in schema.names:
        raise DataError(
            f"{file.path} has no column {source.column!r}.",
            got=", ".join(schema.names),
            fix=closest(source.column, schema.names),
        )
    kind = schema.field(source.column).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    if not any(test(value) for test in (*texts, kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)):
        raise DataError(f"{file.path}: column {source.column!r} holds {kind}.", rule="a column of strings or of binary")
