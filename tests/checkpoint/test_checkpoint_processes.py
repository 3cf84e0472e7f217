"""Two real processes of two devices each: they save one checkpoint together, and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import meshes
from jaxtrain.checkpoint import digest, manifest, restore
from jaxtrain.checkpoint.verify import damage
from tests.checkpoint.states import make_state

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120  # it takes about 12 s on two idle cores

PROGRAM = """
import json, sys
import jax
from pathlib import Path

address, process, folder, answer = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=process)
import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest, manifest, storage
from jaxtrain.errors import CheckpointError
from tests.checkpoint.states import abstract, letters, make_state, placed

fsdp = placed(make_state(1), config=meshes.MeshConfig(), rules=meshes.FSDP)
halves = abstract(placed(make_state(0), config=meshes.MeshConfig(data=2), rules=meshes.HSDP))
checkpoints = Checkpoints(folder, CheckpointConfig(deadline_seconds=60))
said = {"empty": checkpoints.latest(halves) is None}
checkpoints.save(1, fsdp, config={}, data={}, letters=letters())
checkpoints.wait()
said["digest"] = digest(fsdp)
state, found = checkpoints.latest(halves)
said["restored"] = [digest(state), found.step, jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s.sharding, state, halves))]

def refuse(writes, deadline):
    end(writes, deadline)
    raise OSError("the disk of process 1 is gone")

end = storage.end_write
if process == 1:
    storage.end_write = refuse
checkpoints.save(2, fsdp, config={}, data={})
try:
    checkpoints.wait()
except CheckpointError as error:
    said["failed save"] = str(error)
storage.end_write, read_manifest, read = end, manifest.read, storage.read

def damaged(folder):
    raise manifest.DamagedError("process 1 reads a damaged manifest")

def restore_fails():
    try:
        checkpoints.latest(halves)
    except CheckpointError as error:
        return str(error)

if process == 1:
    manifest.read = damaged
said["manifest damaged on 1"] = restore_fails()
manifest.read = read_manifest
if process == 1:  # its disk shows it another array than was saved, and it holds second copies only
    storage.read = lambda *args: {name: x + 1 if name == "params/embed" else x for name, x in read(*args).items()}
said["array damaged on 1"] = restore_fails()
said["steps"] = checkpoints.steps()
Path(answer).write_text(json.dumps(said))
checkpoints.close()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder, and what each process said."""
    base = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answers = [base / f"{process}.json" for process in range(2)]
    commands = [[sys.executable, "-c", PROGRAM, address, str(i), str(base / "checkpoints"), str(answers[i])] for i in range(2)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
    return base, [json.loads(answer.read_text()) for answer in answers]


def test_both_see_the_same_digest_and_it_is_that_of_one_device(together):
    assert [said["digest"] for said in together[1]] == [digest(make_state(1))] * 2
    assert [said["empty"] for said in together[1]] == [True, True]


def test_both_restore_it_onto_another_mesh(together):
    assert [said["restored"] for said in together[1]] == [[digest(make_state(1)), 1, True]] * 2


def test_one_process_restores_it_onto_a_mesh_of_eight(together):
    mesh = meshes.make(meshes.MeshConfig(fsdp=2, tensor=4))
    state = restore(together[0], mesh=mesh, rules=meshes.FSDP_TP)
    assert digest(restore(together[0])) == manifest.read(together[0] / "checkpoints" / "1").digest == digest(make_state(1))
    assert state["params"]["embed"].sharding == meshes.sharding(mesh, "VD", meshes.FSDP_TP.params)
    assert jax.tree.all(jax.tree.map(lambda x: len(x.sharding.device_set) == 8, state))


def test_the_manifest_has_the_files_of_both_and_all_are_whole(together):
    found = manifest.read(together[0] / "checkpoints" / "1")
    assert found.processes == 2 and found.mesh["fsdp"] == 4
    assert all(any(f"process_{process}" in name for name in found.files) for process in range(2))
    assert damage(together[0] / "checkpoints" / "1") == []


def test_a_save_that_fails_on_one_process_fails_on_both_and_leaves_nothing(together):
    base, said = together
    assert said[0]["failed save"] == said[1]["failed save"] and "the disk of process 1 is gone" in said[0]["failed save"]
    assert [each["steps"] for each in said] == [[1], [1]] and [path.name for path in (base / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("damage", ["manifest damaged on 1", "array damaged on 1"])
def test_what_one_process_reads_wrong_is_refused_by_both(together, damage):
    said = [each[damage] for each in together[1]]
    assert said[0] == said[1] and "none of the checkpoints" in said[0]
