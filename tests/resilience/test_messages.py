"""Messages whose fields are wrong, from peers that have the secret: refused, counted, and neither end dies of them. Seeded."""

import copy
import dataclasses
import json
import random
import threading
import time

import pytest

from jaxtrain.resilience import messages, wire
from jaxtrain.resilience.channel import GONE, HERE, Hub
from jaxtrain.resilience.follow import Follower
from jaxtrain.resilience.host import Plan
from jaxtrain.resilience.links import Link
from jaxtrain.resilience.pulse import PHASES, Beat
from jaxtrain.resilience.remotes import Remotes
from jaxtrain.resilience.report import packed
from jaxtrain.resilience.stock import Part, Stock
from jaxtrain.resilience.verdict import Status
from jaxtrain.resilience.vitals import Vitals
from jaxtrain.resilience.wire import Refused
from tests.resilience.ends import Ends, Still
from tests.resilience.lines import SECRET, Heard, Raw, until

CASES = 300
STANDS = {"generation": 1, "running": 1, "term": 1}
BEAT = Beat(3, 4, 1, 20, "step", time.monotonic(), "data 0", "", dict.fromkeys(PHASES, 2), dict.fromkeys(PHASES, 0.5))
PLAN = Plan(generation=1, service="a:1", first=0, count=2, env={"JAXTRAIN_TERM": "1"}, argv=("--x", "1"), buddy=None)
PART = ["h", 0, 20, 1, 2, 4096]
TO_LEAD = [
    {"ping": 1.5, "echo": 0.0, "term": 1},
    {"hello": {"instance": "1", "shape": "1 processes of 1 devices", "aside": False}, **STANDS},
    {"report": packed([Status(index=0, host="h", pid=7, beat=BEAT), Status(index=1, host="h", pid=8, code=-9, ended=1.0)]),
     "complaints": {"memory": "h has little"}, "news": True, "ready": False, **STANDS},
    {"done": 1, "alive": ["process 7 on h"], "term": 1},
    {"done": 2, "gathered": {"0": {"frame": "get (loader.py:72)", "links": [["a", "b", 0]]}}, "term": 1},
    {"done": 3, "parts": [PART], "term": 1},
    {"done": 4, "sent": True, "term": 1},
]  # fmt: skip
TO_HOST = [
    {"pong": 1.0, "left": 2.5, "now": 3, "term": 1},
    {"end": 0, "term": 1},
    *({"order": name, "term": 1} for name in ("prepare", "aside")),
    *({"order": name, "id": 5, "term": 1} for name in ("fence", "inventory")),
    {"order": "know", "generation": 3, "term": 1},
    {"order": "start", "plan": dataclasses.asdict(PLAN), "term": 1},
    {"order": "signal", "number": 15, "term": 1},
    {"order": "gather", "folder": "incidents/0001", "id": 6, "term": 1},
    {"order": "send", "lots": {"ME": [PART]}, "id": 7, "term": 1},
]
ODD = [None, True, 0, -1, 2**64, 10**400, 1e300, float("nan"), "", "\0", "\ud800", "../..", "9" * 5000, [], [[]], {}, {"a": 1}]


def spoilt(message, rng):
    """The same with one field, at any depth, that is another, is missing or is one too many."""
    message = copy.deepcopy(message)
    place = message
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        if not keys:
            place.update(x=1) if isinstance(place, dict) else place.append(1)
            return message
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and rng.random() < 0.7:
            place = place[key]
            continue
        how = rng.randrange(4)
        if how == 0:
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place["x"] = rng.choice(ODD)
        else:
            place[key] = rng.choice(ODD)
        return message


def test_what_is_checked_has_the_fields_of_what_is_sent():
    fields = lambda kind: [field.name for field in dataclasses.fields(kind)]  # noqa: E731
    assert [*messages.STATUS] == fields(Status) and [*messages.BEAT] == fields(Beat) and [*messages.plan(())] == fields(Plan)
    assert (*messages.LINK,) == Link._fields and (*messages.PART,) == Part._fields
    assert {*messages.to_host(()), *messages.TO_LEAD} == {"pong", "end", "order", "ping", "hello", "report", "done"}


@pytest.mark.parametrize("checks, said", [(messages.TO_LEAD, TO_LEAD), (messages.to_host(["ME"]), TO_HOST)])
def test_what_supervisors_say_is_taken_and_one_wrong_field_is_not(checks, said):
    for message in said:
        sent = json.loads(json.dumps(message))
        assert messages.checked(sent, checks) == sent
        for field in sent:
            for odd in (None, [1], {"x": 1}, {"x": float("nan")}):
                with pytest.raises(Refused):
                    messages.checked(sent | {field: odd}, checks)
            with pytest.raises(Refused):
                messages.checked({key: value for key, value in sent.items() if key != field}, checks)


def test_a_hub_and_a_lead_outlive_every_field_that_a_peer_can_send(opened, tmp_path):
    ends = opened(Ends(tmp_path, 0))
    node, name = ends.nodes[0], ends.addresses[1]
    node.hub.refusals._log = Heard()
    remotes, rng = Remotes(node, ends.tenures[0], threading.Event()), random.Random(3)
    for _ in range(CASES):
        raw = Raw.joined(node.hub.port, name)
        raw.send(raw.session.seal(wire.MESSAGE, json.dumps(spoilt(rng.choice(TO_LEAD), rng)).encode()))
        raw.sock.close()
        remotes.hear()
    until(lambda: node.hub.refused.get("malformed", 0) > 0.5 * CASES)
    raw = Raw.joined(node.hub.port, name)
    for message in TO_LEAD:
        raw.send(raw.session.seal(wire.MESSAGE, json.dumps(message).encode()))
    until(lambda: raw.read() and any(b'"pong":1.5' in body for _, body in raw.frames))
    until(lambda: remotes.hear() or remotes[name].shape == "1 processes of 1 devices")


def test_a_host_that_follows_outlives_every_order_that_a_lead_can_send(opened, tmp_path):
    ends = opened(Ends(tmp_path, 0, 1))
    node, tenure = ends.nodes[1], ends.tenures[1]
    stock = Stock(None, node.roster, SECRET, lambda *what: None)
    follower, rng, refused = Follower(Still(), node, tenure, threading.Event(), stock, Vitals(tmp_path)), random.Random(4), 0
    follower._turn()
    for _ in range(CASES * 10):
        order = json.loads(json.dumps(spoilt(rng.choice(TO_HOST), rng)).replace("ME", node.roster.name))
        try:
            node._ordered(1, order)
        except Refused:
            refused += 1
        follower._turn()
    assert refused > CASES


def test_a_lead_that_sends_nonsense_is_hung_up_on_and_called_again(opened, tmp_path):
    ends, log, states = opened(Ends(tmp_path, 0, 1)), Heard(), Heard()
    node, name = ends.nodes[1], ends.addresses[1]
    ends.nodes[0].hub.close()
    hub = opened(Hub(ends.addresses[0], SECRET, Heard(), on_change=states, log=Heard()))
    node.follow(ends.tenures[1].newest)
    node._line.refusals._log = log
    until(lambda: node.lead().state == HERE and hub.peers())
    hub.send(name, {"order": "dance", "term": 1})
    until(lambda: (name, GONE) in states)
    until(lambda: states[-1] == (name, HERE))
    assert node._line.refused == {"malformed": 1} and node.orders.empty()
    hub.send(name, {"order": "fence", "id": 1, "term": 1})
    assert until(lambda: not node.orders.empty() and node.orders.get())["order"] == "fence"
