"""Terms in a folder: who may take one when, and when the right ends. Leases of a tenth of a second and more."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxtrain.errors import CheckpointError
from jaxtrain.resilience.leash import Leash, clock
from jaxtrain.resilience.tenure import TAKEN, Tenure, still_valid
from tests.resilience.lines import until

LEASE_S = 0.5


@pytest.fixture
def host(tmp_path):
    made = []

    def make(name, lease=LEASE_S):
        made.append(Tenure(tmp_path, name, f"{name}:1", lease, threading.Event()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_of_many_that_claim_at_once_one_leads(host, tmp_path):
    hosts = [host(f"h{i}", lease=5.0) for i in range(8)]
    until(lambda: all(each.still() > 1 for each in hosts))
    answers = []
    threads = [threading.Thread(target=lambda each=each: answers.append(each.claim())) for each in hosts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(answers) == [False] * 7 + [True]
    assert [each.mine for each in hosts].count(1) == 1


def test_a_lead_that_lives_is_seen_to_live_and_one_that_stops_is_not(host):
    a, b = host("a"), host("b")
    until(lambda: a.still() > 1)
    assert a.claim()
    until(lambda: b.newest.host == "a")
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        assert b.still() < TAKEN * LEASE_S and a.until() > clock()
        time.sleep(0.01)
    a.close()
    stopped = clock()
    until(lambda: b.still() >= TAKEN * LEASE_S)
    assert clock() - stopped >= TAKEN * LEASE_S * 0.8
    assert clock() > a.until()
    assert b.claim() and b.newest.number == 2


def test_a_right_that_is_over_does_not_come_back(host, monkeypatch):
    a = host("a")
    until(lambda: a.still() > 1)
    assert a.claim()
    a._confirmed = a._acked = clock() - 2 * LEASE_S
    a.heard_by_all(clock())
    assert a.until() < clock()
    until(lambda: a.mine == 0)


def test_a_lead_that_all_others_hear_leads_on_though_the_folder_cannot_be_written(host, monkeypatch):
    a = host("a")
    until(lambda: a.still() > 1)
    assert a.claim()

    def refused(path, text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("jaxtrain.resilience.tenure._write_life", refused)
    end = time.monotonic() + 4 * LEASE_S
    while time.monotonic() < end:
        a.heard_by_all(clock())
        assert a.mine == 1 and a.until() > clock()
        time.sleep(0.01)
    assert "Read-only" in a.trouble
    until(lambda: clock() > a.until())


def test_a_newer_term_ends_an_older_one(host, tmp_path):
    a = host("a")
    until(lambda: a.still() > 1)
    assert a.claim()
    (tmp_path / "terms" / "2").write_text('{"host": "b", "address": "b:1"}')
    until(lambda: a.mine == 0 and a.newest.host == "b")
    with pytest.raises(CheckpointError, match="this generation is over"):
        still_valid(tmp_path, {"JAXTRAIN_TERM": "1"})
    still_valid(tmp_path, {"JAXTRAIN_TERM": "2"})
    still_valid(tmp_path, {})


@pytest.mark.parametrize("removed", [["1"], ["1.life"], ["1", "1.life"]], ids=" ".join)
def test_a_term_whose_files_somebody_removes_is_made_again_and_nobody_takes_it(host, tmp_path, removed):
    a, b = host("a", lease=5.0), host("b", lease=5.0)
    until(lambda: a.still() > 1)
    assert a.claim()
    until(lambda: b.newest.host == "a")
    for name in removed:
        (tmp_path / "terms" / name).unlink()
    until(lambda: {"1", "1.life"} <= {path.name for path in (tmp_path / "terms").iterdir()})
    late = host("c", lease=5.0)
    until(lambda: late.newest.host == "a")
    assert a.mine == 1 and a.leads() and b.newest.host == "a" and late.still() < 1.5 * 5


def test_of_two_leads_of_one_term_the_one_that_its_file_does_not_name_leads_no_more(host, tmp_path):
    a = host("a")
    until(lambda: a.still() > 1)
    assert a.claim()
    (tmp_path / "terms" / "fresh").write_text('{"host": "b", "address": "b:1"}')
    (tmp_path / "terms" / "fresh").replace(tmp_path / "terms" / "1")
    until(lambda: a.mine == 0 and a.newest.host == "b")


def test_what_ended_well_is_followed_at_once_and_its_code_is_known(host):
    a, b = host("a"), host("b")
    until(lambda: a.still() > 1)
    assert a.claim()
    until(lambda: b.newest.number == 1)
    a.end(75)
    until(lambda: b.newest.ended == 75)
    assert b.still() > 1 and b.claim()


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def test_the_leash_kills_when_the_time_is_over_and_not_before(opened):
    child, leash = opened(sleeper()), Leash()
    try:
        leash.hold([child.pid], clock() + 1.0)
        time.sleep(0.6)
        leash.hold([child.pid], clock() + 1.0)
        time.sleep(0.6)
        assert child.poll() is None
        assert child.wait(10) == -signal.SIGKILL
    finally:
        child.kill()
        leash.close()


def test_the_leash_kills_what_a_stopped_supervisor_left_and_is_replaced_when_it_is_killed(opened, tmp_path):
    children = [opened(sleeper()) for _ in range(2)]
    script = (
        "import os, sys, time; from jaxtrain.resilience.leash import Leash, clock; leash = Leash(sys.argv[3])\n"
        "leash.hold([int(sys.argv[1])], clock() + 60, '1.3'); leash._process.kill(); leash._process.wait()\n"
        "leash.hold([int(sys.argv[1])], clock() + 1.0, '1.7'); print('held', flush=True)\n"
        "time.sleep(60) if sys.argv[2] == 'stop' else os._exit(0)"
    )
    try:
        for child, how in zip(children, ("stop", "exit")):
            command = [sys.executable, "-c", script, str(child.pid), how, str(tmp_path / how)]
            holder = opened(subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}))
            holder.stdout.readline()
            if how == "stop":
                holder.send_signal(signal.SIGSTOP)
            assert child.wait(10) == -signal.SIGKILL
            holder.kill()
            until(lambda: (tmp_path / how).exists() and (tmp_path / how).read_text() == "1.7")
    finally:
        for child in children:
            child.kill()
