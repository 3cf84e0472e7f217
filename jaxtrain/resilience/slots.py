"""A process's snapshots as files that outlive it: two slots of raw bytes, each with a header that is written last.

A slot is FOLDER/PROCESS-a.data, mapped into memory and written over again and again, and FOLDER/PROCESS-a.json. The
header goes before the first byte is overwritten and comes back when the last one stands, so a slot with a header is
whole whenever its writer is killed. A machine that loses power may keep a header and lose bytes; their checksums tell.
It imports no jax, and knows arrays only as named boxes of bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from zlib_ng import zlib_ng

from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.errors import RunError
from jaxtrain.resilience.say import as_host

NAMES = ("a", "b")
COPIES = "buddies"  # the folder within a host's folder that holds other hosts' snapshots, by host
ALIGNMENT = 64  # bytes, of each piece's beginning
UNTOUCHED_S = 24 * 3600.0  # a cancelled run that goes on from memory is back within a working day; later its checkpoint serves

Box = tuple[tuple[int, int], ...]  # per dim, where it begins and ends in the whole array
Needs = Mapping[str, Iterable[Box]]  # by array


class Moment(NamedTuple):
    """Which snapshot: of one step there may be one from before a restart and one from after it."""

    step: int
    generation: int


_NOTHING = Moment(-1, -1)


class Piece(NamedTuple):
    """A box of an array, in row-major order, and where its bytes are in the slot."""

    name: str
    box: Box
    offset: int
    size: int
    crc32: str


class Kind(NamedTuple):
    """What an array is as a whole."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a slot holds. `since`: the step that its generation went on from; what other generations have after that
    step has not happened. `keep`: what must not be overwritten, since it was the newest whole one of the run."""

    run: str
    moment: Moment
    since: int
    keep: Moment | None
    process: int
    processes: int
    data: dict
    arrays: dict[str, Kind]
    pieces: list[Piece]

    @property
    def size(self) -> int:
        return max((piece.offset + piece.size for piece in self.pieces), default=0)

    def to_bytes(self) -> bytes:
        """JSON after a line with its SHA-256."""
        text = json.dumps(asdict(self)).encode()
        return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def header_of(data: bytes, where: object) -> Header:
    """Raises DamagedError where a byte is not as it was written."""
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise DamagedError(f"{where} is damaged.", rule="its first line is the SHA-256 of the rest")
    fields = json.loads(text)
    fields["moment"], keep = Moment(*fields["moment"]), fields["keep"]
    fields["keep"] = keep and Moment(*keep)
    fields["arrays"] = {name: Kind(dtype, tuple(shape)) for name, (dtype, shape) in fields["arrays"].items()}
    fields["pieces"] = [Piece(name, tuple(map(tuple, box)), *rest) for name, box, *rest in fields["pieces"]]
    return Header(**fields)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One process's part of a snapshot, in a slot."""

    path: Path  # of the bytes
    header: Header

    def read(self, piece: Piece) -> memoryview:
        """A piece's bytes, checked. Raises DamagedError that names the file and the array."""
        data = self.bytes(piece)
        if len(data) != piece.size or checksum(data) != piece.crc32:
            raise DamagedError(
                f"{self.path} is damaged.",
                got=f"{piece.name}{_text(piece.box)} does not have the bytes that were written (CRC-32)",
                rule="every byte is as it was written",
            )
        return data

    def bytes(self, piece: Piece) -> memoryview:
        """Not checked."""
        return self.all_bytes[piece.offset : piece.offset + piece.size]

    @cached_property
    def all_bytes(self) -> memoryview:
        """The slot's memory itself: its writer may write to it while it is read."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


class Slots:
    """Both slots of one process, to be written by one writer."""

    def __init__(self, folder: Path, process: int):
        self._folder, self._process = folder, process
        self._maps: dict[str, mmap.mmap] = {}
        found = {name: _header(self._paths(name)[0]) for name in NAMES}
        self._held = {name: header.moment if header else _NOTHING for name, header in found.items()}

    def begin(self, size: int, keep: Moment | None) -> memoryview:
        """The bytes of the slot to write to, which from now on holds no snapshot: not `keep`, else the older one.

        Raises OSError where there is no room.
        """
        self._name = min(NAMES, key=lambda name: (self._held[name] == keep, self._held[name]))
        header, data = self._paths(self._name)
        header.unlink(missing_ok=True)
        self._held[self._name] = _NOTHING
        kept = self._maps.get(self._name)
        if kept is None or len(kept) != max(size, 1):
            self._maps[self._name] = _mapped(data, max(size, 1))
        return memoryview(self._maps[self._name])[:size]

    def commit(self, header: Header) -> None:
        """From here on the slot that `begin` gave holds the snapshot."""
        path, _ = self._paths(self._name)
        fresh = path.with_suffix(".tmp")
        fresh.write_bytes(header.to_bytes())
        os.replace(fresh, path)
        self._held[self._name] = header.moment

    def _paths(self, name: str) -> tuple[Path, Path]:
        data = data_file(self._folder, self._process, name)
        return data.with_suffix(".json"), data


def data_file(folder: Path, process: int, name: str) -> Path:
    """Where the bytes of a slot are; its header is beside them."""
    return folder / f"{process}-{name}.data"


def growth(folder: Path, process: int, size: int) -> int:
    """By how many bytes a process's slots grow at most when one takes a snapshot of this size."""
    files = [data_file(folder, process, name) for name in NAMES]
    return max(0, size - min(file.stat().st_size if file.is_file() else 0 for file in files))


def laid_out(sizes: Iterable[int]) -> Iterator[int]:
    """Offsets of pieces of these sizes, one after the other."""
    end = 0
    for size in sizes:
        yield end
        end = -(-(end + size) // ALIGNMENT) * ALIGNMENT


def checksum(data: memoryview | bytes) -> str:
    """CRC-32 as hex, without holding the GIL."""
    return f"{zlib_ng.crc32(data):08x}"


def folders(own: Path) -> list[Path]:
    """Where a host has snapshots: its own first, then its copies of other hosts'."""
    return [own, *sorted(path for path in (own / COPIES).glob("*") if path.is_dir())]


def snapshots(folder: Path) -> list[Snapshot]:
    """All that are in a folder, with whole headers and all of their bytes, none of which is read."""
    found = ((path, _header(path)) for path in sorted(folder.glob("*.json")))
    parts = [Snapshot(path.with_suffix(".data"), header) for path, header in found if header]
    return [part for part in parts if part.path.is_file() and part.path.stat().st_size >= part.header.size]


def remove(path: Path) -> None:
    """Takes a snapshot out of its slot, and the slot's memory back."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.with_suffix(".data").unlink(missing_ok=True)


def newest(folders: Iterable[Path], run: str | None = None) -> int | None:
    """The newest step of which these folders together hold every part of every array; contents are not looked at."""
    parts = [part for folder in folders for part in snapshots(folder) if run in (None, part.header.run)]
    moments = [moment for moment, those in by_moment(parts).items() if covered(those, _all_of(those[0].header))]
    restarts = {(part.header.moment.generation, part.header.since) for part in parts}
    return max((moment.step for moment in moments if not undone(moment, restarts)), default=None)


@contextlib.contextmanager
def starting(*own: Path) -> Iterator[None]:
    """Within it a supervisor makes and locks its folder, after what dead runs left beside it in memory is removed.

    `own`: the folders of its run, which stay. Of this user's supervisors one is within it at a time, so that none removes
    a folder that another has opened and not yet locked. Raises RunError.
    """
    stem = own[0].name.rpartition("-")[0]  # as of all folders of this user
    lock = _turn(own[0].with_name(f"{stem}.lock"))
    try:
        beside = sorted({*own[0].parent.glob(f"{stem}-*")} - {*own})
        freed = [size for folder in beside if (size := _swept(folder)) is not None]
        if freed:
            hours = UNTOUCHED_S / 3600
            runs = f"{len(freed)} run{'s' * (len(freed) > 1)} untouched for {hours:.0f} h"
            as_host(f"removed what {runs} left in memory: {sum(freed) / 1e9:.3f} GB")
        yield
    finally:
        os.close(lock)


def by_moment(parts: Iterable[Snapshot]) -> dict[Moment, list[Snapshot]]:
    groups: dict[Moment, list[Snapshot]] = defaultdict(list)
    for part in parts:
        groups[part.header.moment].append(part)
    return dict(groups)


def undone(moment: Moment, restarts: Collection[tuple[int, int]]) -> bool:
    """Whether a later generation went on from a step before this one; `restarts`: (generation, the step)."""
    return any(generation > moment.generation and since < moment.step for generation, since in restarts)


def covered(parts: Sequence[Snapshot], needs: Needs) -> bool:
    """Whether these parts of one snapshot hold all of these boxes. Pieces of one array are equal or disjoint."""
    boxes: dict[str, set[Box]] = defaultdict(set)
    for part in parts:
        for piece in part.header.pieces:
            boxes[piece.name].add(piece.box)
    return all(
        sum(volume(overlap(wanted, box)) for box in boxes[name]) == volume(wanted)
        for name, wanteds in needs.items()
        for wanted in wanteds
    )


def overlap(a: Box, b: Box) -> Box:
    return tuple((max(i, k), max(max(i, k), min(j, m))) for (i, j), (k, m) in zip(a, b, strict=True))


def volume(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _all_of(header: Header) -> Needs:
    return {name: [tuple((0, n) for n in kind.shape)] for name, kind in header.arrays.items()}


def _header(path: Path) -> Header | None:
    try:
        return header_of(path.read_bytes(), path)
    except (FileNotFoundError, DamagedError):
        return None


def _mapped(path: Path, size: int) -> mmap.mmap:
    """The memory of a file of this size, its old pages used again. Room is made sure of: a page that is missing when
    it is written kills the writer."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _turn(path: Path) -> int:
    """The file, held: it waits for its turn."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX)
            return lock
        os.close(lock)
        got = "it belongs to somebody else"
    except OSError as error:
        got = str(error)
    raise RunError(f"{path} cannot be locked.", got=got, rule="a user's supervisors start one by one", fix=f"remove {path}")


def _swept(folder: Path) -> int | None:
    """The bytes of a dead run's folder, which is gone now; None where it is not one, or stays."""
    with contextlib.suppress(OSError):  # it is somebody else's, or goes just now: no reason not to start
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return None
        found = [path.lstat() for path in (folder, *folder.rglob("*"))]
        if time.time() < max(each.st_mtime for each in found) + UNTOUCHED_S:
            return None
        with open(folder / "lock", "a") as lock:  # which its supervisor holds as long as it lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            return sum(512 * each.st_blocks for each in found)
    return None


def _text(box: Box) -> str:
    return f"[{', '.join(f'{begin}:{end}' for begin, end in box)}]"
