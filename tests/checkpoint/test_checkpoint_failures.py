"""Saves that fail: training goes on while the patience lasts, and says so; file systems that are full, read-only, silent."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, complaints, files, manifest, peers, save, storage
from jaxtrain.errors import CheckpointError, ConfigError
from tests.disk import disk, remount  # noqa: F401

ROOT = Path(__file__).parents[2]
NOTE = dict(config={}, data={})
STATE = {"x": jnp.ones(1 << 10)}

FEW_FILES = """
import gc, os, resource, sys, time
import jax.numpy as jnp
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints

class Ours:
    def __del__(self):
        raise ValueError("ours")

checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(deadline_seconds=30, patience=99))
state = {str(i): jnp.ones(1 << 14) for i in range(30)}
for step, free in enumerate((10**3, 2, 2, 4)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + free, 4096))
    checkpoints.save(step, state, config={}, data={})
    checkpoints.settle()
Ours()
gc.collect()
time.sleep(0.5)
"""


@pytest.fixture
def refusing(monkeypatch):
    """A switch: while it is set, writes fail."""
    refuse, end = threading.Event(), storage.end_write

    def end_write(*args):
        end(*args)
        if refuse.is_set():
            raise OSError("the disk is gone")

    monkeypatch.setattr(storage, "end_write", end_write)
    return refuse


@pytest.fixture
def silent(monkeypatch):
    """While it is set, whoever writes waits; a disk that does not answer."""
    stalled, answers, begin = threading.Event(), threading.Event(), storage.begin_write

    def begin_write(*args):
        if stalled.is_set():
            assert answers.wait(60)
        return begin(*args)

    monkeypatch.setattr(storage, "begin_write", begin_write)
    monkeypatch.setattr(save, "_SLACK_SECONDS", 0.1)
    monkeypatch.setattr(save, "_WAIT_SECONDS", 0.1)
    stalled.answer = answers.set
    yield stalled
    answers.set()


def saved(checkpoints, step):
    checkpoints.save(step, STATE, **NOTE)
    checkpoints.settle()


def test_saves_that_fail_are_said_and_counted_and_a_good_one_ends_the_count(opened, refusing, capsys):
    checkpoints = opened(patience=3)
    refusing.set()
    for step in (1, 2):
        saved(checkpoints, step)
        assert checkpoints.check() == {"checkpoint/failed_saves": step}
    said = capsys.readouterr().err
    assert said.count("SAVE FAILED") == 2 and "2 in a row" in said and "the disk is gone" in said
    refusing.clear()
    saved(checkpoints, 3)
    assert checkpoints.check() == {} and checkpoints.steps() == [3]


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("call", ["save", "check"])
def test_the_run_ends_when_the_patience_runs_out(opened, refusing, patience, call):
    checkpoints = opened(patience=patience)
    refusing.set()
    for step in range(1, patience + 1):
        saved(checkpoints, step)
    with pytest.raises(CheckpointError, match=f"step {patience} was not saved(.|\n)*the disk is gone"):
        checkpoints.check() if call == "check" else checkpoints.save(9, STATE, **NOTE)


def test_the_last_save_of_all_must_succeed_whatever_the_patience(opened, refusing):
    checkpoints = opened(patience=99)
    refusing.set()
    checkpoints.save(1, STATE, **NOTE)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        checkpoints.wait()


def test_a_patience_below_one_is_refused():
    with pytest.raises(ConfigError, match="patience = 0"):
        CheckpointConfig(patience=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's: its other writes outlive its loop
def test_a_disk_that_fills_up_fails_the_save_leaves_the_one_before_and_takes_the_next(disk, monkeypatch, capsys):
    checkpoints = Checkpoints(disk / "checkpoints", CheckpointConfig(deadline_seconds=30))
    saved(checkpoints, 1)
    (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - (1 << 19)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))  # it fills up later
    checkpoints.save(2, {"x": jnp.ones(1 << 18)}, **NOTE)
    checkpoints.settle()
    assert "free space, or a smaller checkpoint.keep_last" in capsys.readouterr().err
    assert checkpoints.steps() == [1] and files.no_checkpoints(checkpoints.directory) == []
    (disk / "other").unlink()
    saved(checkpoints, 3)
    assert checkpoints.latest({"x": jnp.zeros(1 << 10)})[1].step == 3
    checkpoints.close()


def test_a_disk_that_becomes_read_only_fails_the_save_and_leftovers_go_when_it_is_back(disk, monkeypatch, capsys):
    checkpoints = Checkpoints(disk / "checkpoints", CheckpointConfig(deadline_seconds=30))
    saved(checkpoints, 1)
    end = storage.end_write
    with monkeypatch.context() as patch:
        patch.setattr(storage, "end_write", lambda *args: (end(*args), remount(disk, "ro")))
        saved(checkpoints, 2)
    saved(checkpoints, 3)
    said = capsys.readouterr().err
    assert said.count("SAVE FAILED") == 2 and "Read-only file system" in said and "give write permission" in said
    assert [path.name for path in files.leftovers(checkpoints.directory)] == ["2.saving"]
    remount(disk, "rw")
    saved(checkpoints, 4)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "4"]
    checkpoints.close()


def test_a_folder_that_takes_no_file_is_said_where_there_are_checkpoints_and_refused_where_it_is_new(opened, folder, monkeypatch, capsys):
    saved(opened(), 1)

    def refused(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_durably", refused)
    assert opened().latest(STATE)[1].step == 1
    assert capsys.readouterr().err.count("takes no file now (OSError: [Errno 28] No space left on device); the run goes on") == 1
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be kept"):
            Checkpoints(folder.parent / "new", CheckpointConfig())


def test_files_in_the_place_of_leftovers_are_removed_like_them(opened, folder):
    saved(opened(), 1)
    for name in ("90.saving", "1.deleting"):
        (folder / name).write_text("")
    checkpoints = opened()
    assert [path.name for path in folder.iterdir()] == ["1"]
    for name in ("2.saving", "1.deleting"):
        (folder / name).write_text("")
    saved(checkpoints, 1)
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2] and files.no_checkpoints(folder) == []


@pytest.mark.parametrize(
    "error, fix",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (ValueError("Error opening file: Too many open files"), "ulimit -n"),
        (OSError(errno.EEXIST, os.strerror(errno.EEXIST)), "remove the file"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "free space"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "give write permission"),
    ],
)
def test_the_fix_of_a_folder_that_cannot_be_used_is_of_its_trouble(folder, error, fix):
    assert fix in complaints.unusable("what.", error, folder, 1.0).fix


def test_a_save_that_fails_is_said_once_and_no_loop_of_its_libraries_says_it_again(folder):
    done = subprocess.run([sys.executable, "-c", FEW_FILES, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    ours = done.stderr.index("Exception ignored in: <function Ours.__del__")
    said = done.stderr[:ours].splitlines()
    assert done.returncode == 0 and "ValueError: ours" in done.stderr[ours:]
    assert done.stderr.count("Traceback") == 1 and "Too many open files" in "".join(said)
    assert all(line.startswith(("SAVE FAILED", "  got ", "  rule ", "  fix ")) for line in said), done.stderr


def test_a_disk_that_does_not_answer_never_holds_the_loop_for_long(opened, silent, capsys):
    checkpoints = opened(deadline_seconds=5)
    saved(checkpoints, 1)
    silent.set()
    begun = time.monotonic()
    checkpoints.save(2, STATE, **NOTE)
    checkpoints.save(3, STATE, **NOTE)
    assert time.monotonic() - begun < 4
    said = capsys.readouterr().err
    assert "step 3 was not begun" in said and "that of step 2" in said and checkpoints.check() == {}
    checkpoints.settle()  # gives it up
    checkpoints.save(4, STATE, **NOTE)
    said = capsys.readouterr().err
    assert "step 2 was not saved in time" in said and "a save that was given up" in said
    assert checkpoints.check() == {"checkpoint/failed_saves": 2}
    silent.clear()
    silent.answer()
    assert checkpoints._stuck.exception(30) is not None
    saved(checkpoints, 5)
    assert checkpoints.check() == {} and checkpoints.steps() == [1, 5]
    saved(checkpoints, 6)  # what the late thread still wrote goes with the saves after it
    assert files.no_checkpoints(checkpoints.directory) == []


def test_a_disk_that_does_not_answer_before_the_state_is_read_gives_the_state_back(opened, monkeypatch):
    """On accelerators the state is read by the thread that writes: the loop waits for it, and does not wait long."""
    answers, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(save, "on_cpu", lambda arrays: False)
    monkeypatch.setattr(save, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(Checkpoints, "_check_space", lambda *args: answers.wait(60))
    monkeypatch.setattr(storage, "begin_write", lambda *args: begun.set())
    checkpoints = opened(deadline_seconds=30)
    start = time.monotonic()
    checkpoints.save(1, STATE, **NOTE)
    assert time.monotonic() - start < 5
    answers.set()
    with pytest.raises(CheckpointError, match="step 1 was not saved in time"):
        checkpoints.wait()
    assert not begun.is_set()


@pytest.mark.parametrize("place", [(files, "leftovers"), (manifest, "read"), (files, "numbered")], ids=["opening", "manifest", "list"])
def test_a_file_system_that_does_not_answer_a_start_is_given_up_and_named(opened, folder, monkeypatch, place):
    answers = threading.Event()
    saved(opened(deadline_seconds=30), 1)
    monkeypatch.setattr(*place, lambda *args: answers.wait(60))
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="1 s|did not answer") as error:
        opened(deadline_seconds=1).latest(STATE)
    answers.set()
    monkeypatch.undo()
    assert time.monotonic() - begun < 10 and str(folder) in str(error.value)


def test_a_newest_step_that_vanishes_while_it_is_looked_for_is_passed_by(opened, monkeypatch):
    checkpoints = opened()
    for step in (1, 2):
        saved(checkpoints, step)
    shutil.rmtree(checkpoints.directory / "2" / "state")
    assert checkpoints.latest(STATE)[1].step == 1
    (checkpoints.directory / "2" / "manifest.json").unlink()
    assert opened().latest(STATE)[1].step == 1


def test_processes_that_do_not_report_are_all_named_with_their_hosts(monkeypatch):
    told = {"checkpoint/hosts/1": "node-b", "checkpoint/hosts/2": "node-c", "key/0": "{}"}
    monkeypatch.setattr(peers.jax, "process_count", lambda: 3)
    monkeypatch.setattr(peers.coordination, "get", lambda key, seconds: told.get(key))
    below = lambda prefix, _: {k.removeprefix(f"{prefix}/"): v for k, v in told.items() if k.startswith(prefix)}  # noqa: E731
    monkeypatch.setattr(peers.coordination, "under", below)
    with pytest.raises(CheckpointError, match=r"process 1 \(node-b\), 2 \(node-c\) did not report"):
        peers._reports("key", save.Deadline(1))
