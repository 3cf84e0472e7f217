"""What a job's supervisors cost the lead on one core: its hub, and what it makes of the reports of simulated hosts.

    python -m benchmarks.control_plane [--hosts N] [--seconds N] [--payload MEGABYTES] [--out FILE.json]

The lead has a core of its own, the hosts are one process on the others; each reports its one trainer every second
(followers do so every 4 s where they are 4,096) and asks as often as it would for the right to let it run. A report is
late by the time from its sending to the hub's callback. The lead's share of its core is that of its whole process: its
term and its leash, rights and signs of life to all hosts, reports taken in, and at every look all statuses judged for a
hang.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import ssl
import statistics
import tempfile
import threading
import time
from array import array
from collections import deque
from contextlib import closing
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from benchmarks import program
from jaxtrain.descriptors import more_descriptors
from jaxtrain.resilience import pulse, verdict, wire
from jaxtrain.resilience.channel import HERE, Hub, Line
from jaxtrain.resilience.connection import Connection, Limits, Loop, Refusals
from jaxtrain.resilience.crew import LOOKED_AT_A_SECOND
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.host import Plan
from jaxtrain.resilience.leash import clock
from jaxtrain.resilience.node import Node
from jaxtrain.resilience.remotes import Remotes
from jaxtrain.resilience.report import packed
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.tenure import Tenure

SECRET = b"of the benchmark, and of no job "
SETTLE_S, DEADLINE_S = 2.0, 60.0
GENERATION, TERM = 7, 1
WIDE = Limits(queue_bytes=16 << 30)  # all payloads of the benchmark


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--payload", type=int, default=512, help="megabytes that one host sends, afterwards")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rows = reports(options.hosts, options.seconds, cores)
    os.sched_setaffinity(0, cores)
    rows |= payload_rows(options.payload)
    for name, value in rows.items():
        print(f"{name:<64}{value:>12,.3f}")
    program.write(options.out, program.facts() | {"openssl": ssl.OPENSSL_VERSION, "rows": rows})
    return 1 if rows["reports lost"] or not rows["looks at all of them"] or rows["lead, share of one core"] >= 1 else 0


class Lead(Node):
    """A lead's end: how late reports are, whether each host's are all there, and what its main thread makes of them."""

    def __init__(self, hosts: int, run_dir: Path):
        self.late, self.next, self.lost, self._hosts = array("d"), {}, 0, hosts
        names = [name(index) for index in range(hosts)]
        with socket.create_server(("", 0)) as free:
            own = f"127.0.0.1:{free.getsockname()[1]}"
        roster, changed = Roster(index=hosts, addresses=(*(f"{host}:1" for host in names), own)), threading.Event()
        tenure = Tenure(run_dir, roster.name, own, Deadlines().lease, changed)
        assert tenure.claim() and tenure.mine == TERM
        super().__init__(roster, SECRET, tenure, changed, lambda: ("-", []))
        self._remotes = Remotes(self, tenure, changed)
        self._remotes.begin(Plan(generation=GENERATION, service="", first=0, count=hosts, env={}), [])

    def _received(self, name: str, message: dict[str, Any], payload: memoryview | None) -> None:
        if "report" in message:
            number, sent = message.pop("number"), message.pop("sent")  # which no supervisor says
            self.late.append(time.monotonic() - sent)
            self.lost += number != self.next.get(name, 0)
            self.next[name] = number + 1
        super()._received(name, message, payload)

    def close(self) -> None:
        super().close()
        self._tenure.close()

    def watch(self, seconds: float) -> int:
        """How many looks there were; each found all hosts well, and their rights in force."""
        end, looks, pause = time.monotonic() + seconds, 0, self._hosts / LOOKED_AT_A_SECOND
        while time.monotonic() < end:
            time.sleep(pause)
            self._remotes.hear()
            assert self._tenure.leads() and all(until > clock() for until in [*self.promised.values()])
            statuses = [status for remote in self._remotes for status in remote.statuses]
            beats = [status.beat for status in statuses]
            assert verdict.of_hang(statuses, Deadlines(), beats) is None
            looks += len(statuses) == self._hosts
        return looks


def reports(hosts: int, seconds: float, cores: list[int]) -> dict[str, float]:
    os.sched_setaffinity(0, cores[:1])
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, closing(Lead(hosts, Path(folder))) as lead:
        given = (lead.hub.port, hosts, cores[1:] or cores, lead.pause_s, theirs)
        simulated = context.Process(target=simulate, args=given, daemon=True)
        simulated.start()
        assert pipe.poll(DEADLINE_S) and pipe.recv() == "dialling"
        began = time.monotonic()
        while len(lead.hub.peers()) < hosts:
            assert time.monotonic() < began + DEADLINE_S, "not all hosts came"
            time.sleep(0.01)
        rows = {"hosts": hosts, "seconds until all had connected": time.monotonic() - began}
        rows |= watched(lead, seconds)
        asked = time.monotonic()
        assert lead.hub.send_all({"end": 0, "term": TERM}) == hosts
        assert pipe.poll(DEADLINE_S), "a message to all did not come"
        sent, size, last, behind = pipe.recv()
        received = settled(lead, sent)
    simulated.join(DEADLINE_S)
    rows |= {"bytes of a report": size, "reports lost": lead.lost + sent - received}
    rows |= {"seconds until a message to all had reached the last": last - asked}
    return rows | {"hosts behind their own schedule, seconds at most": behind}


def watched(lead: Lead, seconds: float) -> dict[str, float]:
    """Over `seconds`, once all have settled."""
    lead.watch(SETTLE_S + lead.pause_s)
    assert len(lead.promised) == len(lead.hub.peers())
    first, cpu, wall = len(lead.late), time.process_time(), time.monotonic()
    looks = lead.watch(seconds)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    late = sorted(lead.late[first:])
    assert all(peer.state == HERE for peer in lead.hub.peers().values()) and not lead.hub.refused
    return {
        "reports per second": len(late) / wall,
        "looks at all of them": looks,
        "lead, share of one core": cpu / wall,
        "lead, microseconds of CPU per report": 1e6 * cpu / len(late),
        "a report is late, ms, median": 1e3 * statistics.median(late),
        "a report is late, ms, 99 %": 1e3 * late[int(0.99 * len(late))],
        "a report is late, ms, worst": 1e3 * late[-1],
    }


def settled(lead: Lead, sent: int) -> int:
    """How many came, once all have or some time has passed."""
    end = time.monotonic() + SETTLE_S
    while len(lead.late) < sent and time.monotonic() < end:
        time.sleep(0.05)
    return len(lead.late)


class Hosts:
    """Many supervisors' ends in one thread: the connections of Lines, without their ways of coming back."""

    def __init__(self, port: int, count: int, ping_s: float):
        self.limits, self.refusals, self.ping_s = Limits(), Refusals(print), ping_s
        self.port, self.count, self.loop = port, count, Loop(self.limits.beat_s)
        self.due: deque[tuple[float, Connection]] = deque()  # in order
        self.pings: deque[tuple[float, Connection]] = deque()
        self.echo: dict[Connection, float] = {}
        self.number: dict[Connection, int] = {}
        self.told, self.last, self.behind, self.size = 0, 0.0, 0.0, 0
        self.joined: list[Connection] = []
        for index in range(count):
            self.dial(name(index))

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
            said = json.loads(bytes(body))
            if "pong" in said:
                self.echo[connection] = said["now"]
            else:
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
        self.pings.extend((now + self.ping_s * index / len(self.joined), host) for index, host in enumerate(self.joined))
        self.number = dict.fromkeys(self.joined, 0)

    def ping(self, now: float) -> None:
        while self.pings[0][0] <= now:
            due, connection = self.pings.popleft()
            asked = {"ping": clock(), "echo": self.echo.get(connection, 0.0), "term": TERM}
            connection.put(wire.MESSAGE, json.dumps(asked).encode())
            self.pings.append((due + self.ping_s, connection))

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


def name(index: int) -> str:
    return f"host-{index:05}"


def progress(number: int, host: str) -> dict[str, Any]:
    """What a supervisor says of its trainer, and for the benchmark which of its reports this is."""
    index, now = int(host.rpartition("-")[2]), time.monotonic()
    counts = dict.fromkeys(pulse.PHASES, 1000 + number)
    longest = dict.fromkeys(pulse.PHASES, 0.4123456789)
    about = f"data {index // 8}, fsdp {index % 8}"
    beat = pulse.Beat(4 * number, 4711, GENERATION, 1000 + number, "step", now - 0.137, about, "snapshot 990", counts, longest)
    told = packed([verdict.Status(index=index, host=host, pid=4711, beat=beat)])
    state = {"news": False, "ready": True, "complaints": {}, "generation": GENERATION, "running": GENERATION}
    return {"number": number, "sent": now, "term": TERM, "report": told} | state


def simulate(port: int, count: int, cores: list[int], ping_s: float, pipe: Pipe) -> None:
    """In a process of its own: connects all, reports until told to end, and says how much it sent."""
    os.sched_setaffinity(0, cores)
    more_descriptors()
    pipe.send("dialling")
    hosts = Hosts(port, count, ping_s)
    while len(hosts.joined) < count:
        hosts.loop.turn(0.1)
    hosts.schedule()
    while hosts.told < count:
        hosts.ping(time.monotonic())
        hosts.report(time.monotonic())
        hosts.loop.turn(min(hosts.due[0][0], hosts.pings[0][0]) - time.monotonic())
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


if __name__ == "__main__":
    program.run(main)
