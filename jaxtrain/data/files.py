"""Finds a source's files and opens them, compressed or not. It reads no document."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxtrain.data.source import Megatron, Source, Synthetic, parts
from jaxtrain.errors import DataError

COMPRESSED = (".gz", ".zst")


class File(NamedTuple):
    name: str  # relative to the deepest folder that holds all the patterns, with forward slashes
    path: str
    size: int
    mtime_ns: int


def list_files(patterns: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[File]:
    """The files of folders, globs and paths, each once, sorted by name. Raises DataError where one matches nothing."""
    found = {}
    for pattern in map(os.path.expanduser, patterns):
        matches = _matches(pattern)
        if not matches:
            raise DataError(
                f"no file matches {pattern!r}.",
                got=f"working folder {os.getcwd()}",
                rule="each entry of `files` is a folder with files, a glob or a file",
                fix=_nearest_folder(pattern),
            )
        found |= {os.path.abspath(path): None for path in matches}
    base = os.path.commonpath([_base(os.path.expanduser(p)) for p in patterns])
    files = [_file(Path(os.path.relpath(path, base)).as_posix(), path) for path in found]
    kept = sorted(f for f in files if not any(fnmatch.fnmatch(f.name, pattern) for pattern in exclude))
    if not kept:
        raise DataError(f"exclude = {exclude} leaves none of {len(files)} files.", got=f"files = {patterns}")
    return kept


def check_files(source: Source) -> None:
    """Raises DataError where this machine does not have a source's files. It opens none."""
    for part in parts(source):
        if not isinstance(part, Synthetic):
            list_files(part.indices if isinstance(part, Megatron) else part.files)


def _matches(pattern: str) -> list[str]:
    if os.path.isfile(pattern):  # whatever brackets its name holds
        return [pattern]
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    return [path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path)]


def _base(pattern: str) -> str:
    """The folder above the first wildcard."""
    if glob.has_magic(pattern) and not os.path.exists(pattern):
        parts = Path(pattern).parts
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        return os.path.abspath(os.path.join(*parts[:first])) if first else os.getcwd()
    return os.path.abspath(pattern if os.path.isdir(pattern) else os.path.dirname(pattern))


def _file(name: str, path: str) -> File:
    stat = os.stat(path)
    return File(name, path, stat.st_size, stat.st_mtime_ns)


def _nearest_folder(pattern: str) -> str:
    folder = Path(_base(pattern))
    while not folder.is_dir():
        folder = folder.parent
    inside = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())[:8]
    return f"{folder} holds {', '.join(inside) or 'nothing'}"


def hashed_out(data: bytes, fraction: float) -> bool:
    """Whether a document of this name or text is among the held-out fraction: a pure function of its bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") < fraction * 2.0**64


def open_bytes(path: str) -> BinaryIO:
    """The file's bytes, decompressed by its extension; only an uncompressed file seeks fast."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstd(open(path, "rb")), 1 << 17)
    return open(path, "rb", 1 << 17)


class _Zstd(io.RawIOBase):
    """Zstandard frames, read on. Raises EOFError where the last one is cut: the library's reader just ends."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._chunks = self._decompress()
        self._rest = b""

    def _decompress(self) -> Iterator[bytes]:
        from zstandard import ZstdDecompressor

        frame, rest, begun = ZstdDecompressor().decompressobj(), b"", False
        while chunk := rest or self._file.read(1 << 17):
            yield frame.decompress(chunk)
            rest, begun = frame.unused_data if frame.eof else b"", not frame.eof
            if frame.eof:
                frame = ZstdDecompressor().decompressobj()
        if begun:
            raise EOFError("the file ends within a zstandard frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()
