"""Campaigns of faults: how they are drawn and told; one small campaign is run to its end behind the marker `slow`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.errors import ConfigError
from jaxtrain.resilience.faults import ENDING, HANGING, KINDS, PHASES, TOLERATED, Fault, as_flag, parse, placed
from jaxtrain.resilience.soak import GAP, Ended, Options, draw, launches, table
from tests.tiny import TINY

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


def test_a_campaign_is_a_function_of_its_seed_in_which_a_fault_that_ends_a_generation_is_its_last():
    config = dataclasses.replace(TINY, steps=1000, checkpoint=CheckpointConfig(every=7))
    options, other = (Options(count=200, seed=seed, processes=4) for seed in (7, 8))
    faults = draw(options, config)
    assert faults == draw(options, config) != draw(other, config)
    for before, fault in zip(faults, faults[1:]):
        assert fault.generation == before.generation + (before.kind in ENDING) and fault.step >= before.step + GAP
    assert 0 < faults[0].step and faults[-1].step < 1000
    assert {fault.process for fault in faults} == {0, 1, 2, 3} and {fault.kind for fault in faults} == {*ENDING, *TOLERATED}
    assert {fault.phase for fault in faults} == {*PHASES, "snapshot", "save"}
    assert all(fault.phase in PHASES for fault in faults if fault.kind in HANGING)
    assert all(fault.step % 7 == 0 for fault in faults if fault.phase == "save")  # where there is one


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_survives_being_told_on_a_command_line_and_can_be_made(kind):
    from jaxtrain.resilience.injection import _ACTS

    fault = Fault(kind=kind, process=3, step=17, phase="data", generation=4, seconds=0.25, where="opt")
    assert parse(as_flag(fault)) == fault and kind in _ACTS


def test_a_fault_that_lasts_keeps_no_other_from_coming():
    from jaxtrain.resilience.injection import Injector

    injector = Injector([placed(parse(text), 1, 9) for text in ("slow:seconds=0", "exception:step=3")])
    injector("step", 2)
    with pytest.raises(RuntimeError, match="injected fault"):
        injector("step", 3)


def test_a_fault_with_a_seed_is_placed_within_the_run_and_keeps_what_was_said():
    first, second = (placed(parse(f"kill:seed={seed},phase=data"), 4, 100) for seed in (7, 8))
    assert first == placed(parse("kill:seed=7,phase=data"), 4, 100) != second
    assert first.phase == "data" and 0 <= first.process < 4 and 1 <= first.step < 100 and first.seed == 0
    assert placed(parse("kill:step=1,process=0,seed=7"), 4, 100).step == 1
    assert placed(parse("kill"), 4, 100) == Fault(kind="kill", process=0, step=1, phase="step")
    with pytest.raises(ConfigError, match="did you mean 'params'"):
        parse("flip-bit:where=param")
    with pytest.raises(ConfigError, match="did you mean 'metrics'"):
        parse("kill:phase=metric")
    for text in ("kill:process=4", "kill:step=101"):
        with pytest.raises(ConfigError, match="would never come"):
            placed(parse(text), 4, 100)


LOG = "[p1] fault: disk-full at step 12, phase step\n[lead] incident 1: process 2\n"


def test_a_row_says_whether_the_one_that_failed_was_named():
    row = dict(incident=1, step=9, what="SIGKILL", culprits=[2], tier="standbys", recovery_seconds=1.0, replayed_steps=3)
    faults = [Fault(kind="kill", process=2), Fault(kind="hang", process=1, generation=2), Fault(kind="stop", generation=3)]
    first, second, third = table(faults, [row, row | {"incident": 2}], LOG)
    assert first["culprit_named"] and not second["culprit_named"]
    assert third["detected_as"] == "nothing" and not third["culprit_named"]


def test_a_row_of_a_fault_that_is_lived_with_says_whether_it_came():
    came, not_yet = table([Fault(kind="disk-full", process=1), Fault(kind="disk-full", process=2)], [], LOG)
    assert (came["detected_as"], came["culprit_named"], came["tier"]) == ("tolerated", None, "none")
    assert not_yet["detected_as"] == "nothing"


def test_after_a_fault_that_ends_the_launch_generations_count_anew_and_the_row_says_what_the_same_command_went_on_from():
    faults = draw(Options(count=30, seed=3, kinds=("kill", "sigterm", "kill-supervisor")), dataclasses.replace(TINY, steps=300))
    parts = launches(faults)
    assert sum(parts, []) == faults and len(parts) == 1 + sum(fault.kind != "kill" for fault in faults)
    assert [[fault.generation for fault in part] for part in parts] == [[*range(1, len(part) + 1)] for part in parts]
    ends = [Ended(75, 10.0, None, ""), Ended(-9, 20.0, 13.5, "checkpoint 9"), Ended(0, 30.0, 24.0, "snapshot 5")]
    two = [Fault(kind="sigterm", process=0, step=9), Fault(kind="kill-supervisor", process=1, step=12)]
    asked, killed = table(two, [], "", ends)
    assert (asked["detected_as"], asked["tier"], asked["recovery_seconds"]) == ("exit code 75", "same command, checkpoint", 3.5)
    assert (killed["detected_as"], killed["replayed_steps"], killed["recovery_seconds"]) == ("SIGKILL", 7, 4.0)
    assert table(two, [], "", ends[:2])[1]["detected_as"] == "nothing"


@pytest.mark.slow
def test_a_campaign_of_every_kind_ends_where_an_undisturbed_run_ends(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jaxtrain", "faults", "soak", "config.py", "--count", "8", "--processes", "2"]
    done = subprocess.run([*command, "--json", "rows.json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert done.returncode == 0 and rows[-1]["hash_equal"], done.stdout + done.stderr
    assert all(row["culprit_named"] is not False for row in rows[:-1]), done.stdout
