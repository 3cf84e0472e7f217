"""A trainer's progress in a memory-mapped file that outlives it: the trainer writes, its supervisor reads. It judges nothing.

One record of 484 bytes: who writes it, what it does since when, and of each phase how often it came and how long it
took. A write is a copy into memory, without a system call, so a trainer that hangs leaves its last word.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jaxtrain.errors import RunError
from jaxtrain.resilience import faults
from jaxtrain.resilience.say import as_host

PHASES = ("start", "prepare", "restore", "compile", "data", "step", "metrics", "evaluate", "snapshot", "save", "end")
_CHECK = struct.Struct("<I")  # CRC-32 of the rest: what was read in the middle of a write, or is damaged, is no news
# Sequence, pid, generation, step, phase, since when (CLOCK_MONOTONIC, ns); of each phase: how often, and the longest in
# seconds; a text about the writer, UTF-8.
_RECORD = struct.Struct(f"<6q{2 * len(PHASES)}d256p")
SIZE = _CHECK.size + _RECORD.size
_FADES = 0.99  # of the longest, at each further time: what was slow once is forgotten after some hundred steps


@dataclass(frozen=True)
class Beat:
    """One reading. `since` is on the clock of time.monotonic, which all processes of a host share."""

    sequence: int
    pid: int
    generation: int
    step: int
    phase: str
    since: float
    about: str  # the writer in words: its place in the mesh
    restored: str  # what its state came from, as "snapshot 40"; "" from nothing
    counts: Mapping[str, int]
    longest: Mapping[str, float]  # seconds

    def age(self) -> float:
        """Seconds in this phase, or since it was renewed."""
        return time.monotonic() - self.since


class Pulse:
    """The writing end, in phase "start" at first. Without a path it writes where nobody reads."""

    def __init__(self, path: Path | None = None, generation: int = 0, at: Callable[[str, int], None] | None = None):
        """`at` is called with every phase and step, after they are written: where faults are injected."""
        self._memory = mmap.mmap(-1, SIZE) if path is None else _mapped(path)
        last = _beat(self._memory[:])
        self._generation, self._sequence, self._at = generation, last.sequence if last else 0, at
        self._counts, self._longest = [0] * len(PHASES), [0.0] * len(PHASES)
        self._phase, self._since = PHASES.index("start"), time.monotonic_ns()
        self._step, self._text = 0, b""
        self._sequence += 1
        self._write()

    def beat(self, phase: str, step: int) -> None:
        """From now on this process is in `phase`, and has completed `step` updates."""
        now, last = time.monotonic_ns(), self._phase
        self._counts[last] += 1
        self._longest[last] = max(1e-9 * (now - self._since), _FADES * self._longest[last])
        self._phase, self._since, self._step = PHASES.index(phase), now, step
        self._sequence += 1
        self._write()
        if self._at is not None:
            self._at(phase, step)

    def renew(self) -> None:
        """It comes on within its phase, whose time counts from now. It is no beat: the others need not do the same, and by
        the numbers of beats they are compared."""
        now = time.monotonic_ns()
        self._longest[self._phase] = max(1e-9 * (now - self._since), self._longest[self._phase])
        self._since = now
        self._write()

    def about(self, place: str, restored: str = "") -> None:
        """Says, for readers, who writes: its place in the mesh, and what its state came from: tier and step."""
        self._text = f"{place}\n{restored}".encode()
        self._write()

    def _write(self) -> None:
        head = self._sequence, os.getpid(), self._generation, self._step, self._phase, self._since
        took = [value for pair in zip(self._counts, self._longest) for value in pair]
        record = _RECORD.pack(*head, *took, self._text)
        self._memory[:] = _CHECK.pack(zlib.crc32(record)) + record


class Reader:
    """The reading end. The file stays open, so one that is removed is read on."""

    def __init__(self, file: IO[bytes]):
        self.path, self._file = Path(file.name), file
        self._last: Beat | None = None

    def last(self) -> Beat | None:
        """The last that was whole: where the file was cut or damaged since, its writer is as silent as it was then."""
        self._last = _beat(os.pread(self._file.fileno(), SIZE, 0)) or self._last
        return self._last

    def close(self) -> None:
        self._file.close()


def begun(path: Path, generation: int) -> Reader:
    """A pulse for a trainer to come, in phase "start": one that never comes to its own counts as late too.

    Where there is no room at `path` it is in the temporary directory, until the reader is closed. Raises RunError.
    """
    try:
        return _begun(open(path, "w+b", buffering=0), generation)
    except OSError as error:
        full = error
    try:
        reader = _begun(tempfile.NamedTemporaryFile(prefix="jaxtrain-", suffix=".pulse", buffering=0), generation)
    except OSError as error:
        raise RunError(
            f"{path.parent.parent} is full, and has no room for a trainer's pulse, nor has the temporary directory.",
            got=f"{full}; {error}",
            rule=f"each trainer tells its supervisor by {SIZE} bytes that it lives",
            fix=f"make room in {path.parent.parent}: the same command goes on",
        ) from error
    as_host(f"{path.parent} takes no pulse ({full}): a trainer has {reader.path}")
    return reader


def mine(env: Mapping[str, str] = os.environ) -> Pulse:
    """This process's, where a supervisor gave it a path."""
    path = env.get("JAXTRAIN_PULSE")
    return Pulse(Path(path) if path else None, int(env.get("JAXTRAIN_GENERATION", "0")), at=faults.mine(env))


def read(path: Path) -> Beat | None:
    """The last whole record; None where nothing, or nothing whole, is there."""
    try:
        return _beat(path.read_bytes())
    except FileNotFoundError:
        return None


def _beat(raw: bytes) -> Beat | None:
    if len(raw) < SIZE or _CHECK.unpack_from(raw)[0] != zlib.crc32(raw[_CHECK.size : SIZE]):
        return None
    sequence, pid, generation, step, phase, since, *took, text = _RECORD.unpack_from(raw, _CHECK.size)
    counts = {name: int(count) for name, count in zip(PHASES, took[::2])}
    about, _, restored = text.decode(errors="replace").partition("\n")
    longest = dict(zip(PHASES, took[1::2]))
    return Beat(sequence, pid, generation, step, PHASES[phase], 1e-9 * since, about, restored, counts, longest)


def _begun(file: IO[bytes], generation: int) -> Reader:
    try:
        Pulse(Path(file.name), generation)
    except OSError:
        file.close()
        raise
    return Reader(file)


def _mapped(path: Path) -> mmap.mmap:
    """Room is made sure of: a page that is missing when it is written kills the writer."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, SIZE)
        return mmap.mmap(descriptor, SIZE)
    finally:
        os.close(descriptor)
