"""Snapshots in a run: taken behind rows that are on disk, and what a killed run goes on from."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import TINY

from jaxtrain.checkpoint import CheckpointConfig
from jaxtrain.config import load
from jaxtrain.resilience import slots, tiers
from jaxtrain.resilience.health import Judge
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.train.loop import Loop

ROOT = Path(__file__).parents[2]
DEADLINE = 180  # seconds for one process, on a busy machine
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Jsonl
from jaxtrain.resilience.policy import SnapshotConfig
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps=301, log_every=1, checkpoint=CheckpointConfig(every=100), snapshot=SnapshotConfig(every=7), sinks=(Jsonl(),)
)
"""


class Log:
    """Stands in for everything a loop drives, and writes down what was asked of it."""

    def __init__(self):
        self.lines = []

    def write(self, step, row):
        self.lines.append(f"row {step}")

    def flush(self):
        self.lines.append("flush")

    def tick(self, step):
        return {}

    def restart(self, step):
        self.lines.append(f"restart {step}")

    def flags(self):
        return None

    def agreed(self, number):
        assert number == 0


def looped(wired, inline=False, say_steps=False, **fields):
    log = Log()
    config = replace(TINY, eval=None, steps=6, log_every=1, **fields)

    def step(state, batch, flags):
        if say_steps:
            log.lines.append(f"step {state + 1}")
        return state + 1, {"train/loss": np.float32(1), "train/grad_norm": np.float32(1), "stop": np.int32(0)}

    def taken(kind):
        return lambda done, state: log.lines.append(f"{kind} {done}")

    def silent(*args):
        return None

    quiet = dict(last_good=str, beat=silent, judge=Judge(config.health), compare=silent, agreed=silent, say=silent)
    hooks = dict(evaluate=silent, save=taken("save"), check_save=dict, snapshot=taken("snapshot") if wired else None)
    loop = Loop(config=config, step=step, stop=log, recorder=log, clock=log, inline=inline, **hooks, **quiet)
    loop.run(0, [(i, None) for i in range(6)], 0)
    return log.lines


def test_a_snapshot_is_taken_when_its_row_and_all_before_it_are_on_disk():
    lines = looped(True, snapshot=SnapshotConfig(every=2), checkpoint=CheckpointConfig(every=4))
    assert lines == [
        *("restart 0", "row 1", "row 2", "flush", "snapshot 2"),
        *("row 3", "row 4", "flush", "snapshot 4", "save 4", "restart 4"),
        *("row 5", "row 6", "flush", "snapshot 6", "save 6", "restart 6"),
    ]


def test_without_a_supervisors_folder_the_loop_does_what_it_did():
    assert looped(False, snapshot=SnapshotConfig(every=2)) == [
        *("restart 0", *(f"row {i}" for i in range(1, 7)), "flush", "save 6", "restart 6")
    ]


@pytest.mark.parametrize("inline", [False, True])
def test_the_row_of_an_update_is_written_when_it_is_done(inline):
    """The clock counts between rows: from `restart 0`, when nothing compiles any more, or with the compilation."""
    lines = looped(False, inline=inline, say_steps=True)
    dispatched = [lines.index(f"step {i}") for i in range(1, 7)]
    rows = [lines.index(f"row {i}") for i in range(1, 7)]
    assert ("restart 0" in lines) != inline
    assert all((row < after) == inline for row, after in zip(rows, dispatched[1:]))
    assert lines[-4:] == ["row 6", "flush", "save 6", "restart 6"]


def test_a_runs_snapshots_are_flags_of_its_config():
    config = load(ROOT / "configs" / "quickstart.py", ["--snapshot.every", "50", "--snapshot.memory-gb", "2"])
    assert config.snapshot == SnapshotConfig(every=50, memory_gb=2.0)


def test_snapshots_of_another_config_are_another_runs(tmp_path):
    config = replace(TINY, runs_dir=str(tmp_path))
    config.run_dir.mkdir(parents=True)
    runs = [tiers.run_name(c) for c in (config, replace(config, log_every=3), replace(config, seed=1), config)]
    assert runs[0] == runs[1] == runs[3] != runs[2]
    (config.run_dir / "identity").unlink()
    assert tiers.run_name(config) != runs[0], "a run folder that was begun anew is another run"


def _start(place, name, generation):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(place / "cache"), "PYTHONUNBUFFERED": "1"}
    env |= {"JAXTRAIN_SNAPSHOTS": str(place / f"{name}.memory"), "JAXTRAIN_GENERATION": str(generation)}
    command = [sys.executable, "-m", "jaxtrain", "train", "config.py", "--name", name, "--fake-devices", "2"]
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process):
    try:
        out, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


def _result(place, name):
    rows = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]
    return rows, json.loads((place / "runs" / name / "checkpoints" / "301" / "manifest.json").read_text())["arrays"]


def _killed_past(place, name, generation, step):
    process = _start(place, name, generation)
    end = time.monotonic() + DEADLINE
    while (slots.newest([place / f"{name}.memory" / "snapshots"]) or 0) < step:
        assert process.poll() is None and time.monotonic() < end, "no progress"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_memory_and_ends_where_an_undisturbed_one_ends(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    _finish(_start(tmp_path, "undisturbed", 0))
    assert not (tmp_path / "undisturbed.memory" / "snapshots").exists(), "a run that is complete gives the memory back"
    for generation, step in enumerate((130, 180, 301), 1):  # the last one within the last save
        _killed_past(tmp_path, "killed", generation, step)
        held = slots.newest([tmp_path / "killed.memory" / "snapshots"])
    out = _finish(_start(tmp_path, "killed", 4))
    assert held == 301 and "resumed at step 301" in out
    assert "step 301 from memory of 1 process; the" in out or "step 301 from the checkpoint" in out
    assert _result(tmp_path, "killed") == _result(tmp_path, "undisturbed")
