"""Folders of checkpoints of the states in states.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxtrain.checkpoint import CheckpointConfig, Checkpoints
from tests.checkpoint.states import FSDP_4X2, letters, make_state, placed


@pytest.fixture
def folder(tmp_path):
    """RUN_DIR/checkpoints, not made yet."""
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def opened(folder):
    """opened(keep_last=..., ...) -> Checkpoints on `folder`, closed at the end."""
    made = []

    def make(**fields) -> Checkpoints:
        made.append(Checkpoints(folder, replace(CheckpointConfig(deadline_seconds=60), **fields)))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


@pytest.fixture
def saved(opened):
    """saved(*steps) -> Checkpoints holding make_state(step) at each step, sharded over eight devices."""

    def make(*steps: int, **fields) -> Checkpoints:
        checkpoints = opened(**fields)
        for step in steps:
            state = placed(make_state(step), **FSDP_4X2)
            checkpoints.save(step, state, config={"batch": 8}, data={"examples": 8 * step}, letters=letters())
        checkpoints.wait()
        return checkpoints

    return make
