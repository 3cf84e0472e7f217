"""The lead with small scripts in the place of trainers, always in a process of its own, as a user runs it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.exits import Exit
from jaxtrain.resilience import lead as leading
from jaxtrain.resilience import pulse
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.faults import Fault, parse
from jaxtrain.resilience.host import Host, Plan, memory_folder
from jaxtrain.resilience.pulse import Beat
from jaxtrain.resilience.verdict import Status, Verdict
from tests.resilience.ends import Still
from tests.resilience.lines import until

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60  # far above what any of these takes, below a test run's patience
LEAD = """
import sys, threading
from pathlib import Path
from jaxtrain.errors import UserError
from jaxtrain.resilience import faults
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.host import Host, memory_folder
from jaxtrain.resilience.lead import Lead

folder, steps, processes, *given = sys.argv[1:]
injected = [faults.placed(faults.parse(text), int(processes), int(steps)) for text in given]
changed = threading.Event()
fake = [sys.executable, "tests/resilience/fake_trainer.py"]
service = [sys.executable, "-c", "from jaxtrain.resilience.child import READY; print(READY, flush=True); input()"]
try:
    host = Host(["train", folder, steps], int(processes), memory_folder(Path(folder)), changed, trainer=fake, service=service)
    print("memory", host.folder, flush=True)
    lead = Lead(host, Path(folder), changed, Deadlines(floor=1.0), lambda n: faults.environment(injected, n))
    sys.exit(lead.run())
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture(autouse=True)
def forgotten(tmp_path):
    """What a run that did not end well leaves in memory for the next."""
    yield
    shutil.rmtree(memory_folder(tmp_path), ignore_errors=True)


def start(folder, *faults, steps=30, processes=2):
    command = [sys.executable, "-c", LEAD, str(folder), str(steps), str(processes), *faults]
    pipe = subprocess.PIPE
    env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PATH": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def run(folder, *faults, **how):
    """Exit code, output, errors, incidents."""
    lead = start(folder, *faults, **how)
    output, errors = lead.communicate(timeout=DEADLINE_S)
    path = folder / "incidents.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lead.returncode, output, errors, rows


def test_a_run_without_failures_has_one_generation_and_no_incident(tmp_path):
    code, output, _, rows = run(tmp_path)
    assert (code, rows) == (0, [])
    lines = output.splitlines()[1:]
    assert sorted(lines) == ["[p0] generation 1 from step 0", "[p1] generation 1 from step 0"]


def test_a_killed_trainer_is_named_and_the_run_goes_on_from_what_was_saved(tmp_path):
    code, output, errors, (row,) = run(tmp_path, "kill:process=1,step=12")
    assert code == 0
    assert "[p1] generation 2 from step 10" in output
    assert row["culprits"] == [1] and row["what"] == "SIGKILL" and "data 1" in row["line"]
    assert (row["step"], row["restored_step"], row["replayed_steps"]) == (12, 10, 2)
    assert row["recovery_seconds"] == pytest.approx(sum(row["seconds"].values()), abs=0.01)
    assert "[lead] incident 1: process 1" in errors


def test_a_run_folder_that_another_process_writes_is_waited_for_and_nobody_is_to_blame(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on elsewhere")
        lock.flush()
        lead = start(tmp_path)
        said = iter(lead.stderr.readline, "")
        assert "another live process writes the run folder" in next(said)
        assert "in use by process 7 on elsewhere" in next(said)
    lead.communicate(timeout=DEADLINE_S)
    (row,) = map(json.loads, (tmp_path / "incidents.jsonl").read_text().splitlines())
    assert lead.returncode == 0 and row["culprits"] == [] and row["what"] == "run folder held"


@pytest.mark.parametrize(("phase", "pauses"), [("start", True), ("prepare", True), ("save", True), ("end", True), ("step", False)])
def test_attempts_that_fail_where_a_disk_may_be_full_are_not_used_up_at_once(tmp_path, monkeypatch, phase, pauses):
    said, host = [], Still()
    host.poll_s = 0.01
    monkeypatch.setattr(leading, "as_lead", said.append)
    monkeypatch.setattr(leading, "PAUSES_S", (0.0, 0.01))
    again = leading.Lead(host, tmp_path, threading.Event(), Deadlines())
    again._failures = 2
    beat = Beat(1, 1, 1, 30, phase, 0.0, "", "", {}, {})
    again._pause(Verdict(what="exit code 1", culprits=(0,), line="", statuses=[Status(index=0, host="h", pid=1, code=1, beat=beat)]))
    assert said == ["the next attempt comes in 0 s"] * pauses


def test_a_stopped_trainer_is_noticed_named_and_killed_with_the_evidence_kept(tmp_path):
    code, _, errors, (row,) = run(tmp_path, "stop:process=0,step=12")
    assert code == 0 and row["what"] == "hang" and row["culprits"] == [0]
    assert "was stopped" in row["line"] and 1.0 <= row["seconds"]["detection"] < 3.0
    evidence = (tmp_path / "incidents" / "0001" / "p0.txt").read_text()
    assert "phase step" in evidence and "stopped" in evidence and "thread" in evidence


def test_a_trainer_that_hangs_in_python_is_named_though_the_other_runs_on(tmp_path):
    code, _, _, (row,) = run(tmp_path, "hang:process=1,step=12,phase=data")
    assert code == 0 and row["culprits"] == [1] and "phase data" in row["line"]
    assert "(jaxtrain/resilience/injection.py" in row["line"]  # where it stands, from its stack


def test_failures_one_after_the_other_are_each_recovered(tmp_path):
    faults = ["kill:process=0,step=7", "exit:process=1,step=12,generation=2", "exception:process=1,step=22,generation=3"]
    code, output, _, rows = run(tmp_path, *faults)
    assert code == 0
    assert [row["culprits"] for row in rows] == [[0], [1], [1]]
    assert "generation 4 from step 20" in output


def test_generations_that_make_no_progress_end_the_run_with_a_report(tmp_path):
    faults = [f"kill:process=1,step=12,generation={number}" for number in range(1, 9)]
    code, _, errors, rows = run(tmp_path, *faults)
    assert code == 1 and len(rows) == 5
    assert "5 generations in a row made no new step" in errors and "does not get beyond it" in errors
    assert [row["tier"] for row in rows] == ["the recovery failed"] * 4 + ["not seen to its end"]
    assert memory_folder(tmp_path).exists()  # with the newest snapshots, for the same command


@pytest.mark.slow
def test_trainers_that_do_not_get_to_train_are_given_time(tmp_path):
    faults = [f"exit:process={i},step=0,phase=restore,generation={number}" for number in (1, 2) for i in (0, 1)]
    code, _, errors, rows = run(tmp_path, *faults)
    assert code == 0 and len(rows) == 2
    assert errors.count("the next attempt comes in 5 s") == 1 and "in 20 s" not in errors


def test_what_no_trainer_can_run_is_not_tried_again(tmp_path):
    code, _, _, rows = run(tmp_path, "exit:process=0,step=3")
    assert code == 0 and len(rows) == 1  # exit code 1 is tried again
    (tmp_path / "saved").unlink()
    lead = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "launch", "--processes", "2", "nowhere.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert lead.returncode == 2 and "no config at nowhere.py" in lead.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_nothing_outlives_it(tmp_path, number):
    lead = start(tmp_path, steps=100_000)
    memory = Path(lead.stdout.readline().split()[1])
    for _ in range(2):
        assert "from step 0" in lead.stdout.readline()
    lead.send_signal(number)
    lead.communicate(timeout=DEADLINE_S)
    assert lead.returncode == {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.UNSAVED}[number]
    assert memory.exists()  # for nothing was saved
    _assert_gone(tmp_path)


def test_a_stop_that_a_dead_trainer_makes_vain_has_a_row_and_is_tried_again(tmp_path):
    lead = start(tmp_path, steps=100_000)
    lead.stdout.readline()
    for _ in range(2):
        assert "from step 0" in lead.stdout.readline()
    os.kill(pulse.read(memory_folder(tmp_path) / "1.1.pulse").pid, signal.SIGKILL)
    lead.send_signal(signal.SIGTERM)
    lead.communicate(timeout=DEADLINE_S)
    assert lead.returncode == Exit.UNSAVED
    (row,) = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert row["what"] == "SIGKILL" and row["culprits"] == [1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordination_service_that_is_lost_is_missed_though_no_trainer_ends(tmp_path, number):
    lead = start(tmp_path, steps=400)
    lead.stdout.readline()
    for _ in range(2):
        assert "from step 0" in lead.stdout.readline()
    children = Path(f"/proc/{lead.pid}/task/{lead.pid}/children").read_text().split()
    service = [pid for pid in children if "input()" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(service[0]), number)  # the next generation's may be there
    _, errors = lead.communicate(timeout=DEADLINE_S)
    (row,) = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert lead.returncode == 0 and row["what"] == "service lost" and row["culprits"] == [], errors


def test_trainers_are_late_before_they_have_said_a_word_and_a_stopped_standby_is_replaced(tmp_path):
    silent = [sys.executable, "-c", "from jaxtrain.resilience.child import READY; print(READY, flush=True); input(); input()"]
    host = Host(["train"], 2, memory_folder(tmp_path), threading.Event(), trainer=silent)
    try:
        host.prepare(0)
        until(host.ready)
        stopped = host._standbys[0].pid
        os.kill(stopped, signal.SIGSTOP)
        until(host._standbys[0].stopped)
        host.prepare(0)
        assert stopped not in [child.pid for child in host._standbys] and len(host._standbys) == 2
        host.start(Plan(generation=3, service="", first=0, count=2, env={}))
        assert [(s.beat.phase, s.beat.generation) for s in host.statuses()] == [("start", 3)] * 2
        host.prepare(0)
        until(host.ready)
        host._standbys[0].kill(10.0)
        assert not host.ready()
        host.tend()
        until(host.ready)
    finally:
        host.forget()
        host.close()
    assert not memory_folder(tmp_path).exists()


def test_nothing_outlives_a_lead_that_is_killed(tmp_path):
    lead = start(tmp_path, steps=100_000)
    memory = Path(lead.stdout.readline().split()[1])
    for _ in range(2):
        assert "from step 0" in lead.stdout.readline()
    lead.kill()
    lead.communicate(timeout=DEADLINE_S)
    _assert_gone(tmp_path)
    code, _, _, _ = run(tmp_path)  # whose supervisor takes over what the killed one left in memory, and clears it
    assert code == 0 and not memory.exists()


def test_an_incident_that_outlived_its_supervisor_has_a_row(tmp_path):
    lead = start(tmp_path, "kill:process=1,step=12", "hang:process=0,step=12,generation=2", steps=100_000)
    for line in lead.stdout:
        if "] generation 2" in line:
            break
    until(lambda: (tmp_path / "incidents" / "0001.json").exists())
    lead.kill()
    lead.communicate(timeout=DEADLINE_S)
    _, _, _, rows = run(tmp_path, "kill:process=0,step=22")
    assert [row["incident"] for row in rows] == [1, 2] and [row["culprits"] for row in rows] == [[1], [0]]
    assert rows[0]["tier"] == "not seen to its end" and not [*(tmp_path / "incidents").iterdir()]


def test_a_machine_that_stood_still_is_no_failure(tmp_path):
    lead = start(tmp_path, steps=150)
    memory = Path(lead.stdout.readline().split()[1])
    for _ in range(2):
        assert "from step 0" in lead.stdout.readline()
    trainers = [pulse.read(path).pid for path in memory.glob("*.pulse")]
    for pid in (lead.pid, *trainers):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)  # longer than the deadline of any phase, and than a supervisor takes between two looks
    for pid in (lead.pid, *trainers):  # the supervisor looks before any trainer has moved
        time.sleep(0.2)
        os.kill(pid, signal.SIGCONT)
    lead.communicate(timeout=DEADLINE_S)
    assert lead.returncode == 0 and len(trainers) == 2
    assert not (tmp_path / "incidents.jsonl").exists()


def test_a_run_has_one_supervisor_on_a_host(tmp_path):
    lead = start(tmp_path, steps=100_000)
    assert lead.stdout.readline().startswith("memory")
    second = start(tmp_path, steps=10)
    _, errors = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 1 and "has a supervisor on this host already" in errors
    lead.terminate()
    lead.communicate(timeout=DEADLINE_S)


def _assert_gone(folder):
    """No process is left whose command line names this folder."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(p)]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_fault_is_written_as_its_kind_and_fields():
    assert parse("kill:process=1,step=30") == Fault(kind="kill", process=1, step=30)
    assert parse("slow:seconds=0.5,phase=data") == Fault(kind="slow", seconds=0.5, phase="data")
    for text, words in (("kil", "did you mean 'kill'"), ("kill:stp=3", "did you mean 'step'"), ("kill:step=x", "type int")):
        with pytest.raises(ConfigError, match=words):
            parse(text)


def test_a_run_folder_that_cannot_be_written_stops_no_recovery(tmp_path):
    (tmp_path / "incidents.jsonl").mkdir()  # so that root cannot write it either
    (tmp_path / "incidents").write_text("")
    lead = start(tmp_path, "kill:process=1,step=12", "stop:process=0,step=22,generation=2")
    _, errors = lead.communicate(timeout=DEADLINE_S)
    assert lead.returncode == 0, errors
    assert "incident 1 is not recorded" in errors and "the evidence is not kept" in errors
