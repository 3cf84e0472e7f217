"""Campaigns of faults: how they are drawn and told; one small campaign is run to its end behind the marker `slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.resilience.faults import ENDING, KINDS, Fault, as_flag, parse
from jaxtrain.resilience.soak import Options, draw, table

ROOT = Path(__file__).parents[2]
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Console, Jsonl
from jaxtrain.resilience.deadlines import Deadlines
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps=600, log_every=10, eval=None, sinks=(Console(), Jsonl()),
    checkpoint=CheckpointConfig(every=25, keep_last=2), watch=Deadlines(floor=8.0),
)
"""


def test_a_campaign_is_a_function_of_its_seed_with_one_fault_for_each_generation():
    options = Options(count=50, seed=7, processes=4)
    faults = draw(options, steps=1000)
    assert faults == draw(options, steps=1000) != draw(Options(count=50, seed=8, processes=4), steps=1000)
    assert [fault.generation for fault in faults] == list(range(1, 51))
    steps = [fault.step for fault in faults]
    assert steps == sorted(steps) and 0 < steps[0] and steps[-1] < 1000
    assert {fault.process for fault in faults} == {0, 1, 2, 3} and {fault.kind for fault in faults} == set(ENDING)


def test_a_fault_survives_being_told_on_a_command_line():
    for kind in KINDS:
        fault = Fault(kind=kind, process=3, step=17, phase="data", generation=4, seconds=0.25)
        assert parse(as_flag(fault)) == fault


def test_a_row_says_whether_the_one_that_failed_was_named():
    row = dict(step=9, what="SIGKILL", culprits=[2], tier="standbys", recovery_seconds=1.0, replayed_steps=3)
    first, second = table([Fault(kind="kill", process=2), Fault(kind="kill", process=1)], [row, row])
    assert first["culprit_named"] and not second["culprit_named"]


@pytest.mark.slow
def test_a_campaign_of_every_kind_ends_where_an_undisturbed_run_ends(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jaxtrain", "faults", "soak", "config.py", "--count", "8", "--processes", "2"]
    done = subprocess.run([*command, "--json", "rows.json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert done.returncode == 0 and rows[-1]["hash_equal"], done.stdout + done.stderr
    assert all(row["culprit_named"] for row in rows[:-1]), done.stdout
