"""A step compiled for a GPU adds nothing up in an order that changes: no scatter meets a place twice."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

import meshes
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered
from tests.parity.programs import DENSE, h100s
from tests.parity.test_collectives import PLAN, ROOT, gpus
from tests.parity.test_experts import MODELS
from tests.tiny import TINY

FREE = "take_along_axis"  # the gradient of what a token's k experts are: k different ones


@pytest.mark.slow
@gpus
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_no_sum_of_a_gpus_step_depends_on_an_order(model):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": f"{ROOT}{os.pathsep}{PLAN}"}
    command = [sys.executable, "-m", "tests.parity.test_determinism", model]
    ran = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-4000:]
    scatters = json.loads(ran.stdout.splitlines()[-1])
    assert any("unique_indices=true" in line for line in scatters)  # the embedding's gradient at least
    assert not [line for line in scatters if "unique_indices=true" not in line and FREE not in line]


if __name__ == "__main__":
    mesh = meshes.MeshConfig(fsdp=8)
    config = dataclasses.replace(TINY, model=DENSE if sys.argv[1] == "dense" else MODELS[sys.argv[1]], mesh=mesh)
    text = lowered(Blueprint(config, meshes.make(mesh, h100s()))).compile().as_text()
    print(json.dumps([line.strip() for line in text.splitlines() if re.search(r"= \S+ scatter\(", line)]))
