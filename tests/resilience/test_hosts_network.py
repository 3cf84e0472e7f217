"""Hosts as network namespaces on one bridge: cables pulled for a while or for good, and slow ones. Trainers without jax."""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest

from tests.resilience.supervisors import Job, free_ports
from tests.resilience.test_hosts import assert_one_generation_at_a_time
from tests.resilience.test_hosts_jax import CONFIG, PATIENCE_S, Launched

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
    """Cable pulled and all its processes gone at once, none of which can say a last word: as a machine without power."""
    three = job(3, steps=100)
    saved(three)
    lead = three.lead()
    three.cut(lead)
    pids = subprocess.run(["ip", "netns", "pids", f"{three.name}h{lead}"], capture_output=True, text=True).stdout.split()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)
    three.until("leads, term 2")
    three.until("generation 2")
    three.mend(lead)
    three.start(lead)
    assert set(three.end().values()) == {0}
    assert three.rows()[0]["what"] == "lead lost"


class Switched(Namespaces):
    """The hosts' interfaces are this process's, which passes each packet on `DELAY_S` later: netem is not in every kernel."""

    DELAY_S = 0.1
    _TUNSETIFF, _TUN, _NO_INFO = 0x400454CA, 0x0001, 0x1000

    def place(self, count):
        self._open, self._ends = True, {}
        for index in range(count):
            space, name = f"{self.name}h{index}", f"{self.name}t{index}"
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, self._TUNSETIFF, struct.pack("16sH", name.encode(), self._TUN | self._NO_INFO))
            ip("-n", space, "link", "del", "eth0")
            ip("link", "set", name, "netns", space)
            ip("-n", space, "address", "add", f"{NET}.{index + 1}/24", "dev", name)
            ip("-n", space, "link", "set", name, "up")
            self._ends[socket.inet_aton(f"{NET}.{index + 1}")] = end
        self.passed, self._switch = 0, threading.Thread(target=self._pass_on)
        self._switch.start()
        return super().place(count)

    def _pass_on(self):
        waiting = deque()
        while self._open:
            left = waiting[0][0] - time.monotonic() if waiting else 0.05
            for end in select.select(self._ends.values(), [], [], max(0.0, left))[0]:
                with suppress(BlockingIOError):
                    waiting.append((time.monotonic() + self.DELAY_S, os.read(end, 65536)))
            while waiting and waiting[0][0] <= time.monotonic():
                packet = waiting.popleft()[1]
                if other := self._ends.get(packet[16:20]):
                    os.write(other, packet)
                    self.passed += 1

    def close(self):
        self._open = False
        self._switch.join()
        super().close()
        for end in self._ends.values():
            os.close(end)


def test_links_that_take_200_ms_there_and_back_raise_no_alarm(tmp_path):
    two = Switched(tmp_path, 2, steps=300)
    try:
        begin = time.monotonic()
        assert two.end() == {0: 0, 1: 0}
        assert two.rows() == [] and time.monotonic() - begin > 5 and two.passed > 100
        assert {"generation 1 from step 0" in two.said(index) for index in (0, 1)} == {True}
    finally:
        two.close()
    assert_one_generation_at_a_time(tmp_path)


def test_a_host_lost_behind_links_that_take_200_ms_is_named_and_replaced(tmp_path):
    three = Switched(tmp_path, 3, steps=100, spares=1)
    try:
        saved(three)
        lead = three.lead()
        (lost,) = [i for i in range(3) if i != lead and "generation 1" in three.said(i)]
        three.signal(lost, 9)
        assert set(three.end({0, 1, 2} - {lost}).values()) == {0}
        assert [row["what"] for row in three.rows()] == ["host lost"] and "accumulated" not in three.said()
    finally:
        three.close()
    assert_one_generation_at_a_time(tmp_path)


class Cabled(Launched, Namespaces):
    """Real trainers, each host in a namespace in which its name is its address."""

    flags = ()

    def place(self, count):
        self.folders = [Path("/etc/netns") / f"{self.name}h{index}" for index in range(count)]
        for index, folder in enumerate(self.folders):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{NET}.{index + 1} {socket.gethostname()}\n")
        return Namespaces.place(self, count)

    def close(self):
        super().close()
        for folder in self.folders:
            shutil.rmtree(folder)


def test_real_trainers_go_on_without_a_host_that_is_cut_off_and_with_it_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.resilience.supervisors.DEADLINE_S", PATIENCE_S)
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG.replace("steps=1200", "steps=900"))
    two = Cabled(folder, 2)
    try:
        two.until_true(lambda: two.step() > 60, "step 60")
        cut = 1 - two.lead(folder / "tiny")
        two.cut(cut)
        two.until("the batch is the same")
        reached = two.step()
        two.until_true(lambda: two.step() > reached + 20, "steps on one host")
        two.mend(cut)
        assert set(two.end().values()) == {0}, two.said()
        rows = [json.loads(line) for line in (folder / "tiny" / "incidents.jsonl").read_text().splitlines()]
        assert [row["what"] for row in rows] == ["host lost", "more hosts"], two.said()
        assert "the network to" in rows[0]["line"]
        assert rows[1]["tier"].endswith("snapshot") and rows[1]["restored_step"] % 20 == 0  # no checkpoint was there yet
        steps = [json.loads(line)["step"] for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 901)]
    finally:
        two.close()
