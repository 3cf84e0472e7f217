"""Every fault in a real run of two processes: noticed and recovered from, or lived with and said. All behind `slow`."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 400  # of one run, on a machine that does something else too
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Console, Jsonl
from jaxtrain.resilience.deadlines import Deadlines
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, steps=60, log_every=10, eval=None, sinks=(Console(), Jsonl()),
    checkpoint=CheckpointConfig(every=10, keep_last=2), watch=Deadlines(floor=8.0),
)
"""
COPIES = ["--mesh.data", "-1", "--mesh.fsdp", "1", "--health.hash-every", "5"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(faults, overrides) -> exit code, what was said, incidents, the last checkpoint's hash."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.py").write_text(CONFIG)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(folder / "cache")}
    number = iter(range(100))

    @cache
    def run(faults, overrides=()):
        name = f"run{next(number)}"
        flags = [word for fault in faults for word in ("--fault", fault)]
        command = [sys.executable, "-m", "jaxtrain", "launch", "--processes", "2", *flags, "config.py", "--name", name]
        how = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        done = subprocess.run([*command, *overrides], **how)
        rows = folder / "runs" / name / "incidents.jsonl"
        incidents = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        hashed = subprocess.run([sys.executable, "-m", "jaxtrain", "checkpoint", "hash", f"runs/{name}"], **how).stdout
        return done.returncode, done.stdout + done.stderr, incidents, hashed

    return run


@pytest.mark.parametrize(
    ("fault", "what", "words"),
    [
        ("oom:process=1,step=23", "exit code 1", "MemoryError"),
        ("stall-data:process=1,step=23", "hang", "in phase data"),
        ("abort:process=1,step=23", "SIGABRT", ""),
        ("cut-network:process=1,step=23", "hang", "is cut off"),
    ],
)
def test_what_ends_a_trainer_is_named_and_the_run_ends_where_an_undisturbed_one_ends(launched, fault, what, words):
    code, said, (incident,), hashed = launched((fault,))
    assert (code, incident["what"], incident["culprits"]) == (0, what, [1]), said
    assert words in said
    assert hashed == launched(())[-1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("disk-full:process=0,step=23", "SAVE FAILED, 1 in a row.*\n.*No space left"),
        ("disk-full:process=1,step=23", "SAVE FAILED, 1 in a row.*\n.*No space left"),
        ("stall-save:process=1,step=23,seconds=5", ""),
        ("clock-jump:process=0,step=23,seconds=-86400", ""),
        ("clock-jump:process=1,step=23,seconds=86400", ""),
        ("slow:process=1,step=23,seconds=0.05", ""),
        ("delay-network:process=1,step=20,seconds=0.1", ""),
    ],
)
def test_what_a_run_lives_with_makes_no_incident_and_changes_no_bit(launched, fault, words):
    code, said, incidents, hashed = launched((fault,))
    assert (code, incidents) == (0, []), said
    assert f"fault: {fault.partition(':')[0]} at step 2" in said
    assert re.search(words, said), said
    assert hashed == launched(())[-1]


def test_a_save_that_stalls_beyond_its_deadline_is_given_up_and_said(launched):
    code, said, incidents, hashed = launched(
        ("stall-save:process=1,step=23,seconds=12",), ("--checkpoint.deadline-seconds", "4")
    )
    assert (code, incidents) == (0, []), said
    assert "SAVE FAILED" in said and hashed == launched(())[-1]


@pytest.mark.parametrize("where", ["params", "opt", "grads"])
def test_a_bit_that_flips_in_one_copy_is_found_and_the_run_goes_on_from_before_it(launched, where):
    code, said, (incident,), hashed = launched((f"flip-bit:process=1,step=23,where={where}",), tuple(COPIES))
    assert code == 0 and "copies of" in said and incident["restored_step"] <= 23, said
    assert hashed == launched((), tuple(COPIES))[-1]


def test_a_bit_that_flips_in_a_checkpoint_is_found_when_it_is_read_and_an_older_one_serves(launched):
    slow = "slow:process=0,step=41,seconds=0.3"  # the save of step 40 ends long before step 58
    faults = ("flip-bit:process=1,step=58,where=file", "kill:process=0,step=59", slow)
    code, said, (incident,), hashed = launched(faults, ("--snapshot.every", "0", "--checkpoint.every", "20"))
    assert code == 0 and "skipped the checkpoint of step 40" in said and incident["restored_step"] == 20, said
    assert hashed == launched(())[-1]


def test_a_number_that_is_none_is_skipped_or_rolled_back_as_the_policy_says(launched):
    for policy, words in (("Skip", "its update is skipped"), ("RollBack", "are put aside")):
        code, said, incidents, _ = launched(("nan:process=1,step=23",), ("--health.not-finite", policy))
        assert (code, incidents) == (0, []) and words in said, said
    code, said, incidents, _ = launched(("nan:process=1,step=23",))
    assert (code, incidents) == (65, []) and "NumericsError" in said  # another start would meet it again
