"""Processes that meet: threads stand in for them here, each with a socket of its own."""

import contextlib
import json
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxtrain.cluster import Member
from jaxtrain.errors import RunError
from jaxtrain.meeting import meet

SOON, LATER = 0.5, 20.0  # seconds: deadlines that are meant to pass, and not to


@pytest.fixture
def coordinator():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_jax_afterwards(monkeypatch):
    monkeypatch.setattr("jaxtrain.meeting._await_jax", lambda me: None)


def outcomes(coordinator, members, deadline_s=LATER):
    """What `meet` did for each (index, count): "met", or the text of its error."""

    def go(place):
        index, (number, count) = place
        try:
            meet(Member(coordinator=coordinator, count=count, index=number), f"host-{index}", deadline_s)
            return "met"
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(go, enumerate(members)))


def test_all_that_arrive_meet(coordinator):
    assert outcomes(coordinator, [(i, 5) for i in range(5)]) == ["met"] * 5


def test_the_port_is_free_after_the_meeting(coordinator):
    outcomes(coordinator, [(0, 2), (1, 2)])
    socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()


def test_everyone_learns_who_is_missing(coordinator):
    said = outcomes(coordinator, [(0, 4), (2, 4)], SOON)
    assert said[0] == said[1]
    assert "2 of 4 processes did not arrive: 1, 3." in said[0]
    assert "0 (host-0), 2 (host-1)" in said[0]


def test_a_process_that_finds_no_process_0_says_so_at_its_deadline(coordinator):
    start = time.monotonic()
    (said,) = outcomes(coordinator, [(1, 2)], SOON)
    assert "cannot reach process 0" in said and coordinator in said and "refused" in said
    assert time.monotonic() - start < SOON + 2


def test_two_processes_with_one_index_are_named_to_all(coordinator):
    said = outcomes(coordinator, [(0, 3), (1, 3), (1, 3)])
    assert all("Two processes say that they are process 1" in text for text in said)
    assert all("host-1" in text and "host-2" in text for text in said)


def test_a_second_process_0_cannot_listen(coordinator):
    said = outcomes(coordinator, [(0, 2), (0, 2)], SOON)
    assert sorted("cannot listen" in text for text in said) == [False, True]


def test_processes_that_count_differently_are_told(coordinator):
    said = outcomes(coordinator, [(0, 2), (1, 3)])
    assert all("disagree on how many they are" in text and "process 1 (host-1) says 3" in text for text in said)


def test_strangers_at_the_port_are_ignored(coordinator):
    host, _, port = coordinator.rpartition(":")
    with ThreadPoolExecutor(2) as pool:
        lead = pool.submit(meet, Member(coordinator=coordinator, count=2, index=0), "a", LATER)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\n", b""):
            _say(host, int(port), noise).close()
        pool.submit(meet, Member(coordinator=coordinator, count=2, index=1), "b", LATER).result(LATER)
        lead.result(LATER)


def test_a_process_that_was_restarted_while_others_wait_takes_its_place_again(coordinator):
    host, _, port = coordinator.rpartition(":")
    with ThreadPoolExecutor(3) as pool:
        lead = pool.submit(meet, Member(coordinator=coordinator, count=3, index=0), "a", LATER)
        _say(host, int(port), json.dumps([1, 3, "b"]).encode() + b"\n").close()
        others = [pool.submit(meet, Member(coordinator=coordinator, count=3, index=i), "b", LATER) for i in (1, 2)]
        assert [future.result(LATER) for future in (lead, *others)] == [None, None, None]


FEW, MANY = 32, 60  # files that process 0 may have open, and processes

ALONE = """
    import resource, sys
    from jaxtrain.cluster import Member
    from jaxtrain.errors import RunError
    from jaxtrain.meeting import meet
    coordinator, count, soft, hard = sys.argv[1], *map(int, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        meet(Member(coordinator=coordinator, count=count, index=0), "lead", 60.0)
        print("met")
    except RunError as error:
        print(error)
"""


@pytest.mark.parametrize(("hard", "said"), [(4 * MANY, "met"), (FEW, "Process 0 cannot accept all 60 processes: Too many open")])
def test_more_processes_than_files_may_be_open_meet_or_hear_why_they_cannot(coordinator, hard, said):
    host, _, port = coordinator.rpartition(":")
    command = [sys.executable, "-c", textwrap.dedent(ALONE), coordinator, *map(str, (MANY, FEW, hard))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as lead, contextlib.ExitStack() as lines:
        hellos = [json.dumps([index, MANY, "b"]).encode() + b"\n" for index in range(1, MANY)]
        first = lines.enter_context(_say(host, int(port), hellos[0]))
        with contextlib.suppress(ConnectionError):  # the lead has given up
            for hello in hellos[1:]:
                line = lines.enter_context(socket.create_connection((host, int(port)), timeout=LATER))
                line.sendall(hello)
        output = lead.communicate(timeout=LATER)[0]
        assert output.startswith(said) and ("LimitNOFILE=120" in output) == (hard == FEW)
        heard = json.loads(first.makefile().readline())
        assert heard is None if hard > FEW else heard["what"] in output


def _say(host, port, data):
    end = time.monotonic() + LATER
    while True:
        try:
            line = socket.create_connection((host, port), timeout=1)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)
    line.sendall(data)
    return line
