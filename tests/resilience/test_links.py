"""Cut cables, imitated and recognised: sockets that hear nothing, connections that nobody acknowledges, who is cut off."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from jaxtrain.resilience import verdict
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.deafness import deafen
from jaxtrain.resilience.links import RESENDS, Link, links
from jaxtrain.resilience.pulse import PHASES
from tests.resilience.test_pulse import beat, status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="by the kernel's socket filters and /proc")
PEER = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while data := s.recv(1): s.send(data.upper())
"""


@pytest.fixture
def peer():
    """A child that sends back what it gets, and this end of the connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = subprocess.Popen([sys.executable, "-c", PEER, str(server.getsockname()[1])])
        ours, _ = server.accept()
        with ours:
            yield child, ours
        child.send_signal(signal.SIGCONT)
        child.wait(10)


def hears(sock, seconds):
    return bool(select.select([sock], [], [], seconds)[0]) and sock.recv(10)


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def stuck(pid):
    return [link for link in links(pid) if link.stuck]


def test_what_is_sent_to_a_deaf_process_comes_when_it_hears_again_and_until_then_both_ends_show(peer):
    child, ours = peer
    ours.send(b"a")
    assert hears(ours, 10) == b"A" and not stuck(child.pid)
    deafen(lambda: [child.pid], 3.0)
    time.sleep(0.3)
    ours.send(b"b")
    assert not hears(ours, 0.5)
    until(lambda: stuck(os.getpid()))
    (link,) = stuck(os.getpid())
    (other,) = links(child.pid)
    assert (link.local, link.remote) == (other.remote, other.local) and link.resends >= RESENDS
    assert hears(ours, 30) == b"B"


def test_a_process_that_is_stopped_has_no_stuck_connection(peer):
    child, ours = peer
    child.send_signal(signal.SIGSTOP)
    ours.send(b"a")
    time.sleep(3)
    assert not stuck(os.getpid()) and len(links(child.pid)) == 1


def test_a_deaf_process_reaches_nobody_anew():
    with socket.create_server(("127.0.0.1", 0)) as server:
        deafen(lambda: [os.getpid()], 1.0)
        time.sleep(0.2)
        with socket.socket() as fresh:
            fresh.setblocking(False)
            fresh.connect_ex(server.getsockname())
            assert not select.select([], [fresh], [], 0.5)[1]
            assert select.select([], [fresh], [], 30)[1]


def test_two_cuts_that_overlap_both_end():
    original = socket.socket.connect_ex
    deafen(lambda: [os.getpid()], 0.6)
    time.sleep(0.3)
    deafen(lambda: [os.getpid()], 0.6)
    time.sleep(0.4)
    assert socket.socket.connect_ex is not original
    until(lambda: socket.socket.connect_ex is original, 5)


def test_of_a_process_that_is_gone_nothing_is_known():
    assert links(2**22 + 1) == ()


def hung(*ends):
    """Who waits as long as all others, with these connections: (to whom, how often sent again); a port is 10 * from + to."""
    return [
        replace(status(i, age=20 - i), links=tuple(Link(f"{10 * i + to}", f"{10 * to + i}", n) for to, n in mine))
        for i, mine in enumerate(ends)
    ]


def test_who_is_cut_off_is_to_blame_though_it_is_not_late_itself():
    known = [beat(longest={phase: 0.1 for phase in PHASES})]
    late, cut, third = hung([(1, 5)], [(0, 5), (2, 5)], [(1, 0)])
    cut = replace(cut, beat=replace(cut.beat, since=time.monotonic(), sequence=50))
    assert verdict.of_hang([late, cut, third], Deadlines(floor=10), known).culprits == (1,)


@pytest.mark.parametrize(
    ("ends", "culprits"),
    [
        ([[(1, 5)], [(0, 5), (2, 5)], [(1, 0)]], (1,)),  # both directions, and one more neighbour
        ([[(1, 0)], [(0, 5), (9, 4)], []], (1,)),  # its neighbour has nothing to send; 9: the coordination service
        ([[(1, 5)], [(0, 5)], []], (0,)),  # one connection has two ends: who has been silent longest
        ([[(1, RESENDS - 1)], [(0, 2), (2, 1)], [(1, 1)]], (0,)),  # a packet was lost
    ],
)
def test_who_has_most_stuck_connections_is_cut_off(ends, culprits):
    known = [beat(longest={phase: 0.1 for phase in PHASES})]
    found = verdict.of_hang(hung(*ends), Deadlines(floor=10), known)
    assert found.culprits == culprits and ("is cut off" in found.line) == (culprits == (1,))
