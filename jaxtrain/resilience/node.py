"""A supervisor's ends of the channel: a hub at its own address, a line to who leads, and on a leash the right to let
trainers run, which a lead has from its term and the others have from the lead. It decides nothing.

The right travels by question and answer: a host asks at its time p, the lead answers with the seconds that are left to
it, and the host's trainers may live until p plus those: no delay makes that longer than the lead's own right.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from jaxtrain.resilience import messages
from jaxtrain.resilience.channel import GONE, HERE, SILENT, Hub, Limits, Line, Peer
from jaxtrain.resilience.leash import Leash, clock
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.tenure import Tenure, Term

Message = dict[str, Any]
LOOKS = 20  # questions to the lead, and words to the leash, in one lease; a quarter of that where the hosts are many
ASKED_A_SECOND = 2000  # at most of one lead


class Node:
    """`inbox`: (host, message) from hosts that follow this one; `orders`: messages from the lead that it follows.

    `pids`: the generation and the processes of this host's trainers now. `changed` is set when something has come.
    """

    def __init__(
        self, roster: Roster, secret: bytes, tenure: Tenure, changed: threading.Event, pids: Callable[[], tuple[str, list[int]]]
    ):
        self.roster, self._secret, self._tenure, self._changed, self._pids = roster, secret, tenure, changed, pids
        self.inbox: queue.SimpleQueue[tuple[str, Message]] = queue.SimpleQueue()
        self.orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.on_payload: Callable[[str, Message, memoryview], None] = lambda name, message, payload: None
        self.following: Term = Term()
        self.heard = clock()  # when the lead last answered
        self.promised: dict[str, float] = {}  # by host, until when its trainers may live by what was answered
        self.withheld: set[str] = set()  # hosts that were told to fence: until they have, their right is not made longer
        self._until, self._echo, self._counted = 0.0, 0.0, 0.0
        self._echoes = dict.fromkeys((name for name in roster.names if name != roster.name), -1e9)
        self._line: Line | None = None
        self.connections = 0  # to leads, so far: after each the host greets
        self.pause_s = min(4 * tenure.lease / LOOKS, max(tenure.lease / LOOKS, len(roster.names) / ASKED_A_SECOND))
        self.silent_s = tenure.lease / 2
        self._to_host = messages.to_host(roster.names)
        self._limits = Limits(beat_s=self.pause_s, silent_s=self.silent_s, hello_s=self.silent_s)
        port = roster.addresses[roster.index].rpartition(":")[2]
        self.hub = Hub(f":{port}", secret, self._received, on_change=lambda *_: changed.set(), limits=self._limits)
        self._leash, self._holding = Leash(tenure.word(roster.name)), threading.Lock()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def follow(self, term: Term) -> None:
        """From now on the lead is that term's host; nobody, where it is this host or there is none."""
        old, self._line = self._line, None
        self.following = term
        if old:
            old.close()
        self._until = 0.0
        while not self.orders.empty():
            self.orders.get()
        self.heard, self._echo = clock(), 0.0
        if term.host and term.host != self.roster.name:
            line = lambda message, payload: self._ordered(term.number, message)  # noqa: E731
            self._line = Line(term.address, self.roster.name, self._secret, line, on_change=self._turned, limits=self._limits)

    def tell(self, message: Message) -> bool:
        """To the lead."""
        return self._line is not None and self._line.send(message | {"term": self.following.number})

    def lead(self) -> Peer:
        return self._line.lead() if self._line else Peer(state=GONE)

    def led(self) -> bool:
        """Whether somebody is heard to lead: who leads no more may still be connected, but does not answer."""
        return self.lead().state == HERE and clock() < self.heard + self._tenure.lease

    def until(self) -> float:
        """When the right to let trainers run ends."""
        return self._tenure.until() if self._tenure.mine else self._until

    def order(self, name: str, message: Message) -> bool:
        """To a host that follows this one."""
        return self.hub.send(name, message | {"term": self._tenure.mine})

    def state(self, name: str) -> str:
        return self.hub.peer(name).state

    def hold(self) -> None:
        """Puts this host's trainers on the leash: what is told to them after this is on it from the beginning."""
        with self._holding:
            of, pids = self._pids()
            self._leash.hold(pids, self.until(), of)

    def close(self) -> None:
        """Sends what is queued."""
        self._closed.set()
        self._keeper.join()
        if self._line:
            self._line.close()
        self.hub.close()

    def _keep(self) -> None:
        """Asks for the right, and passes it on to the leash, whatever the main thread waits for."""
        while not self._closed.wait(self.pause_s):
            self.tell({"ping": clock(), "echo": self._echo})
            self.hold()
        self._leash.close()

    def _received(self, name: str, message: Message, payload: memoryview | None) -> None:
        if payload is not None:
            return self.on_payload(name, messages.checked(message, messages.WITH_PAYLOAD), payload)
        if name not in self._echoes or messages.checked(message, messages.TO_LEAD)["term"] != self._tenure.mine:
            return None
        if "ping" in message:
            if message["echo"] <= clock():  # this host's own time, as it was told
                self._echoes[name] = max(self._echoes[name], float(message["echo"]))
            if clock() > self._counted + self.pause_s / 4:  # of thousands, not at each ping
                self._counted = clock()
                self._tenure.heard_by_all(min(self._echoes.values()))
            now, until = clock(), self._tenure.until()
            left = 0.0 if name in self.withheld else until - now
            if left > 0:
                self.promised[name] = until
            if until > now:
                self.hub.send(name, {"pong": message["ping"], "left": left, "now": now, "term": message["term"]})
            return None
        self.inbox.put((name, message))
        if message.get("news", True):
            self._changed.set()
        return None

    def _turned(self, state: str) -> None:
        self.connections += state == HERE
        self._changed.set()

    def _ordered(self, number: int, message: Message) -> None:
        if messages.checked(message, self._to_host)["term"] != number or number != self.following.number:
            return
        if "pong" in message:
            self._until = max(self._until, float(message["pong"]) + float(message["left"]))
            self.heard, self._echo = clock(), float(message["now"])
            return
        self.orders.put(message)
        self._changed.set()


__all__ = ["GONE", "HERE", "SILENT", "Node"]
