"""Ctrl-C, SIGTERM and the notice file, as small processes without jax hear them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.errors import RunError
from jaxtrain.exits import Exit
from jaxtrain.train.notice import FILE, GRACE, Notice, grace_seconds

ROOT = Path(__file__).parents[2]
START = """
import ctypes, os, signal, time
from jaxtrain.train.notice import Notice
with Notice() as notice:
"""
# a lock taken twice, in C: no Python code of the main thread ever runs again
HANG = """lock = ctypes.create_string_buffer(64)
print('up', flush=True)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)"""
DEADLINE_S = 30


def start(body: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", START + "".join(f"    {line}\n" for line in body.splitlines())]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, float]:
    """Exit code, what it said, seconds from now."""
    begin = time.monotonic()
    try:
        _, said = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return process.returncode, said, time.monotonic() - begin


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, Exit.PREEMPTED), (signal.SIGINT, Exit.INTERRUPTED)], ids=["SIGTERM", "SIGINT"]
)
@pytest.mark.parametrize("before", ["", "notice.guard(); notice.release()\n"], ids=["at the start", "at the end"])
def test_where_nothing_would_be_lost_a_signal_ends_a_process_that_hangs_in_c(number, code, before):
    process = start(before + HANG)
    process.send_signal(number)
    status, said, seconds = ended(process)
    assert (status, seconds < 4) == (code, True)
    assert "nothing to save; the same command continues" in said


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_takes_nothing_does_not_keep_a_signal_from_being_acted_on(stderr):
    lines = START + "".join(f"    {line}\n" for line in HANG.splitlines())
    shell = ["sh", "-c", f'exec "$@" {stderr}', "sh", sys.executable, "-c", lines]
    process = subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == Exit.PREEMPTED


def test_where_a_state_is_to_be_saved_sigterm_waits_however_often_it_comes():
    process = start("notice.guard()\nprint('up', flush=True)\nwhile not notice.signal: time.sleep(.01)\ntime.sleep(1)\nos._exit(9)")
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    status, said, _ = ended(process)
    assert (status, said.count("saving and stopping")) == (9, 1)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_ends_a_process_that_hangs(first):
    process = start(f"notice.guard()\n{HANG}")
    process.send_signal(first)
    assert "saving and stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    status, _, seconds = ended(process)
    assert (status, seconds < 4) == (Exit.INTERRUPTED, True)


def test_the_gravest_signal_is_the_one_that_counts():
    process = start("notice.guard()\nprint('up', flush=True)\nwhile notice.signal < signal.SIGTERM: time.sleep(.01)\nos._exit(9)")
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 9


@pytest.mark.parametrize("heard", ["os.kill(os.getpid(), signal.SIGTERM)", "notice.agreed(signal.SIGTERM)"])
def test_what_is_not_saved_when_the_grace_ends_leaves_before_the_kill_and_says_so(heard):
    status, said, seconds = ended(start(f"notice.guard()\n{heard}\n{HANG}", **{GRACE: "2"}))
    assert (status, seconds < 2.0) == (Exit.UNSAVED, True)
    assert "not saved within 1.8 s of 2 s grace" in said and "continues from the checkpoint before" in said


def test_what_is_saved_and_not_gone_when_the_grace_ends_counts_as_saved():
    body = f"notice.guard(); notice.agreed(signal.SIGTERM); notice.release()\n{HANG}"
    assert ended(start(body, **{GRACE: "1"}))[0] == Exit.PREEMPTED


def test_ctrl_c_has_no_deadline():
    body = "notice.guard()\nos.kill(os.getpid(), signal.SIGINT)\nprint('up', flush=True)\ntime.sleep(1.5)\nos._exit(9)"
    assert ended(start(body, **{GRACE: "1"}))[0] == 9


def test_a_notice_file_counts_as_sigterm(tmp_path):
    process = start(f"notice.guard()\n{HANG}", **{FILE: str(tmp_path / "notice"), GRACE: "1"})
    time.sleep(0.2)
    assert process.poll() is None
    (tmp_path / "notice").touch()
    status, said, seconds = ended(process)
    assert (status, seconds < 4) == (Exit.UNSAVED, True)
    assert f"there is a notice: {tmp_path / 'notice'}" in said and "SIGTERM: saving and stopping" in said


@pytest.mark.parametrize("text", ["", "soon", "-3", "0", "1e3", "١"])
def test_a_grace_that_is_no_time_is_refused(text):
    with pytest.raises(RunError, match="JAXTRAIN_GRACE_SECONDS is no time"):
        grace_seconds({GRACE: text})


def test_without_a_grace_nobody_kills():
    assert grace_seconds({}) is None and grace_seconds({GRACE: "0.5"}) == 0.5


def test_afterwards_signals_act_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Notice({}):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
