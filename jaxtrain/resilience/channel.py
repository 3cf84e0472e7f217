"""The line over which the supervisors of one job talk: a hub at the lead, a line from every other. It trains nothing.

Messages are JSON objects, each with one payload of bytes if wanted. What is sent to a peer arrives once and in order
while the connection lives (messages overtake payloads); what was under way when it broke is lost, so whoever needs it
sends its state again when the peer is "here" again. Each end has one daemon thread, in which all callbacks run: they
must return soon, and one that raises ends the channel. Contents are authenticated, not encrypted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import secrets
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtrain.errors import RunError
from jaxtrain.resilience import wire
from jaxtrain.resilience.connection import GONE, HERE, SILENT, Connection, Limits, state_after
from jaxtrain.resilience.end import End, say
from jaxtrain.resilience.wire import Message, Payload, Refused

__all__ = ["GONE", "HERE", "SILENT", "Hub", "Limits", "Line", "Peer"]

NAME_CHARS = 255
DESCRIPTORS = 16384  # and as many that wait to be accepted
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
    peer's state is another than before. Both in the hub's own thread. Raises RunError where it cannot listen.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        on_message: Callable[[str, Message, memoryview | None], object],
        *,
        on_change: Callable[[str, str], object] = lambda name, state: None,
        limits: Limits = Limits(),
        log: Callable[[str], None] = say,
    ):
        more_descriptors()
        self._server = _listen(address)
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
        self._tell(name, HERE)

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

    `on_message(message, payload or None)`; a payload is the callback's to keep. `on_change(state)`: the lead's state is
    another than before. Both in the line's own thread.
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
        log: Callable[[str], None] = say,
    ):
        assert _is_name(name), f"a name has 1 to {NAME_CHARS} printable ASCII characters: {name!r}"
        self._host, self._port = _split(address)
        super().__init__(secret, limits, log)
        self.name, self.why = name, "nothing was tried"  # why there is no connection
        self._address, self._instance = address, secrets.token_hex(8)
        self._on_message, self._on_change = on_message, on_change
        self._lead: Connection | None = None  # that is open
        self._joined: Connection | None = None  # the last that was welcomed
        self._state = GONE  # of the lead, while it has not welcomed this end
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
        joined = self._joined
        if joined is None:
            return Peer(state=self._state, address=self._address)
        state = self._state if joined.closed else joined.state
        return Peer(state=state, heard_s=joined.heard_s, address=self._address)

    def received(self, connection: Connection, kind: int, body: memoryview) -> None:
        if kind == wire.GREETED:
            connection.put(wire.JOIN, json.dumps({"name": self.name, "instance": self._instance}).encode())
        elif not connection.name:
            self._answered(connection, kind)
        elif kind != wire.BEAT and (whole := connection.inbox.take(kind, body)):
            self._on_message(*whole)

    def ended(self, connection: Connection, why: str) -> None:
        self._lead = None
        if connection.name and self._loop.clock - connection.began > LAST_S:
            self._delay = FIRST_S
        if connection.session.greeted and not connection.session.known:
            why += " before it welcomed this end: does it have the same secret?"
        self._failed(connection.closed, why)

    def _answered(self, connection: Connection, kind: int) -> None:
        if kind == wire.REFUSAL:
            return connection.refuse("taken")
        if kind != wire.WELCOME:
            raise Refused("malformed")
        connection.name = self._address
        self._joined, self.why = connection, ""
        self._tell(self._address, HERE)

    def _tick(self) -> float:
        clock, lead = self._loop.clock, self._lead
        if lead is None:
            if clock >= self._dial_at and self._end_at is None:
                self._dial()
            return self._dial_at - clock
        if lead.name and clock >= self._beat_at:
            self._beat_at = clock + self.limits.beat_s
            lead.beat()
        if lead.name and lead.state == SILENT:  # the kernel might take minutes to try an old connection again
            lead.close(SILENT, f"nothing was heard for {self.limits.silent_s} s")
        elif not lead.name and clock - lead.began >= self.limits.hello_s:
            lead.close(SILENT, f"no welcome within {self.limits.hello_s} s")
        return self.limits.beat_s

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
        self._lead = Connection(sock, self._address, self._loop, session, self)
        self._lead.flush()

    def _failed(self, state: str, why: str) -> None:
        self._state, self.why = state, why
        self._dial_at = self._loop.clock + self._delay * random.uniform(0.5, 1.0)
        self._delay = min(2 * self._delay, LAST_S)
        self._tell(self._address, state)

    def _changed(self, peer: str, state: str) -> None:
        self._on_change(state)

    def _connections(self) -> list[Connection]:
        return [self._lead] if self._lead else []


def _peer(connection: Connection) -> Peer:
    return Peer(state=connection.state, heard_s=connection.heard_s, address=connection.address)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 1 <= len(name) <= NAME_CHARS and name.isascii() and name.isprintable()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise RunError(f"{address!r} is no address.", rule="host:port", fix="for example node-1:7600")
    return host.strip("[]"), int(port)


def _listen(address: str) -> socket.socket:
    host, port = _split(address)
    try:
        if host:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            server = socket.create_server((host, port), family=family, backlog=DESCRIPTORS)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=DESCRIPTORS)
    except OSError as error:
        raise RunError(
            f"The lead cannot listen on {address}.",
            got=error.strerror or str(error),
            rule="the address is this host's, and its port is free",
            fix="choose another port, or end what holds it",
        ) from error
    server.setblocking(False)
    return server


def more_descriptors() -> None:
    """Raises the soft limit: the usual 1,024 are too few for one connection per supervisor of a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
