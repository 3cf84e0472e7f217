"""The local launcher, with small scripts in the place of trainers, always in a process of its own, as a user runs it."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.launch.local import Options, main, parse

ROOT = Path(__file__).parent.parent.parent
LAUNCH = """
import sys
from jaxtrain.launch.local import launch
sys.exit(launch(sys.argv[2:], int(sys.argv[1]), grace_s=1.0))
"""
DEADLINE_S = 30  # far above what any of these takes, below a test run's patience
ME = "import os, sys, time, signal; me = int(os.environ['JAXTRAIN_PROCESS_ID'])\n"


def start(code: str, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, str(processes), sys.executable, "-c", ME + textwrap.dedent(code)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code: str, processes: int = 2) -> tuple[int, list[str], str]:
    """Exit code, sorted output lines, error output."""
    launcher = start(code, processes)
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    return launcher.returncode, sorted(output.splitlines()), errors


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition) -> bool:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_each_process_is_told_its_place_and_its_lines_are_headed_by_it():
    code = "print(os.environ['JAXTRAIN_NUM_PROCESSES'], os.environ['JAX_PLATFORMS']); print('oh', file=sys.stderr)"
    status, output, errors = run(code, 3)
    assert (status, output) == (0, ["[p0] 3 cpu", "[p1] 3 cpu", "[p2] 3 cpu"])
    assert sorted(errors.splitlines()) == ["[p0] oh", "[p1] oh", "[p2] oh"]


def test_all_processes_are_given_the_same_free_port():
    _, output, _ = run("print(os.environ['JAXTRAIN_COORDINATOR'])")
    addresses = {line.split()[1] for line in output}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")


def test_the_exit_code_is_that_of_the_first_that_failed_and_the_others_are_ended():
    start = time.monotonic()
    status, _, errors = run("sys.exit(7) if me == 1 else time.sleep(60)")
    assert status == 7
    assert "process 1 ended with 7" in errors
    assert time.monotonic() - start < DEADLINE_S


def test_those_that_end_by_themselves_in_time_are_not_disturbed():
    status, output, _ = run("time.sleep(0 if me else 0.4); print('done'); sys.exit(3 if me else 0)")
    assert (status, output) == (3, ["[p0] done", "[p1] done"])


def test_one_that_ignores_sigterm_is_killed():
    status, _, errors = run("signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.exit(9) if me else time.sleep(60)")
    assert status == 9
    assert "did not end by themselves" in errors


def test_a_process_that_a_signal_killed_counts_as_a_shell_counts_it():
    assert run("os.kill(os.getpid(), signal.SIGKILL) if me else time.sleep(60)")[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once_and_they_may_take_their_time(number):
    launcher = start("""
        got = []
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda number, frame: got.append(number))
        print("ready")
        while not got:
            time.sleep(0.01)
        time.sleep(0.1 + 1.5 * me)  # longer than the grace after a failure
        print("saved after", got)
        sys.exit(128 + got[0])
    """)
    assert [launcher.stdout.readline()[5:] for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=DEADLINE_S)
    assert sorted(output.splitlines()) == [f"[p{i}] saved after [{int(number)}]" for i in range(2)]
    assert launcher.returncode == 128 + number


def test_a_second_signal_kills():
    launcher = start("""
        signal.signal(signal.SIGINT, lambda *_: print("noted"))
        print("ready")
        while True:
            time.sleep(0.01)
    """)
    for word in ("ready", "noted"):
        assert [launcher.stdout.readline()[5:] for _ in range(2)] == [f"{word}\n"] * 2
        launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_process_outlives_a_launcher_that_was_killed():
    launcher = start("print(os.getpid()); time.sleep(60)")
    pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    launcher.kill()
    launcher.communicate(timeout=DEADLINE_S)
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_a_reader_that_left_does_not_stop_the_run(tmp_path):
    with start(f"[print('x' * 1000) for _ in range(1000)]; open('{tmp_path}/' + str(me), 'w').close()") as launcher:
        launcher.stdout.close()
        launcher.stderr.read()
    assert launcher.returncode in (0, 120)  # 120: Python could not flush its own output at exit
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_own_flags_come_before_the_config_and_the_rest_is_the_trainers():
    assert parse(["--processes", "4", "--devices-per-process=2", "c.py", "--steps", "3", "--processes", "9"]) == (
        Options(processes=4, devices_per_process=2),
        ["c.py", "--steps", "3", "--processes", "9"],
    )
    assert parse(["c.py"]) == (Options(), ["c.py"])


@pytest.mark.parametrize(
    "argv, what, fix",
    [
        (["--procesess", "2", "c.py"], "has no flag --procesess", "did you mean '--processes'"),
        (["--processes", "two", "c.py"], "--processes needs a number", ""),
        (["--processes=0", "c.py"], "--processes needs a number", ""),
        (["--processes"], "--processes needs a number", ""),
        (["--processes", "2"], "needs a CONFIG", "a file such as configs/quickstart.py"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(argv, what, fix):
    with pytest.raises(ConfigError, match=what) as error:
        main(argv)
    assert error.value.fix.startswith(fix)


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help_shows_the_flags(argv, capsys):
    assert main(argv) == 0
    assert "--devices-per-process N (default: 1)" in capsys.readouterr().out


def test_what_is_started_is_jaxtrain_train_with_fake_devices(monkeypatch):
    seen = []
    monkeypatch.setattr("jaxtrain.launch.local.launch", lambda *call: seen.append(call) or 0)
    assert main(["--processes", "3", "--devices-per-process", "4", "c.py", "--steps", "5"]) == 0
    trainer = [sys.executable, "-m", "jaxtrain", "train", "c.py", "--fake-devices", "4", "--steps", "5"]
    assert seen == [(trainer, 3)]
