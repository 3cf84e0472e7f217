"""The hosts of a job as its lead uses them, in the place of one Host: which of them train, what they report, who is lost.

Trainers are numbered host by host. Nothing new starts before the trainers of a lost host are dead for certain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtrain.errors import RunError
from jaxtrain.resilience.child import Child
from jaxtrain.resilience.host import Host, Plan
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import Node
from jaxtrain.resilience.remotes import GONE_S, Deposed, Remotes
from jaxtrain.resilience.report import with_evidence
from jaxtrain.resilience.say import as_lead
from jaxtrain.resilience.stock import Part, Stock, missing
from jaxtrain.resilience.tenure import VARIABLE, Tenure
from jaxtrain.resilience.verdict import Status, Verdict

JOIN_S = 120.0  # for all hosts to come at first; then those that are there begin
RETURN_S = 600.0  # for hosts to come back where those that are left are too few
GATHER_S = 9.5  # for the stacks of all hosts
GROW_LOOK_S = 1.0
LOOKED_AT_A_SECOND = 4000  # hosts, where none has news
RESTOCK_S = 120.0  # for parts of snapshots to come to hosts that lack them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """How a job uses its hosts.

    `fits`: what so many hosts add to the trainers' command line, or None where the config does not run on them.
    `buddies`: on so many hosts, by place, which one keeps whose snapshots. `moment` changes with every new state to go on
    from, beside snapshots; None: it is not known yet. `spares`: hosts that do not train while all are well.
    """

    fits: Callable[[int], list[str] | None]
    buddies: Callable[[int], list[int | None]] | None = None
    moment: Callable[[], object] = lambda: ""
    spares: int = 0


class Crew:
    """To be used by the main thread alone. `lost`: the host that led before, for which nobody waits; `early`: the others'
    trainers may live as long as its right to lead would have lasted, until they are here."""

    def __init__(
        self, own: Host, node: Node, tenure: Tenure, changed: threading.Event, stock: Stock, terms: Terms, lost: str = "", early: bool = False
    ):
        self.name, self.settle_s = own.name, 2 * GONE_S
        self._own, self._node, self._tenure, self._stock, self._terms = own, node, tenure, stock, terms
        self._names = node.roster.names
        self._full = len(self._names) - terms.spares
        self._remotes = Remotes(node, tenure, changed)
        self._members: list[str] = []
        self._plan: Plan | None = None
        self._absent, self._patience, self._early = lost, tenure.lease if lost else JOIN_S, early
        self._signalled, self._looked = False, 0.0
        self._grow_from: tuple[object, int] | None = None  # the moment after which those who have come may train
        self._said: set[str] = set()
        self.poll_s = max(Host.poll_s, len(self._names) / LOOKED_AT_A_SECOND)

    @property
    def processes(self) -> int:
        """Of the generation that is or will be."""
        return len(self._members) * self._own.processes

    @property
    def address(self) -> str:
        """At which all hosts reach what this one serves."""
        return self._node.roster.reach

    def last_generation(self) -> int:
        """Of which any host here has heard."""
        self._remotes.hear()
        return max([self._own.generation, self._tenure.generation, *(remote.generation for remote in self._remotes)])

    # Between generations

    def assemble(self) -> bool:
        """Chooses who trains next, and waits where too few are here; False where a signal came meanwhile."""
        began, first = clock(), self._plan is None
        while not self._signalled:
            self._remotes.hear()
            able = self._able()
            size, waited = self._best(len(able)), clock() - began
            missing = {*self._names} - {*able, self._absent}
            patience = self._patience if first and missing and (self._early or size < self._full) else 0.0
            if size and waited >= patience:
                self._choose(able, size)
                self._restock()
                return not self._signalled
            if waited > RETURN_S:
                raise self._too_few(able)
            self._say_once(f"waiting for hosts: {len(able)} of {self._full} are here")
            self._remotes.pause(0.1)
        return False

    def prepare(self, count: int) -> None:
        """Standbys on all hosts, and here a service for so many trainers."""
        self._own.prepare(count)
        self._remotes.tell(self._remotes.here(), {"order": "prepare"})

    def ready(self) -> bool:
        """Whether standbys wait on all hosts that train."""
        return self._own.ready() and all(self._remotes[name].ready for name in self._others())

    def service(self, count: int) -> tuple[int, Child]:
        return self._own.service(count)

    def start(self, plan: Plan) -> bool:
        """Each host's trainers; whether all hosts had standbys."""
        if not self._tenure.leads():
            raise Deposed
        size, each = len(self._members), self._own.processes
        keepers = self._terms.buddies(size) if self._terms.buddies else [None] * size
        env = {**plan.env, VARIABLE: str(self._tenure.mine)}
        self._plan = plan = dataclasses.replace(plan, env=env, argv=tuple(self._terms.fits(size) or ()))
        self._grow_from, ready, self._tenure.generation = None, True, plan.generation
        self._remotes.begin(plan, self._others())
        for place, (name, keeper) in enumerate(zip(self._members, keepers)):
            buddy = None if keeper is None else self._members[keeper]
            part = dataclasses.replace(plan, first=place * each, buddy=buddy)
            if name == self.name:
                self._stock.begin(part, each)
                ready = self._own.start(part) and ready
            else:
                ready = self._remotes[name].ready and ready
                self._remotes.start(name, dataclasses.asdict(part))
        spares = [name for name in self._remotes.here() if name not in self._members]
        self._remotes.tell(spares, {"order": "know", "generation": plan.generation})
        return ready

    def fence(self) -> list[str]:
        """All trainers of this generation are dead when it returns, but for those that it names."""
        for name in self._others():
            self._remotes.ask(name, {"order": "fence"})
        alive = self._own.fence()
        self._stock.rest()
        return alive + self._remotes.wait_until_dead(self._others())

    # While one runs

    def statuses(self) -> list[Status]:
        """Of all trainers, by index; of those whose host has not reported yet, next to nothing."""
        self._remotes.hear()
        rows: list[Status] = []
        for place, name in enumerate(self._members):
            first = place * self._own.processes
            told = self._own.statuses() if name == self.name else self._remotes[name].statuses
            rows += told or [Status(index=first + i, host=name, pid=0) for i in range(self._own.processes)]
        return rows

    def trouble(self) -> Verdict | None:
        """Who is lost, or who has come. Raises Deposed."""
        if not self._tenure.leads():
            raise Deposed
        self._remotes.hear()
        lost = [name for name in self._others() if self._remotes.is_lost(name)]
        return self._lost(lost) if lost else self._grown()

    def unsure(self) -> bool:
        """Whether a host is not heard now, so that nobody else is to be blamed yet."""
        return self._remotes.unheard(self._others())

    def explained(self, found: Verdict) -> Verdict:
        """The same with what became known while the others were fenced: whether a silent host lives."""
        silent = self._remotes.silent(self._others())
        if found.what != "host lost" or not silent:
            return found
        cut = [name for name in silent if self._cries(name)]
        dead = [name for name in silent if name not in cut]
        lines = [f"the network to {', '.join(cut)} is cut: its supervisor still writes to the run folder"] * bool(cut)
        lines += [f"{', '.join(dead)} is dead or stopped, or cut off from the run folder too"] * bool(dead)
        return dataclasses.replace(found, line="; ".join([found.line, *lines]))

    def _cries(self, name: str) -> bool:
        with contextlib.suppress(OSError):  # the folder does not answer: nothing is known
            return self._tenure.cries(name)
        return False

    def signal(self, number: int) -> None:
        """To all trainers."""
        self._signalled = True
        self._own.signal(number)
        self._remotes.tell(self._others(), {"order": "signal", "number": int(number)})

    def gather(self, statuses: Sequence[Status], folder: Path) -> list[Status]:
        """As Host.gather, of all hosts."""
        end = time.monotonic() + GATHER_S
        asked = [name for name in self._others() if self._remotes.ask(name, {"order": "gather", "folder": str(folder)})]
        rows = {s.index: s for s in self._own.gather([s for s in statuses if s.host == self.name], folder)}
        self._remotes.wait(asked, max(0.5, end - time.monotonic()))
        told = {int(i): row for name in asked for i, row in self._remotes[name].done.get("gathered", {}).items()}
        return [rows.get(s.index) or with_evidence(s, told.get(s.index, {})) for s in statuses]

    def put_aside(self, processes: Sequence[int]) -> list[str]:
        """The hosts of these trainers train no more, where others can; which those are."""
        names = sorted({self._members[index // self._own.processes] for index in processes if index < self.processes})
        if names and not self._best(len([name for name in self._able() if name not in names])):
            as_lead(f"{', '.join(names)} should train no more, but without it the hosts are too few")
            return []
        self._own.aside = self._own.aside or self.name in names
        for name in {*names} - {self.name}:
            self._remotes[name].aside = True
        self._remotes.tell({*names} - {self.name}, {"order": "aside"})
        return names

    def tend(self) -> None:
        """Each host replaces its own standbys."""
        self._own.tend()

    def forget(self) -> None:
        self._own.forget()

    def close(self) -> None:
        """The supervisor ends the host that is its own."""

    # How it chooses

    def _others(self) -> list[str]:
        return [name for name in self._members if name != self.name]

    def _able(self) -> list[str]:
        """Who could train, in the order of the roster."""
        able = []
        for name in self._names:
            if name == self.name:
                aside, shape = self._own.aside, self._own.shape()
            elif self._remotes.may_run(name):
                aside, shape = self._remotes[name].aside, self._remotes[name].shape
            else:
                continue
            if aside:
                continue
            if shape != self._own.shape():
                self._say_once(f"host {name} is left out: it has {shape}, host {self.name} has {self._own.shape()}")
                continue
            able.append(name)
        return able

    def _best(self, most: int) -> int:
        """The largest number of hosts on which the config runs; 0: none."""
        return next((size for size in range(min(most, self._full), 0, -1) if self._terms.fits(size) is not None), 0)

    def _choose(self, able: list[str], size: int) -> None:
        """Those who trained stay in their places and others take those of the lost; another number begins anew."""
        before = self._members
        stay = [name if name in able else None for name in before] if len(before) == size else [None] * size
        fresh = iter([name for name in able if name not in stay])
        self._members = [name or next(fresh) for name in stay]
        if self._members != before or self._plan is None:
            spare = [name for name in able if name not in self._members]
            more = self._terms.fits(size)
            as_lead(
                f"hosts {', '.join(self._members)} train"
                + (f"; {', '.join(spare)} wait as spares" if spare else "")
                + (f"; the batch is the same, {' '.join(more)}" if more else "")
            )

    def _restock(self) -> None:
        """Lets those who lack parts of the newest snapshot have them; what does not arrive in time is not waited for."""
        asked = [name for name in self._remotes.here() if self._remotes.ask(name, {"order": "inventory"})]
        self._remotes.wait(asked, GATHER_S)
        stocks = {name: [Part(*row) for row in self._remotes[name].done.get("parts", [])] for name in asked}
        stocks[self.name] = self._stock.inventory()
        orders: dict[str, dict[str, list[Part]]] = {}
        for source, part, to in missing(self._members, self._own.processes, stocks):
            orders.setdefault(source, {}).setdefault(to, []).append(part)
        own = orders.pop(self.name, {})
        for name, lots in orders.items():
            self._remotes.ask(name, {"order": "send", "lots": lots})
        sent = all([self._stock.send(parts, to) for to, parts in own.items()])
        self._remotes.wait(orders, RESTOCK_S)
        if not sent or not all(self._remotes[name].done.get("sent") for name in orders):
            as_lead("not all hosts have what they need of the newest snapshot")

    def _lost(self, names: list[str]) -> Verdict:
        statuses, each = self.statuses(), self._own.processes
        culprits = [self._members.index(name) * each + i for name in names for i in range(each)]
        places = {name: ", ".join(s.place for s in statuses if s.host == name) for name in names}
        told = [f"host {name} was lost ({places[name]}): {self._remotes.how(name)}" for name in names]
        return Verdict(what="host lost", culprits=tuple(culprits), line="; ".join(told), statuses=statuses)

    def _grown(self) -> Verdict | None:
        """Where more hosts could train than do, once there is a new state to go on from."""
        if time.monotonic() < self._looked + GROW_LOOK_S:
            return None
        self._looked = time.monotonic()
        able = self._able()
        fresh = [name for name in able if name not in self._members and name != self.name]
        size = self._best(len(able))
        if size <= len(self._members) or not all(self._remotes[name].ready for name in fresh):
            self._grow_from = None
            return None
        saved = self._terms.moment()
        if saved is None:
            return None
        moment = saved, self._stock.newest()
        self._grow_from = self._grow_from or moment
        if self._grow_from == moment:
            return None
        line = f"hosts {', '.join(fresh)} can train: from {len(self._members)} to {size} hosts, from a new snapshot or save"
        return Verdict(what="more hosts", culprits=(), line=line, statuses=self.statuses())

    def _too_few(self, able: list[str]) -> RunError:
        missing = [name for name in self._names if name not in able]
        return RunError(
            f"{len(able)} of {len(self._names)} hosts are too few.",
            got=f"here: {', '.join(able) or 'none'}; not here or put aside: {', '.join(missing)}",
            rule="the mesh and the batch fit the devices of the hosts that train",
            fix="start the missing hosts; or one mesh axis at -1, so that the config runs on fewer",
        )

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            as_lead(line)
