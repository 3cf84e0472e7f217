"""Copies of a host's snapshots on another host: who keeps whose, and how files become bytes to send and files again.

For supervisors, which send the bytes over their own channel; no jax, no socket. The order that keeps a lost host's
newest whole snapshot within reach:
  1. a host's supervisor calls `start` before its trainers begin, so that they wait for their copies;
  2. whenever `ready` names a moment that was not sent yet, it sends `parcel` of each of its processes;
  3. the buddy's supervisor hands what comes to an `Arrival`, piece by piece, and reports back;
  4. when all are there, the first calls `confirm`; only then do the trainers let go of the snapshot before.
"""

from __future__ import annotations

import os
import struct
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.resilience import slots
from jaxtrain.resilience.slots import Header, Moment

TOGETHER = ("fsdp", "tensor")  # the mesh axes whose devices hold one copy of the state between them
_CONFIRMED = "copied"  # in a host's folder: the newest moment that its buddy has
_POLL_SECONDS = 0.02
_HEAD = struct.Struct("<Q")  # the header's bytes


@dataclass(frozen=True)
class Buddy:
    """The host that keeps a host's copies; `apart`: it holds no other part of the same copy of the state."""

    host: int
    apart: bool

    def __str__(self) -> str:
        return f"host {self.host}" + ("" if self.apart else ", which shares an fsdp or tensor group with it: no other can")


def groups(mesh: Mapping[str, int], hosts: int) -> list[frozenset[int]]:
    """For each host the hosts with which it shares an fsdp or tensor group, itself among them.

    `mesh`: sizes by axis, outer to inner, over devices that are in the order of their hosts, as many on each.
    """
    sizes, devices = list(mesh.items()), 1
    for _, size in sizes:
        devices *= size
    assert devices % hosts == 0, f"{devices} devices do not divide over {hosts} hosts"
    members: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for device in range(devices):
        members[_copy_of(device, sizes)].add(device * hosts // devices)
    return [frozenset().union(*(those for those in members.values() if host in those)) for host in range(hosts)]


def buddy(host: int, shared: Sequence[frozenset[int]]) -> Buddy | None:
    """Who keeps the copies of `host`; None where there is one host. `shared`: by host, `groups`.

    All take the same shift around the ring of hosts, so each keeps the copies of exactly one: the smallest that takes
    most of them out of their groups.
    """
    count = len(shared)
    if count == 1:
        return None
    shift = max(range(1, count), key=lambda shift: (sum((h + shift) % count not in shared[h] for h in range(count)), -shift))
    keeper = (host + shift) % count
    return Buddy(keeper, keeper not in shared[host])


def start(folder: Path) -> None:
    """From now on trainers wait for `confirm`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / _CONFIRMED, "-1 -1")


def stop(folder: Path) -> None:
    """From now on they wait for nobody."""
    (folder / _CONFIRMED).unlink(missing_ok=True)


def ready(folder: Path, processes: Sequence[int]) -> Moment | None:
    """The newest moment of which these processes, all of one host, have each written their part."""
    of_process = [{part.header.moment for part in slots.snapshots(folder) if part.header.process == p} for p in processes]
    return max(set.intersection(*of_process), default=None) if of_process else None


def parcel(folder: Path, process: int, moment: Moment) -> list[memoryview] | None:
    """One process's part of a snapshot as buffers to be sent one after the other, or None if it is gone.

    They are the slot's own memory: what the trainer overwrites meanwhile, `Arrival` refuses.
    """
    for part in slots.snapshots(folder):
        if (part.header.process, part.header.moment) == (process, moment):
            head = part.path.with_suffix(".json").read_bytes()
            return [memoryview(_HEAD.pack(len(head))), memoryview(head), part.all_bytes[: part.header.size]]
    return None


class Arrival:
    """A part of a snapshot of `host` as it comes into this host's `folder`: pieces of what `parcel` gave, in order and cut
    anywhere, each written where it is to stay.

    Both methods raise DamagedError where a byte is not as it was written, OSError where there is no room. The newest
    whole snapshot that is there stays until this one is; the older one makes way when the first byte has come.
    """

    def __init__(self, folder: Path, host: str):
        self._place, self._host = folder / slots.COPIES / host, host
        self._head, self._header, self._at = bytearray(), None, 0

    @property
    def begun(self) -> bool:
        """Whether its slot is made as large as it needs."""
        return self._header is not None

    def take(self, piece: memoryview | bytes) -> None:
        if self._header is None:
            self._head += piece
            (length,) = _HEAD.unpack_from(self._head) if len(self._head) >= _HEAD.size else (0,)
            if not length or len(self._head) < _HEAD.size + length:
                return
            head, piece = bytes(self._head[_HEAD.size : _HEAD.size + length]), bytes(self._head[_HEAD.size + length :])
            self._head.clear()
            self._begin(slots.header_of(head, f"a snapshot from {self._host}"))
        end = self._at + len(piece)
        if end > self._header.size:
            raise DamagedError(f"a snapshot from {self._host} is longer than its header says.")
        self._view[self._at : end] = piece
        self._at = end

    def finish(self) -> Moment:
        """After the last piece: which snapshot it is of."""
        if self._header is None or self._at < self._header.size:
            raise DamagedError(f"a snapshot from {self._host} is cut short.")
        for piece in self._header.pieces:
            if slots.checksum(self._view[piece.offset : piece.offset + piece.size]) != piece.crc32:
                raise DamagedError(f"{piece.name} in a snapshot from {self._host} is not as it was written.")
        self._slots.commit(self._header)
        return self._header.moment

    def _begin(self, header: Header) -> None:
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._slots = slots.Slots(self._place, header.process)
        self._view, self._header = self._slots.begin(header.size, header.keep), header


def confirm(folder: Path, moment: Moment) -> None:
    """The buddy has all parts of this host's snapshot."""
    _write(folder / _CONFIRMED, f"{moment.step} {moment.generation}")


def wait_for_copy(folder: Path, moment: Moment, seconds: float) -> bool:
    """Whether the buddy has this snapshot before the time is up; True at once where no copies are kept."""
    end = time.monotonic() + seconds
    while (copied := _confirmed(folder)) is not None and _age(copied) < _age(moment):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _copy_of(device: int, sizes: list[tuple[str, int]]) -> tuple[int, ...]:
    """The device's coordinates along all axes but those along which one copy of the state is spread."""
    coordinates = []
    for axis, size in reversed(sizes):
        device, at = divmod(device, size)
        if axis not in TOGETHER:
            coordinates.append(at)
    return tuple(coordinates)


def _age(moment: Moment) -> tuple[int, int]:
    """A later generation's is newer, whatever its step: it went on from an earlier one."""
    return moment.generation, moment.step


def _confirmed(folder: Path) -> Moment | None:
    try:
        step, generation = (folder / _CONFIRMED).read_text().split()
    except FileNotFoundError:
        return None
    return Moment(int(step), int(generation))


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    os.replace(fresh, path)
