"""One socket of a channel, and the loop of the thread that serves it: who is ready, what waits, who was heard.

It knows neither who connects to whom nor what is said.
"""

from __future__ import annotations

import errno
import selectors
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxtrain.resilience import wire
from jaxtrain.resilience.wire import Payload, Refused

HERE, GONE, SILENT = "here", "gone", "silent"  # states of a peer
RULES = {  # what is refused
    "garbage": "it does not speak this protocol",
    "version": "it speaks another version of this protocol: all hosts of a job run the same code",
    "secret": "it does not know the job's secret",
    "late": "it did not show the job's secret in time",
    "taken": "its name is another's, who is connected",
    "forged": "a frame is not the other end's",
    "order": "a frame came again, or before its turn",
    "oversized": "a frame or payload is larger than agreed",
    "malformed": "a frame is the other end's, and makes no sense",
    "truncated": "it hung up within a frame",
    "exhausted": "this process has no descriptors or memory left for it",
    "overflow": "it does not read, and more waits for it than may",
}
BUFFER_BYTES = 512 * 1024  # for one read: one frame and the beginning of the next
UNSENT_BYTES = 128 * 1024  # in the kernel: what a message waits for behind a payload
BATCH_BYTES = 16 * 1024  # of small frames, sent at once
BURST = 4  # batches or large frames to one peer before the others have their turn
AGAIN_S = 10.0  # between two lines of one kind in the log
_UNREACHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
_NOTSENT_LOWAT = 25 if sys.platform == "linux" else None  # TCP_NOTSENT_LOWAT, which Python 3.11 does not name


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the ends of a channel grant each other; the same on all hosts of a job.

    `beat_s`: a sign of life at least this often. `silent_s`: a peer that is not heard for so long is silent. `hello_s`:
    to connect and show the secret. `close_s`: for what is queued to be sent at the end. `queue_bytes`: waiting for one
    peer. `strangers`: connections at a time that have not shown the secret.
    """

    beat_s: float = 1.0
    silent_s: float = 5.0
    hello_s: float = 5.0
    close_s: float = 2.0
    payload_bytes: int = 64 << 20
    queue_bytes: int = 256 << 20
    strangers: int = 512


class Refusals:
    """Counts what was refused by kind, and logs at most one line of a kind in 10 s."""

    def __init__(self, log: Callable[[str], None]):
        self.counts: Counter[str] = Counter()
        self._log, self._again = log, dict.fromkeys(RULES, 0.0)

    def add(self, kind: str, whom: str) -> None:
        self.counts[kind] += 1
        now = time.monotonic()
        if now >= self._again[kind]:
            self._again[kind] = now + AGAIN_S
            self._log(f"refused {whom}: {RULES[kind]} ({kind}, {self.counts[kind]} so far)")


class Loop:
    """The sockets of one thread. `clock` counts the seconds that the thread has listened.

    While the process is stopped or starved the clock stands: what peers sent meanwhile waits in the kernel, and nobody
    is silent for that this end was deaf.
    """

    def __init__(self, longest_s: float):
        self.clock, self._last, self._longest = 0.0, time.monotonic(), longest_s
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self._selector = selectors.DefaultSelector()
        self._asked: deque[Callable[[], None]] = deque()
        self._lock, self._rung, self._open = threading.RLock(), False, True  # as the outbox's
        self._ear, self._bell = socket.socketpair()
        for end in (self._ear, self._bell):
            end.setblocking(False)
        self.watch(self._ear, self._answer)

    def watch(self, sock: socket.socket, ready: Callable[[int], None], *, room: bool = False) -> None:
        """Calls `ready` when `sock` can be read, or, with `room`, written to."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if room else 0)
        known = sock in self._selector.get_map()
        (self._selector.modify if known else self._selector.register)(sock, events, ready)

    def unwatch(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)

    def ask(self, call: Callable[[], None]) -> None:
        """From any thread: lets the loop's thread call this soon. Nothing once the loop is closed."""
        self._asked.append(call)
        with self._lock:
            if self._open and not self._rung:
                self._rung = True
                self._bell.send(b"!")

    def turn(self, timeout_s: float) -> None:
        """Waits for something to do, at most so long, and does it."""
        ready = self._selector.select(min(max(timeout_s, 0.0), self._longest))
        now = time.monotonic()
        self.clock, self._last = self.clock + min(now - self._last, 2 * self._longest), now
        for key, mask in ready:
            key.data(mask)

    def close(self) -> None:
        with self._lock:
            self._open = False
        self._selector.close()
        self._ear.close()
        self._bell.close()

    def _answer(self, mask: int) -> None:
        with self._lock:
            self._ear.recv(16)
            self._rung = False
        for _ in range(len(self._asked)):
            self._asked.popleft()()


class Owner(Protocol):
    """Who has connections: a hub or a line. All calls come in the loop's thread."""

    limits: Limits
    refusals: Refusals

    def received(self, connection: Connection, kind: int, body: memoryview) -> None:
        """A frame that opened. May raise Refused."""

    def ended(self, connection: Connection, why: str) -> None:
        """It is closed, and its state final."""


class Connection:
    """Only `put` and `state` may be used by other threads."""

    def __init__(self, sock: socket.socket, address: str, loop: Loop, session: wire.Session, owner: Owner):
        self.address, self.session, self._owner = address, session, owner
        self.name = ""  # of the other end, once it has shown the secret
        self.instance = ""  # tells two peers of one name apart
        self.closed = ""  # the final state
        self.began = self.heard = loop.clock
        self.inbox = wire.Inbox(owner.limits.payload_bytes)
        self._outbox = wire.Outbox(owner.limits.queue_bytes)
        self._sock, self._loop, self._out = sock, loop, memoryview(session.greeting)
        self._blocked = self._ending = self._overflown = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _NOTSENT_LOWAT is not None:
            sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, UNSENT_BYTES)
        loop.watch(sock, self._ready)

    @property
    def heard_s(self) -> float:
        """Seconds of listening since the last good frame."""
        return self._loop.clock - self.heard

    @property
    def state(self) -> str:
        return self.closed or (HERE if self.heard_s <= self._owner.limits.silent_s else SILENT)

    def put(self, kind: int, body: Payload = b"", payload: memoryview | None = None) -> bool:
        """Queues a frame, or a message with its payload; False where the connection is closed, or by this closes."""
        if self.closed or self._overflown:
            return False
        if self._outbox.put(kind, body, payload):
            self._loop.ask(self.flush)
            return True
        self._overflown = True
        self._loop.ask(lambda: self.refuse("overflow"))
        return False

    def beat(self) -> None:
        """A sign of life, unless something else is on its way."""
        if not self._out and not self._outbox and not self.closed:
            self._outbox.put(wire.BEAT)
            self.flush()

    def flush(self) -> None:
        """Sends what the kernel takes."""
        for _ in range(BURST):
            if self.closed or not self._fill():
                break
            try:
                sent = self._sock.send(self._out)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                return self._broken(error)
            self._out = self._out[sent:]
        if not self.closed:
            self._await_room()

    def finish(self) -> None:
        """Closes once what is queued is sent and the other end has hung up."""
        self._ending = True
        self.flush()

    def refuse(self, kind: str) -> None:
        if not self.closed:
            self._owner.refusals.add(kind, self.name or self.address)
            self.close(SILENT if self.state == SILENT else GONE, RULES[kind])

    def close(self, state: str, why: str = "") -> None:
        if self.closed:
            return
        self.closed = state
        self._loop.unwatch(self._sock)
        self._sock.close()
        self._owner.ended(self, why)

    def _fill(self) -> bool:
        """Whether there is something to send."""
        if not self._out:
            frames: list[bytes] = []
            while sum(map(len, frames)) < BATCH_BYTES and (frame := self._outbox.next()):
                frames.append(self.session.seal(*frame))
            self._out = memoryview(b"".join(frames))
        return bool(self._out)

    def _await_room(self) -> None:
        blocked = bool(self._out or self._outbox)
        if blocked != self._blocked:
            self._blocked = blocked
            self._loop.watch(self._sock, self._ready, room=blocked)
        if self._ending and not blocked:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._broken(error)

    def _ready(self, mask: int) -> None:
        if self.closed:
            return
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if mask & selectors.EVENT_READ and not self.closed:
            self._read()

    def _read(self) -> None:
        try:
            count = self._sock.recv_into(self._loop.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            return self._broken(error)
        if not count:
            return self._hung_up()
        try:
            for kind, body in self.session.feed(self._loop.buffer[:count]):
                self.heard = self._loop.clock
                self._owner.received(self, kind, body)
                if self.closed:
                    return
        except Refused as refused:
            self.refuse(refused.kind)

    def _hung_up(self) -> None:
        if self.session.held:
            return self.refuse("truncated")
        self.close(GONE, "it hung up")

    def _broken(self, error: OSError) -> None:
        self.close(state_after(error.errno), error.strerror or str(error))


def state_after(number: int | None) -> str:
    """What an error of a socket says of the other end."""
    return SILENT if number in _UNREACHED else GONE
