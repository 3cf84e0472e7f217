"""Two real processes as two hosts: one snapshot between them, unequal failures, and one killed while both save."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tests.checkpoint.states import FSDP_4X2, abstract, make_state, placed

import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest
from jaxtrain.resilience import slots
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.resilience.slots import Moment
from jaxtrain.resilience.snapshots import Snapshots

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120  # it takes about 15 s on two idle cores

PROGRAM = """
import json, os, signal, sys
import jax
from pathlib import Path

address, process, base, victim = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=process)
import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest, storage
from jaxtrain.errors import CheckpointError
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.resilience.snapshots import Snapshots
from tests.checkpoint.states import abstract, make_state, placed

fsdp = dict(config=meshes.MeshConfig(), rules=meshes.FSDP)
halves = dict(config=meshes.MeshConfig(data=2), rules=meshes.HSDP)
said, config = {}, SnapshotConfig(memory_gb=0.1, deadline_seconds=60)

replicas = Snapshots(base / f"replica{process}", config, run="r", generation=1)
replicas.save(1, placed(make_state(1), **halves), data={})
replicas.wait()

snapshots = Snapshots(base / f"host{process}", config, run="r", generation=1)
for step in (1, 2):
    snapshots.save(step, placed(make_state(step), **fsdp), data={"examples": step})
    said[f"newest {step}"] = snapshots.wait()

def refuse(header, view):
    raise OSError("no memory on process 1")

if process == 1:
    snapshots._commit = refuse
snapshots.save(3, placed(make_state(3), **fsdp), data={})
said["after a failure of one"] = snapshots.wait()
wanted = abstract(placed(make_state(0), **fsdp))
known = snapshots.known(wanted)
said["whole"] = known.whole
said["digest"] = digest(snapshots.restore(known.whole[0], wanted).state)
said["other mesh"] = list(snapshots.known(abstract(placed(make_state(0), **halves))).lacking.values())

tight = Snapshots(base / f"tight{process}", SnapshotConfig(memory_gb=1e-6 if process else 1), run="r", generation=1)
tight.save(1, placed(make_state(1), **fsdp), data={})
said["a budget of one"] = tight.wait()

checkpoints = Checkpoints(base / "run" / "checkpoints", CheckpointConfig(deadline_seconds=6))
checkpoints.save(1, placed(make_state(1), **fsdp), config={}, data={})
checkpoints.wait()
if process == victim:
    storage.end_write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, placed(make_state(2), **fsdp), config={}, data={})
(base / f"{process}.json").write_text(json.dumps(said))
try:
    checkpoints.wait()
except CheckpointError as error:
    (base / "killed").write_text(str(error))
os._exit(0)
"""


def run(base, victim):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    commands = [[sys.executable, "-c", PROGRAM, address, str(i), str(base), str(victim)] for i in range(2)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[victim].returncode == -signal.SIGKILL, outputs[victim][1]
    return processes[1 - victim].returncode, "".join(err for _, err in outputs)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder, what each process said, and what both printed."""
    base = tmp_path_factory.mktemp("together")
    code, printed = run(base, victim=1)
    assert code == 0, printed
    return base, [json.loads((base / f"{process}.json").read_text()) for process in range(2)], printed


def test_both_agree_on_the_newest_whatever_one_of_them_failed_at(together):
    base, said, printed = together
    for each in said:
        assert (each["newest 1"], each["newest 2"], each["after a failure of one"]) == (1, 2, 2)
        assert each["whole"][0] == [2, 1] and each["digest"] == digest(make_state(2))
    assert "step 3 is not whole" in printed and "process 1" in printed and "no memory on process 1" in printed


def test_a_mesh_that_needs_what_lies_on_the_other_host_is_refused_with_a_reason(together):
    for each in together[1]:
        assert any("0, 1 does not find all parts" in why for why in each["other mesh"])


def test_a_budget_that_one_host_exceeds_keeps_all_from_taking(together):
    base, said, printed = together
    assert [each["a budget of one"] for each in said] == [None, None] and "there are no snapshots" in printed
    assert not list(base.glob("tight*/*.data"))


def test_one_host_alone_has_a_state_that_both_hold_and_half_of_one_that_they_share(together):
    base = together[0]
    assert [slots.newest([base / f"replica{host}"]) for host in range(2)] == [1, 1]
    assert [slots.newest([base / f"host{host}"]) for host in range(2)] == [None, None]
    assert slots.newest([base / "host0", base / "host1"]) == 2


def test_another_mesh_and_process_count_restores_it_from_both_hosts_files(together, tmp_path):
    base, folder = together[0], tmp_path / "host"
    shutil.copytree(base / "host0", folder)
    shutil.copytree(base / "host1", folder / slots.COPIES / "host1")
    snapshots = Snapshots(folder, SnapshotConfig(memory_gb=1), run="r", generation=2)
    for layout in (FSDP_4X2, dict(config=meshes.MeshConfig(data=2), rules=meshes.HSDP)):
        wanted = abstract(placed(make_state(0), **layout))
        recalled = snapshots.restore(snapshots.known(wanted).whole[0], wanted)
        assert digest(recalled.state) == digest(make_state(2)) and recalled.data == {"examples": 2}
        assert recalled.origin == "memory of 1 process and buddy copies of 1 process"


def test_files_of_processes_that_are_no_more_go_when_a_snapshot_of_the_new_ones_is_whole(together, tmp_path):
    base, folder = together[0], tmp_path / "host"
    shutil.copytree(base / "host0", folder)
    for path in (base / "host1").glob("1-*"):  # one slot whole, one cut off while it was written
        shutil.copy(path, folder)
    snapshots = Snapshots(folder, SnapshotConfig(memory_gb=1), run="r", generation=2)
    snapshots.save(4, placed(make_state(4), **FSDP_4X2), data={})
    assert snapshots.wait() == 4
    assert not list(folder.glob("1-*")) and slots.newest([folder]) == 4
    assert Moment(4, 2) in {part.header.moment for part in slots.snapshots(folder)}


def left_after_the_kill(base):
    checkpoints = Checkpoints(base / "run" / "checkpoints", CheckpointConfig(deadline_seconds=60))
    state, found = checkpoints.latest(jax.tree.map(lambda x: x, make_state(0)))
    assert (found.step, digest(state)) == (1, digest(make_state(1)))
    assert [path.name for path in (base / "run" / "checkpoints").iterdir()] == ["1"]


def test_a_process_killed_while_all_save_is_named_with_its_host_and_the_save_before_stays(together):
    base = together[0]
    assert f"process 1 ({socket.gethostname()}) did not report" in (base / "killed").read_text()
    left_after_the_kill(base)


@pytest.mark.slow
def test_the_lead_killed_while_all_save_leaves_the_save_before(tmp_path):
    run(tmp_path, victim=0)
    left_after_the_kill(tmp_path)
