"""Hubs and lines over real sockets: what arrives, who is here, gone or silent, who comes back, how it ends."""

import random
import socket
import threading
import time

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import wire
from jaxtrain.resilience.channel import GONE, HERE, SILENT, Hub, Limits, Line
from tests.resilience.lines import BRIEF, LONG_S, SECRET, Raw, a_hub, a_line, until


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
    assert line.lead().state == SILENT and line.send({})
    again.send(again.session.seal(wire.WELCOME))
    until(lambda: states[2:] == [(HERE,)])
    assert raw.hung_up()


def test_nobody_is_silent_because_this_end_was_deaf(opened):
    """As after a pause of the whole machine: nothing waits in the kernel when the hub listens again."""
    limits, awake = Limits(beat_s=0.05, silent_s=2.0), threading.Event()
    hub, _, states = a_hub(opened, lambda *_: (time.sleep(1.5 * limits.silent_s), awake.set()), limits=limits)
    raw = Raw.joined(hub.port)
    raw.send(raw.session.seal(wire.MESSAGE, b"{}"))
    assert awake.wait(LONG_S)
    time.sleep(0.3)
    assert hub.peer("raw").state == HERE and hub.peer("raw").heard_s < limits.silent_s
    assert states == [("raw", HERE)]


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
    assert old.hung_up() and states == [("a", HERE)] * 2


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
