"""The line over which the supervisors of one job talk: a hub at the lead, a line from every other. It trains nothing.

Messages are JSON objects, each with one payload of bytes if wanted. What is sent to a peer arrives once and in order
while the connection lives (messages overtake payloads); what was under way when it broke is lost. So every connection
is reported as "here", after which whoever needs it sends its state again. Each end has one daemon thread, in which all
callbacks run: they must return soon, and one that raises ends the channel. Contents are authenticated, not encrypted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import secrets
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtrain.descriptors import more_descriptors
from jaxtrain.resilience import wire
from jaxtrain.resilience.connection import GONE, HERE, SILENT, Connection, Limits, state_after
from jaxtrain.resilience.end import End
from jaxtrain.resilience.listening import listen, split
from jaxtrain.resilience.say import as_channel
from jaxtrain.resilience.wire import Message, Payload, Refused

__all__ = ["GONE", "HERE", "SILENT", "Hub", "Limits", "Line", "Peer"]

NAME_CHARS = 255
AT_ONCE = 64  # connections to accept or signs of life to send, before those that are ready have their turn
PAUSE_S, FULL_S = 0.5, 0.02  # without accepting, where the process has no descriptors left, or too many strangers
GRACE_S = 1.0  # for a stranger while others cannot come in
FIRST_S, LAST_S = 0.05, 2.0  # between attempts to connect, doubling; each is cut by up to half at random


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What is known of the other end.

    `state`: "here"; "gone": its host answers, and it hung up or does not listen; "silent": nothing was heard for
    `silent_s`, so the host is dead, the process stopped or the network cut. `heard_s`: seconds since it was last heard.
    """

    state: str
    heard_s: float = math.inf
    address: str = ""


class Hub(End):
    """The lead's end. `address`: "host:port"; without a host on all interfaces, port 0 for any that is free.

    `on_message(name, message, payload or None)`; a payload is the callback's to keep. `on_change(name, state)`: a
    peer is newly connected, or in another state. Both in the hub's own thread. Raises RunError where it cannot listen.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        on_message: Callable[[str, Message, memoryview | None], object],
        *,
        on_change: Callable[[str, str], object] = lambda name, state: None,
        limits: Limits = Limits(),
        log: Callable[[str], None] = as_channel,
    ):
        more_descriptors()
        self._server = listen(address)
        super().__init__(secret, limits, log)
        self.port: int = self._server.getsockname()[1]
        self._on_message, self._changed = on_message, on_change
        self._strangers: dict[Connection, None] = {}  # in the order in which they came
        self._peers: dict[str, Connection] = {}  # the last of each name, open or closed
        self._beats: deque[tuple[float, Connection]] = deque()  # when each is due: in order, as all have one period
        self._accept_at: float | None = None  # where it does not accept now
        self._loop.watch(self._server, self._accept)
        self._thread.start()

    def send(self, name: str, message: Message, payload: Payload | None = None) -> bool:
        """Queues a message and returns at once; False where the peer is not connected, or too much waits for it.

        The payload is not copied: its bytes must not change any more.
        """
        peer = self._peers.get(name)
        return bool(self._put([peer] if peer else [], message, payload))

    def send_all(self, message: Message, payload: Payload | None = None) -> int:
        """To all that are connected; how many those are."""
        return self._put(self._peers.copy().values(), message, payload)

    def peers(self) -> dict[str, Peer]:
        """All that were ever connected, by name."""
        return {name: _peer(connection) for name, connection in self._peers.copy().items()}

    def peer(self, name: str) -> Peer:
        """One of them; gone where it never came."""
        connection = self._peers.get(name)
        return _peer(connection) if connection else Peer(state=GONE)

    def received(self, connection: Connection, kind: int, body: memoryview) -> None:
        if kind == wire.GREETED:
            return
        if connection in self._strangers:
            return self._join(connection, kind, body)
        self._tell(connection.name, HERE)
        if kind != wire.BEAT and (whole := connection.inbox.take(kind, body)):
            self._on_message(connection.name, *whole)

    def ended(self, connection: Connection, why: str) -> None:
        self._strangers.pop(connection, None)
        if self._peers.get(connection.name) is connection:
            self._tell(connection.name, connection.closed)

    def _accept(self, mask: int) -> None:
        for _ in range(AT_ONCE):
            if len(self._strangers) >= self.limits.strangers:
                return self._pause(FULL_S)
            try:
                sock, address = self._server.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # descriptors or memory; those that wait would wake the loop without end
                self.refusals.add("exhausted", "who comes next")
                return self._pause(PAUSE_S)
            self._admit(sock, f"{address[0].removeprefix('::ffff:')}:{address[1]}")

    def _admit(self, sock: socket.socket, address: str) -> None:
        stranger = Connection(sock, address, self._loop, wire.Session(self._secret, hub=True), self)
        self._strangers[stranger] = None
        stranger.flush()

    def _pause(self, seconds: float) -> None:
        """Leaves those that come in the kernel's queue."""
        self._loop.unwatch(self._server)
        self._accept_at = self._loop.clock + seconds

    def _join(self, connection: Connection, kind: int, body: memoryview) -> None:
        said = wire.decoded(body) if kind == wire.JOIN and not connection.name else {}
        name, instance = said.get("name"), said.get("instance")
        if not (_is_name(name) and _is_name(instance)):
            raise Refused("malformed")
        connection.name, connection.instance = name, instance
        old = self._peers.get(name)
        if old and old.state == HERE and old.instance != instance:
            self.refusals.add("taken", f"{name} at {connection.address}")
            connection.put(wire.REFUSAL)
            return connection.finish()
        del self._strangers[connection]
        self._peers[name] = connection
        if old:
            old.close(GONE)
        connection.put(wire.WELCOME)
        self._beats.append((self._loop.clock + self.limits.beat_s, connection))
        self._tell(name, HERE, again=True)

    def _connections(self) -> list[Connection]:
        return [peer for peer in (*self._strangers, *self._peers.values()) if not peer.closed]

    def _tick(self) -> float:
        clock = self._loop.clock
        patience = self.limits.hello_s if self._accept_at is None else min(GRACE_S, self.limits.hello_s)
        while self._strangers and (first := next(iter(self._strangers))).began + patience <= clock:
            first.refuse("late")
        self._beat(clock)
        if self._accept_at is not None and clock >= self._accept_at and self._end_at is None:
            self._accept_at = None
            self._loop.watch(self._server, self._accept)
        due = [self._beats[0][0]] if self._beats else []
        return min(due + [at for at in [self._accept_at] if at is not None], default=clock + PAUSE_S) - clock

    def _beat(self, clock: float) -> None:
        for _ in range(AT_ONCE):
            if not self._beats or self._beats[0][0] > clock:
                break
            _, peer = self._beats.popleft()
            if not peer.closed:
                peer.beat()
                self._tell(peer.name, peer.state)
                self._beats.append((clock + self.limits.beat_s, peer))

    def _hang_up(self) -> None:
        if self._accept_at is None and self._server.fileno() != -1:
            self._loop.unwatch(self._server)
        self._server.close()


class Line(End):
    """A supervisor's end: connects to the lead's `address`, "host:port", as `name`, again and again until closed.

    `on_message(message, payload or None)`; a payload is the callback's to keep. `on_change(state)`: the lead is
    newly connected, or in another state. Both in the line's own thread.
    """

    def __init__(
        self,
        address: str,
        name: str,
        secret: bytes,
        on_message: Callable[[Message, memoryview | None], object],
        *,
        on_change: Callable[[str], object] = lambda state: None,
        limits: Limits = Limits(),
        log: Callable[[str], None] = as_channel,
    ):
        assert _is_name(name), f"a name has 1 to {NAME_CHARS} printable ASCII characters: {name!r}"
        self._host, self._port = split(address)
        super().__init__(secret, limits, log)
        self.name, self.why = name, "nothing was tried"  # why there is no connection
        self._address, self._instance = address, secrets.token_hex(8)
        self._on_message, self._on_change = on_message, on_change
        self._dialled: Connection | None = None  # that is not welcomed yet
        self._joined: Connection | None = None  # the last that was welcomed, open or closed
        self._state = GONE  # of the lead, where no welcomed connection is open
        self._attempts, self._delay, self._dial_at, self._beat_at = 0, FIRST_S, 0.0, 0.0
        self._thread.start()

    def send(self, message: Message, payload: Payload | None = None) -> bool:
        """Queues a message and returns at once; False where the lead is not connected, or too much waits for it.

        The payload is not copied: its bytes must not change any more.
        """
        lead = self._joined
        return bool(self._put([lead] if lead else [], message, payload))

    def lead(self) -> Peer:
        """What is known of the lead."""
        heard_s = self._joined.heard_s if self._joined else math.inf
        return Peer(state=self._now(), heard_s=heard_s, address=self._address)

    def received(self, connection: Connection, kind: int, body: memoryview) -> None:
        if kind == wire.GREETED:
            connection.put(wire.JOIN, json.dumps({"name": self.name, "instance": self._instance}).encode())
        elif connection is self._dialled:
            self._answered(connection, kind)
        else:
            self._tell(self._address, HERE)
            if kind != wire.BEAT and (whole := connection.inbox.take(kind, body)):
                self._on_message(*whole)

    def ended(self, connection: Connection, why: str) -> None:
        if connection is self._dialled:
            self._dialled = None
            if connection.session.greeted and not connection.session.known:
                why += " before it welcomed this end: does it have the same secret?"
            self._failed(connection.closed, why)
        elif connection is self._joined:  # while another is under way, that one will tell whether the lead is gone
            self._failed(SILENT if self._dialled else connection.closed, why)

    def _now(self) -> str:
        joined = self._joined
        return joined.state if joined and not joined.closed else self._state

    def _answered(self, connection: Connection, kind: int) -> None:
        if kind == wire.REFUSAL:
            return connection.refuse("taken")
        if kind != wire.WELCOME:
            raise Refused("malformed")
        connection.name = self._address
        old, self._joined, self._dialled, self.why = self._joined, connection, None, ""
        if old:
            old.close(GONE)
        self._tell(self._address, HERE, again=True)

    def _tick(self) -> float:
        """A lead that is silent is dialled beside the old connection.

        That one is kept: the kernel may take minutes to try it again after a cut, but a lead that was merely stopped
        would take its end for the end of this host.
        """
        clock, joined, state = self._loop.clock, self._joined, self._now()
        self._tell(self._address, state)
        if joined and clock >= self._beat_at:
            self._beat_at = clock + self.limits.beat_s
            joined.beat()
        if self._dialled and clock - self._dialled.began >= self.limits.hello_s:
            self._dialled.close(SILENT, f"no welcome within {self.limits.hello_s} s")
        elif state == HERE and clock - joined.began > LAST_S:
            self._delay = FIRST_S
        elif state != HERE and not self._dialled and clock >= self._dial_at and self._end_at is None:
            self._dial()
        return self.limits.beat_s if state == HERE or self._dialled else self._dial_at - clock

    def _dial(self) -> None:
        """Begins to connect, to each of the host's addresses in turn. Only looking up its name waits, for DNS."""
        try:
            found = socket.getaddrinfo(self._host or "localhost", self._port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[self._attempts % len(found)]
            self._attempts += 1
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            return self._failed(SILENT, str(error))
        sock.setblocking(False)
        number = sock.connect_ex(address)
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            return self._failed(state_after(number), os.strerror(number))
        session = wire.Session(self._secret, hub=False)
        self._dialled = Connection(sock, self._address, self._loop, session, self)
        self._dialled.flush()

    def _failed(self, state: str, why: str) -> None:
        self._state, self.why = state, why
        self._dial_at = self._loop.clock + self._delay * random.uniform(0.5, 1.0)
        self._delay = min(2 * self._delay, LAST_S)
        self._tell(self._address, self._now())

    def _changed(self, peer: str, state: str) -> None:
        self._on_change(state)

    def _connections(self) -> list[Connection]:
        return [each for each in (self._dialled, self._joined) if each and not each.closed]


def _peer(connection: Connection) -> Peer:
    return Peer(state=connection.state, heard_s=connection.heard_s, address=connection.address)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 1 <= len(name) <= NAME_CHARS and name.isascii() and name.isprintable()
