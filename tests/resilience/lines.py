"""Peers of a hub or a line that do what no honest one does, and waiting with a deadline. Not a test."""

import random
import socket
import time

from jaxtrain.resilience import wire
from jaxtrain.resilience.channel import HERE, Hub, Limits, Line
from jaxtrain.resilience.wire import Session

SECRET = b"known to all the hosts of this job"
BRIEF = Limits(beat_s=0.05, silent_s=0.4, hello_s=0.4, close_s=0.4)
LONG_S = 20.0  # deadlines that are not meant to pass


def until(holds, seconds=LONG_S):
    """What `holds` says, once it is true; the test fails at the deadline."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"did not come true within {seconds} s"
        time.sleep(0.005)
    return value


class Raw:
    """A socket with a session, which seals what it is told and sends any bytes. It reads only when asked."""

    all = []  # closed after each test: an unclosed socket is a warning

    def __init__(self, sock, secret=SECRET, *, hub=False, greet=True):
        self.sock, self.session = sock, Session(secret, hub=hub)
        self.sock.settimeout(LONG_S)
        self.frames = []
        self.all.append(sock)
        if greet:
            self.send(self.session.greeting)
            self.read(wire.GREETING.size)

    @classmethod
    def dial(cls, port, **options):
        return cls(socket.create_connection(("127.0.0.1", port), LONG_S), **options)

    @classmethod
    def joined(cls, port, name="raw", instance="1"):
        """To a hub, which has welcomed it."""
        raw = cls.dial(port)
        raw.send(raw.session.seal(wire.JOIN, b'{"name":"%s","instance":"%s"}' % (name.encode(), instance.encode())))
        raw.read()
        assert [kind for kind, _ in raw.frames[:2]] == [wire.GREETED, wire.WELCOME]
        return raw

    def send(self, data):
        self.sock.sendall(data)

    def read(self, most=1 << 20):
        """The frames of the next bytes; whether there were any bytes."""
        data = self.sock.recv(most)
        self.frames += [(kind, bytes(body)) for kind, body in self.session.feed(memoryview(data))]
        return bool(data)

    def hung_up(self):
        """Reads to the end, which must come."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        return True


def messages(session, count=12):
    """Frames of an honest peer, and the messages in them. The fourth has a payload in three parts."""
    frames, sent = [], []
    for number in range(count):
        message = {"number": number, "text": "x" * (7 * number)}
        if number == 3:
            payload = bytes(range(256)) * 3
            _, body, _ = wire.encoded(message, payload, len(payload))
            frames.append(session.seal(wire.ATTACHED, body))
            frames += [session.seal(wire.PART, payload[at : at + 256]) for at in (0, 256, 512)]
            sent.append((message, payload))
        else:
            frames.append(session.seal(*wire.encoded(message, None, 0)[:2]))
            frames.append(session.seal(wire.BEAT))
            sent.append((message, None))
    return frames, sent


def mutated(frames, rng: random.Random):
    """What somebody on the way could make of these frames, as bytes."""
    how, frames = rng.randrange(7), list(frames)
    one, other = rng.randrange(len(frames)), rng.randrange(len(frames))
    if how == 0:
        frames[one], frames[other] = frames[other], frames[one]
    elif how == 1:
        frames.insert(other, frames[one])
    elif how == 2:
        del frames[one]
    data = bytearray(b"".join(frames))
    at, length = rng.randrange(len(data)), rng.randrange(1, 60)
    if how == 3:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 4:
        del data[at : at + length]
    elif how == 5:
        data[at:at] = rng.randbytes(length)
    elif how == 6:
        data[at : at + length] = rng.randbytes(length)
    return bytes(data)


class Heard(list):
    """What callbacks were given."""

    def __call__(self, *what):
        self.append(tuple(bytes(part) if isinstance(part, memoryview) else part for part in what))


def a_hub(opened, on_message=None, address="127.0.0.1:0", secret=SECRET, **options):
    """The hub, what it heard, and the states that it reported."""
    heard, states = Heard(), Heard()
    options = {"log": Heard(), "on_change": states} | options
    return opened(Hub(address, secret, on_message or heard, **options)), heard, states


def a_line(opened, port, name="a", secret=SECRET, wait=True, **options):
    heard, states = Heard(), Heard()
    line = opened(Line(f"localhost:{port}", name, secret, heard, log=Heard(), on_change=states, **options))
    if wait:
        until(lambda: line.lead().state == HERE)
    return line, heard, states
