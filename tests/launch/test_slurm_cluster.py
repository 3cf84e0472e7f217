"""A real Slurm of two nodes on this machine: a job preempted, requeued, crashed and bereft of a node loses nothing.

It needs root and Debian's slurm-wlm and munge, and installs nothing. All its files are in one folder of its own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch", "scontrol") if not shutil.which(name, path=SBIN)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts tasks as their user: it needs root"),
]
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, "localhost")  # each looks for the other by its name, so both have to be addresses of this machine
DEADLINE_S = 240  # for anything that is waited for: two processes that start on a busy machine
START_S = 30  # for the daemons
STEPS = 800
CONFIG = f"""
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Jsonl
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps={STEPS}, log_every=1, checkpoint=CheckpointConfig(every=25, keep_last=2), sinks=(Jsonl(),)
)
"""
SLURM_CONF = """
ClusterName=jaxtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
NodeName={nodes[0]},{nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=1 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """The daemons, and what a user types."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        ours = {"PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.env = os.environ | ours | {"JAXTRAIN_CACHE_DIR": str(folder / "cache")}
        text = SLURM_CONF.format(host=HOST, folder=folder, nodes=NODES, ports=free_ports(3))
        (folder / "slurm.conf").write_text(text)
        (folder / "config.py").write_text(CONFIG)
        for name in ("state", *NODES):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self) -> None:
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self._daemon("munged", *(f"--{flag}={self.folder}/munge.{end}" for flag, end in files.items()), "--foreground")
        until("munged listens", (self.folder / "munge.socket").exists, self._said, START_S)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        until("both nodes are idle", self._idle, self._said, START_S)

    def _idle(self) -> bool:
        try:
            return self.says("sinfo", "--noheader", "--format=%t %D") == "idle 2"
        except AssertionError:  # slurmctld does not listen yet
            return False

    def _said(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.out"))

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node)

    def _daemon(self, name: str, *flags: str) -> None:
        key = flags[-1] if name == "slurmd" else name
        marked = self.env | {"TEST_NODE": f"{self.folder}/{key}"}  # inherited by a node's slurmstepd
        with open(self.folder / f"{key}.out", "a") as out:
            self.daemons[key] = subprocess.Popen([shutil.which(name, path=SBIN), *flags], env=marked, stdout=out, stderr=out)

    def stop(self) -> None:
        """Jobs, daemons in reverse, and whatever processes of ours are left: each by its process id."""
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.says("scancel", "--user=root", deadline_s=10)
            until("no job runs", lambda: not self.says("squeue", "--noheader"), deadline_s=40)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait(timeout=10)
        self._kill(f"SLURM_CONF={self.folder}/slurm.conf")

    def lose(self, node: str) -> None:
        """As if its power went: slurmd, slurmstepd and the tasks there; then Slurm is told, who would see it in minutes."""
        slurmd = self.daemons.pop(node)
        slurmd.kill()
        slurmd.wait(timeout=10)
        self._kill(f"TEST_NODE={self.folder}/{node}", f"SLURMD_NODENAME={node}")
        self.says("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def _kill(self, *marks: str) -> None:
        """Every process with one of these words in its environment, and this cluster's."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if f"SLURM_CONF={self.folder}/slurm.conf" in words and set(marks) & set(words):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def says(self, *command: str, deadline_s: float = DEADLINE_S) -> str:
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=deadline_s)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jaxtrain(self, *words: str) -> str:
        return self.says(sys.executable, "-m", "jaxtrain", *words)

    def submit(self, *flags: str) -> str:
        """The number of the job that `jaxtrain launch --slurm` made."""
        said = self.jaxtrain("launch", "--slurm", "config.py", "--nodes", "2", "--gpus-per-node", "0", *flags)
        return re.search(r"^job +(\d+)", said, re.MULTILINE)[1]

    def job(self, number: str) -> dict[str, str]:
        return dict(pair.partition("=")[::2] for pair in self.says("scontrol", "show", "job", number).split())

    def output(self, name: str) -> str:
        return "".join(path.read_text() for path in (self.folder / "runs").glob(f"{name}/slurm-*.out"))

    def report(self) -> str:
        """For a test that fails: what Slurm says of jobs and nodes, and what daemons and jobs have said last."""
        said = [self.says("squeue"), self.says("sinfo", "--Node", "--long"), self.says("sinfo", "--list-reasons")]
        return "\n".join([*said, self._said()[-3000:], self.output("*")[-3000:]])

    def step(self, name: str) -> int:
        """The last whole row's step, 0 before there is one."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
        return json.loads(whole[-1])["step"] if whole else 0

    def await_step(self, name: str, step: int) -> None:
        until(f"{name} is past step {step}", lambda: self.step(name) >= step, self.report)

    def await_restart(self, number: str, restarts: int) -> None:
        """Until it is queued again for the so-manieth time; there Slurm would let it wait for two minutes.

        A node starts nothing of a job in the second in which it ended the last of it: "Job credential revoked".
        """
        until(
            f"restart {restarts}",
            lambda: self.job(number)["JobState"] == "PENDING" and self.job(number)["Restarts"] == str(restarts),
            self.report,
        )
        self.says("scontrol", "update", f"jobid={number}", "starttime=now+5")


def until(what: str, condition, explain=lambda: "", deadline_s: float = DEADLINE_S) -> None:
    begin, end = time.monotonic(), time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not so after {deadline_s} s: {what}\n{explain()}"
        time.sleep(0.25)
    print(f"{time.monotonic() - begin:5.1f} s until {what}")  # shown where a test fails


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
    folder.chmod(0o755)  # munged wants all users to reach its socket
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def kill_trainers(cluster: Cluster, node: str) -> None:
    """kill -9 of the trainers on a node, and of those that wait, which Slurm has nothing to do with."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            trainer = b"jaxtrain.resilience.trainer" in path.with_name("cmdline").read_bytes()
            if trainer and f"SLURM_CONF={cluster.folder}/slurm.conf" in words and f"SLURMD_NODENAME={node}" in words:
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_whatever_happens_to_the_job_the_run_ends_with_the_bits_of_an_undisturbed_one(cluster):
    cluster.jaxtrain("train", "config.py", "--name", "undisturbed", "--fake-devices", "2")
    number = cluster.submit("--name", "run")
    assert os.access(cluster.folder / "runs/run/slurm.sh", os.X_OK)

    cluster.await_step("run", 40)
    cluster.says("scancel", "--signal=TERM", number)  # what --signal does before the time limit
    cluster.await_restart(number, 1)
    assert "preempted, exit code 75: queued again" in cluster.output("run")

    at = cluster.step("run")
    cluster.await_step("run", at + 40)
    cluster.says("scontrol", "requeue", number)  # what preemption by a job of higher priority does
    cluster.await_restart(number, 2)
    assert cluster.output("run").count("stopped by SIGTERM at step") == 2

    at = cluster.step("run")
    cluster.await_step("run", at + 60)
    kill_trainers(cluster, NODES[1])
    until("it goes on", lambda: "incident 1: over" in cluster.output("run"), cluster.report)
    assert "ended by SIGKILL" in cluster.output("run") and cluster.job(number)["Restarts"] == "2"

    at = cluster.step("run")
    cluster.await_step("run", at + 40)
    cluster.says("scancel", number)
    until("it is cancelled", lambda: cluster.job(number)["JobState"] == "CANCELLED")
    assert cluster.step("run") < STEPS

    number = cluster.submit("--name", "run")  # the same command
    until("it has ended", lambda: cluster.job(number)["JobState"] == "COMPLETED", cluster.report)
    assert cluster.jaxtrain("checkpoint", "hash", "runs/run") == cluster.jaxtrain("checkpoint", "hash", "runs/undisturbed")


def test_a_run_outlives_a_node_of_its_job(cluster):
    number = cluster.submit("--name", "outlives", "--data.seed", "5", "--watch.lease", "5")
    cluster.await_step("outlives", 40)
    stays, goes = sorted(NODES)  # the first has the script, and Slurm ends the job with it
    cluster.lose(goes)
    at = cluster.step("outlives")
    cluster.await_step("outlives", at + 40)
    said = cluster.output("outlives")
    assert re.search(f"host {goes}(, which led,)? was lost", said), said
    assert f"hosts {stays} train; the batch is the same, --accumulate 2" in said, said
    assert cluster.job(number)["Restarts"] == "0"
    cluster.says("scancel", number)
    cluster.start_node(goes)
    until("it is gone", lambda: cluster.job(number)["JobState"] == "CANCELLED", cluster.report)


def test_before_the_time_limit_the_job_saves_and_is_queued_again(cluster):
    number = cluster.submit("--name", "time limit", "--steps", "1000000", "--time", "1", "--grace-seconds", "20")
    cluster.await_restart(number, 1)
    assert "stopped by SIGTERM at step" in cluster.output("time limit")
    cluster.says("scancel", number)


def test_one_run_has_one_job_at_a_time_and_what_the_user_got_wrong_is_not_queued_again(cluster):
    first = cluster.submit("--name", "once", "--steps", "1000000", "--data.seed", "3")
    second = cluster.submit("--name", "once", "--steps", "1000000", "--data.seed", "3")
    cluster.await_step("once", 1)
    assert (cluster.job(second)["JobState"], cluster.job(second)["Reason"]) == ("PENDING", "Dependency")
    cluster.says("scancel", second)
    cluster.says("scancel", first)
    until("it is gone", lambda: cluster.job(first)["JobState"] == "CANCELLED")
    (cluster.folder / "config.py").rename(cluster.folder / "elsewhere.py")
    try:
        again = cluster.says("sbatch", "--parsable", "runs/once/slurm.sh")
        until("it has failed", lambda: cluster.job(again)["JobState"] == "FAILED")
        assert cluster.job(again)["ExitCode"].startswith("2:")
    finally:
        (cluster.folder / "elsewhere.py").rename(cluster.folder / "config.py")
