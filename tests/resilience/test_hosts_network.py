"""Hosts as network namespaces on one bridge: cables pulled for a while or for good, and slow ones. Trainers without jax."""

import os
import shutil
import subprocess
import time
from contextlib import suppress

import pytest

from tests.resilience.supervisors import Job, free_ports
from tests.resilience.test_hosts import assert_one_generation_at_a_time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]
NET = "10.77.62"


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


class Namespaces(Job):
    """Host `index` is namespace jtPIDhINDEX with address NET.INDEX+1; `cut` pulls its cable."""

    def __init__(self, folder, count, **how):
        self.name = f"jt{os.getpid()}"
        ip("link", "add", self.name, "type", "bridge")
        ip("link", "set", self.name, "up")
        for index in range(count):
            space, cable = f"{self.name}h{index}", f"{self.name}c{index}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", self.name, "up")
            ip("-n", space, "address", "add", f"{NET}.{index + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        super().__init__(folder, count, **how)

    def place(self, count):
        (port,) = free_ports(1)
        return [f"{NET}.{index + 1}:{port}" for index in range(count)]

    def prefix(self, index):
        return ["ip", "netns", "exec", f"{self.name}h{index}"]

    def cut(self, index):
        ip("link", "set", f"{self.name}c{index}", "nomaster")

    def mend(self, index):
        ip("link", "set", f"{self.name}c{index}", "master", self.name)

    def close(self):
        try:
            super().close()
        finally:
            for index in range(self.count):
                for words in (("netns", "del", f"{self.name}h{index}"), ("link", "del", f"{self.name}c{index}")):
                    subprocess.run(["ip", *words], capture_output=True, timeout=20)
            subprocess.run(["ip", "link", "del", self.name], capture_output=True, timeout=20)


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(count, **how):
        jobs.append(Namespaces(tmp_path, count, **how))
        return jobs[-1]

    yield start
    for each in jobs:
        each.close()
    assert_one_generation_at_a_time(tmp_path)


def saved(job):
    job.until_true(lambda: (job.folder / "saved").exists(), "a first save")


def test_a_host_cut_off_is_told_from_a_dead_one_and_comes_back(job):
    three = job(3, steps=400)
    saved(three)
    cut = (three.lead() + 1) % 3
    three.cut(cut)
    three.until("accumulated")
    three.mend(cut)
    assert set(three.end().values()) == {0}
    assert [row["what"] for row in three.rows()] == ["host lost", "more hosts"]
    assert "its supervisor still writes to the run folder" in three.rows()[0]["line"]
    assert "the trainers of this host are ended" in three.said(cut)


def test_a_lead_that_is_cut_off_but_for_the_run_folder_leads_on_alone(job):
    three = job(3, steps=120)
    saved(three)
    lead = three.lead()
    three.cut(lead)
    three.until("accumulated")
    three.mend(lead)
    assert set(three.end().values()) == {0}
    assert three.said().count("leads, term") == 1


def test_a_spare_takes_the_place_of_a_host_that_is_cut_off_for_good(job):
    three = job(3, steps=100, spares=1)
    saved(three)
    lead = three.lead()
    (cut,) = [i for i in range(3) if i != lead and "generation 1" in three.said(i)]
    three.cut(cut)
    (spare,) = {0, 1, 2} - {lead, cut}
    assert set(three.end({lead, spare}).values()) == {0}
    assert "generation 2" in three.said(spare) and "accumulated" not in three.said()


def test_a_lead_whose_host_is_gone_is_followed_by_another(job):
    """Cable pulled and all its processes stopped: as a machine without power."""
    three = job(3, steps=100)
    saved(three)
    lead = three.lead()
    three.cut(lead)
    pids = subprocess.run(["ip", "netns", "pids", f"{three.name}h{lead}"], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), 19)
    three.until("leads, term 2")
    three.until("generation 2")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), 18)
    three.mend(lead)
    assert set(three.end().values()) == {0}
    assert three.rows()[0]["what"] == "lead lost"


def test_links_that_delay_200_ms_raise_no_alarm(job):
    two = job(2, steps=300)
    for index in (0, 1):
        done = subprocess.run(
            ["tc", "-n", f"{two.name}h{index}", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "100ms"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            with suppress(AssertionError):
                two.end()
            pytest.skip(f"no netem: {done.stderr.strip()}")
    begin = time.monotonic()
    assert two.end() == {0: 0, 1: 0}
    assert two.rows() == [] and time.monotonic() - begin > 5
