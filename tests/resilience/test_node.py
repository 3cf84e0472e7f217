"""The right to let trainers run, as it travels from a lead to a host that follows. No trainer, no jax."""

import itertools
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

from jaxtrain.resilience.follow import Follower
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import HERE, Node
from jaxtrain.resilience.remotes import Remotes
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.stock import Stock
from jaxtrain.resilience.tenure import TAKEN, Tenure
from jaxtrain.resilience.vitals import Vitals
from tests.resilience.ends import Ends, Still
from tests.resilience.lines import SECRET, Heard, until
from tests.resilience.supervisors import free_ports

LEASE_S = 1.0
SLACK_S = 1.0  # for a busy machine


def test_the_trainers_of_a_host_that_was_told_to_fence_live_no_longer_than_the_right_it_had(tmp_path):
    """Its supervisor lives, is heard and asks: only its main thread, which would kill them, does not get to it."""
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    trainers = []
    tenures = [Tenure(tmp_path, name, name, LEASE_S, threading.Event()) for name in addresses]
    pids = lambda: ("1.1", [trainer.pid for trainer in trainers if trainer.poll() is None])  # noqa: E731
    nodes = [
        Node(Roster(index=i, addresses=addresses), SECRET, tenures[i], threading.Event(), pids if i else lambda: ("-", []))
        for i in (0, 1)
    ]
    lead, host = nodes
    try:
        until(lambda: tenures[0].still() > 1)
        assert tenures[0].claim()
        lead.follow(tenures[0].newest)
        until(lambda: tenures[1].newest.number == 1)
        host.follow(tenures[1].newest)
        until(lambda: lead.state(addresses[1]) == HERE and host.until() > clock())
        trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        trainers.append(trainer)
        time.sleep(2 * LEASE_S)
        assert trainer.poll() is None  # the right is made longer all the time
        lead.withheld.add(addresses[1])
        until(lambda: trainer.poll() is not None)
        assert clock() > lead.promised[addresses[1]]
        assert lead.state(addresses[1]) == HERE and host.until() < clock()
        lead.withheld.clear()
        until(lambda: host.until() > clock())
    finally:
        for trainer in trainers:
            trainer.kill()
        for node, tenure in zip(nodes, tenures):
            node.close()
            tenure.close()


def follower(node, tenure, vitals):
    stock = Stock(None, node.roster, SECRET, lambda *what: None)
    return Follower(Still(), node, tenure, threading.Event(), stock, vitals)


def test_what_is_wrong_with_another_hosts_machine_the_lead_says_once_with_its_name(opened, tmp_path, monkeypatch):
    ends, said, looks = opened(Ends(tmp_path, 0, 1)), Heard(), itertools.count()
    monkeypatch.setattr("jaxtrain.resilience.remotes.as_lead", lambda line: said(line))
    monkeypatch.setattr("jaxtrain.resilience.follow.EVERY_S", 0.05)
    rows = [("disk", "the run folder's disk is full"), ("GPU 3", "GPU 3 is lost")]
    vitals = SimpleNamespace(look=lambda: iter([*rows, ("memory", f"{next(looks)} bytes are free")]))
    host, remotes = follower(ends.nodes[1], ends.tenures[1], vitals), Remotes(ends.nodes[0], ends.tenures[0], threading.Event())
    until(lambda: host._turn() or remotes.hear() or len(said) > 2 and next(looks) > 200)
    joined, gpu, memory = (line.removeprefix(f"host {ends.addresses[1]}") for (line,) in said)
    assert joined == " has joined" and gpu == ": GPU 3 is lost" and memory.endswith(" bytes are free")


def test_a_lead_that_leads_no_more_is_followed_within_one_lease_though_it_is_connected_and_others_are_missing(opened, tmp_path):
    ends = opened(Ends(tmp_path, 2, 9, count=12, lease=LEASE_S))
    tenure, node = ends.tenures[9], ends.nodes[9]
    host = follower(node, tenure, Vitals(tmp_path))

    def led():
        host._turn()
        return tenure.mine

    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:  # it hears its lead
        assert not led()
        time.sleep(0.01)
    ends.tenures[2].close()
    stopped = clock()
    until(lambda: clock() > ends.tenures[2].until())
    assert node.lead().state == HERE
    until(led, (TAKEN + 1) * LEASE_S + SLACK_S)
    assert clock() > ends.tenures[2].until() and clock() - stopped >= (TAKEN - 0.2) * LEASE_S
