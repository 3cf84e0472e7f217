"""Runs on a disk that is full: what goes on, what is said, and what waits for room."""

import errno
import json
import os
import shutil
import threading
import time

import pytest

from jaxtrain.checkpoint import CheckpointConfig
from jaxtrain.errors import CheckpointError, RunError
from jaxtrain.resilience import verified
from jaxtrain.resilience.health import Health
from jaxtrain.resilience.verified import Verified
from tests.disk import disk, fill  # noqa: F401
from tests.resilience.lines import until
from tests.resilience.runs import after_steps, cache, configured, result, run  # noqa: F401
from tests.resilience.values import STEPS

PATIENT = CheckpointConfig(every=5, keep_last=10, patience=99)


def test_the_same_command_goes_on_from_its_state_on_a_full_disk_and_ends_when_there_is_room(disk, monkeypatch, capsys):
    config = configured(disk)
    assert run(config, monkeypatch) == 0
    before = result(config)
    shutil.rmtree(config.run_dir / "checkpoints" / str(STEPS))
    room = fill(disk)
    with pytest.raises(CheckpointError, match=f"step {STEPS} was not saved(.|\n)*0.00 GB free"):
        run(config, monkeypatch)
    room.unlink()
    assert run(config, monkeypatch) == 0
    assert capsys.readouterr().out.count("resumed at step 15") == 2 and result(config) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's: its other writes outlive its loop
def test_a_disk_that_fills_up_ends_no_run_at_a_comparison_of_copies(disk, monkeypatch):
    whole, config = configured(disk, "whole"), configured(disk, health=Health(hash_every=3), checkpoint=PATIENT)
    assert run(whole, monkeypatch) == 0

    def filled(state, metrics):
        until((config.run_dir / "checkpoints" / "5" / "manifest.json").exists)  # nobody else writes while it is filled
        fill(disk)
        return state, metrics

    after_steps(monkeypatch, [7], filled)
    with pytest.raises((CheckpointError, RunError), match=f"step {STEPS} was not saved|rows of metrics were not written"):
        run(config, monkeypatch)
    assert json.loads((config.run_dir / verified.FILE).read_text()) == {"agreed": STEPS}
    (disk / "other").unlink()
    assert run(config, monkeypatch) == 0 and result(config) == result(whole)


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "WRITE_S", 0.5)
    record = Verified(tmp_path, 1, lead=True)
    record.begin(0)
    return record


def kept(folder):
    return json.loads((folder / verified.FILE).read_text())


def test_an_agreement_that_a_disk_refuses_is_said_once_and_the_next_one_that_it_takes_counts(tmp_path, monkeypatch, record, capsys):
    def refused(path, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(verified, "_put", refused)
        for step in (1, 2):
            record.agree(step)
            record.settle()
        with pytest.raises(RunError, match="(?s)copies differ at step 3.*Input/output error"):
            record.differ(3, [], "majority")
    (said,) = capsys.readouterr().err.splitlines()
    assert "verified.json IS NOT WRITTEN (Input/output error)" in said and kept(tmp_path) == {"agreed": 0}
    record.differ(3, [], "majority")
    assert kept(tmp_path) == {"agreed": 2, "differs": 3} and Verified(tmp_path, 1, lead=False).limit() == 2


def test_a_disk_that_does_not_answer_holds_no_comparison_and_an_older_word_never_replaces_a_newer(
    tmp_path, monkeypatch, record, capsys
):
    hangs, answers, put = threading.Event(), threading.Event(), verified._put
    monkeypatch.setattr(verified, "_put", lambda *args: hangs.set() or answers.wait(60) and put(*args))
    begun = time.monotonic()
    for step in (1, 2, 3):
        record.agree(step)
    assert time.monotonic() - begun < 1.2  # three waits would take 1.5 s
    assert hangs.wait(10)  # the agreement has its turn before the difference asks for one
    with pytest.raises(RunError, match="(?s)copies differ at step 4.*(no answer within 0.5 s|an earlier write has not ended)"):
        record.differ(4, [], "majority")
    record.settle()
    assert "no answer within 0.5 s" in capsys.readouterr().err and kept(tmp_path) == {"agreed": 0}
    answers.set()
    record.differ(4, [], "majority")
    assert kept(tmp_path) == {"agreed": 3, "differs": 4}


def test_a_full_disk_has_room_for_what_copies_were_found_to_be(disk):
    record = Verified(disk, 1, lead=True)
    record.begin(0)
    record.differ(5, [], "majority")
    record.begin(0)
    fill(disk)
    record.agree(9)
    record.settle()
    assert kept(disk) == {"agreed": 9}
    record.differ(12, [], "majority")
    assert kept(disk) == {"agreed": 9, "differs": 12} and Verified(disk, 1, lead=False).limit() == 9
    record.begin(9)
    assert kept(disk) == {"agreed": 9} and Verified(disk, 1, lead=False).limit() is None
