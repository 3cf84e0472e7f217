"""Runs on a disk that is full: what goes on, what is said, and what waits for room."""

import shutil

import pytest

from jaxtrain.errors import CheckpointError
from tests.disk import disk, fill  # noqa: F401
from tests.resilience.runs import cache, configured, result, run  # noqa: F401
from tests.resilience.values import STEPS


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
