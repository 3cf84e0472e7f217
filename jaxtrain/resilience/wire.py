"""The bytes between two supervisors: greetings, keys, sealed frames, messages cut into frames. No socket, no clock.

Both ends greet with a fresh nonce. From the job's secret and the two greetings each derives one key per direction, so
that a frame of another connection, of the other direction or of another place in the order does not open. The first
frame that opens shows that the other end has the secret. Contents are authenticated, not encrypted.

    greeting   magic 8 | version 2 | nonce 32
    frame      length of the body 4 | kind 1 | sequence number 8 | body | HMAC-SHA256 of all before it 32
"""

from __future__ import annotations

import hmac
import json
import secrets
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from jaxtrain.errors import RunError

MAGIC, VERSION = b"jaxtrain", 1
GREETING = struct.Struct(">8sH32s")
HEAD = struct.Struct(">IBQ")
SIZE = struct.Struct(">Q")
MAC = 32
GREETED, JOIN, WELCOME, REFUSAL, BEAT, MESSAGE, ATTACHED, PART = range(8)  # GREETED is never a frame's

FRAME_BYTES = 256 * 1024  # of a body: 0.2 s of a 10 Mbit/s line, the longest that a sign of life waits
FIRST_BYTES = 1024  # of the first frame's: all that is held for a peer that has not shown the secret
_ENTRY_BYTES = 256  # what a queued message costs beside its text

Message = dict[str, Any]
Payload = bytes | bytearray | memoryview


class Refused(Exception):
    """What came is not what an honest peer sends; `kind` is a key of connection.RULES."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class Session:
    """One end of one connection: bytes in, frames out, and the other way round."""

    def __init__(self, secret: bytes, *, hub: bool):
        self.greeting = GREETING.pack(MAGIC, VERSION, secrets.token_bytes(32))
        self.known = False  # whether the other end has shown that it has the secret
        self._secret, self._hub = secret, hub
        self._keys: tuple[bytes, bytes] | None = None  # for what comes in, for what goes out
        self._received = self._sent = 0
        self._rest, self._need = bytearray(), 0

    @property
    def held(self) -> int:
        """Bytes of a frame that has not come to its end."""
        return len(self._rest)

    @property
    def greeted(self) -> bool:
        """Whether the other end's greeting has come."""
        return self._keys is not None

    def seal(self, kind: int, body: Payload = b"") -> bytes:
        """The next frame out. Only after the other end's greeting."""
        assert self._keys, "sealed before the greeting"
        frame = b"".join((HEAD.pack(len(body), kind, self._sent), body))
        self._sent += 1
        return frame + hmac.digest(self._keys[1], frame, "sha256")

    def feed(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The (kind, body) of each frame that ends in `data`; GREETED first. Bodies are valid until the next call.

        Raises Refused, after which the session is of no more use.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return
            data, self._rest = memoryview(self._rest), bytearray()
        at = 0
        while len(data) - at >= (need := self._next(data[at:])):
            yield self._open(data[at : at + need])
            at += need
        self._rest += data[at:]
        self._need = need

    def _next(self, data: memoryview) -> int:
        """How many bytes it takes to go on: a whole greeting or frame, or a frame's head."""
        if self._keys is None:
            return GREETING.size
        if len(data) < HEAD.size:
            return HEAD.size
        length, _, _ = HEAD.unpack_from(data)
        if length > (FRAME_BYTES if self.known else FIRST_BYTES):
            raise Refused("oversized")
        return HEAD.size + length + MAC

    def _open(self, unit: memoryview) -> tuple[int, memoryview]:
        if self._keys is None:
            return self._greeted(bytes(unit))
        signed = unit[:-MAC]
        if not hmac.compare_digest(unit[-MAC:], hmac.digest(self._keys[0], signed, "sha256")):
            raise Refused("forged" if self.known else "secret")
        _, kind, number = HEAD.unpack_from(unit)
        if number != self._received:
            raise Refused("order")
        self._received += 1
        self.known = True
        return kind, signed[HEAD.size :]

    def _greeted(self, theirs: bytes) -> tuple[int, memoryview]:
        magic, version, _ = GREETING.unpack(theirs)
        if magic != MAGIC:
            raise Refused("garbage")
        if version != VERSION:
            raise Refused("version")
        both = self.greeting + theirs if self._hub else theirs + self.greeting
        up, down = (hmac.digest(self._secret, way + both, "sha256") for way in (b"line to hub", b"hub to line"))
        self._keys = (up, down) if self._hub else (down, up)
        return GREETED, memoryview(b"")


class Inbox:
    """Makes messages of frames. It holds no more than has come: a payload grows, it is not allocated as announced."""

    def __init__(self, payload_bytes: int):
        self._limit = payload_bytes
        self._message: Message | None = None  # whose payload is coming
        self._payload, self._size = bytearray(), 0

    def take(self, kind: int, body: memoryview) -> tuple[Message, memoryview | None] | None:
        """The message that is whole with this frame. Raises Refused."""
        if kind == MESSAGE:
            return decoded(body), None
        if kind == ATTACHED:
            return self._begin(body)
        if kind == PART:
            return self._go_on(body)
        raise Refused("malformed")

    def _begin(self, body: memoryview) -> tuple[Message, memoryview] | None:
        if self._message is not None or len(body) < SIZE.size:
            raise Refused("malformed")
        (self._size,) = SIZE.unpack_from(body)
        if self._size > self._limit:
            raise Refused("oversized")
        self._message = decoded(body[SIZE.size :])
        return self._whole()

    def _go_on(self, body: memoryview) -> tuple[Message, memoryview] | None:
        if self._message is None or not len(body) or len(self._payload) + len(body) > self._size:
            raise Refused("malformed")
        self._payload += body
        return self._whole()

    def _whole(self) -> tuple[Message, memoryview] | None:
        if len(self._payload) < self._size:
            return None
        message, payload = self._message, self._payload
        self._message, self._payload = None, bytearray()
        return message, memoryview(payload)


class Outbox:
    """What waits to be sent to one peer: messages first, payloads in the gaps between them. Any thread may fill it."""

    def __init__(self, queue_bytes: int):
        self._limit, self._waiting = queue_bytes, 0
        self._messages: deque[tuple[int, Payload]] = deque()
        self._payloads: deque[Iterator[tuple[int, Payload]]] = deque()
        self._lock = threading.RLock()  # a signal handler may send while its thread does

    def __bool__(self) -> bool:
        return bool(self._messages or self._payloads)

    def put(self, kind: int, body: Payload = b"", payload: memoryview | None = None) -> bool:
        """False, and nothing queued, where more than `queue_bytes` would wait."""
        cost = _ENTRY_BYTES + len(body) + (len(payload) if payload is not None else 0)
        with self._lock:
            if self._waiting + cost > self._limit:
                return False
            self._waiting += cost
            if payload is None:
                self._messages.append((kind, body))
            else:
                self._payloads.append(_cut(body, payload))
        return True

    def next(self) -> tuple[int, Payload] | None:
        """The next frame to seal."""
        with self._lock:
            if self._messages:
                return self._taken(self._messages.popleft(), _ENTRY_BYTES)
            while self._payloads:
                frame = next(self._payloads[0], None)
                if frame is not None:
                    return self._taken(frame, _ENTRY_BYTES if frame[0] == ATTACHED else 0)
                self._payloads.popleft()
        return None

    def _taken(self, frame: tuple[int, Payload], entry: int) -> tuple[int, Payload]:
        self._waiting -= len(frame[1]) + entry
        return frame


def _cut(head: Payload, payload: memoryview) -> Iterator[tuple[int, Payload]]:
    yield ATTACHED, head
    for at in range(0, len(payload), FRAME_BYTES):
        yield PART, payload[at : at + FRAME_BYTES]


def encoded(message: Message, payload: Payload | None, payload_bytes: int) -> tuple[int, bytes, memoryview | None]:
    """The (kind, body, payload) to put into an outbox. Raises RunError for what is larger than may be sent."""
    assert isinstance(message, dict), f"a message is a dict, not {type(message).__name__}"
    text = json.dumps(message, separators=(",", ":")).encode()
    if len(text) > FRAME_BYTES - SIZE.size:
        raise RunError(
            f"A message of {len(text)} bytes is too long for the channel.",
            got=f"keys {', '.join(map(str, message))}",
            rule=f"at most {FRAME_BYTES - SIZE.size} bytes of JSON",
            fix="send what is long as the message's payload",
        )
    if payload is None:
        return MESSAGE, text, None
    view = memoryview(payload).cast("B")
    if len(view) > payload_bytes:
        raise RunError(
            f"A payload of {len(view)} bytes is too long for the channel.",
            rule=f"at most payload_bytes = {payload_bytes}",
            fix="send it in pieces, or raise payload_bytes on all hosts",
        )
    return ATTACHED, SIZE.pack(len(view)) + text, view


def decoded(body: memoryview) -> Message:
    """The JSON object that a body holds. Raises Refused."""
    try:
        message = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise Refused("malformed") from None
    if not isinstance(message, dict):
        raise Refused("malformed")
    return message
