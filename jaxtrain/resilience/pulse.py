"""A trainer's progress in a memory-mapped file that outlives it: the trainer writes, its supervisor reads. It judges nothing.

One record of 512 bytes: who writes it, what it does since when, and of each phase how often it came and how long it
took. A write is a few stores into memory, without a system call, so a trainer that hangs leaves its last word.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.resilience import faults

PHASES = ("start", "restore", "compile", "data", "step", "metrics", "evaluate", "snapshot", "save", "end")
_HEAD = struct.Struct("<6q")  # sequence, pid, generation, step, phase, since when (CLOCK_MONOTONIC, ns)
_TOOK = struct.Struct(f"<{2 * len(PHASES)}d")  # of each phase: how often, and the longest in seconds
_LAST = struct.Struct("<q")  # the sequence again: a record whose two differ was read in the middle of a write
_TEXT, SIZE = 256, 512  # where a text about the writer begins, as a length and UTF-8; the record's end
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
        """Seconds in this phase."""
        return time.monotonic() - self.since


class Pulse:
    """The writing end, in phase "start" at first. Without a path it writes where nobody reads.

    A supervisor begins one for each trainer that it starts, so that one that never comes to its own counts as late too.
    """

    def __init__(self, path: Path | None = None, generation: int = 0, at: Callable[[str, int], None] | None = None):
        """`at` is called with every phase and step, after they are written: where faults are injected."""
        self._memory = mmap.mmap(-1, SIZE) if path is None else _mapped(path)
        self._generation, self._sequence, self._at = generation, _HEAD.unpack_from(self._memory)[0], at
        self._counts, self._longest = [0] * len(PHASES), [0.0] * len(PHASES)
        self._phase, self._since = PHASES.index("start"), time.monotonic_ns()
        self._write(0)

    def beat(self, phase: str, step: int) -> None:
        """From now on this process is in `phase`, and has completed `step` updates."""
        now, last = time.monotonic_ns(), self._phase
        self._counts[last] += 1
        self._longest[last] = max(1e-9 * (now - self._since), _FADES * self._longest[last])
        self._phase, self._since = PHASES.index(phase), now
        self._write(step)
        if self._at is not None:
            self._at(phase, step)

    def about(self, place: str, restored: str = "") -> None:
        """Says, for readers, who writes: its place in the mesh, and what its state came from: tier and step."""
        raw = f"{place}\n{restored}".encode()[: SIZE - _TEXT - 1]
        self._memory[_TEXT : _TEXT + 1 + len(raw)] = bytes([len(raw)]) + raw

    def _write(self, step: int) -> None:
        self._sequence += 1
        _HEAD.pack_into(
            self._memory, 0, self._sequence, os.getpid(), self._generation, step, self._phase, self._since
        )
        took = [value for pair in zip(self._counts, self._longest) for value in pair]
        _TOOK.pack_into(self._memory, _HEAD.size, *took)
        _LAST.pack_into(self._memory, _HEAD.size + _TOOK.size, self._sequence)


def mine(env: Mapping[str, str] = os.environ) -> Pulse:
    """This process's, where a supervisor gave it a path."""
    path = env.get("JAXTRAIN_PULSE")
    return Pulse(Path(path) if path else None, int(env.get("JAXTRAIN_GENERATION", "0")), at=faults.mine(env))


def read(path: Path) -> Beat | None:
    """The last whole record; None where nothing, or nothing whole, is there."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < SIZE:
        return None
    sequence, pid, generation, step, phase, since = _HEAD.unpack_from(raw)
    if not sequence or _LAST.unpack_from(raw, _HEAD.size + _TOOK.size) != (sequence,):
        return None
    took = _TOOK.unpack_from(raw, _HEAD.size)
    counts = {name: int(count) for name, count in zip(PHASES, took[::2])}
    about, _, restored = raw[_TEXT + 1 : _TEXT + 1 + raw[_TEXT]].decode(errors="replace").partition("\n")
    longest = dict(zip(PHASES, took[1::2]))
    return Beat(sequence, pid, generation, step, PHASES[phase], 1e-9 * since, about, restored, counts, longest)


def _mapped(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.truncate(descriptor, SIZE)
        return mmap.mmap(descriptor, SIZE)
    finally:
        os.close(descriptor)
