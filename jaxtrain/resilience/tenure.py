"""Who leads a job of several hosts: terms in the shared run folder, each of one host, which shows there that it lives.

A term is a file terms/N, made once and never changed, by a link, of which one succeeds; its lead makes it again if somebody
removes it. Its host writes to terms/N.life every few moments; others see whether it changes, by their own clocks: no two
clocks are compared. The rules:
  1. a lead has the right to lead for `lease` seconds from the beginning of its last write, or from when all others have
     last heard it. Neither counts that is done when the right is over, and no trainer lives longer than it (leash.py);
  2. a host takes the next term only when it has seen no life of the last, and heard nothing of its host, for 1.5 times
     `lease`: by then the right is over for good. Or at once when the lead's own leash says that it is dead; then it has to
     wait for that long only where another host does not say that its trainers are dead too (crew.py);
  3. a lead that finds a newer term than its own leads no more; nor may a trainer of an older term commit anything.
It kills nobody and starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtrain.background import Deadline, within
from jaxtrain.errors import CheckpointError
from jaxtrain.resilience.leash import clock

FOLDER, VARIABLE = "terms", "JAXTRAIN_TERM"
TAKEN = 1.5  # times the lease, after which another may lead
LOOKS = 10  # in one lease
_ENDED = "ended"


@dataclass(frozen=True)
class Term:
    """`number` counts from 1; 0: nobody has led yet. `ended`: the exit code of the job that its lead brought to an end."""

    number: int = 0
    host: str = ""
    address: str = ""
    ended: int | None = None


class Tenure:
    """What is known of the run's terms, kept up by a thread, for a file system may not answer. `changed` is set at news."""

    def __init__(self, run_dir: Path, host: str, address: str, lease: float, changed: threading.Event):
        self._folder, self._host, self._address = run_dir / FOLDER, host, address
        self.lease, self._changed = lease, changed
        self.newest = Term()
        self._confirmed = self._acked = -1e9  # of `clock`: when the last write began; when all others had heard
        self.mine = 0  # the term of this host, 0 while it does not lead
        self.generation = 0  # the last one of the job, as its lead says; set by the lead
        self.trouble = ""  # why the folder cannot be read or written now
        self.bereft = 0  # the term whose host is dead for certain, and all its trainers
        self.cut = False  # whether this host does not hear the lead, which it says in the folder
        self._cried = False
        self._life, self._still, self._looked, self._count = "", 0.0, 0.0, 0
        self._writing = threading.Lock()  # of a life: the last word of a term stays
        self._known = threading.Event()  # it was read once
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="tenure", daemon=True).start()

    def still(self) -> float:
        """For how many seconds of looking there was no sign of life in the newest term; endless where it has ended."""
        if not self._known.is_set() or clock() - self._looked > self.lease / 4:
            return 0.0
        return 1e9 if self.newest.number == 0 or self.newest.ended is not None else self._still

    def claim(self) -> bool:
        """Takes the term after the newest that was seen; whether this host has it. Raises OSError."""
        began, number = clock(), self.newest.number + 1

        if not within(Deadline(self.lease), lambda: self._make(number)):
            return False
        if clock() > began + self.lease / 2:
            return False  # too slow to be sure of; it passes like any term without life
        self.newest, self._confirmed, self._acked = Term(number, self._host, self._address), began, -1e9
        self.mine = number
        return True

    def _make(self, number: int) -> bool:
        """The files of a term of this host, where there is no such term."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / f".{number}.{_plain(self._host)}.{os.getpid()}"
        with open(mine, "w") as file:
            json.dump({"host": self._host, "address": self._address}, file)
            file.flush()
            os.fsync(file.fileno())  # a term that is there can be read, whatever happens to this machine
        try:
            _write_life(self._folder / f"{number}.life", f"{self._count} {self.generation}")
            os.link(mine, self._folder / str(number))
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        return True

    def until(self) -> float:
        """When the right to lead ends, on `clock`."""
        return max(self._confirmed, self._acked) + self.lease if self.mine else 0.0

    def leads(self) -> bool:
        """Whether this host has the right to lead now: it may have been stopped, and not know of its end yet."""
        return clock() < self.until()

    def heard_by_all(self, moment: float) -> None:
        """All other hosts have heard something that this one said at this moment or later.

        All of the roster: one that is not connected, or not started yet, sees the folder alone, and may take the next
        term 1.5 leases after that stood still, however well the connected ones hear this host.
        """
        if clock() < self.until():
            self._acked = max(self._acked, moment)

    def cries(self, host: str) -> bool:
        """Whether a host that is not heard says in the folder that it lives. Raises OSError."""
        read = lambda: (self._folder / f"{_plain(host)}.cut").read_text()  # noqa: E731
        with contextlib.suppress(FileNotFoundError):
            return within(Deadline(1.0), read) == str(self.mine)
        return False

    def word(self, host: str) -> str:
        """The file in which a host's leash says that its supervisor and all its trainers are dead: of which generation."""
        return str((self._folder / f"{_plain(host)}.dead").absolute())

    def is_dead(self, host: str, generation: str) -> bool:
        """Whether that file says so. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return within(Deadline(1.0), Path(self.word(host)).read_text) == generation
        return False

    def end(self, code: int) -> None:
        """The job is over, or this host leads no more: the next term may begin at once."""
        number, self.mine = self.mine, 0

        def write() -> None:
            with self._writing:
                _write_life(self._folder / f"{number}.life", f"{_ENDED} {code}")

        if number:
            with contextlib.suppress(OSError):
                within(Deadline(self.lease), write)

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self.lease / LOOKS):
            try:
                self._look()
                self.trouble = ""
            except (OSError, ValueError, LookupError, TypeError) as error:
                self.trouble = str(error)

    def _look(self) -> None:
        began, mine = clock(), self.mine
        term, life = _newest(self._folder)
        if term.number == self.newest.number and not term.host:  # its file was removed
            term = replace(term, host=self.newest.host, address=self.newest.address)
        another = term.number > mine or (term.number == mine and term.host != self._host)
        if mine and (another or clock() >= self.until()):
            self.mine = 0
            self._changed.set()
        elif mine:
            self._live(mine, began)
        seen = (term, life)
        moved = seen != (self.newest, self._life) or not self._known.is_set()
        passed = min(began - self._looked, 2 * self.lease / LOOKS)  # while it did not look it has seen nothing
        self._looked, self._still = began, 0.0 if moved else self._still + passed
        if term.number >= self.newest.number:
            if term != self.newest:
                self._changed.set()
            self.newest, self._life = term, life
            if not self.mine:
                self.generation = int(life.split()[1]) if life and term.ended is None else 0
        self._known.set()
        self.bereft = term.number if term.number and not self.mine and self._left_by(term) else 0
        if self.cut != self._cried:
            self._cry(term.number)

    def _live(self, mine: int, began: float) -> None:
        with self._writing:
            if mine != self.mine:  # it has ended meanwhile
                return
            self._count += 1
            if not (self._folder / str(mine)).exists() and not self._make(mine):  # somebody removed it
                return
            _write_life(self._folder / f"{mine}.life", f"{self._count} {self.generation}")
        if clock() < self.until():
            self._confirmed = began

    def _left_by(self, term: Term) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(self.word(term.host)).read_text().startswith(f"{term.number}.")
        return False

    def _cry(self, number: int) -> None:
        path, cut = self._folder / f"{_plain(self._host)}.cut", self.cut
        path.write_text(str(number)) if cut else path.unlink(missing_ok=True)
        self._cried = cut


def ended_with(run_dir: Path) -> int | None:
    """The exit code with which the run's last term ended; None where it has not, or there was none. Raises OSError."""
    return within(Deadline(10.0), lambda: _newest(run_dir / FOLDER)[0].ended)


def still_valid(run_dir: Path, env: Mapping[str, str] = os.environ) -> None:
    """By a trainer, before it commits. Raises CheckpointError where its generation's term is not the newest."""
    mine = env.get(VARIABLE)
    if not mine:
        return
    newest = max(_numbers(run_dir / FOLDER), default=0)
    if newest > int(mine):
        raise CheckpointError(
            "this generation is over.",
            got=f"its lead had term {mine}, and there is term {newest}",
            rule="of two leads the newer one's trainers write the run folder",
            fix="nothing: the run goes on elsewhere",
        )


def _newest(folder: Path) -> tuple[Term, str]:
    number = max(_numbers(folder), default=0)
    if not number:
        return Term(), ""
    said = {"host": "", "address": ""}
    with contextlib.suppress(FileNotFoundError):
        said = json.loads((folder / str(number)).read_text())
    with contextlib.suppress(FileNotFoundError):
        life = (folder / f"{number}.life").read_text().strip("\0 \n")
        word, _, code = life.partition(" ")
        return Term(number, said["host"], said["address"], int(code) if word == _ENDED else None), life
    return Term(number, said["host"], said["address"]), ""


def _plain(host: str) -> str:
    return host.replace("/", "-")


def _numbers(folder: Path) -> list[int]:
    """Of the terms, of which somebody may have removed one of the two files."""
    try:
        return [int(name.removesuffix(".life")) for name in os.listdir(folder) if name.removesuffix(".life").isdecimal()]
    except FileNotFoundError:
        return []


def _write_life(path: Path, text: str) -> None:
    """In place, so that a full disk has room for it; closed, so that other clients of a file server see it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.ljust(32).encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
