"""Several supervisors of one job on this machine, killed, stopped and started again; trainers without jax.

Those that take over ten seconds on a busy machine are slow.
"""

import json
import random
import re
import signal
import sys
import time

import pytest

from jaxtrain.exits import Exit
from tests.resilience.supervisors import LEASE_S, Job


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(count, **how):
        jobs.append(Job(tmp_path, count, **how))
        return jobs[-1]

    yield start
    for each in jobs:
        each.close()
    assert_one_generation_at_a_time(tmp_path)


def assert_one_generation_at_a_time(folder):
    """Generations and, within each, steps grow from commit to commit, and no two trainers had one number."""
    path = folder / "commits"
    commits = [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []
    assert commits == sorted(set(commits))
    assert not (folder / "overlap").exists()


def test_hosts_find_each_other_and_end_together(job):
    two = job(2, steps=10)
    assert two.end() == {0: 0, 1: 0}
    assert two.rows() == []
    assert "[p0] generation 1 from step 0" in two.said(two.lead())
    assert "[p1] generation 1 from step 0" in two.said(1 - two.lead())


def test_a_killed_trainer_of_another_host_is_named_with_its_host(job):
    two = job(2, faults=["kill:process=1,step=12"])
    assert two.end() == {0: 0, 1: 0}
    (row,) = two.rows()
    assert row["culprits"] == [1] and row["what"] == "SIGKILL" and two.addresses[1] in row["line"]
    assert row["restored_step"] == 10


@pytest.mark.slow
def test_a_stopped_trainer_of_another_host_is_named_with_stacks_of_both(job):
    two = job(2, faults=["stop:process=1,step=12"])
    assert two.end() == {0: 0, 1: 0}
    (row,) = two.rows()
    assert row["culprits"] == [1] and "was stopped" in row["line"] and two.addresses[1] in row["line"]
    for process in (0, 1):
        assert "phase" in (two.folder / "incidents" / "0001" / f"p{process}.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_host_is_named_and_the_others_go_on_without_it(job, number):
    three = job(3, steps=80)
    three.until_true(lambda: (three.folder / "saved").exists(), "a first save")
    lost = (three.lead() + 1) % 3
    three.signal(lost, number)
    codes = three.end(set(range(3)) - {lost})
    assert set(codes.values()) == {0}
    row = three.rows()[0]
    assert row["what"] == "host lost" and f"host {three.addresses[lost]} was lost" in row["line"]
    assert "accumulated" in three.said() and "the batch is the same, accumulated" in three.said()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by the kernel's socket filters")
def test_a_host_whose_network_is_cut_is_lost_and_comes_back(job):
    three = job(3, steps=400, faults=["cut-network:process=1,step=12,seconds=6"])
    assert set(three.end().values()) == {0}
    first, second = three.rows()
    assert first["what"] in ("host lost", "lead lost") and second["what"] == "more hosts"
    assert first["what"] == "lead lost" or first["culprits"] == [1] and "the network to" in first["line"]


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_lost_host(job):
    three = job(3, steps=80, spares=1)
    three.until_true(lambda: (three.folder / "saved").exists(), "a first save")
    lead = three.lead()
    (lost,) = [i for i in range(3) if i != lead and "generation 1" in three.said(i)]
    (spare,) = {0, 1, 2} - {lead, lost}
    three.signal(lost, signal.SIGKILL)
    assert set(three.end({lead, spare}).values()) == {0}
    assert "generation 2" in three.said(spare) and "accumulated" not in three.said()


@pytest.mark.slow
def test_a_host_that_comes_again_trains_again_after_the_next_save(job):
    two = job(2, steps=300)
    two.until_true(lambda: (two.folder / "saved").exists(), "a first save")
    lost = 1 - two.lead()
    two.signal(lost, signal.SIGKILL)
    two.until("accumulated")
    two.start(lost)
    assert set(two.end().values()) == {0}
    assert [row["what"] for row in two.rows()] == ["host lost", "more hosts"]
    assert "generation 3" in two.said(lost)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_the_lead_is_lost_another_takes_over(job, number):
    three = job(3, steps=100)
    three.until_true(lambda: (three.folder / "saved").exists(), "a first save")
    lost = three.lead()
    three.signal(lost, number)
    others = set(range(3)) - {lost}
    three.until("leads, term 2")
    if number == signal.SIGSTOP:
        three.until("generation 2")
        three.signal(lost, signal.SIGCONT)
        others |= {lost}
    assert set(three.end(others).values()) == {0}
    row = three.rows()[0]
    assert row["what"] == "lead lost" and f"host {three.addresses[lost]}, which led, was lost" in row["line"]


@pytest.mark.slow
def test_a_lead_that_was_only_stopped_takes_the_end_of_the_job_and_starts_nothing(job):
    three = job(3, steps=100)
    three.until_true(lambda: (three.folder / "saved").exists(), "a first save")
    stopped = three.lead()
    three.signal(stopped, signal.SIGSTOP)
    assert set(three.end(set(range(3)) - {stopped}).values()) == {0}
    three.signal(stopped, signal.SIGCONT)
    assert three.end({stopped}) == {stopped: 0}
    assert "term 3" not in three.said()


def test_a_host_that_changes_bits_is_put_aside(job, tmp_path):
    row = {"step": 12, "agreed": 0, "found_by": "majority", "suspects": [{"process": 1}]}
    (tmp_path / "corrupt").write_text(json.dumps(row) + "\n")
    three = job(3, steps=40, spares=1)
    assert set(three.end().values()) == {0}
    (row,) = three.rows()
    bad = next(i for i in range(3) if "[p1] generation 1" in three.said(i))
    assert row["what"] == "corruption" and f"{three.addresses[bad]} is put aside" in row["line"]
    assert "generation 2" not in three.said(bad) and three.said().count("] generation 2") == 2


def test_a_host_that_fails_again_and_again_gives_way_to_a_spare(job):
    three = job(3, steps=60, spares=1, faults=[f"exit:process=1,step=12,generation={number}" for number in (1, 2)])
    assert set(three.end().values()) == {0}
    first, second = three.rows()
    bad = next(i for i in range(3) if "[p1] generation 1" in three.said(i))
    assert "put aside" not in first["line"] and f"{three.addresses[bad]} is put aside: it was to blame 2 times" in second["line"]
    assert "generation 3" not in three.said(bad) and three.said().count("] generation 3") == 2


@pytest.mark.slow
def test_a_host_that_was_put_aside_stays_so_when_another_leads(job, tmp_path):
    row = {"step": 12, "agreed": 0, "found_by": "majority", "suspects": [{"process": 1}]}
    (tmp_path / "corrupt").write_text(json.dumps(row) + "\n")
    three = job(3, steps=150, spares=1)
    three.until("] generation 2")
    bad, lost = next(i for i in range(3) if "[p1] generation 1" in three.said(i)), three.lead()
    assert bad != lost
    three.signal(lost, signal.SIGKILL)
    three.until("leads, term 2")
    assert set(three.end({0, 1, 2} - {lost}).values()) == {0}
    assert [row["what"] for row in three.rows()] == ["corruption", "lead lost"]
    assert "[p0] generation 1" not in three.said(bad) and not re.search(r"\] generation [2-9]", three.said(bad))


@pytest.mark.slow
def test_without_the_secret_nobody_joins(job, tmp_path):
    two = job(2, steps=400)
    two.until_true(lambda: (two.folder / "saved").exists(), "a first save")
    stranger = 1 - two.lead()
    two.signal(stranger, signal.SIGKILL)
    two.until("accumulated")
    two.start(stranger, JAXTRAIN_JOB_SECRET="not the secret of this job at all")
    two.until("it does not know the job's secret")
    assert set(two.end().values()) == {0}
    assert "more hosts" not in [row["what"] for row in two.rows()]


@pytest.mark.slow
def test_a_job_that_died_whole_goes_on_by_the_same_command(job):
    two = job(2, steps=80)
    two.until_true(lambda: (two.folder / "saved").exists(), "a first save")
    for index in (0, 1):
        two.signal(index, signal.SIGKILL)
        two.processes[index].wait()
    for index in (0, 1):
        two.start(index)
    assert two.end() == {0: 0, 1: 0}
    assert "generation 1 from step 0" in two.said() and two.said().count("leads, term 2") == 1


def test_a_signal_to_all_ends_all_with_one_code(job):
    two = job(2, steps=100_000)
    two.until_true(lambda: (two.folder / "saved").exists(), "a first save")
    for index in (0, 1):
        two.signal(index, signal.SIGTERM)
    codes = two.end()
    assert set(codes.values()) == {Exit.UNSAVED}  # these trainers save nothing


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_killed_and_stopped_there_is_one_lead_and_the_run_ends(job, seed):
    """Supervisors of four hosts, and what they started, killed, stopped and started again at random."""
    chance = random.Random(seed)
    four = job(4, steps=4000)
    four.until_true(lambda: (four.folder / "saved").exists(), "a first save")
    end = time.monotonic() + 45
    while time.monotonic() < end:
        index = chance.randrange(4)
        if four.processes[index].poll() is not None:
            four.start(index)
        elif chance.random() < 0.4:
            four.signal(index, signal.SIGKILL)
            four.processes[index].wait()
        else:
            four.signal(index, signal.SIGSTOP)
            time.sleep(chance.uniform(0, 4 * LEASE_S))
            four.signal(index, signal.SIGCONT)
        time.sleep(chance.uniform(0, 2 * LEASE_S))
    for index in range(4):
        if four.processes[index].poll() is not None:
            four.start(index)
    four.until_true(lambda: "4000" == (four.folder / "saved").read_text(), "the end")
    codes = four.end()
    assert set(codes.values()) == {0}
    leads = [line for line in four.said().splitlines() if "leads, term" in line]
    assert len(leads) == len({line.split()[-1] for line in leads}), leads
