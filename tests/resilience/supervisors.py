"""Supervisors of several hosts as processes on this machine, each with a port of its own and trainers without jax. Not a test."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxtrain.resilience.host import memory_folder

ROOT = Path(__file__).parents[2]
DEADLINE_S = 150  # far above what any of these takes
LEASE_S = 2.0
SUPERVISOR = """
import os, sys, threading
from pathlib import Path
from jaxtrain.errors import UserError
from jaxtrain.resilience import faults, injection
from jaxtrain.resilience.crew import Terms
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.host import Host, memory_folder
from jaxtrain.resilience.roster import roster
from jaxtrain.resilience.secret import job_secret
from jaxtrain.resilience.supervise import supervise

folder, steps, processes, spares, sizes, lease, *given = sys.argv[1:]
run_dir, changed, sizes = Path(folder), threading.Event(), [int(size) for size in sizes.split(",")]
injected = [faults.placed(faults.parse(text), int(processes) * sizes[0], int(steps)) for text in given]
fits = lambda hosts: ([] if hosts == sizes[0] else ["accumulated"]) if hosts in sizes else None
fake = [sys.executable, "tests/resilience/fake_trainer.py"]
saved = lambda: (run_dir / "saved").read_text() if (run_dir / "saved").exists() else ""
terms = Terms(fits=fits, moment=saved, spares=int(spares))
service = [sys.executable, "-c", "from jaxtrain.resilience.child import READY; print(READY, flush=True); input()"]
try:
    hosts = roster()
    host = Host(["train", folder, steps], int(processes), memory_folder(run_dir, hosts.name), changed,
                trainer=fake, service=service, name=hosts.name)
    watch, env = Deadlines(floor=1.5, lease=float(lease)), lambda n: faults.environment(injected, n)
    injection.obey(injected, host.pids)
    sys.exit(supervise(host, hosts, run_dir, job_secret(os.environ, run_dir), changed, watch, terms, env))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


class Job:
    """Supervisors 0, 1, ... of one run folder. `sizes`: on how many hosts the config runs, the usual first."""

    def __init__(self, folder, count, *, steps=60, processes=1, spares=0, sizes=None, lease=LEASE_S, faults=()):
        self.folder, self.count, self.processes = folder, count, {}
        self.addresses = self.place(count)
        allowed = ",".join(map(str, sizes or range(count - spares, 0, -1)))
        self.words = [str(folder), str(steps), str(processes), str(spares), allowed, str(lease), *faults]
        for index in range(count):
            self.start(index)

    def start(self, index, **env):
        """As a cluster manager does, also for a second time."""
        own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PATH": os.environ["PATH"]}
        own |= {"JAXTRAIN_HOSTS": ",".join(self.addresses), "JAXTRAIN_HOST_INDEX": str(index)} | env
        if index in self.processes:
            self.processes[index].wait(DEADLINE_S)
        command = [*self.prefix(index), sys.executable, "-c", SUPERVISOR, *self.words]
        with open(self.folder / f"said.{index}", "a") as said:
            self.processes[index] = subprocess.Popen(
                command, cwd=ROOT, env=own, stdout=said, stderr=said, stdin=subprocess.DEVNULL
            )

    def place(self, count):
        return [f"127.0.0.1:{port}" for port in free_ports(count)]

    def prefix(self, index):
        return []

    def said(self, index=None):
        which = range(self.count) if index is None else [index]
        return "\n".join((self.folder / f"said.{i}").read_text() for i in which)

    def until(self, text, index=None, count=1):
        """Until somebody has said this so often."""
        self.until_true(lambda: self.said(index).count(text) >= count, repr(text))

    def until_true(self, holds, what):
        end = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}\n{self.said()}"
            time.sleep(0.02)

    def signal(self, index, number):
        self.processes[index].send_signal(number)

    def lead(self, run_dir=None):
        """The host of the newest term."""
        terms = (run_dir or self.folder) / "terms"
        newest = max((int(path.name) for path in terms.glob("*") if path.name.isdecimal()), default=0)
        return self.addresses.index(json.loads((terms / str(newest)).read_text())["address"]) if newest else None

    def end(self, indices=None):
        """The exit codes, once these have ended."""
        indices = self.processes if indices is None else indices
        end = time.monotonic() + DEADLINE_S
        codes = {}
        for index in indices:
            try:
                codes[index] = self.processes[index].wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"supervisor {index} has not ended\n{self.said()}") from None
        return codes

    def rows(self):
        path = self.folder / "incidents.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        assert_gone(self.folder)
        for run_dir in (self.folder, self.folder / "tiny"):
            for name in self.addresses:
                shutil.rmtree(memory_folder(run_dir, name), ignore_errors=True)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def assert_gone(folder):
    """No process is left whose command line names this folder."""
    end = time.monotonic() + DEADLINE_S
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(p)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
