"""Sessions without sockets: what opens, what does not, and that nothing but what was sent ever comes out."""

import random

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import wire
from jaxtrain.resilience.wire import FRAME_BYTES, HEAD, MAC, Inbox, Outbox, Refused, Session
from tests.resilience.lines import SECRET, messages, mutated

CASES = 4000


def pair(secret=SECRET, other=SECRET):
    """A line's session and a hub's that have greeted each other."""
    line, hub = Session(secret, hub=False), Session(other, hub=True)
    list(line.feed(memoryview(hub.greeting)))
    list(hub.feed(memoryview(line.greeting)))
    return line, hub


def opened(session, data):
    return [(kind, bytes(body)) for kind, body in session.feed(memoryview(data))]


def refusal(session, data):
    with pytest.raises(Refused) as caught:
        opened(session, data)
    return caught.value.kind


def test_both_ways_open_what_the_other_end_sealed():
    line, hub = pair()
    frames = line.seal(wire.MESSAGE, b"{}") + line.seal(wire.BEAT)
    assert opened(hub, frames) == [(wire.MESSAGE, b"{}"), (wire.BEAT, b"")]
    assert opened(line, hub.seal(wire.WELCOME)) == [(wire.WELCOME, b"")]
    assert line.known and hub.known


def test_frames_open_however_they_are_cut():
    line, hub = pair()
    data = b"".join(line.seal(wire.MESSAGE, bytes(size)) for size in (0, 1, 900))
    assert [len(body) for at in range(len(data)) for _, body in opened(hub, data[at : at + 1])] == [0, 1, 900]
    assert hub.held == 0


def test_another_secret_opens_nothing():
    line, hub = pair(other=b"another job's")
    assert refusal(hub, line.seal(wire.JOIN, b"{}")) == "secret"
    assert refusal(line, hub.seal(wire.WELCOME)) == "secret"


def test_a_frame_of_another_connection_does_not_open():
    (line, _), (_, hub) = pair(), pair()
    assert refusal(hub, line.seal(wire.JOIN, b"{}")) == "secret"


def test_a_frame_that_is_sent_back_does_not_open():
    line, hub = pair()
    opened(hub, line.seal(wire.BEAT))
    assert refusal(hub, hub.seal(wire.BEAT)) == "forged"


def test_an_echo_of_everything_is_not_a_hub():
    line = Session(SECRET, hub=False)
    opened(line, line.greeting)
    assert refusal(line, line.seal(wire.JOIN)) == "secret"


def test_a_frame_opens_once_and_in_its_turn():
    line, hub = pair()
    first, second, third = (line.seal(wire.BEAT) for _ in range(3))
    opened(hub, first)
    assert refusal(hub, first) == "order"
    line, hub = pair()
    first, second, third = (line.seal(wire.BEAT) for _ in range(3))
    opened(hub, first)
    assert refusal(hub, third) == "order"


def test_a_changed_bit_anywhere_is_noticed():
    for bit in range(8 * (HEAD.size + 2 + MAC)):
        line, hub = pair()
        opened(hub, line.seal(wire.BEAT))
        frame = bytearray(line.seal(wire.MESSAGE, b"{}"))
        frame[bit // 8] ^= 1 << bit % 8
        try:
            assert opened(hub, frame) == [], "a length may only make it wait for more"
        except Refused as refused:
            assert refused.kind in ("forged", "oversized")


def test_a_stranger_may_send_little_and_a_peer_no_more_than_a_frame():
    line, hub = pair()
    assert refusal(hub, HEAD.pack(wire.FIRST_BYTES + 1, wire.JOIN, 0)) == "oversized"
    line, hub = pair()
    opened(hub, line.seal(wire.JOIN))
    assert refusal(hub, HEAD.pack(FRAME_BYTES + 1, wire.MESSAGE, 1)) == "oversized"


def test_strangers_of_other_kinds_are_told_apart():
    hub = Session(SECRET, hub=True)
    assert refusal(hub, b"GET / HTTP/1.1\r\nHost: a-host-somewhere:7600\r\n\r\n") == "garbage"
    other = wire.GREETING.pack(wire.MAGIC, wire.VERSION + 1, bytes(32))
    assert refusal(Session(SECRET, hub=True), other) == "version"


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff\xfe", b'"x"', b"[" * 100_000, b"9" * 5000])
def test_a_message_is_a_json_object(body):
    with pytest.raises(Refused, match="malformed"):
        Inbox(100).take(wire.MESSAGE, memoryview(body))


def test_parts_that_make_no_payload_are_refused():
    head = memoryview(wire.SIZE.pack(5) + b"{}")
    for frames, kind in [
        ([(wire.PART, b"x")], "malformed"),
        ([(wire.ATTACHED, head), (wire.ATTACHED, head)], "malformed"),
        ([(wire.ATTACHED, head), (wire.PART, b"123456")], "malformed"),
        ([(wire.ATTACHED, head), (wire.PART, b"")], "malformed"),
        ([(wire.ATTACHED, b"1234567")], "malformed"),
        ([(wire.ATTACHED, wire.SIZE.pack(101) + b"{}")], "oversized"),
        ([(wire.JOIN, b"{}")], "malformed"),
        ([(99, b"{}")], "malformed"),
    ]:
        inbox = Inbox(100)
        with pytest.raises(Refused, match=kind):
            for number, body in frames:
                assert inbox.take(number, memoryview(body)) is None


def test_messages_overtake_a_payload_and_both_arrive_whole():
    outbox, inbox, payload = Outbox(1 << 20), Inbox(1 << 20), random.Random(0).randbytes(3 * FRAME_BYTES - 7)
    assert outbox.put(*wire.encoded({"big": 1}, payload, 1 << 20))
    first = outbox.next()
    assert outbox.put(*wire.encoded({"small": 1}, None, 0))
    frames = [first]
    while frame := outbox.next():
        frames.append(frame)
    assert [kind for kind, _ in frames] == [wire.ATTACHED, wire.MESSAGE, wire.PART, wire.PART, wire.PART]
    came = [whole for kind, body in frames if (whole := inbox.take(kind, memoryview(body)))]
    assert came == [({"small": 1}, None), ({"big": 1}, payload)]


def test_a_queue_takes_its_bytes_and_gives_all_of_them_back():
    outbox = Outbox(10_000)
    for _ in range(3):
        taken = [outbox.put(*wire.encoded({"n": n}, bytes(1000), 1000)) for n in range(20)]
        assert taken.count(True) in (7, 8) and not outbox.put(wire.MESSAGE, bytes(5000))
        while outbox.next():
            pass
        assert not outbox and outbox._waiting == 0


def test_what_is_too_long_says_what_to_do():
    with pytest.raises(RunError, match="(?s)too long.*keys text.*as the message.s payload"):
        wire.encoded({"text": "x" * FRAME_BYTES}, None, 0)
    with pytest.raises(RunError, match="payload_bytes = 10"):
        wire.encoded({}, bytes(11), 10)


def delivered(hub, data, rng):
    """The messages in these bytes, cut at random; and what the session held at most."""
    inbox, came, held, at = Inbox(10_000), [], 0, 0
    try:
        while at < len(data):
            size = rng.choice((1, 17, 400, 5000))
            for kind, body in hub.feed(memoryview(data[at : at + size])):
                if kind not in (wire.JOIN, wire.BEAT) and (whole := inbox.take(kind, body)):
                    came.append((whole[0], None if whole[1] is None else bytes(whole[1])))
            at, held = at + size, max(held, hub.held)
    except Refused:
        pass
    return came, held


def test_of_mutated_traffic_only_what_was_sent_is_delivered():
    """Seeded: a prefix of the messages comes out, no other exception, no more held than one frame."""
    rng, refused = random.Random(11), 0
    for _ in range(CASES):
        line, hub = pair()
        frames, sent = messages(line)
        came, held = delivered(hub, mutated(frames, rng), rng)
        assert came == sent[: len(came)]
        assert held <= HEAD.size + FRAME_BYTES + MAC
        refused += len(came) < len(sent)
    assert refused > 0.9 * CASES
    line, hub = pair()
    frames, sent = messages(line)
    assert delivered(hub, b"".join(frames), rng)[0] == sent
