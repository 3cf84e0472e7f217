"""The processes of one machine: trainers of the current generation, standbys for the next, coordination services.

It starts and kills what it is told to, and says what it sees. What that means, and what to do, the lead decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jaxtrain.errors import RunError
from jaxtrain.resilience import evidence, pulse
from jaxtrain.resilience.child import Child
from jaxtrain.resilience.say import as_host
from jaxtrain.resilience.verdict import Status, Verdict

FENCE_S = 300.0  # for the kernel to end a process after SIGKILL: one in uninterruptible I/O takes as long as its disk
FENCE_SAID_S = 5.0  # of it, before it is said
RESPAWN_S = 10.0  # at least from one standby that ended unasked to the next in its place

TRAINER = (sys.executable, "-m", "jaxtrain.resilience.trainer")
SERVICE = (sys.executable, "-m", "jaxtrain.resilience.service")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One generation as this host has to start it: trainers `first`, `first` + 1, ... of `count`."""

    generation: int
    service: str  # host:port
    first: int
    count: int
    env: Mapping[str, str]
    argv: tuple[str, ...] = ()  # more words for the trainers' command line
    buddy: str | None = None  # the host that keeps copies of this one's snapshots


def generation_name(plan: Plan | None) -> str:
    """There is none like it in a run folder's whole life."""
    return f"{plan.env.get('JAXTRAIN_TERM', '0')}.{plan.generation}" if plan else "-"


class Host:
    """To be used by the main thread alone. `argv`: the trainers' verb, CONFIG and flags; `processes`: how many run here;
    `folder`: in memory, of this run alone; snapshots that a killed supervisor left there are used by the next.

    `trainer` and `service` are commands that say READY and take orders; tests put small scripts in their place.
    """

    def __init__(
        self,
        argv: Sequence[str],
        processes: int,
        folder: Path,
        changed: threading.Event,
        env: Mapping[str, str] = os.environ,
        trainer: Sequence[str] = TRAINER,
        service: Sequence[str] = SERVICE,
        name: str = "",
        devices: int = 1,
    ):
        self.name, self._argv, self._env, self._changed = name or socket.gethostname(), list(argv), dict(env), changed
        self.processes, self._trainer, self._service = processes, trainer, service
        self._plan: Plan | None = None
        self._devices = devices
        self.generation = 0  # the last of which this host has heard
        self.aside = False  # it trains no more
        self._needed = True
        self.folder, self._lock = folder, _held(folder)
        for old in folder.glob("*.pulse"):
            old.unlink()
        self._trainers: list[Child] = []
        self._pulses: list[pulse.Reader] = []  # theirs
        self._standbys: list[Child] = []
        self._prepared, self._tended = 0, 0.0  # for how many trainers there is a service; when standbys were replaced
        self._services: list[tuple[int, int, Child]] = []  # port, for how many trainers
        self.before_orders: Callable[[], object] = lambda: None  # when `pids` are new ones, and nothing of them runs yet

    # What a host is to a lead that has this one alone; crew.py is all this for several.
    poll_s = 0.02  # between two looks at the pulses; an exit is noticed at once
    address, settle_s = "localhost", 0.05  # `settle_s`: from the first exit to the verdict: what ended with it

    def assemble(self) -> bool:
        """There is nobody to wait for."""
        return True

    def last_generation(self) -> int:
        return self.generation

    def trouble(self) -> Verdict | None:
        """No other host is lost, and none comes."""

    def unsure(self) -> bool:
        return False

    def explained(self, found: Verdict) -> Verdict:
        return found

    def put_aside(self, processes: Sequence[int]) -> list[str]:
        """The run has no other host."""
        return []

    def gather(self, statuses: Sequence[Status], folder: Path) -> list[Status]:
        """Stacks and connections of trainers into `folder`; the statuses with them."""
        return evidence.gather(statuses, folder)

    def shape(self) -> str:
        """What trains here, in words."""
        return f"{self.processes} processes of {self._devices} devices"

    def pids(self) -> tuple[str, list[int]]:
        """Of which generation the trainers here are, and those that live."""
        return generation_name(self._plan), [child.pid for child in self._trainers if child.ended is None]

    def running(self) -> int:
        """The generation whose trainers are here; 0: none."""
        return self.generation if self._trainers else 0

    def prepare(self, count: int) -> None:
        """Standbys for every trainer of this host, and a service for `count`, if any: on their way when it returns."""
        self._prepared = count
        for child in [*self._standbys, *(row[2] for row in self._services)]:
            if child.stopped():
                child.kill(1.0)
        self._standbys = [child for child in self._standbys if child.ended is None]
        while len(self._standbys) < self.processes:
            command = [*self._trainer, *self._argv[1:]]
            self._standbys.append(Child(command, self._env, "[standby] ", self._changed))
        self._services = [row for row in self._services if row[2].ended is None]
        for row in [row for row in self._services if row[1] != count]:
            row[2].signal(signal.SIGKILL)
            self._services.remove(row)
        if count and all(made_for != count for _, made_for, _ in self._services):
            port, quiet = _free_port(), self._env | {"TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [*self._service, self.address, str(port), str(count)]
            self._services.append((port, count, Child(command, quiet, "[service] ", self._changed)))

    def ready(self) -> bool:
        """Whether all that was prepared waits for orders."""
        children = [*self._standbys, *(child for _, _, child in self._services)]
        return all(child.ready and child.ended is None for child in children)

    def tend(self) -> None:
        """Replaces standbys that have ended unasked; to be called now and then."""
        if any(child.ended for child in self._standbys) and time.monotonic() > self._tended + RESPAWN_S:
            self._tended = time.monotonic()
            self.prepare(self._prepared)

    def service(self, count: int) -> tuple[int, Child]:
        """A prepared service for `count` trainers: its port, and the process, which the caller ends."""
        row = next(row for row in self._services if row[1] == count)
        self._services.remove(row)
        return row[0], row[2]

    def start(self, plan: Plan) -> bool:
        """Turns standbys into the trainers of this generation; whether all were ready. One that still imports reads its
        order later."""
        assert not self._trainers, "the last generation is not fenced"
        ready = sorted(self._standbys, key=lambda child: not child.ready)
        self._trainers, self._standbys, self._plan = ready[: self.processes], ready[self.processes :], plan
        self.generation = plan.generation
        self._hold()
        self.before_orders()
        for local, child in enumerate(self._trainers):
            path = self.folder / f"{plan.generation}.{plan.first + local}.pulse"
            self._pulses.append(pulse.begun(path, plan.generation))
            child.head = f"[p{plan.first + local}] "
            child.tell(json.dumps({"env": self._place(plan, local), "argv": [*self._argv, *plan.argv]}))
        return all(child.ready for child in self._trainers)

    def statuses(self) -> list[Status]:
        """Of this generation's trainers, by index."""
        plan = self._plan
        return [
            Status(
                index=plan.first + local,
                host=self.name,
                pid=child.pid,
                code=child.code,
                ended=child.ended,
                beat=self._pulses[local].last(),
                stopped=child.ended is None and child.stopped(),
            )
            for local, child in enumerate(self._trainers)
        ]

    def signal(self, number: int) -> None:
        """To all trainers."""
        for child in self._trainers:
            child.signal(number)

    def fence(self) -> list[str]:
        """Kills all trainers; those that the kernel has not ended in time, in words."""
        for child in self._trainers:
            child.signal(signal.SIGKILL)
        stuck = [child for child in self._trainers if not child.kill(FENCE_SAID_S)]
        if stuck:
            as_host(f"processes {[child.pid for child in stuck]} do not end: the kernel waits for a device or a disk")
        alive = [f"process {child.pid} on {self.name}" for child in stuck if not child.kill(FENCE_S)]
        self._trainers = []
        self._close_pulses()
        return alive

    def forget(self) -> None:
        """The run's state is on its disk: snapshots are needed no more."""
        self._needed = False

    def close(self) -> None:
        """Ends everything that was started here. Snapshots that are needed stay, for the same command to go on from."""
        children = [*self._trainers, *self._standbys, *(child for _, _, child in self._services)]
        for child in children:
            child.signal(signal.SIGKILL)
        for child in children:
            child.kill(FENCE_SAID_S)
        self._close_pulses()
        if not self._needed:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _close_pulses(self) -> None:
        for reader in self._pulses:
            reader.close()
        self._pulses = []

    def _hold(self) -> None:
        """Makes and locks the folder again where somebody has removed it. Raises RunError."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.folder / "lock"), os.fstat(self._lock.fileno())):
                return
        as_host(f"somebody removed {self.folder}, and with it what snapshots it held: it is made again")
        self._lock.close()
        self._lock = _held(self.folder)

    def _place(self, plan: Plan, local: int) -> dict[str, str]:
        return dict(plan.env) | {
            "JAXTRAIN_SERVICE": plan.service,
            "JAXTRAIN_NUM_PROCESSES": str(plan.count),
            "JAXTRAIN_PROCESS_ID": str(plan.first + local),
            "JAXTRAIN_GENERATION": str(plan.generation),
            "JAXTRAIN_PULSE": str(self._pulses[local].path),
            "JAXTRAIN_SNAPSHOTS": str(self.folder),
        }


def memory_folder(run_dir: Path, host: str = "") -> Path:
    """Where a run's pulses and snapshots lie on this host: in memory where there is a tmpfs, and the same for every start.

    `host`: its name where a run has several, which may be on one machine.
    """
    name = hashlib.sha256(f"{run_dir.absolute()}{host and f' {host}'}".encode()).hexdigest()[:16]
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    return memory / f"jaxtrain-{os.getuid()}-{name}"


def _held(folder: Path) -> IO[str]:
    """The folder made and locked; the kernel drops the lock with the process. Raises RunError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise RunError(f"{folder} belongs to somebody else.", rule="a run's memory is its user's own", fix=f"remove {folder}")
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise RunError(
            f"{folder} cannot be made.",
            got=str(error),
            rule="a run's pulses and snapshots lie in memory",
            fix=f"make room in {folder.parent}: the same command goes on",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunError(
            "this run has a supervisor on this host already.",
            got=f"a live process holds {folder}",
            rule="one supervisor to a run and host",
            fix="end it, or choose another --name",
        ) from None
    return lock


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
