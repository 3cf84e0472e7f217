"""What a job's supervisors cost the lead: a hub on one core, and simulated hosts that all report every second.

    python -m benchmarks.control_plane [--hosts N] [--seconds N] [--payload MEGABYTES] [--out FILE.json]

The hub has a core of its own, the hosts are one process on the others. A report is late by the time from its sending
to the hub's callback. The hub's share of its core is that of its whole process, signs of life to all hosts included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import socket
import ssl
import statistics
import sys
import threading
import time
from array import array
from collections import deque
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from jaxtrain.resilience import wire
from jaxtrain.resilience.channel import HERE, Hub, Line
from jaxtrain.resilience.connection import Connection, Limits, Loop, Refusals
from jaxtrain.resilience.listening import more_descriptors

SECRET = b"of the benchmark, and of no job "
SETTLE_S, DEADLINE_S = 2.0, 60.0
WIDE = Limits(queue_bytes=16 << 30)  # all payloads of the benchmark


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--payload", type=int, default=512, help="megabytes that one host sends, afterwards")
    parser.add_argument("--out", default="benchmarks/results/control_plane.json")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rows = reports(options.hosts, options.seconds, cores)
    os.sched_setaffinity(0, cores)
    rows |= payload_rows(options.payload)
    for name, value in rows.items():
        print(f"{name:<64}{value:>12,.3f}")
    if options.out:
        Path(options.out).write_text(json.dumps(facts(cores) | {"rows": rows}, indent=1) + "\n")
    return 1 if rows["reports lost"] or rows["hub, share of one core"] >= 1 else 0


class Arrivals:
    """What the hub was told: how late, and whether each host's reports are all there."""

    def __init__(self) -> None:
        self.late, self.next = array("d"), {}
        self.lost = self.size = 0

    def __call__(self, name: str, message: dict[str, Any], payload: object) -> None:
        self.late.append(time.monotonic() - message["sent"])
        self.lost += message["number"] != self.next.get(name, 0)
        self.next[name] = message["number"] + 1


def reports(hosts: int, seconds: float, cores: list[int]) -> dict[str, float]:
    arrivals, here = Arrivals(), threading.Semaphore(0)
    os.sched_setaffinity(0, cores[:1])
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with Hub("127.0.0.1:0", SECRET, arrivals, on_change=lambda name, state: state == HERE and here.release()) as hub:
        simulated = context.Process(target=simulate, args=(hub.port, hosts, cores[1:] or cores, theirs), daemon=True)
        simulated.start()
        assert pipe.poll(DEADLINE_S) and pipe.recv() == "dialling"
        began = time.monotonic()
        assert all(here.acquire(timeout=DEADLINE_S) for _ in range(hosts)), "not all hosts came"
        rows = {"hosts": hosts, "seconds until all had connected": time.monotonic() - began}
        rows |= watched(hub, arrivals, seconds)
        asked = time.monotonic()
        assert hub.send_all({"end": True}) == hosts
        assert pipe.poll(DEADLINE_S), "a message to all did not come"
        sent, size, last, behind = pipe.recv()
        received = settled(arrivals, sent)
    simulated.join(DEADLINE_S)
    rows |= {"bytes of a report": size, "reports lost": arrivals.lost + sent - received}
    rows |= {"seconds until a message to all had reached the last": last - asked}
    return rows | {"hosts behind their own schedule, seconds at most": behind}


def watched(hub: Hub, arrivals: Arrivals, seconds: float) -> dict[str, float]:
    """Over `seconds`, once all have settled."""
    time.sleep(SETTLE_S)
    first, cpu, wall = len(arrivals.late), time.process_time(), time.monotonic()
    time.sleep(seconds)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    late = sorted(arrivals.late[first:])
    assert all(peer.state == HERE for peer in hub.peers().values()) and not hub.refused
    return {
        "reports per second": len(late) / wall,
        "hub, share of one core": cpu / wall,
        "hub, microseconds of CPU per report": 1e6 * cpu / len(late),
        "a report is late, ms, median": 1e3 * statistics.median(late),
        "a report is late, ms, 99 %": 1e3 * late[int(0.99 * len(late))],
        "a report is late, ms, worst": 1e3 * late[-1],
    }


def settled(arrivals: Arrivals, sent: int) -> int:
    """How many came, once all have or some time has passed."""
    end = time.monotonic() + SETTLE_S
    while len(arrivals.late) < sent and time.monotonic() < end:
        time.sleep(0.05)
    return len(arrivals.late)


class Hosts:
    """Many supervisors' ends in one thread: the connections of Lines, without their ways of coming back."""

    def __init__(self, port: int, count: int):
        self.limits, self.refusals = Limits(), Refusals(print)
        self.port, self.count, self.loop = port, count, Loop(self.limits.beat_s)
        self.due: deque[tuple[float, Connection]] = deque()  # in order
        self.number: dict[Connection, int] = {}
        self.told, self.last, self.behind, self.size = 0, 0.0, 0.0, 0
        self.joined: list[Connection] = []
        for index in range(count):
            self.dial(f"host-{index:05}")

    def dial(self, name: str) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self.port))
        connection = Connection(sock, name, self.loop, wire.Session(SECRET, hub=False), self)
        connection.flush()

    def received(self, connection: Connection, kind: int, body: memoryview) -> None:
        if kind == wire.GREETED:
            connection.put(wire.JOIN, json.dumps({"name": connection.address, "instance": "simulated"}).encode())
        elif kind == wire.WELCOME:
            self.joined.append(connection)
        elif kind == wire.MESSAGE:
            self.told, self.last = self.told + 1, time.monotonic()

    def ended(self, connection: Connection, why: str) -> None:
        assert self.told >= self.count, f"{connection.address}: {why}"
        self.count -= 1

    def schedule(self) -> None:
        """Spreads the first reports over a second, in any order."""
        now, rng = time.monotonic(), random.Random(0)
        starts = sorted(now + rng.random() for _ in self.joined)
        rng.shuffle(self.joined)
        self.due.extend(zip(starts, self.joined))
        self.number = dict.fromkeys(self.joined, 0)

    def report(self, now: float) -> None:
        while self.due[0][0] <= now:
            due, connection = self.due.popleft()
            self.behind = max(self.behind, now - due)
            number = self.number[connection]
            body = json.dumps(progress(number, connection.address)).encode()
            self.size = len(body)
            connection.put(wire.MESSAGE, body)
            self.number[connection] = number + 1
            self.due.append((due + 1.0, connection))


def progress(number: int, host: str) -> dict[str, Any]:
    """What a supervisor says of its trainers every second."""
    trainers = [{"process": 0, "phase": "step", "step": 1000 + number, "sequence": 4 * number, "age": 0.137}]
    state = {"generation": 7, "memory": 0.63, "disk": 0.41}
    return {"number": number, "sent": time.monotonic(), "host": host, "trainers": trainers} | state


def simulate(port: int, count: int, cores: list[int], pipe: Pipe) -> None:
    """In a process of its own: connects all, reports until told to end, and says how much it sent."""
    os.sched_setaffinity(0, cores)
    more_descriptors()
    pipe.send("dialling")
    hosts = Hosts(port, count)
    while len(hosts.joined) < count:
        hosts.loop.turn(0.1)
    hosts.schedule()
    while hosts.told < count:
        hosts.report(time.monotonic())
        hosts.loop.turn(hosts.due[0][0] - time.monotonic())
    pipe.send((sum(hosts.number.values()), hosts.size, hosts.last, hosts.behind))
    end = time.monotonic() + DEADLINE_S
    while hosts.count and time.monotonic() < end:  # until the hub hangs up
        hosts.loop.turn(0.1)


def payload_rows(megabytes: int) -> dict[str, float]:
    """One host's payloads to the hub while it also sends a message every 10 ms; both ends in this process."""
    late, done = [], threading.Event()

    def arrived(name: str, message: dict[str, Any], payload: memoryview | None) -> None:
        if payload is None:
            late.append(time.monotonic() - message["sent"])
        elif message["last"]:
            done.set()

    size, count = 32 << 20, max(1, (megabytes << 20) // (32 << 20))
    with Hub("127.0.0.1:0", SECRET, arrived, limits=WIDE) as hub:
        with Line(f"127.0.0.1:{hub.port}", "host", SECRET, lambda message, payload: None, limits=WIDE) as line:
            wait_for(line)
            began, block = time.monotonic(), bytes(size)
            for index in range(count):
                assert line.send({"last": index == count - 1}, block)
            while not done.wait(0.01):
                assert line.send({"sent": time.monotonic()}) and time.monotonic() < began + DEADLINE_S
            took = time.monotonic() - began
    rate = count * size / took / 1e6
    return {"payload, MB per second": rate, "a message beside it is late, ms, worst": 1e3 * max(late)}


def wait_for(line: Line) -> None:
    end = time.monotonic() + DEADLINE_S
    while line.lead().state != HERE:
        assert time.monotonic() < end, line.why
        time.sleep(0.01)


def facts(cores: list[int]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python -m benchmarks.control_plane", *sys.argv[1:]]),
        "load average": os.getloadavg()[0],  # of other processes too, which make reports late
        "system": platform.platform(),
        "machine": names[0] if names else platform.machine(),
        "cores": len(cores),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }


if __name__ == "__main__":
    sys.exit(main())
