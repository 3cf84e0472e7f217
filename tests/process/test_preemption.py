"""A host is taken away with a warning: all processes save the same step in time, or say that they could not."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
import dataclasses, os, sys, time
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Jsonl
from tests.tiny import TINY

@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowDisk:
    '''No sink: where one is opened jax is there, and from then on no save ends while a file `stalled` is there.'''

    def open(self, run_dir, first_step, steps):
        from jaxtrain.checkpoint import storage
        from jaxtrain.observe.sinks import Jsonl
        if "BROKEN" in os.environ:
            raise ValueError("a fault of the user's own code")
        write = storage.end_write

        def end_write(writes, deadline):
            while os.path.exists("stalled"):
                time.sleep(0.05)
            write(writes, deadline)

        storage.end_write = end_write
        return Jsonl().open(run_dir, first_step, steps)

if "LATE" in os.environ:  # the last thing that a process does before it leaves takes half a second, twice
    program = sys.modules["__main__"]
    flush, program._flush = program._flush, lambda stream: time.sleep(0.5) or flush(stream)

config = dataclasses.replace(
    TINY, steps=1_000_000, log_every=1, eval=None, checkpoint=CheckpointConfig(every=20), sinks=(SlowDisk(),)
)
"""
DEADLINE_S = 180  # for one process, on a busy machine
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preemption")
    (folder / "config.py").write_text(CONFIG)
    return folder


def start(place: Path, name: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxtrain", "train", "config.py", "--name", name]
    ours = {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(place / "cache"), "PYTHONUNBUFFERED": "1"}
    STARTED.append(
        subprocess.Popen(
            command, cwd=place, env=os.environ | ours | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    )
    return STARTED[-1]


def pair(place: Path, name: str, **env: dict[str, str]) -> list[subprocess.Popen]:
    """Two processes of one run; `p0` and `p1` are added to the environment of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAXTRAIN_COORDINATOR": f"127.0.0.1:{port}", "JAXTRAIN_NUM_PROCESSES": "2"}
    return [start(place, name, JAXTRAIN_PROCESS_ID=str(i), **shared, **env.get(f"p{i}", {})) for i in range(2)]


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=DEADLINE_S)
    STARTED.remove(process)
    return process.returncode, said


def await_rows(place: Path, name: str, process: subprocess.Popen, count: int) -> None:
    end, path = time.monotonic() + DEADLINE_S, place / "runs" / name / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)


def checkpoints(place: Path, name: str) -> set[int]:
    return {int(path.parent.name) for path in (place / "runs" / name / "checkpoints").glob("*/manifest.json")}


def test_a_notice_on_one_host_stops_all_after_one_step_and_all_say_preempted(place):
    processes = pair(place, "two", p1={"JAXTRAIN_NOTICE": str(place / "notice")})
    await_rows(place, "two", processes[0], 30)
    (place / "notice").touch()
    (code, lead), (other, said) = map(ended, processes)
    assert (code, other) == (75, 75), lead + said
    assert "SIGTERM" in said and "there is a notice" in said
    step = int(re.search(r"stopped by SIGTERM at step (\d+); the same command continues", lead)[1])
    assert max(checkpoints(place, "two")) == step


def test_sigterm_while_a_start_waits_for_its_peers_ends_it_as_preempted(place):
    waiting = start(
        place, "alone", JAXTRAIN_COORDINATOR="127.0.0.1:9", JAXTRAIN_NUM_PROCESSES="2", JAXTRAIN_PROCESS_ID="1"
    )
    time.sleep(2)
    waiting.send_signal(signal.SIGTERM)
    code, said = ended(waiting)
    assert code == 75, said
    assert "nothing to save" in said


def test_a_save_that_outlasts_the_grace_is_left_before_the_kill_and_the_checkpoint_before_it_stays(place):
    process = start(place, "late", JAXTRAIN_GRACE_SECONDS="6")
    await_rows(place, "late", process, 45)
    (place / "stalled").touch()
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert any("not saved within 5.4 s of 6 s grace" in line for line in process.stdout)
    assert time.monotonic() - begin < 6
    assert ended(process)[0] == 74
    (place / "stalled").unlink()
    newest = max(checkpoints(place, "late"))
    process = start(place, "late")
    assert f"resumed at step {newest}" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75


def test_the_process_that_serves_the_others_leaves_after_them(place):
    processes = pair(place, "last", p1={"JAXTRAIN_NOTICE": str(place / "another"), "LATE": "1"})
    await_rows(place, "last", processes[0], 30)
    (place / "another").touch()
    (code, lead), (other, said) = map(ended, processes)
    assert (code, other) == (75, 75), lead + said


def test_a_fault_in_code_of_the_users_ends_all_processes(place):
    (code, lead), (other, said) = map(ended, pair(place, "broken", p0={"BROKEN": "1"}))
    assert (code, other) == (1, 1)
    assert "ValueError: a fault of the user's own code" in lead
    assert said.splitlines()[-1].endswith("""process 0 has ended: ValueError("a fault of the user's own code")"""), said


def test_a_mistake_that_only_the_first_process_can_see_ends_all_with_its_words_and_its_code(place):
    (place / "runs" / "blocked").mkdir(parents=True)
    (place / "runs" / "blocked" / "metrics.jsonl").mkdir()
    (code, lead), (other, said) = map(ended, pair(place, "blocked"))
    assert (code, other) == (1, 1), lead + said
    assert "RunError: cannot write metrics" in lead and "process 0 has ended: RunError: cannot write metrics" in said
    assert "Check failure stack trace" not in said
