"""What the lead knows of its job's other hosts, and how it asks them: orders, answers, who is lost, who is dead for certain."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.resilience.host import Plan, generation_name
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import GONE, HERE, SILENT, Node
from jaxtrain.resilience.report import unpacked
from jaxtrain.resilience.say import as_lead
from jaxtrain.resilience.tenure import Tenure
from jaxtrain.resilience.verdict import Status

GONE_S = 0.3  # for a line that broke to be there again
DYING_S = 1.0  # for trainers to be gone after their right was


class Deposed(Exception):
    """This host leads no more."""


@dataclass
class Remote:
    """What is known of another host."""

    shape: str = ""
    instance: str = ""
    generation: int = 0  # of which it has last heard, as it says
    running: int = 0  # whose trainers it has; 0: none
    statuses: list[Status] = field(default_factory=list)
    ready: bool = False
    aside: bool = False  # it trains no more
    reborn: bool = False  # it came as another process
    lost_since: float | None = None
    part: dict[str, Any] = field(default_factory=dict)  # the order that began its part of the generation
    asked: dict[str, Any] = field(default_factory=dict)  # the order that it has not answered
    done: dict[str, Any] = field(default_factory=dict)  # the last answer


class Remotes:
    """To be used by the main thread alone."""

    def __init__(self, node: Node, tenure: Tenure, changed: threading.Event):
        self._node, self._tenure, self._changed = node, tenure, changed
        self._all: dict[str, Remote] = {}
        node.withheld.clear()
        self._numbers = itertools.count(1)
        self._plan: Plan | None = None
        self._training: list[str] = []
        self._said: set[tuple[str, str]] = set()  # of whose machine, which kind of complaint

    def __getitem__(self, name: str) -> Remote:
        return self._all[name]

    def __iter__(self) -> Iterable[Remote]:
        return iter(self._all.values())

    def hear(self) -> None:
        """Takes in what has come."""
        while not self._node.inbox.empty():
            name, message = self._node.inbox.get()
            remote = self._all.setdefault(name, Remote())
            if "generation" in message:
                remote.generation, remote.running = message["generation"], message["running"]
            if "hello" in message:
                self._greet(name, remote, message["hello"])
            elif "report" in message:
                remote.ready = message["ready"]
                self._say(name, message["complaints"])
                if self._plan and remote.running == self._plan.generation:
                    remote.statuses = unpacked(message["report"])
            elif remote.asked and message.get("done") == remote.asked["id"]:
                remote.asked, remote.done = {}, message
                self._node.withheld.discard(name)

    def here(self) -> list[str]:
        """In the order of the roster."""
        return [name for name in self._node.roster.names if name in self._all and self._node.state(name) == HERE]

    def may_run(self, name: str) -> bool:
        """Whether it is here and has the right to let trainers run."""
        return name in self.here() and self._node.promised.get(name, 0.0) > clock()

    def begin(self, plan: Plan, training: list[str]) -> None:
        """From now on this is the generation, and these have trainers of it."""
        self._plan, self._training = plan, training

    def start(self, name: str, part: dict[str, Any]) -> None:
        remote = self._all[name]
        remote.statuses, remote.reborn, remote.part = [], False, {"order": "start", "plan": part}
        self._node.order(name, remote.part)

    def tell(self, names: Iterable[str], message: dict[str, Any]) -> None:
        for name in names:
            self._node.order(name, message)

    def ask(self, name: str, message: dict[str, Any]) -> bool:
        """Its answer will be in `done`. Whether it could be sent; where the line breaks it is sent again."""
        remote = self._all[name]
        remote.done, remote.asked = {}, message | {"id": next(self._numbers)}
        return self._node.order(name, remote.asked)

    def wait(self, names: Iterable[str], seconds: float) -> None:
        """Until these have answered, or are not here, or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.hear()
            if not [name for name in names if self._all[name].asked and self._node.state(name) == HERE]:
                return
            self.pause(0.02)

    def wait_until_dead(self, names: Iterable[str]) -> list[str]:
        """Until these, which were told to fence, have no trainers for certain; those that could not be killed.

        A host that does not answer has none when its leash has left word, or the right is over that it last had from here.
        """
        names = [*names]
        self._node.withheld |= {name for name in names if self._all[name].asked}
        while self._tenure.leads():
            self.hear()
            if all(self._is_dead(name) for name in names):
                break
            self.pause(0.05)
        return [trainer for name in names for trainer in self._all[name].done.get("alive", [])]

    def _is_dead(self, name: str) -> bool:
        if not self._all[name].asked or clock() > self._node.promised.get(name, 0.0) + DYING_S:
            return True
        with contextlib.suppress(OSError):
            return self._node.state(name) != HERE and self._tenure.is_dead(name, generation_name(self._plan))
        return False

    def is_lost(self, name: str) -> bool:
        """Of a host that has trainers of this generation."""
        remote, state = self._all[name], self._node.state(name)
        if state == HERE:
            remote.lost_since = None
            return remote.reborn or (remote.generation == self._plan.generation and not remote.running)
        remote.lost_since = remote.lost_since or clock()
        return state == SILENT or clock() > remote.lost_since + GONE_S

    def how(self, name: str) -> str:
        """It was lost, as far as it can be told from here."""
        state = self._node.state(name)
        if state == HERE:
            return "it came again without its trainers"
        if state == GONE:
            return "its supervisor has ended, the host itself answers"
        return f"nothing was heard for {self._node.silent_s:g} s"

    def silent(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._node.state(name) == SILENT]

    def unheard(self, names: Iterable[str]) -> bool:
        """Whether one of these is late with its sign of life: what is known of its trainers may be old."""
        peers = [self._node.hub.peer(name) for name in names]
        return any(peer.state != HERE or peer.heard_s > 2 * self._node.pause_s for peer in peers)

    def pause(self, seconds: float) -> None:
        """Until something has come, or so long. Raises Deposed."""
        if not self._tenure.leads():
            raise Deposed
        self._changed.wait(seconds)
        self._changed.clear()

    def _say(self, name: str, complaints: dict[str, str]) -> None:
        """What a host finds wrong with its machine, each kind once."""
        for kind, line in complaints.items():
            if (name, kind) not in self._said:
                self._said.add((name, kind))
                as_lead(f"host {name}: {line}")

    def _greet(self, name: str, remote: Remote, hello: dict[str, Any]) -> None:
        """A host is newly connected: for the first time, again, or as another process."""
        if hello["instance"] != remote.instance:
            remote.asked, remote.ready, remote.reborn = {}, False, True
            self._node.withheld.discard(name)
            as_lead(f"host {name} has joined")
        elif remote.asked:
            self._node.order(name, remote.asked)  # it may have been lost with the old connection
        if not remote.reborn and name in self._training and remote.generation < self._plan.generation:
            self._node.order(name, remote.part)
        remote.instance, remote.shape, remote.aside = hello["instance"], hello["shape"], hello["aside"]
        self._node.order(name, {"order": "prepare"})
