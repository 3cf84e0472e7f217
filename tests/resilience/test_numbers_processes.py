"""Several processes come to one verdict: they put aside the same examples, and name the process whose copy is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 240  # seconds for a run, on a busy machine
CONFIG = """
import dataclasses
import numpy as np
from jaxtrain.resilience.health import Health, RollBack
from tests.resilience.values import CONFIG
from {faults} import {name}
{name}()
config = dataclasses.replace(CONFIG, health=Health(not_finite=RollBack(), hash_every={hash_every}))
"""
FAULTS = '''
"""What goes wrong in these runs, in every process of them."""
import dataclasses
import os


def poisoned():
    from jaxtrain.data.dataset import Dataset

    rows = Dataset.rows

    def spoilt(self, step, wanted):
        batch = rows(self, step, wanted)
        names = self.ids(step)
        batch["weights"][[i for i, row in enumerate(wanted) if names[row] in BAD]] = float("nan")
        return batch

    Dataset.rows = spoilt


def flipped():
    from jaxtrain.train import run

    if os.environ.get("JAXTRAIN_GENERATION") != "1" or run.compiled_ahead.__module__ != "jaxtrain.train.step":
        return  # a config is read twice, and the next generation is to get through
    compiled = run.compiled_ahead

    def compiled_ahead(blueprint):
        import jax
        from tests.resilience.runs import flipped

        real = compiled(blueprint)

        def step(*arguments):
            state, metrics = real(*arguments)
            if int(state.step) == 6:
                norm = flipped(state.params["final_norm_D"], [jax.devices()[3]])
                state = dataclasses.replace(state, params=state.params | {"final_norm_D": norm})
            return state, metrics

        return step

    run.compiled_ahead = compiled_ahead
'''


@pytest.fixture
def train(tmp_path):
    def run(name, fault, *argv, verb=("train",), hash_every=0):
        from tests.resilience.runs import data_of

        (tmp_path / "faults.py").write_text(f"{FAULTS}\n\nBAD = {data_of().ids(6)[3:4]}\n")
        (tmp_path / f"{name}.py").write_text(CONFIG.format(faults="faults", name=fault, hash_every=hash_every))
        command = [sys.executable, "-m", "jaxtrain", *verb, f"{name}.py", "--name", name, *argv]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}
        with subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            try:
                out, _ = process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, out, tmp_path / "runs" / name

    return run


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


@pytest.mark.slow
def test_two_processes_put_aside_what_one_does_and_train_the_same(train):
    code, out, one = train("one", "poisoned", "--fake-devices", "2")
    assert code == 0, out
    code, out, two = train("two", "poisoned", verb=("launch", "--processes", "2", "--devices-per-process", "1"))
    assert code == 0 and "back to step 5" in out, out
    assert (one / "quarantine.jsonl").read_text() == (two / "quarantine.jsonl").read_text()
    assert _rows(one) == _rows(two)


@pytest.mark.slow
def test_all_processes_name_the_process_and_device_of_a_flipped_copy_and_the_next_generation_goes_on_from_before_it(train):
    launch = ("launch", "--processes", "2", "--devices-per-process", "2")
    code, out, folder = train("flip", "flipped", "--mesh.data", "4", verb=launch, hash_every=3)
    assert code == 0 and "resumed at step 5" in out and "exit code 76" in out, out
    assert "(data 3) of process 1 on" in out, out
    event = json.loads((folder / "corruption.jsonl").read_text().splitlines()[-1])
    assert (event["step"], event["agreed"], event["found_by"]) == (6, 5, "majority")
    assert [(s["process"], s["coordinates"]) for s in event["suspects"]] == [(1, {"data": 3})]
