"""What others do to the folder in memory of a run that is supervised."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import pulse
from jaxtrain.resilience.deadlines import ENOUGH
from jaxtrain.resilience.host import Host, Plan
from tests.disk import disk, fill  # noqa: F401
from tests.resilience.lines import until
from tests.resilience.test_lead import DEADLINE_S, forgotten, start  # noqa: F401

SILENT = [sys.executable, "-c", "from jaxtrain.resilience.child import READY; print(READY, flush=True); input(); input()"]


@pytest.fixture
def host(tmp_path):
    host = Host(["train"], 2, tmp_path / "memory", threading.Event(), trainer=SILENT)
    yield host
    host.close()


def started(host, generation=1):
    host.prepare(0)
    until(host.ready)
    host.start(Plan(generation=generation, service="", first=0, count=2, env={}))


@pytest.fixture
def lead(tmp_path):
    """Of a run of two fake trainers, which ends with the test."""
    process = start(tmp_path, steps=200)
    process.memory = Path(process.stdout.readline().split()[1])
    yield process
    process.kill()
    process.communicate(timeout=DEADLINE_S)


def trainers(memory):
    """Once both have trained for so long that their deadlines are learned."""
    paths = [memory / f"1.{index}.pulse" for index in range(2)]
    until(lambda: all((beat := pulse.read(path)) and beat.counts["step"] > ENOUGH["step"] for path in paths))
    return [pulse.read(path).pid for path in paths]


def rows_of(tmp_path, lead):
    """The exit code, what was said, and the incidents."""
    _, errors = lead.communicate(timeout=DEADLINE_S)
    path = tmp_path / "incidents.jsonl"
    return lead.returncode, errors, path.read_text() if path.exists() else ""


def test_a_folder_that_was_removed_is_made_and_locked_again(host, tmp_path):
    started(host)
    shutil.rmtree(host.folder)
    host.fence()
    started(host, generation=2)
    assert [s.beat.generation for s in host.statuses()] == [2, 2]
    with pytest.raises(RunError, match="has a supervisor on this host already"):
        Host(["train"], 2, host.folder, threading.Event())


def test_a_folder_that_was_removed_is_another_supervisors_where_that_one_came_first(host):
    shutil.rmtree(host.folder)
    other = Host(["train"], 2, host.folder, threading.Event(), trainer=SILENT)
    try:
        with pytest.raises(RunError, match="has a supervisor on this host already"):
            started(host)
    finally:
        other.close()


def test_a_full_memory_says_so_before_anything_starts(monkeypatch, tmp_path):
    def full(*how, **named):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunError, match="No space left on device(.|\n)*make room"):
        Host(["train"], 2, tmp_path / "memory", threading.Event())


def test_trainers_start_and_are_watched_in_a_full_memory(disk):
    fill(disk)
    host = Host(["train"], 2, disk / "memory", threading.Event(), trainer=SILENT)
    try:
        started(host)
        assert [s.beat.phase for s in host.statuses()] == ["start", "start"]
    finally:
        host.close()


def test_a_run_whose_folder_in_memory_is_removed_goes_on_after_a_kill(lead, tmp_path):
    first, _ = trainers(lead.memory)
    shutil.rmtree(lead.memory)
    os.kill(first, signal.SIGKILL)
    code, errors, rows = rows_of(tmp_path, lead)
    assert code == 0 and rows.count('"what": "SIGKILL"') == 1, errors
    assert "it is made again" in errors


def test_a_stopped_trainer_is_missed_though_its_pulse_was_removed(lead, tmp_path):
    first, _ = trainers(lead.memory)
    for path in lead.memory.glob("*.pulse"):
        path.unlink()
    os.kill(first, signal.SIGSTOP)
    code, errors, rows = rows_of(tmp_path, lead)
    assert code == 0 and rows.count('"what": "hang"') == 1 and "was stopped" in rows, errors


def test_a_damaged_pulse_ends_no_run(lead, tmp_path):
    trainers(lead.memory)
    for _ in range(200):
        with open(lead.memory / "1.0.pulse", "r+b") as file:
            file.seek(32)
            file.write(b"\x7f" * 8)
    code, errors, _ = rows_of(tmp_path, lead)  # a fake trainer waits for the pulse of the other, and may be missed
    assert code == 0 and "Traceback" not in errors, errors


def test_the_service_is_to_blame_where_the_supervisor_stood_still_while_it_ended_and_its_trainers_with_it(lead, tmp_path):
    both = trainers(lead.memory)
    service = next(pid for pid in children(lead.pid) if "input()" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(lead.pid, signal.SIGSTOP)
    until(lambda: states(f"{lead.pid}/task/*") == {"T"})  # all threads, of which each waits for one child
    for pid, number in [(service, signal.SIGKILL), *((pid, signal.SIGABRT) for pid in both)]:
        os.kill(pid, number)
    until(lambda: all(states(f"{pid}") == {"Z"} for pid in (service, *both)))
    os.kill(lead.pid, signal.SIGCONT)
    code, errors, rows = rows_of(tmp_path, lead)
    assert code == 0 and rows.count('"what": "service lost"') == 1 and rows.count('"culprits": []') == 1, errors


def states(processes):
    """The kernel's letters for these."""
    return {path.read_text().rpartition(")")[2].split()[0] for path in Path("/proc").glob(f"{processes}/stat")}


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
