"""Killed at any moment, the same command continues, and ends where an undisturbed run ends: bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Console, Jsonl
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps=400, log_every=1, checkpoint=CheckpointConfig(every=25, keep_last=2), sinks=(Console(), Jsonl())
)
"""
DEADLINE = 180  # seconds for one process, on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the config, and the environment of a process that trains it."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "config.py").write_text(CONFIG)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    return folder, env


def _start(place, name, *argv, verb=("train",)):
    folder, env = place
    command = [sys.executable, "-m", "jaxtrain", *verb, "config.py", "--name", name, "--runs-dir", "runs", *argv]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process):
    try:
        out, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, out


def _rows(place, name):
    """The rows of a run without what a clock says."""
    lines = (place[0] / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


def _hash(place, name):
    folder, env = place
    command = [sys.executable, "-m", "jaxtrain", "checkpoint", "hash", f"runs/{name}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def _step(place, name):
    """The last whole row's step, 0 before there is one."""
    path = place[0] / "runs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _when_past(place, name, process, step):
    """Waits until the run has written a row past `step`; False where it ended before."""
    end = time.monotonic() + DEADLINE
    while _step(place, name) <= step:
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "no progress"
        time.sleep(0.005)
    return True


@pytest.fixture(scope="module")
def undisturbed(place):
    code, out = _finish(_start(place, "undisturbed"))
    assert code == 0, out
    return _rows(place, "undisturbed"), _hash(place, "undisturbed")


def _killed_until_done(place, name, kills, seed):
    """Trains to the end although SIGKILL comes at `kills` random moments: at a step, in a start, in a save."""
    draw, reached = random.Random(seed), 0
    for _ in range(kills):
        process = _start(place, name)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 3))
        else:
            _when_past(place, name, process, reached + draw.randrange(1, 400 // kills + 10))
            time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.communicate()
        reached = min(_step(place, name), 380)
    code, out = _finish(_start(place, name))
    assert code == 0, out
    assert "resumed at step" in out


def test_a_run_killed_three_times_equals_one_that_was_not(place, undisturbed):
    _killed_until_done(place, "killed", kills=3, seed=1)
    assert (_rows(place, "killed"), _hash(place, "killed")) == undisturbed


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_one_that_was_not(place, undisturbed):
    _killed_until_done(place, "killed20", kills=20, seed=2)
    assert (_rows(place, "killed20"), _hash(place, "killed20")) == undisturbed


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_stops_and_the_same_command_continues(place, undisturbed, number, expected):
    name = f"stopped{expected}"
    process = _start(place, name)
    _when_past(place, name, process, 60)
    process.send_signal(number)
    code, out = _finish(process)
    assert code == expected, out
    assert "the same command continues" in out
    stopped = _step(place, name)
    assert (place[0] / f"runs/{name}/checkpoints/{stopped}/manifest.json").exists()
    code, out = _finish(_start(place, name))
    assert f"resumed at step {stopped}" in out
    assert (_rows(place, name), _hash(place, name)) == undisturbed


def test_a_second_ctrl_c_stops_at_once(place):
    process = _start(place, "twice", "--steps", "1000000")
    _when_past(place, "twice", process, 10)
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "again to stop at once" in line:
            process.send_signal(signal.SIGINT)
            break
    begin = time.monotonic()
    code, out = _finish(process)
    assert code == 130
    assert time.monotonic() - begin < 5
    assert "the same command continues" not in out


def test_a_flipped_byte_falls_back_to_the_checkpoint_before_and_says_so(place, undisturbed):
    process = _start(place, "flipped")
    _when_past(place, "flipped", process, 110)
    process.kill()
    process.communicate()
    checkpoints = place[0] / "runs/flipped/checkpoints"
    newest = max((int(p.parent.name) for p in checkpoints.glob("*/manifest.json")))
    victim = max((p for p in (checkpoints / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    code, out = _finish(_start(place, "flipped"))
    assert code == 0, out
    assert f"resumed at step {newest - 25}" in out
    assert victim.name in out
    assert (_rows(place, "flipped"), _hash(place, "flipped")) == undisturbed


def test_two_processes_train_what_one_process_trains_on_as_many_devices(place):
    flags = ("--steps", "30", "--mesh.tensor", "2")
    code, out = _finish(_start(place, "one", "--fake-devices", "4", *flags))
    assert code == 0, out
    assert "\ntensor 2: cuts F N K V, and the sequence between blocks" in out  # what the axis is given to do is said
    launch = ("launch", "--processes", "2", "--devices-per-process", "2")
    code, out = _finish(_start(place, "two", *flags, verb=launch))
    assert code == 0, out
    assert (_rows(place, "one"), _hash(place, "one")) == (_rows(place, "two"), _hash(place, "two"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(place):
    assert _finish(_start(place, "diverges", "--steps", "30"))[0] == 0
    code, out = _finish(_start(place, "diverges", "--steps", "60", "--optim.peak-lr", "1e30", "--accept-changes"))
    assert code == 65
    assert "is nan at step" in out or "is inf at step" in out
    assert "the last good checkpoint is step 30" in out


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_not_continued_unasked(place):
    assert _finish(_start(place, "other", "--steps", "30"))[0] == 0
    code, out = _finish(_start(place, "other", "--steps", "40", "--data.seed", "5", "--accept-changes"))
    assert code == 0, out
    (place[0] / "runs/other/config.1.json").unlink()
    (place[0] / "runs/other/config.json").unlink()
    code, out = _finish(_start(place, "other", "--steps", "50", "--data.seed", "6"))
    assert code == 1
    assert "was trained on other data" in out
