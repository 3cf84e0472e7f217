"""The hosts of a job as its lead uses them, in the place of one Host: which of them train, what they report, who is lost.

Trainers are numbered host by host. A host is lost when its line is; nothing new starts before its trainers are dead for
certain: it said so, or came again as another process, or the right that it last had (node.py) is over.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtrain.errors import RunError
from jaxtrain.resilience.child import Child
from jaxtrain.resilience.host import FENCE_S, Host, Plan
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import GONE, HERE, SILENT, Node
from jaxtrain.resilience.report import unpacked
from jaxtrain.resilience.stock import Part, Stock, missing
from jaxtrain.resilience.tenure import VARIABLE, Tenure
from jaxtrain.resilience.verdict import Status, Verdict

JOIN_S = 120.0  # for all hosts to come at first; then those that are there begin
RETURN_S = 600.0  # for hosts to come back where those that are left are too few
GONE_S = 0.3  # for a line that broke to be there again
GATHER_S = 9.5  # for the stacks of all hosts
GROW_LOOK_S = 1.0
RESTOCK_S = 120.0  # for parts of snapshots to come to hosts that lack them

Fits = Callable[[int], "list[str] | None"]  # what so many hosts add to the command line; None: the config does not run on them


class Deposed(Exception):
    """This host leads no more."""


@dataclass
class Remote:
    """What is known of another host."""

    hello: dict[str, Any] = field(default_factory=dict)
    generation: int = 0  # of which it has last heard, as it says
    running: int = 0  # whose trainers it has; 0: none
    order: dict[str, Any] = field(default_factory=dict)  # its part of the generation
    reborn: bool = False  # it came as another process
    statuses: list[Status] = field(default_factory=list)
    ready: bool = False
    lost_since: float | None = None
    owes: int = 0  # the order that it has to say "done" to, and its words
    asked: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)


class Crew:
    """To be used by the main thread alone. `fits`: by a number of hosts; `spares`: of the job's hosts that do not train
    while all are well; `moment`: changes whenever there is a new state to go on from; `lost`: the host that led before; `buddies`: on so many hosts, who keeps
    whose snapshots."""

    def __init__(
        self,
        own: Host,
        node: Node,
        tenure: Tenure,
        changed: threading.Event,
        fits: Fits,
        spares: int = 0,
        moment: Callable[[], object] = lambda: None,
        lost: str = "",
        stock: Stock | None = None,
        buddies: Callable[[int], list[int | None]] = lambda hosts: [None] * hosts,
    ):
        self.name, self.settle_s = own.name, 2 * GONE_S
        self._own, self._node, self._tenure, self._changed, self._fits, self._moment = own, node, tenure, changed, fits, moment
        self._names = node.roster.names
        self._full = len(self._names) - spares
        self._remotes: dict[str, Remote] = {}
        self._members: list[str] = []
        self._plan: Plan | None = None
        self._gone, self._patience = lost, tenure.lease if lost else JOIN_S  # for the others to come at first
        self._aside: set[str] = set()
        self._orders = itertools.count(1)
        self._signalled, self._looked, self._grow_from = False, 0.0, None
        self._said: set[str] = set()
        self._stock, self._buddies = stock, buddies

    @property
    def processes(self) -> int:
        """Of the generation that is or will be."""
        return len(self._members) * self._own.processes

    @property
    def address(self) -> str:
        """At which all hosts reach what this one serves."""
        return self._node.roster.reach

    # Between generations

    def assemble(self) -> bool:
        """Chooses who trains next, and waits where too few are here; False where a signal came meanwhile."""
        first, began = self._plan is None, clock()
        while not self._signalled:
            self._hear()
            able = self._able()
            size = self._best(len(able))
            waited = clock() - began
            patience = self._patience if first and {*self._names} - {*able, self._gone} else 0.0
            if size == self._full or (size and waited >= patience):
                self._choose(able, size)
                return True
            if waited > RETURN_S:
                raise self._too_few(able)
            self._say_once(f"waiting for hosts: {len(able)} of {self._full} are here")
            self._pause(0.1)
        return False

    def prepare(self, count: int) -> None:
        self._own.prepare(count)
        for name in self._here():
            self._node.order(name, {"order": "prepare"})

    def service(self, count: int) -> tuple[int, Child]:
        return self._own.service(count)

    def start(self, plan: Plan) -> bool:
        """Each host's trainers; whether all hosts had standbys."""
        each = self._own.processes
        buddies = [None if number is None else self._members[number] for number in self._buddies(len(self._members))]
        self._plan = plan = dataclasses.replace(
            plan, env={**plan.env, VARIABLE: str(self._tenure.mine)}, argv=tuple(self._fits(len(self._members)) or ())
        )
        ready, self._grow_from = True, None
        for number, name in enumerate(self._members):
            part = dataclasses.replace(plan, first=number * each, buddy=buddies[number])
            if name == self.name:
                if self._stock:
                    self._stock.begin(part, each)
                ready = self._own.start(part) and ready
                continue
            remote = self._remotes[name]
            remote.statuses, remote.reborn, ready = [], False, ready and remote.ready
            remote.order = {"order": "start", "plan": dataclasses.asdict(part)}
            self._node.order(name, remote.order)
        for name in set(self._here()) - {*self._members}:
            self._node.order(name, {"order": "know", "generation": plan.generation})
        return ready

    def fence(self) -> list[int]:
        """All trainers of this generation are dead when it returns; the processes of this host that are not."""
        others = self._others()
        for name in others:
            self._ask(name, {"order": "fence"})
        alive = self._own.fence()
        if self._stock:
            self._stock.rest()
        while self._tenure.mine:
            self._hear()
            if not [name for name in others if not self._fenced(name)]:
                break
            self._pause(0.05)
        for name in others:
            alive += self._remotes[name].done.get("alive", [])
        return alive

    # While one runs

    def statuses(self) -> list[Status]:
        """Of all trainers, by index; of those whose host has not reported yet, next to nothing."""
        self._hear()
        assert self._plan
        rows: list[Status] = []
        for number, name in enumerate(self._members):
            first = number * self._own.processes
            reported = self._own.statuses() if name == self.name else self._remotes[name].statuses
            rows += reported or [Status(index=first + i, host=name, pid=0) for i in range(self._own.processes)]
        return rows

    def trouble(self) -> Verdict | None:
        """Who is lost, or who has come; raises Deposed."""
        if not self._tenure.mine:
            raise Deposed
        self._hear()
        lost = [name for name in self._others() if self._is_lost(name)]
        if lost:
            return self._lost(lost)
        return self._grown()

    def unsure(self) -> bool:
        """Whether a host is not heard now, so that nobody else is to be blamed yet."""
        return any(self._node.state(name) != HERE for name in self._others())

    def signal(self, number: int) -> None:
        self._signalled = True
        self._own.signal(number)
        for name in self._others():
            self._node.order(name, {"order": "signal", "number": int(number)})

    def gather(self, statuses: Sequence[Status], folder: Path) -> list[Status]:
        """As Host.gather, of all hosts."""
        asked = [name for name in self._others() if self._ask(name, {"order": "gather", "folder": str(folder)})]
        rows = {s.index: s for s in self._own.gather([s for s in statuses if s.host == self.name], folder)}
        self._await(asked, GATHER_S)
        frames = {int(i): text for name in asked for i, text in self._remotes[name].done.get("frames", {}).items()}
        return [rows.get(s.index) or dataclasses.replace(s, frame=frames.get(s.index, "")) for s in statuses]

    def put_aside(self, processes: Sequence[int]) -> list[str]:
        """The hosts of these trainers train no more; which those are."""
        names = sorted({self._members[index // self._own.processes] for index in processes if index < self.processes})
        self._aside |= {*names}
        return names

    def close(self) -> None:
        """The supervisor ends the host that is its own."""

    # What is known

    def last_generation(self) -> int:
        """Of which any host here has heard."""
        self._hear()
        told = [remote.generation for remote in self._remotes.values()]
        return max([*told, self._own.generation])

    def _hear(self) -> None:
        while not self._node.inbox.empty():
            name, message = self._node.inbox.get()
            remote = self._remotes.setdefault(name, Remote())
            if "generation" in message:
                remote.generation, remote.running = message["generation"], message["running"]
            if "hello" in message:
                self._greet(name, remote, message["hello"])
            elif "report" in message:
                remote.ready = message["ready"]
                if self._plan and remote.running == self._plan.generation:
                    remote.statuses = unpacked(message["report"])
            elif message.get("done") == remote.owes:
                remote.owes, remote.done = 0, message

    def _greet(self, name: str, remote: Remote, hello: dict[str, Any]) -> None:
        """A host is newly connected: for the first time, again, or as another process."""
        if hello["instance"] != remote.hello.get("instance"):
            remote.owes, remote.ready, remote.reborn = 0, False, True
            _say(f"host {name} has joined")
        elif remote.owes:
            self._node.order(name, remote.asked)  # it may have been lost with the old connection
        elif name in self._others() and self._plan and remote.generation < self._plan.generation:
            self._node.order(name, remote.order)
        remote.hello = hello
        self._node.order(name, {"order": "prepare"})

    def _here(self) -> list[str]:
        return [name for name in self._names if name in self._remotes and self._node.state(name) == HERE]

    def _others(self) -> list[str]:
        return [name for name in self._members if name != self.name]

    def _able(self) -> list[str]:
        """Who could train, in the order of the roster."""
        able = []
        for name in self._names:
            if name in self._aside:
                continue
            if name != self.name and (name not in self._here() or self._node.promised.get(name, 0.0) < clock()):
                continue
            shape = self._own.shape() if name == self.name else self._remotes[name].hello["shape"]
            if shape != self._own.shape():
                self._say_once(f"host {name} is left out: it has {shape}, host {self.name} has {self._own.shape()}")
                continue
            able.append(name)
        return able

    def _best(self, most: int) -> int:
        """The largest number of hosts on which the config runs; 0: none."""
        return next((size for size in range(min(most, self._full), 0, -1) if self._fits(size) is not None), 0)

    def _choose(self, able: list[str], size: int) -> None:
        """Those who trained stay in their places, others take those of the lost; fewer hosts move up."""
        before = self._members
        stay = [name if name in able else None for name in before] if len(before) == size else []
        fresh = iter([name for name in able if name not in stay] if stay else able)
        self._members = [name or next(fresh) for name in stay] or list(itertools.islice(fresh, size))
        if self._members != before or self._plan is None:
            spare = [name for name in able if name not in self._members]
            more = self._fits(size)
            _say(
                f"hosts {', '.join(self._members)} train"
                + (f"; {', '.join(spare)} wait as spares" if spare else "")
                + (f"; the batch is the same, {' '.join(more)}" if more else "")
            )
        self._restock()

    def _restock(self) -> None:
        """Lets those who lack parts of the newest snapshot have them; what does not arrive in time is not waited for."""
        if self._stock is None:
            return
        asked = [name for name in self._here() if self._ask(name, {"order": "inventory"})]
        self._await(asked, GATHER_S)
        stocks = {name: [Part(*row) for row in self._remotes[name].done.get("parts", [])] for name in asked}
        stocks[self.name] = self._stock.inventory()
        orders: dict[str, dict[str, list[Part]]] = {}
        for source, part, to in missing(self._members, self._own.processes, stocks):
            orders.setdefault(source, {}).setdefault(to, []).append(part)
        own = orders.pop(self.name, {})
        for name, lots in orders.items():
            self._ask(name, {"order": "send", "lots": lots})
        sent = all([self._stock.send(parts, to) for to, parts in own.items()])
        self._await(list(orders), RESTOCK_S)
        if not sent or not all(self._remotes[name].done.get("sent") for name in orders):
            _say("not all hosts have what they need of the newest snapshot")

    def _await(self, names: list[str], seconds: float) -> None:
        """Until these have done what they were asked, or are lost, or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._hear()
            if not [name for name in names if self._remotes[name].owes and self._node.state(name) == HERE]:
                return
            self._pause(0.02)

    def _is_lost(self, name: str) -> bool:
        remote, state = self._remotes[name], self._node.state(name)
        if state == HERE:
            remote.lost_since = None
            return remote.reborn or (remote.generation == self._plan.generation and not remote.running)
        remote.lost_since = remote.lost_since or clock()
        return state == SILENT or clock() > remote.lost_since + GONE_S

    def _fenced(self, name: str) -> bool:
        """Whether this host's trainers are dead for certain."""
        remote = self._remotes[name]
        if not remote.owes:
            return True
        return clock() > self._node.promised.get(name, 0.0) + FENCE_S / 10

    def _ask(self, name: str, message: dict[str, Any]) -> bool:
        remote = self._remotes[name]
        remote.owes, remote.done = next(self._orders), {}
        remote.asked = message | {"id": remote.owes}
        return self._node.order(name, remote.asked)

    def _lost(self, names: list[str]) -> Verdict:
        statuses = self.statuses()
        each = self._own.processes
        culprits = [self._members.index(name) * each + i for name in names for i in range(each)]
        places = {s.index: s.place for s in statuses}
        told = [f"host {name} was lost ({', '.join(places[i] for i in culprits)}): {self._how(name)}" for name in names]
        return Verdict(what="host lost", culprits=tuple(culprits), line="; ".join(told), statuses=statuses)

    def _how(self, name: str) -> str:
        """As far as it can be told from here."""
        peer = self._node.hub.peer(name)
        if peer.state == HERE:
            return "it came again without its trainers"
        if peer.state == GONE:
            return "its supervisor has ended, the host itself answers"
        return f"nothing was heard for {self._node.silent_s:g} s"

    def explained(self, found: Verdict) -> Verdict:
        """The same with what became known while the others were fenced: whether a silent host lives."""
        silent = [name for name in self._others() if self._node.state(name) == SILENT]
        if found.what != "host lost" or not silent:
            return found
        cut = [name for name in silent if self._tenure.cries(name)]
        dead = [name for name in silent if name not in cut]
        lines = [f"the network to {', '.join(cut)} is cut: its supervisor still writes to the run folder"] * bool(cut)
        lines += [f"{', '.join(dead)} is dead or stopped, or the run folder is cut off too"] * bool(dead)
        return dataclasses.replace(found, line="; ".join([found.line, *lines]))

    def _grown(self) -> Verdict | None:
        """Where more hosts could train than do, once there is a new state to go on from."""
        now = time.monotonic()
        if now < self._looked + GROW_LOOK_S:
            return None
        self._looked = now
        able = self._able()
        fresh = [name for name in able if name not in self._members]
        if not fresh or not all(self._remotes[name].ready for name in fresh) or self._best(len(able)) <= len(self._members):
            self._grow_from = None
            return None
        moment = self._moment()
        if self._grow_from is None:
            self._grow_from = (moment,)
        if self._grow_from == (moment,):
            return None
        line = f"hosts {', '.join(fresh)} can train again: from {len(self._members)} to {self._best(len(able))} hosts"
        return Verdict(what="more hosts", culprits=(), line=line, statuses=self.statuses())

    def _too_few(self, able: list[str]) -> RunError:
        missing = [name for name in self._names if name not in able]
        return RunError(
            f"{len(able)} of {len(self._names)} hosts are too few.",
            got=f"here: {', '.join(able)}; not here or put aside: {', '.join(missing)}",
            rule="the mesh and the batch fit the devices of the hosts that train",
            fix="start the missing hosts; or one mesh axis at -1, so that the config runs on fewer",
        )

    def _pause(self, seconds: float) -> None:
        if not self._tenure.mine:
            raise Deposed
        self._changed.wait(seconds)
        self._changed.clear()

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            _say(line)


def _say(line: str) -> None:
    print(f"[lead] {line}", file=sys.stderr, flush=True)
