"""A host's snapshots and its buddy's copies between supervisors: each new one goes to the buddy, beside the training; what
a new member of the crew lacks comes from whoever has it, before a generation. Which files those are is buddies.py's."""

from __future__ import annotations

import json
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.background import Deadline
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.resilience import buddies, messages, slots
from jaxtrain.resilience.channel import HERE, Line
from jaxtrain.resilience.host import Plan
from jaxtrain.resilience.policy import Shelf
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.say import as_host
from jaxtrain.resilience.slots import Moment

PIECE_BYTES = 16 << 20
LOOK_S = 0.02  # between two looks for a new snapshot
SEND_S = 60.0  # for one process's part to arrive
TO_BUDDY = " copies"  # after a host's name: the line that carries them
_Buddy = tuple[str, list[int]]  # its name, and the processes of this host


class Part(NamedTuple):
    """One process's part of a snapshot: `owner`, whose trainer wrote it."""

    owner: str
    process: int
    step: int
    generation: int
    of: int  # how many parts the snapshot has
    size: int = 0  # bytes

    @property
    def moment(self) -> Moment:
        return Moment(self.step, self.generation)


class Stock:
    """`shelf`: where this host's trainers keep snapshots; None: they keep none. `answer`: sends to who sent to us."""

    def __init__(
        self, shelf: Shelf | None, roster: Roster, secret: bytes, answer: Callable[[str, dict[str, Any]], object]
    ):
        self._shelf, self._roster, self._secret, self._answer = shelf, roster, secret, answer
        self._folder = shelf and shelf.folder
        self._promised: dict[tuple[str, int], int] = {}  # by owner and process: bytes for parts that have not begun to come
        self._came: queue.SimpleQueue[tuple[str, dict[str, Any], memoryview]] = queue.SimpleQueue()
        self._coming: dict[tuple[str, int], _Coming] = {}  # by owner and process: one at a time writes to a slot
        self._buddy: _Buddy | None = None
        self._closed = threading.Event()
        for work in (self._receive, self._copy):
            threading.Thread(target=work, name="stock", daemon=True).start()

    def begin(self, plan: Plan, processes: int) -> None:
        """Before this host's trainers start: from now on each of their snapshots goes to the plan's buddy."""
        if self._folder is None:
            return
        self._promised.clear()  # what has not come by now was not waited for
        if plan.buddy:
            buddies.start(self._folder)
            self._buddy = plan.buddy, list(range(plan.first, plan.first + processes))
        else:
            self._buddy = None
            buddies.stop(self._folder)

    def rest(self) -> None:
        """The generation is over."""
        self._buddy = None

    def newest(self) -> int:
        """Changes with every snapshot that this host's trainers write."""
        return max((written for _, written in _headers(self._folder)), default=0) if self._folder else 0

    def inventory(self) -> list[Part]:
        """All that is here."""
        if self._folder is None:
            return []
        found = []
        for folder in slots.folders(self._folder):
            owner = self._roster.name if folder == self._folder else folder.name
            headers = [part.header for part in slots.snapshots(folder)]
            found += [Part(owner, h.process, *h.moment, h.processes, h.size) for h in headers]
        return found

    def send(self, parts: Iterable[Part], to: str) -> bool:
        """Whether that host has them all when it returns; none is sent where all would be too much for it."""
        if not (parts := list(parts)):
            return True
        if not {*parts} <= {*self.inventory()}:  # one has made way for a newer one
            return False
        with _Sender(self._roster, to, self._secret) as sender:
            return sender.offer(parts, Deadline(SEND_S)) and all(self._sent(sender, part) for part in parts)

    def received(self, name: str, message: dict[str, Any], payload: memoryview) -> None:
        """By the channel's thread."""
        self._came.put((name, message, payload))

    def close(self) -> None:
        self._closed.set()

    def _sent(self, sender: _Sender, part: Part) -> bool:
        if self._folder is None:
            return False
        folder = self._folder if part.owner == self._roster.name else self._folder / slots.COPIES / part.owner
        data = buddies.parcel(folder, part.process, part.moment)
        return data is not None and sender.send(part, data, Deadline(SEND_S))

    def _copy(self) -> None:
        """Brings each new snapshot to the buddy, as long as there is one."""
        copies, said = _Copies(self), ""
        while not self._closed.wait(LOOK_S):
            try:
                copies.bring(self._buddy)
            except OSError as error:  # it is tried again; meanwhile trainers go on with their own copies
                if str(error) != said:
                    as_host(f"a snapshot is not copied: {error}")
                said = str(error)
        copies.close()

    def _copied(self, moment: Moment, buddy: _Buddy, sender: _Sender) -> bool:
        """Whether all parts of this host's snapshot are there, and the buddy is still the same."""
        parts = [Part(self._roster.name, process, *moment, 0) for process in buddy[1]]
        return all(self._sent(sender, part) for part in parts) and self._buddy == buddy

    def _receive(self) -> None:
        while True:
            name, message, payload = self._came.get()
            if self._folder is None:
                continue
            if "offer" in message:
                self._answer(name, {"offer": message["offer"], "trouble": self._refusal(payload)})
                continue
            trouble = self._take(name, message, payload)
            if message["number"] + 1 == message["count"]:
                self._answer(name, {"part": message["part"], "trouble": trouble})

    def _refusal(self, payload: memoryview) -> str:
        """Why the parts that are offered are too much; else their bytes are theirs until they come."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rows, copies = json.loads(bytes(payload)), self._folder / slots.COPIES
            if not messages.PARTS(rows):
                raise ValueError("the offer is malformed")
            parts = [Part(*row) for row in rows]
            grown = {(p.owner, p.process): slots.growth(copies / p.owner, p.process, p.size) for p in parts}
            promised = {**self._promised, **grown}
            needed, room = self._shelf.used() + sum(promised.values()), self._shelf.room()
        except (OSError, ValueError) as error:
            return str(error)
        if needed > room:
            return f"with them it would hold {needed / 1e9:.3f} GB, budget {room / 1e9:.3f} GB (snapshot.memory_gb)"
        self._promised = promised
        return ""

    def _take(self, name: str, message: dict[str, Any], piece: memoryview) -> str:
        """What is wrong with the part of which this is a piece. Who began last to send it is the one who counts."""
        part, number = Part(*message["part"]), message["number"]
        key = part.owner, part.process
        if number == 0:
            self._coming[key] = _Coming(name, part, buddies.Arrival(self._folder, part.owner))
        coming, last = self._coming.get(key), number + 1 == message["count"]
        if coming is None or (coming.sender, coming.part, coming.number) != (name, part, number):
            return "pieces of it are missing, or another host sends it too"
        coming.number += 1
        try:
            if not coming.trouble:
                coming.arrival.take(piece)
                if coming.arrival.begun:
                    self._promised.pop(key, None)
                if last:
                    coming.arrival.finish()
        except (DamagedError, OSError, LookupError, TypeError, ValueError, struct.error) as error:  # all of it is read
            coming.trouble = str(error) or type(error).__name__
        if last:
            del self._coming[key]
        return coming.trouble


@dataclass
class _Coming:
    """A part on its way here, from `sender`; `number`: of the piece that comes next."""

    sender: str
    part: Part
    arrival: buddies.Arrival
    number: int = 0
    trouble: str = ""


def _headers(folder: Path) -> list[tuple[str, int]]:
    """What changes when a snapshot is whole: not read, for one header may be a megabyte."""
    try:
        return sorted((file.name, file.stat().st_mtime_ns) for file in os.scandir(folder) if file.name.endswith(".json"))
    except FileNotFoundError:
        return []


class _Copies:
    """What goes to the buddy. `done`: the newest that is there; `looked`: what was seen when nothing was new."""

    def __init__(self, stock: Stock):
        self._stock = stock
        self.sender: _Sender | None = None
        self.done: Moment | None = None
        self.looked: tuple[_Buddy, list[tuple[str, int]]] | None = None

    def bring(self, buddy: _Buddy | None) -> None:
        """A new snapshot, if there is one, to the buddy, if there is one."""
        if self.sender and (buddy is None or buddy[0] != self.sender.to):
            self.close()
        if buddy is None:
            return
        stock, now = self._stock, (buddy, _headers(self._stock._folder))
        moment = buddies.ready(stock._folder, buddy[1]) if now != self.looked else None
        if moment is None or moment == self.done:
            self.looked = now
            return
        self.sender = self.sender or _Sender(stock._roster, buddy[0], stock._secret)
        if stock._copied(moment, buddy, self.sender):
            buddies.confirm(stock._folder, moment)
            self.done = moment

    def close(self) -> None:
        if self.sender:
            self.sender.close()
        self.sender = None


class _Sender:
    """A line of its own to one host's hub, for what is large."""

    def __init__(self, roster: Roster, to: str, secret: bytes):
        self.to, self._answers = to, queue.SimpleQueue()
        address = roster.addresses[roster.names.index(to)]
        heard = lambda message, _: self._answers.put(messages.checked(message, messages.TO_SENDER))  # noqa: E731
        self._line = Line(address, roster.name + TO_BUDDY, secret, heard, log=_quiet)

    def send(self, part: Part, data: list[memoryview], deadline: Deadline) -> bool:
        """Whether it is there, whole, before the deadline."""
        pieces = [each[at : at + PIECE_BYTES] for each in data for at in range(0, len(each), PIECE_BYTES)]
        for number, piece in enumerate(pieces):
            message = {"part": list(part), "number": number, "count": len(pieces)}
            if not self._put(message, piece, deadline, begun=number > 0):
                return False
        return self._accepted("part", list(part), f"has no copy of {part}", deadline)

    def offer(self, parts: list[Part], deadline: Deadline) -> bool:
        """Whether there is room for all of them; not where it is not known by the deadline."""
        rows = memoryview(json.dumps(parts).encode())
        refused = f"takes no parts of the snapshot of step {parts[0].step}, and the next tier serves"
        return self._put({"offer": len(parts)}, rows, deadline) and self._accepted("offer", len(parts), refused, deadline)

    def _put(self, message: dict[str, Any], payload: memoryview, deadline: Deadline, begun: bool = False) -> bool:
        while not (self._line.lead().state == HERE and self._line.send(message, payload)):
            if not deadline.left() or (begun and self._line.lead().state != HERE):
                return False  # what was sent before is lost with the connection
            threading.Event().wait(0.01)
        return True

    def _accepted(self, key: str, value: object, refused: str, deadline: Deadline) -> bool:
        """What the host answers to this; where it is no, that is said."""
        while deadline.left():
            try:
                answer = self._answers.get(timeout=0.1)
            except queue.Empty:
                if self._line.lead().state != HERE:
                    return False
                continue
            if answer.get(key) == value:
                if answer["trouble"]:
                    as_host(f"{self.to} {refused}: {answer['trouble']}")
                return not answer["trouble"]
        return False

    def close(self) -> None:
        self._line.close()

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _quiet(line: str) -> None:
    """That the line is not there is what `send` says."""


def missing(members: list[str], each: int, stocks: dict[str, list[Part]]) -> list[tuple[str, Part, str]]:
    """What has to go where, as (from, part, to), so that all members find the newest whole snapshot; pure.

    `each`: processes of a host. Where as many processes wrote the snapshot as are to read it each host needs what was
    written in its place; else all need everything, for their shards are others. Of a later generation is newer. Each part
    comes from the holder that has least to send so far: a host sends one after the other.
    """
    holders: dict[Part, list[str]] = {}
    for host, parts in stocks.items():
        for part in parts:
            holders.setdefault(part, []).append(host)
    of_moment: dict[Moment, dict[int, Part]] = {}
    for part in holders:
        if part.of:
            of_moment.setdefault(part.moment, {})[part.process] = part
    counts = {moment: next(iter(parts.values())).of for moment, parts in of_moment.items()}
    whole = [m for m, parts in of_moment.items() if len(parts) == counts[m] and {*parts} == {*range(len(parts))}]
    if not whole:
        return []
    newest = max(whole, key=lambda moment: (moment.generation, moment.step))
    parts, orders, load = of_moment[newest], [], dict.fromkeys(stocks, 0)
    same = len(parts) == len(members) * each
    for place, member in enumerate(members):
        has = {part.process for part in stocks.get(member, []) if part.moment == newest}
        needs = range(place * each, (place + 1) * each) if same else sorted(parts)
        for process in needs:
            if process not in has:
                source = min(holders[parts[process]], key=lambda host: load[host])
                load[source] += parts[process].size
                orders.append((source, parts[process], member))
    return orders
