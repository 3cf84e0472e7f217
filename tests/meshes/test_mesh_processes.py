"""Two real processes of four CPU devices: each gives its rows, and every device must get its part of the batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_ROWS = 8
PATIENCE_SECONDS = 120  # it takes about 8 s on two idle cores
LOW, HIGH, EVERY = [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))
ROWS = {  # sizes -> the rows that processes 0 and 1 must provide
    "fsdp=8": (LOW, HIGH),
    "data=2,tensor=4,fsdp=1": (LOW, HIGH),
    "fsdp=2,context=4": (LOW, HIGH),
    "fsdp=1,tensor=8": (EVERY, EVERY),
    "fsdp=1,context=8": (EVERY, EVERY),
    "fsdp=1,context=2,tensor=4": (EVERY, EVERY),
    "data=2,fsdp=4,backwards": ([0, 2, 4, 6], [1, 3, 5, 7]),  # the batch over ("fsdp", "data"): neighbours far apart
}

PROGRAM = """
import json, sys
from pathlib import Path
import jax
import numpy as np
import meshes

address, process, num_rows, answer, *names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(address, num_processes=2, process_id=process)
whole = np.arange(num_rows * 16, dtype=np.int32).reshape(num_rows, 16)
rows = {}
for name in names:
    sizes = dict(pair.split("=") for pair in name.split(",") if "=" in pair)
    backwards = meshes.Rules(params={}, acts={"B": ("fsdp", "data")})
    rules = backwards if name.endswith("backwards") else meshes.DEFAULT
    mesh = meshes.make(meshes.MeshConfig(**{axis: int(size) for axis, size in sizes.items()}))
    mine = meshes.local_rows(mesh, rules, num_rows)
    batch = meshes.globalize({"tokens": whole[mine]}, mesh, rules, num_rows)["tokens"]
    assert batch.shape == whole.shape and len(batch.addressable_shards) == 4
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    with meshes.use(mesh, rules):
        weighed = jax.jit(lambda x: (meshes.constrain(x, "BS") * (x + 1)).sum())(batch)
    assert int(weighed) == int((whole * (whole + 1)).sum()), name
    rows[name] = mine.tolist()
mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:4])  # of process 0 alone
mine = meshes.local_rows(mesh, meshes.DEFAULT, num_rows)
batch = meshes.globalize(whole[mine], mesh, meshes.DEFAULT, num_rows)
assert batch.shape == whole.shape and batch.dtype == whole.dtype
rows["without a device"] = [mine.tolist(), len(batch.addressable_shards)]
Path(answer).write_text(json.dumps(rows))
"""


def start(address: str, process: int, answer: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, address, str(process), str(NUM_ROWS), str(answer), *ROWS]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("rows") / f"{process}.json" for process in range(2)]  # gloo writes to stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [start(address, process, path) for process, path in enumerate(paths)]
    try:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("name", ROWS)
def test_two_processes_make_one_batch_of_the_rows_that_each_must_give(answers, name):
    assert tuple(answer[name] for answer in answers) == ROWS[name]


def test_a_process_without_a_device_of_the_mesh_makes_the_batch_too(answers):
    assert [answer["without a device"] for answer in answers] == [[EVERY, 4], [[], 0]]
