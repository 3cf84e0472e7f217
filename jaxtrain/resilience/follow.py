"""A host that follows: does what the lead orders, reports what its trainers do, and kills them when it may not let them
run. When nobody leads any more it takes the next term."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtrain.errors import RunError
from jaxtrain.exits import Exit
from jaxtrain.resilience.host import Host, Plan
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import HERE, Node
from jaxtrain.resilience.report import packed
from jaxtrain.resilience.say import as_host
from jaxtrain.resilience.stock import Part, Stock
from jaxtrain.resilience.tenure import TAKEN, Tenure
from jaxtrain.resilience.verdict import Status, Verdict
from jaxtrain.resilience.vitals import DISK, EVERY_S, Vitals

POLL_S = 0.02
REPORT_S = 0.25  # at least so often, and when a trainer ends or begins
REPORTS_A_SECOND = 1000  # at most to one lead, but for news
TURN_S = 1.0  # by which at most each host lets the one before it in the roster take a term first
LEADERLESS_S = 600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Follower:
    """`run` returns the exit code of the job, or None when this host leads."""

    def __init__(self, host: Host, node: Node, tenure: Tenure, changed: threading.Event, stock: Stock, vitals: Vitals):
        self._host, self._node, self._tenure, self._changed = host, node, tenure, changed
        self._instance, self._stock, self._vitals = secrets.token_hex(4), stock, vitals
        self._looked, self._complaints = 0.0, dict[str, str]()  # of this machine, for the lead to say
        self._signals: list[int] = []
        self._passed: set[int] = set()  # signals that this generation's trainers have
        self._greeted, self._served, self._reported, self._last = 0, 0, 0.0, None  # connection; term; when; what
        self.early = False  # whether it leads before the rights of the last term are over
        self._alive = 0  # the last term that was seen before its end
        self._lost, self._silent = "", 0.0  # the last lead, and how long it was not heard
        self.left: list[Status] = []  # of the trainers that a lost lead left here
        self._led = clock()  # when somebody last led
        self._orders: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
            "prepare": lambda order: self._host.prepare(0),
            "know": self._know,
            "start": self._start,
            "aside": self._aside,
            "fence": lambda order: {"alive": self._fence()},
            "signal": lambda order: self._pass_on(order["number"]),
            "gather": self._gather,
            "inventory": lambda order: {"parts": self._stock.inventory()},
            "send": lambda order: {"sent": all([self._stock.send(_parts(rows), to) for to, rows in order["lots"].items()])},
        }

    def run(self) -> int | None:
        old = {number: signal.signal(number, self._forward) for number in SIGNALS}
        self._led = clock()
        try:
            while True:
                self._changed.wait(POLL_S)
                self._changed.clear()
                code = self._turn()
                if code is not None:
                    return code
                if self._tenure.leads():
                    self._alive = self._tenure.newest.number
                    return None
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _turn(self) -> int | None:
        newest, following = self._tenure.newest, self._node.following
        if (newest.number, newest.host) != (following.number, following.host):
            self._fence()  # the new lead's generation is another
            self._node.follow(newest)
        if newest.ended is None:
            self._alive = newest.number
        elif self._alive:
            return newest.ended  # while this host was there, if only stopped
        here = self._node.lead().state == HERE
        self._tenure.cut = not here and 0 < self._served == newest.number
        if here and self._greeted != self._node.connections:
            self._greet()
        while not self._node.orders.empty():
            order = self._node.orders.get()
            if "end" in order:
                return order["end"]
            self._obey(order)
        if self._host.running() and clock() >= self._node.until():
            as_host("the lead is not heard: the trainers of this host are ended")
            self._fence()
        self._report()
        return self._alone()

    def _alone(self) -> int | None:
        """Without a lead: takes a term when its turn has come; the exit code, where it was told to stop."""
        if self._node.led():
            self._led = clock()
            return None
        if self._signals and clock() >= self._node.until():  # the trainers save as long as they may
            return Exit.INTERRUPTED if signal.SIGINT in self._signals else Exit.UNSAVED
        fresh = self._tenure.newest.number == 0 or self._tenure.newest.ended is not None
        bereft = not fresh and self._tenure.bereft == self._tenure.newest.number
        silent, still = clock() - (self._led if fresh else self._node.heard), self._tenure.still()
        quiet, patience = (silent, 0.0) if fresh or bereft else (min(silent, still), TAKEN * self._tenure.lease)
        if still > 0 and quiet >= patience + self._turn_s():
            self._fence()
            self.early = bereft
            self._lost, self._silent = "" if fresh else self._tenure.newest.host, silent
            try:
                if self._tenure.claim():
                    self._node.follow(self._tenure.newest)
            except OSError as error:
                as_host(f"cannot take the lead: {error}")
                time.sleep(TURN_S)
        elif clock() - self._led > LEADERLESS_S:
            raise RunError(
                "this host finds no lead.",
                got=self._tenure.trouble or f"term {self._tenure.newest.number} of host {self._tenure.newest.host} is not heard",
                rule=f"a host leads, or can take the lead in the run folder, within {LEADERLESS_S:.0f} s",
                fix="see whether all hosts share the run folder and reach each other",
            )
        return None

    def took_over(self) -> tuple[str, tuple[Verdict, float] | None]:
        """The host that led before and, where this one served it, the verdict and since when."""
        if not self._served:
            return self._lost, None
        name, self._served = self._lost, 0
        how = "its supervisor has ended" if self.early else "nor had its term a sign of life"
        line = f"host {name}, which led, was lost: not heard for {self._silent:.1f} s, {how}"
        found = Verdict(what="lead lost", culprits=(), line=line, statuses=self.left)
        return name, (found, time.monotonic() - self._silent)

    def _turn_s(self) -> float:
        """How long this host lets others go first: by the roster, from the one after the last lead on, and less than one
        lease in all, for those before it may not be there. Where two turns come at once the term's file has one maker."""
        names, last = self._node.roster.names, self._tenure.newest
        first = names.index(last.host) + 1 if last.host in names and last.ended is None else 0
        return (self._node.roster.index - first) % len(names) * min(TURN_S, self._tenure.lease / len(names))

    def _greet(self) -> None:
        self._greeted, self._served, self._reported = self._node.connections, self._node.following.number, 0.0
        host = self._host
        self._node.tell({"hello": {"instance": self._instance, "shape": host.shape(), "aside": host.aside}, **self._stands()})

    def _stands(self) -> dict[str, int]:
        return {"generation": self._host.generation, "running": self._host.running()}

    def _obey(self, order: dict[str, Any]) -> None:
        answer = self._orders[order["order"]](order)
        if answer is not None:
            self._node.tell({"done": order["id"], **answer})

    def _know(self, order: dict[str, Any]) -> None:
        self._host.generation = order["generation"]

    def _aside(self, order: dict[str, Any]) -> None:
        """This host remembers it, for whoever leads next."""
        self._host.aside = True

    def _start(self, order: dict[str, Any]) -> None:
        plan = Plan(**order["plan"])
        if plan.generation == self._host.generation:
            return  # it was sent again, for a line that broke
        self._fence()
        self._passed.clear()
        self._host.prepare(0)
        self._stock.begin(plan, self._host.processes)
        self._host.start(plan)
        self._reported = 0.0

    def _fence(self) -> list[str]:
        self.left = self._host.statuses() or self.left
        self._stock.rest()
        return self._host.fence()

    def _gather(self, order: dict[str, Any]) -> dict[str, Any]:
        rows = self._host.gather(self._host.statuses(), Path(order["folder"]))
        return {"gathered": {str(s.index): {"frame": s.frame, "links": s.links} for s in rows}}

    def _report(self) -> None:
        """What has changed is told at once."""
        statuses, ready = self._host.statuses(), self._host.ready()
        seen = ([(s.code, s.beat and s.beat.phase == "start") for s in statuses], ready)
        now = time.monotonic()
        news, many = seen != self._last, len(self._node.roster.names) / REPORTS_A_SECOND
        if not news and now < self._reported + max(REPORT_S, many):
            return
        if now >= self._looked + EVERY_S:
            self._looked, self._complaints = now, {kind: line for kind, line in self._vitals.look() if kind != DISK}
        told = {"report": packed(statuses), "complaints": self._complaints, "news": news, "ready": ready}
        if self._node.tell(told | self._stands()):
            self._last, self._reported = seen, now

    def _forward(self, number: int, frame: object) -> None:
        self._signals.append(number)
        again = len(self._signals) > 1 and number == signal.SIGINT
        self._host.signal(signal.SIGKILL) if again else self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """Once to each generation: the lead may order what this host has heard itself, and a second Ctrl-C means another thing."""
        if number not in self._passed:
            self._passed.add(number)
            self._host.signal(number)


def _parts(rows: list[list[Any]]) -> list[Part]:
    return [Part(*row) for row in rows]
