"""Hubs and lines over real sockets: honest peers, strangers, peers that stop, and peers that lie."""

import random
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import wire
from jaxtrain.resilience.channel import GONE, HERE, SILENT, Hub, Limits, Line
from tests.resilience.lines import BRIEF, LONG_S, SECRET, Raw, messages, mutated, until


@pytest.fixture
def opened():
    with ExitStack() as stack:
        yield stack.enter_context
        while Raw.all:
            Raw.all.pop().close()


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


def test_messages_and_payloads_come_whole_in_order_and_both_ways(opened):
    hub, told, _ = a_hub(opened)
    line, answers, _ = a_line(opened, hub.port)
    payload = random.Random(0).randbytes(3_000_000)
    assert all(line.send({"n": n}) for n in range(300))
    assert line.send({"big": 1}, payload) and line.send({"none": 1}, b"")
    until(lambda: len(told) == 302)
    assert told[:300] == [("a", {"n": n}, None) for n in range(300)]
    assert told[300:] == [("a", {"big": 1}, payload), ("a", {"none": 1}, b"")]
    assert hub.send("a", {"x": "ü"}, memoryview(payload)[5:9]) and not hub.send("b", {})
    assert until(lambda: answers) == [({"x": "ü"}, payload[5:9])]


def test_a_message_to_all_reaches_all(opened):
    hub, _, states = a_hub(opened)
    lines = [a_line(opened, hub.port, name) for name in "abc"]
    assert sorted(states) == [("a", HERE), ("b", HERE), ("c", HERE)]
    assert hub.send_all({"go": 1}) == 3
    until(lambda: [heard for _, heard, _ in lines] == [[({"go": 1}, None)]] * 3)


def test_any_address_of_this_host_reaches_a_hub_on_all_interfaces(opened):
    hub, told, _ = a_hub(opened, address=":0")
    addresses = ["127.0.0.1"] + (["[::1]"] if socket.has_dualstack_ipv6() else [])
    for address in addresses:
        line = opened(Line(f"{address}:{hub.port}", address, SECRET, print))
        until(lambda: line.lead().state == HERE)
    assert {name: peer.state for name, peer in hub.peers().items()} == dict.fromkeys(addresses, HERE)
    assert hub.peer("127.0.0.1").address.startswith("127.0.0.1:")


def test_a_hub_that_cannot_listen_says_so(opened):
    hub, _, _ = a_hub(opened)
    with pytest.raises(RunError, match="(?s)cannot listen.*in use"):
        Hub(f"127.0.0.1:{hub.port}", SECRET, print)
    with pytest.raises(RunError, match="host:port"):
        Line("nowhere", "a", SECRET, print)


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


def test_a_peer_that_stops_is_silent_and_one_that_ends_is_gone(opened):
    hub, _, states = a_hub(opened, limits=BRIEF)
    stopped, ended = Raw.joined(hub.port, "stopped"), Raw.joined(hub.port, "ended")
    a_line(opened, hub.port, "well", limits=BRIEF)
    ended.sock.close()
    until(lambda: ("stopped", SILENT) in states)
    assert {name: peer.state for name, peer in hub.peers().items()} == dict(stopped=SILENT, ended=GONE, well=HERE)
    assert hub.peer("stopped").heard_s > BRIEF.silent_s > hub.peer("well").heard_s
    stopped.send(stopped.session.seal(wire.BEAT))
    until(lambda: states[-1] == ("stopped", HERE))
    assert ("well", SILENT) not in states and hub.peer("nobody").state == GONE


def test_bytes_that_make_no_whole_frame_are_no_sign_of_life(opened):
    hub, _, states = a_hub(opened, limits=BRIEF)
    raw = Raw.joined(hub.port)
    frame = raw.session.seal(wire.MESSAGE, b'{"text":"%s"}' % (b"x" * 1000))
    for at in range(200):
        raw.send(frame[at : at + 1])
        time.sleep(0.01)
        if ("raw", SILENT) in states:
            break
    assert states == [("raw", HERE), ("raw", SILENT)] and at > 10


def test_a_lead_that_stops_is_silent_and_is_dialled_again(opened):
    server = opened(socket.create_server(("127.0.0.1", 0)))
    line, _, states = a_line(opened, server.getsockname()[1], wait=False, limits=BRIEF)
    raw = Raw(server.accept()[0], hub=True)
    raw.send(raw.session.seal(wire.WELCOME))
    until(lambda: states == [(HERE,), (SILENT,)])
    again = Raw(server.accept()[0], hub=True)
    assert line.lead().state == SILENT and "nothing was heard" in line.why
    again.send(again.session.seal(wire.WELCOME))
    until(lambda: states[2:] == [(HERE,)])


def test_nobody_is_silent_because_this_end_was_deaf(opened):
    deaf = threading.Event()
    hub, _, states = a_hub(opened, lambda *_: deaf.set() or time.sleep(5 * BRIEF.silent_s), limits=BRIEF)
    line, _, _ = a_line(opened, hub.port)  # patient itself
    line.send({})
    assert deaf.wait(LONG_S)
    began = time.monotonic()
    while time.monotonic() < began + 6 * BRIEF.silent_s:
        assert hub.peer("a").state == HERE
        time.sleep(0.01)
    assert states == [("a", HERE)]


def test_a_line_comes_back_when_the_hub_does_on_the_same_port(opened):
    first, _, _ = a_hub(opened)
    line, _, states = a_line(opened, first.port)
    first.close()
    until(lambda: line.lead().state == GONE and not line.send({}))
    second, told, _ = a_hub(opened, address=f"127.0.0.1:{first.port}")
    until(lambda: line.send({"again": 1}))
    assert until(lambda: told) == [("a", {"again": 1}, None)]
    assert states == [(HERE,), (GONE,), (HERE,)]


def test_a_host_that_dialled_again_takes_its_place_and_another_of_its_name_does_not(opened):
    hub, _, states = a_hub(opened)
    old = Raw.joined(hub.port, "a", "1")
    other = Raw.dial(hub.port)
    other.send(other.session.seal(wire.JOIN, b'{"name":"a","instance":"2"}'))
    other.read()
    assert other.frames[-1][0] == wire.REFUSAL and hub.refused == {"taken": 1}
    Raw.joined(hub.port, "a", "1")
    assert old.hung_up() and states == [("a", HERE)]


def test_a_line_whose_name_is_taken_says_so(opened):
    hub, _, _ = a_hub(opened)
    a_line(opened, hub.port)
    twin, _, _ = a_line(opened, hub.port, wait=False)
    assert until(lambda: twin.refused.get("taken")) and "another's" in twin.why


def test_messages_and_signs_of_life_come_between_the_frames_of_a_payload(opened):
    hub, _, states = a_hub(opened)
    line, heard, lead = a_line(opened, hub.port)
    payload = bytes(48 << 20)
    assert hub.send("a", {"big": 1}, payload) and line.send({"big": 1}, payload)
    assert hub.send("a", {"small": 1})
    until(lambda: len(heard) == 2)
    assert [message for message, _ in heard] == [{"small": 1}, {"big": 1}]
    assert lead == [(HERE,)] and states == [("a", HERE)]


def test_a_peer_that_does_not_read_is_closed_and_holds_up_nobody(opened):
    hub, told, states = a_hub(opened, limits=Limits(queue_bytes=4 << 20))
    Raw.joined(hub.port, "slow")
    line, _, _ = a_line(opened, hub.port, "well")
    block, slowest = bytes(1 << 20), 0.0
    for _ in range(100):
        began = time.monotonic()
        if not hub.send("slow", {}, block):
            break
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.002)
    until(lambda: hub.peer("slow").state == GONE)
    assert hub.refused == {"overflow": 1} and ("slow", GONE) in states and slowest < 0.5
    assert line.send({}) and until(lambda: told) == [("well", {}, None)]


def test_what_is_queued_is_sent_before_the_end(opened):
    hub, told, _ = a_hub(opened)
    line, heard, _ = a_line(opened, hub.port)
    assert all(hub.send("a", {"n": n}, bytes(500_000)) for n in range(20)) and line.send({})
    hub.close()
    assert len(until(lambda: len(heard) == 20 and heard)) == 20
    assert not hub.send("a", {}) and hub.send_all({}) == 0
    hub.close()


def test_the_end_comes_within_its_bound_whatever_the_peers_do(opened):
    hub, _, _ = a_hub(opened, limits=BRIEF)
    Raw.joined(hub.port, "stopped")
    Raw.dial(hub.port)
    hub.send("stopped", {}, bytes(30 << 20))
    server = opened(socket.create_server(("127.0.0.1", 0)))
    line, _, _ = a_line(opened, server.getsockname()[1], wait=False, limits=BRIEF)
    server.accept()[0].close()
    for end in (hub, line):
        began = time.monotonic()
        end.close()
        assert time.monotonic() - began < BRIEF.close_s + 2 and not end._thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_ends_the_channel_and_the_next_send_says_so(opened):
    hub, _, _ = a_hub(opened, lambda name, message, payload: message["missing"])
    line, _, _ = a_line(opened, hub.port)
    line.send({})
    hub._thread.join(LONG_S)
    with pytest.raises(RuntimeError, match="callback raised"):
        hub.send("a", {})
    until(lambda: line.lead().state == GONE)


def test_an_end_may_be_closed_in_its_own_callback(opened):
    hub, _, _ = a_hub(opened, lambda *_: hub.close())
    line, _, _ = a_line(opened, hub.port)
    line.send({"end": 1})
    hub._thread.join(LONG_S)
    assert not hub._thread.is_alive()
