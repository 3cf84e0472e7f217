"""A corpus as one row of tokens with document starts: Megatron files and synthetic ids. It does not pack or order."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from jaxtrain.data.files import File, list_files
from jaxtrain.data.order import key, mix
from jaxtrain.data.source import Megatron, Synthetic
from jaxtrain.errors import DataError


class Stream(Protocol):
    num_tokens: int
    key: str  # of the same content the same

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills the int32 array `out` with the tokens from `start` on."""

    def document_at(self, position: np.ndarray) -> np.ndarray:
        """The numbers of the documents that these tokens belong to."""

    def start_of(self, document: np.ndarray) -> np.ndarray:
        """The positions of the documents' first tokens."""

    def document_name(self, document: int) -> str:
        """Where the document comes from, in the user's words."""


class Arrays:
    """A Stream over memory-mapped arrays laid end to end, with an ascending array of document starts."""

    def __init__(self, arrays: Sequence[np.ndarray], starts: np.ndarray, key: str):
        self._arrays, self._starts, self.key = arrays, starts, key
        self._bases = [0, *np.cumsum([len(a) for a in arrays]).tolist()]
        self.num_tokens = self._bases[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        number, done = bisect_right(self._bases, start) - 1, 0
        while done < len(out):
            first = start + done - self._bases[number]
            part = self._arrays[number][first : first + len(out) - done]
            self._check(number, first, first + len(part))
            out[done : done + len(part)] = part
            done, number = done + len(part), number + 1

    def _check(self, number: int, first: int, last: int) -> None:
        """Raises DataError where tokens first:last of this array are not what was written."""

    def document_at(self, position: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, position, "right") - 1

    def start_of(self, document: np.ndarray) -> np.ndarray:
        return self._starts[document]


MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}  # Megatron-LM core/datasets/indexed_dataset.py, DType


class MegatronStream(Arrays):
    """PREFIX.bin and PREFIX.idx pairs. They carry no checksums: sizes are checked here, ids when batches are made."""

    def __init__(self, source: Megatron):
        indices = list_files(source.indices)
        binaries = [_binary(index) for index in indices]
        pairs = [_open_megatron(index, binary) for index, binary in zip(indices, binaries, strict=True)]
        bases = np.cumsum([0, *(len(tokens) for tokens, _ in pairs)])
        # An empty document leaves no token, hence no start of its own.
        starts = np.unique(np.concatenate([base + s for base, (_, s) in zip(bases, pairs, strict=False)]))
        files = [(f.name, f.size, f.mtime_ns) for f in (*indices, *binaries)]
        digest = hashlib.blake2b(repr(files).encode(), digest_size=16)
        super().__init__([tokens for tokens, _ in pairs], starts[starts < bases[-1]], digest.hexdigest())
        self._names = [f.name.removesuffix(".idx") for f in indices]

    def document_name(self, document: int) -> str:
        number = bisect_right(self._bases, int(self._starts[document])) - 1
        return f"{self._names[number]}#{document - int(self.document_at(np.array(self._bases[number])))}"


def _binary(index: File) -> File:
    """The .bin file beside an index, named like it."""
    path = index.path.removesuffix(".idx") + ".bin"
    try:
        (file,) = list_files((path,))
    except DataError as error:
        raise DataError(f"{path} is missing.", got=f"{index.path}", rule="a .bin beside each .idx") from error
    return file._replace(name=index.name.removesuffix(".idx") + ".bin")


def _open_megatron(index: File, binary: File) -> tuple[np.ndarray, np.ndarray]:
    """-> (tokens, document starts) of one pair.

    Layout: magic, version u64, dtype u8, sequences u64, documents u64; of each sequence its length i32, then of each
    its byte offset i64; of each document, and of the end, its first sequence i64.
    """
    raw = np.fromfile(index.path, np.uint8)
    if raw[:9].tobytes() != MAGIC or len(raw) < 34:
        raise DataError(
            f"{index.path} is no Megatron index.", got=f"it begins with {raw[:9].tobytes()!r}", rule=f"{MAGIC!r}"
        )
    version, code = int(raw[9:17].view("<u8")[0]), int(raw[17])
    if version != 1 or code not in DTYPES:
        known = ", ".join(f"{c} ({t.name})" for c, t in DTYPES.items())
        raise DataError(
            f"{index.path} is of another kind.",
            got=f"version {version}, dtype {code}",
            rule=f"version 1, dtype {known}",
        )
    sequences, documents = (int(n) for n in raw[18:34].view("<u8"))
    ends = list(accumulate([34, 4 * sequences, 8 * sequences, 8 * documents]))
    if len(raw) < ends[-1]:
        raise DataError(
            f"{index.path} is cut short.", got=f"{len(raw)} bytes", rule=f"{ends[-1]} for {sequences} sequences"
        )
    lengths, offsets, firsts = (
        raw[a:b].view(kind) for a, b, kind in zip(ends[:-1], ends[1:], ("<i4", "<i8", "<i8"), strict=True)
    )
    begins = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=begins[1:])
    if not np.array_equal(offsets, begins[:-1] * DTYPES[code].itemsize):
        raise DataError(
            f"{index.path}: its sequences have gaps or another order.", rule="sequences lie end to end in the .bin file"
        )
    if (
        (lengths < 0).any()
        or (np.diff(firsts) < 0).any()
        or firsts[:1].tolist() + firsts[-1:].tolist() != [0, sequences]
    ):
        raise DataError(
            f"{index.path} is damaged.",
            rule="lengths are positive, documents ascend from the first sequence to the last",
        )
    size = int(begins[-1]) * DTYPES[code].itemsize
    if binary.size != size:
        raise DataError(
            f"{binary.path} does not fit its index.", got=f"{binary.size} bytes", rule=f"{size} by {index.path}"
        )
    return map_tokens(binary.path, int(begins[-1]), DTYPES[code]), begins[firsts]


def map_tokens(path: str, count: int, dtype: np.dtype) -> np.ndarray:
    """A read-only memory map, as a plain array: np.memmap's own slicing is 5 times slower."""
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,))) if count else np.zeros(0, dtype)


class SyntheticStream:
    """The documents of a Synthetic source, from hashes of their positions."""

    def __init__(self, source: Synthetic):
        self._source = source
        self.num_tokens = source.document * source.num_documents
        self.key = hashlib.blake2b(repr(source).encode(), digest_size=16).hexdigest()

    def read(self, start: int, out: np.ndarray) -> None:
        length = self._source.document
        first, last = start // length, -(-(start + len(out)) // length)
        skipped = start - first * length
        out[:] = self._documents(np.arange(first, last)).reshape(-1)[skipped : skipped + len(out)]

    def _documents(self, numbers: np.ndarray) -> np.ndarray:
        source = self._source
        at = numbers[:, None] * source.document + np.arange(source.document)[None, :]
        ids = mix(key(source.seed) + at.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        if source.kind == "walk":
            ids[:, 1:] = 1 + ids[:, 1:] % np.uint64(4)
            ids[:, 0] %= np.uint64(source.vocab_size)
            ids = np.cumsum(ids, axis=1, dtype=np.uint64)
        if source.kind == "copy":
            half = source.document - source.document // 2
            ids[:, half:] = ids[:, : source.document - half]
        return ids % np.uint64(source.vocab_size)

    def document_at(self, position: np.ndarray) -> np.ndarray:
        return position // self._source.document

    def start_of(self, document: np.ndarray) -> np.ndarray:
        return document * self._source.document

    def document_name(self, document: int) -> str:
        return f"{self._source.kind}#{document}"
