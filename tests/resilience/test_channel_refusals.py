"""Strangers, liars, replays and noise at a hub's or a line's real socket: refused, counted, and without effect."""

import random
import socket
import time

import pytest

from jaxtrain.resilience import wire
from jaxtrain.resilience.channel import GONE, HERE, Limits
from tests.resilience.lines import BRIEF, Heard, Raw, a_hub, a_line, messages, mutated, until


def test_a_line_with_another_secret_is_refused_counted_and_logged_once(opened):
    log = Heard()
    hub, told, states = a_hub(opened, log=log)
    line, _, _ = a_line(opened, hub.port, secret=b"another job's secret", wait=False)
    until(lambda: hub.refused.get("secret", 0) >= 4)
    assert not line.send({}) and "same secret?" in until(lambda: line.why)
    assert len(log) == 1 and "does not know the job's secret" in log[0][0]
    assert line.lead().state == GONE and told == states == [] and hub.peers() == {}


def test_a_hub_with_another_secret_is_refused_by_the_line(opened):
    server = opened(socket.create_server(("127.0.0.1", 0)))
    line, heard, states = a_line(opened, server.getsockname()[1], wait=False)
    raw = Raw(server.accept()[0], b"another job's secret", hub=True)
    raw.send(raw.session.seal(wire.WELCOME) + raw.session.seal(wire.MESSAGE, b"{}"))
    until(lambda: line.refused == {"secret": 1})
    assert heard == states == [] and line.lead().state == GONE


def test_an_echo_is_not_a_hub(opened):
    server = opened(socket.create_server(("127.0.0.1", 0)))
    line, heard, states = a_line(opened, server.getsockname()[1], wait=False)
    echo = opened(server.accept()[0])
    for _ in range(2):
        echo.sendall(echo.recv(4096))
    until(lambda: line.refused == {"secret": 1})
    assert heard == states == []


LIES = {  # what a peer that has joined sends, by what it counts as; `frame` and `next_frame` hold {"n": 1} and {"n": 2}
    "order": lambda raw, frame, next_frame: frame + frame,
    "forged": lambda raw, frame, next_frame: frame + next_frame[:-1] + bytes([next_frame[-1] ^ 1]),
    "oversized": lambda raw, frame, next_frame: frame + wire.HEAD.pack(wire.FRAME_BYTES + 1, wire.MESSAGE, 2),
    "malformed": lambda raw, frame, next_frame: frame + next_frame + raw.session.seal(wire.MESSAGE, b"[1]"),
    "truncated": lambda raw, frame, next_frame: frame + next_frame[:-1],
}


@pytest.mark.parametrize("kind", LIES)
def test_a_peer_that_lies_is_refused_and_what_it_said_before_counts(opened, kind):
    hub, told, states = a_hub(opened)
    raw = Raw.joined(hub.port)
    frame, next_frame = (raw.session.seal(wire.MESSAGE, b'{"n":%d}' % n) for n in (1, 2))
    raw.send(LIES[kind](raw, frame, next_frame))
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.hung_up()
    until(lambda: states == [("raw", HERE), ("raw", GONE)])
    assert hub.refused == {kind: 1}
    assert told == [("raw", {"n": n}, None) for n in (1, 2) if n == 1 or kind == "malformed"]


def test_frames_in_another_order_are_refused(opened):
    hub, told, _ = a_hub(opened)
    raw = Raw.joined(hub.port)
    frames = [raw.session.seal(wire.MESSAGE, b"{}") for _ in range(3)]
    raw.send(frames[1] + frames[0] + frames[2])
    assert raw.hung_up() and told == [] and hub.refused == {"order": 1}


def test_a_hubs_own_frames_sent_back_are_refused(opened):
    hub, told, _ = a_hub(opened)
    raw = Raw.joined(hub.port)
    hub.send("raw", {"stop": 1})
    raw.send(raw.sock.recv(4096))
    assert raw.hung_up() and told == [] and hub.refused == {"forged": 1}


def test_a_recorded_connection_cannot_be_played_again(opened):
    hub, told, _ = a_hub(opened)
    raw = Raw.dial(hub.port)
    recorded = raw.session.greeting + raw.session.seal(wire.JOIN, b'{"name":"raw","instance":"1"}')
    recorded += raw.session.seal(wire.MESSAGE, b"{}")
    raw.send(recorded[len(raw.session.greeting) :])
    until(lambda: len(told) == 1)
    again = Raw.dial(hub.port, greet=False)
    again.send(recorded)
    assert again.hung_up() and len(told) == 1 and hub.refused == {"secret": 1}


@pytest.mark.parametrize(
    "kind, data",
    [
        ("garbage", b"GET / HTTP/1.1\r\nHost: a-host-somewhere:7600\r\nAccept: */*\r\n\r\n"),
        ("garbage", random.Random(1).randbytes(100_000)),
        ("version", wire.GREETING.pack(wire.MAGIC, wire.VERSION + 1, bytes(32))),
        ("oversized", wire.GREETING.pack(wire.MAGIC, wire.VERSION, bytes(32)) + b"\xff" * 5000),
        ("late", b""),
        ("late", wire.GREETING.pack(wire.MAGIC, wire.VERSION, bytes(32)) + bytes(40)),
    ],
)
def test_strangers_are_refused_and_leave_nothing(opened, kind, data):
    hub, told, states = a_hub(opened, limits=BRIEF)
    raw = Raw.dial(hub.port, greet=False)
    began = time.monotonic()
    raw.send(data)
    assert raw.hung_up() and time.monotonic() - began < BRIEF.hello_s + 2
    until(lambda: hub._connections() == [])
    assert hub.refused == {kind: 1} and told == states == []


def test_a_crowd_that_says_nothing_is_bounded_and_does_not_keep_honest_peers_out(opened):
    hub, _, _ = a_hub(opened, limits=Limits(strangers=8))
    crowd = [opened(socket.create_connection(("127.0.0.1", hub.port))) for _ in range(20)]
    most = []
    line, _, _ = a_line(opened, hub.port, wait=False)
    until(lambda: most.append(len(hub._strangers)) or line.lead().state == HERE)
    assert max(most) == 8 and hub.refused["late"] >= 13 and len(crowd) == 20


def test_a_hub_out_of_descriptors_pauses_and_goes_on(opened, monkeypatch):
    hub, _, _ = a_hub(opened)
    tries = iter([OSError(24, "Too many open files")] * 2)
    accept = socket.socket.accept

    def failing(server):
        if error := next(tries, None):
            raise error
        return accept(server)

    monkeypatch.setattr(socket.socket, "accept", failing)
    a_line(opened, hub.port)
    assert hub.refused == {"exhausted": 2}


def test_mutated_traffic_delivers_only_what_was_sent_and_leaves_the_hub_well(opened):
    """Seeded; the thousands of cases are in test_wire.py, these are the same over sockets."""
    rng, expected = random.Random(5), {}
    hub, told, _ = a_hub(opened)
    for case in range(150):
        raw = Raw.joined(hub.port, f"case{case}")
        frames, sent = messages(raw.session)
        expected[f"case{case}"] = [(message, payload) for message, payload in sent]
        try:
            raw.send(mutated(frames, rng))
            raw.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before it had sent all
        assert raw.hung_up()
        raw.sock.close()
    came = {name: [what for who, *what in told if who == name] for name in expected}
    assert all([tuple(what) for what in came[name]] == expected[name][: len(came[name])] for name in expected)
    until(lambda: hub._connections() == [])
    assert sum(hub.refused.values()) > 100
    a_line(opened, hub.port)
