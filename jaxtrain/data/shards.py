"""Token shards on disk: writing them atomically, opening them, and finding damage. It tokenises nothing.

A folder of shards holds, for shard 00000 and so on,
  00000.tokens  the ids of its documents end to end, each with its end of document; little-endian uint16 or uint32
  00000.docs    int64 (documents, 2): first token in this shard, number within its file
  00000.crc     uint32: CRC-32 of each BLOCK bytes of .tokens
  00000.json    counts, CRC-32 of .docs and .crc, and the files read. Written last: with it the shard is finished
and once all are finished
  starts        int64: the first token of every document in the whole corpus
  index.json    the shards' counts and checksums. Written last: with it the folder is finished
"""

from __future__ import annotations

import json
import os
import socket
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from zlib_ng import zlib_ng

from jaxtrain.data.stream import Arrays, map_tokens
from jaxtrain.errors import DataError, RunError

BLOCK = 1 << 16  # bytes under one CRC: 11 us to check at 6 GB/s, against the 2 to 8 KiB of a typical window


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` whole, on disk, or not at all. Raises RunError where the disk refuses."""
    scratch = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if not path.exists():  # else another process finished the same folder and swept up
            raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def unwritable(path: Path, error: OSError) -> RunError:
    """The error for a file or folder that the disk refuses."""
    fix = "a folder that is there, space and rights; --cache-dir puts prepared data elsewhere"
    return RunError(f"{path} cannot be written.", got=f"{error}", fix=fix)


def block_crcs(tokens: np.ndarray) -> np.ndarray:
    """CRC-32 of each BLOCK bytes."""
    raw = memoryview(tokens.view(np.uint8))
    return np.array([zlib_ng.crc32(raw[i : i + BLOCK]) for i in range(0, len(raw), BLOCK)], "<u4")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """The value with a CRC of its canonical text."""
    with atomic(path) as file:
        file.write(json.dumps(value | {"crc32": _json_crc(value)}, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote. Raises DataError where the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
        stated = value.pop("crc32")
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(path, "is damaged", f"{type(error).__name__}: {error}") from error
    if stated != _json_crc(value):
        raise damaged(path, "is damaged", "another CRC-32 than written")
    return value


def _json_crc(value: dict[str, Any]) -> int:
    return zlib_ng.crc32(json.dumps(value, sort_keys=True).encode())


def damaged(path: Path, what: str, got: str = "") -> DataError:
    """The error for a file of a prepared folder."""
    return DataError(
        f"{path} {what}.",
        got=got,
        rule="prepared shards are what `jaxtrain data prepare` wrote",
        fix=f"remove {path.parent} and run `jaxtrain data prepare` again",
    )


class Shards(Arrays):
    """A finished folder as a Stream. Opening checks every file's size and the document starts in full; each BLOCK of
    tokens is checked when it is first read. Raises DataError."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._index = read_json(folder / "index.json")
        self._names = [f"{number:05}" for number in range(len(self._index["shards"]))]
        dtype = np.dtype(self._index["dtype"])
        arrays = [
            _map(folder / f"{n}.tokens", s["tokens"], dtype)
            for n, s in zip(self._names, self._index["shards"], strict=True)
        ]
        starts = _map(folder / "starts", self._index["documents"], np.dtype("<i8"), self._index["starts_crc32"])
        super().__init__(arrays, starts, folder.name)
        self.num_documents = len(starts)
        self._first_document = np.cumsum([0, *(s["documents"] for s in self._index["shards"])]).tolist()
        self._crcs: dict[int, np.ndarray] = {}
        self._checked = [bytearray(-(-a.nbytes // BLOCK)) for a in arrays]

    def _check(self, number: int, first: int, last: int) -> None:
        size = self._arrays[number].itemsize
        begin, end = first * size // BLOCK, -(-last * size // BLOCK)
        checked = self._checked[number]
        while (block := checked.find(0, begin, end)) >= 0:
            self._check_block(number, block)
            checked[block] = 1

    def _check_block(self, number: int, block: int) -> None:
        if number not in self._crcs:
            stated = self._index["shards"][number]
            path = self._folder / f"{self._names[number]}.crc"
            self._crcs[number] = _map(path, len(self._checked[number]), np.dtype("<u4"), stated["crc_crc32"])
        raw = memoryview(self._arrays[number].view(np.uint8))[block * BLOCK : (block + 1) * BLOCK]
        if zlib_ng.crc32(raw) != self._crcs[number][block]:
            path = self._folder / f"{self._names[number]}.tokens"
            raise damaged(
                path,
                "is damaged",
                f"bytes {block * BLOCK} to {block * BLOCK + len(raw)} have another CRC-32 than written",
            )

    def verify(self) -> int:
        """Checks every byte of every shard, again; -> bytes of tokens checked. Raises DataError."""
        for number in range(len(self._arrays)):
            for block in range(len(self._checked[number])):
                self._check_block(number, block)
            self._documents(number)
            read_json(self._folder / f"{self._names[number]}.json")
        return sum(array.nbytes for array in self._arrays)

    def _documents(self, number: int) -> np.ndarray:
        stated = self._index["shards"][number]
        path = self._folder / f"{self._names[number]}.docs"
        return _map(path, 2 * stated["documents"], np.dtype("<i8"), stated["docs_crc32"]).reshape(-1, 2)

    def document_name(self, document: int) -> str:
        number = bisect_right(self._first_document, document) - 1
        within = document - self._first_document[number]
        pieces = read_json(self._folder / f"{self._names[number]}.json")["pieces"]
        name, mark = pieces[bisect_right(pieces, within, key=lambda piece: piece[2]) - 1][:2]
        return f"{name}{mark}{self._documents(number)[within, 1]}" if mark else name


def _map(path: Path, count: int, dtype: np.dtype, crc32: int | None = None) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    if size != count * dtype.itemsize:
        what = "is empty" if not size else "is cut short" if size < count * dtype.itemsize else "is too long"
        raise damaged(path, what, f"{size} bytes instead of {count * dtype.itemsize}")
    array = map_tokens(str(path), count, dtype)
    if crc32 is not None and zlib_ng.crc32(array.view(np.uint8)) != crc32:
        raise damaged(path, "is damaged", "another CRC-32 than written")
    return array
