"""What a hub and a line have in common: a thread, what they report, how they close. It knows no handshake."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from jaxtrain.resilience import wire
from jaxtrain.resilience.connection import GONE, Connection, Limits, Loop, Refusals
from jaxtrain.resilience.wire import Message, Payload



class End:
    """What both ends do: a thread, messages in and out, and an end within `close_s`."""

    def __init__(self, secret: bytes, limits: Limits, log: Callable[[str], None]):
        self.limits, self.refusals = limits, Refusals(log)
        self._secret, self._loop = secret, Loop(limits.beat_s)
        self._told: dict[str, str] = {}  # the states that were reported last, by peer
        self._end_at: float | None = None  # on the loop's clock, once it is told to close
        self._failure: BaseException | None = None  # what ended the thread before its time
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)

    @property
    def refused(self) -> dict[str, int]:
        """How often what was refused so far, by kind (connection.RULES)."""
        return dict(self.refusals.counts)

    def close(self) -> None:
        """Closes once what is queued is sent, but within `close_s` and a little; the second time it does nothing."""
        self._loop.ask(self._begin_end)
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * self.limits.close_s + 1)

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._over():
                self._loop.turn(self._tick())
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._end_at = self._end_at or 0.0
            self._hang_up()
            for connection in self._connections():
                connection.close(GONE)
            self._loop.close()

    def _over(self) -> bool:
        return self._end_at is not None and (self._loop.clock >= self._end_at or not self._connections())

    def _begin_end(self) -> None:
        if self._end_at is None:
            self._end_at = self._loop.clock + self.limits.close_s
            self._hang_up()
            for connection in self._connections():
                connection.finish() if connection.name else connection.close(GONE)

    def _put(self, peers: Iterable[Connection], message: Message, payload: Payload | None) -> int:
        if self._failure:
            raise RuntimeError("a callback raised, which ended the channel") from self._failure
        kind, body, view = wire.encoded(message, payload, self.limits.payload_bytes)
        return sum(peer.put(kind, body, view) for peer in peers)

    def _tell(self, peer: str, state: str, *, again: bool = False) -> None:
        """Reports a state where it is another than the last that was reported, or `again`."""
        if again or state != self._told.get(peer, GONE):
            self._told[peer] = state
            self._changed(peer, state)

    def _connections(self) -> list[Connection]:
        """All that are open."""
        raise NotImplementedError

    def _tick(self) -> float:
        """Does what is due; seconds until it is to be called again."""
        raise NotImplementedError

    def _hang_up(self) -> None:
        """Stops listening, where it does."""

    def _changed(self, peer: str, state: str) -> None:
        raise NotImplementedError
