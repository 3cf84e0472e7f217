"""Real trainers on hosts of one machine: one is lost, a spare goes on from the copies that a buddy kept of its memory."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.resilience.supervisors import ROOT, Job

pytestmark = pytest.mark.slow
PATIENCE_S = 400  # five processes that import jax, on a machine that has other work
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Jsonl
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.policy import SnapshotConfig
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps=1200, log_every=1, checkpoint=CheckpointConfig(every=1000, keep_last=2), sinks=(Jsonl(),), eval=None,
    snapshot=SnapshotConfig(every=20), watch=Deadlines(floor=200.0, lease=8.0),
)
"""


class Launched(Job):
    """Supervisors as a user starts them. `steps` is ignored."""

    flags = ("--spares", "1")

    def start(self, index, **env):
        own = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_HOST_INDEX": str(index)} | env
        own |= {"JAXTRAIN_HOSTS": ",".join(self.addresses), "JAXTRAIN_CACHE_DIR": str(self.folder.parent / "cache")}
        flags = ["launch", "--devices-per-process", "1", *self.flags]
        command = [*self.prefix(index), sys.executable, "-m", "jaxtrain", *flags, str(self.folder / "config.py"), "--runs-dir", str(self.folder)]
        with open(self.folder / f"said.{index}", "a") as said:
            self.processes[index] = subprocess.Popen(command, cwd=ROOT, env=own, stdout=said, stderr=said)

    def step(self):
        path = self.folder / "tiny" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


def jaxtrain(folder, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(folder.parent / "cache")}
    command = [sys.executable, "-m", "jaxtrain", *words, "--runs-dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout


def digest(run_dir):
    command = [sys.executable, "-m", "jaxtrain", "checkpoint", "hash", str(run_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout.split()[-1]


def test_a_spare_goes_on_from_buddy_copies_and_ends_with_the_bits_of_an_undisturbed_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.resilience.supervisors.DEADLINE_S", PATIENCE_S)
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG)
    job = Launched(folder, 3)
    try:
        job.until_true(lambda: job.step() > 60, "step 60")
        (lost,) = [i for i in range(3) if "[p1]" in job.said(i)]
        job.signal(lost, signal.SIGKILL)
        codes = job.end({0, 1, 2} - {lost})
        assert set(codes.values()) == {0}, job.said()
        assert "buddy copies of 1 process" in job.said()
        (row,) = [json.loads(line) for line in (folder / "tiny" / "incidents.jsonl").read_text().splitlines()]
        assert row["what"] == "host lost" and row["restored_step"] % 20 == 0 < row["restored_step"]
    finally:
        job.close()
    begin = time.monotonic()
    jaxtrain(folder, "train", str(folder / "config.py"), "--name", "undisturbed", "--fake-devices", "2")
    print(f"undisturbed {time.monotonic() - begin:.1f} s")
    assert digest(folder / "tiny") == digest(folder / "undisturbed")
