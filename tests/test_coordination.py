"""A coordination service that is stopped: every call ends, and says what it waited for; so does a save."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 120  # it takes about 20 s on two idle cores

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

import jax.numpy as jnp

from jaxtrain import coordination
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, peers
from jaxtrain.errors import UserError

address, service, folder, answer = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
coordination.connect(address, 1, 0, 60)
coordination.put("known", "1", 60)
checkpoints = Checkpoints(folder, CheckpointConfig(deadline_seconds=2))
peers.jax.process_count = lambda: 2  # the other one has come as far as this
os.kill(service, signal.SIGSTOP)
calls = {
    "put": lambda: coordination.put("key", "value", 1),
    "delete": lambda: coordination.delete("known", 1),
    "under": lambda: coordination.under("known", 1),
    "wait": lambda: coordination.wait("all", 1),
    "get": lambda: coordination.get("unknown", 1),
    "save": lambda: checkpoints.save(5, {"x": jnp.ones(3)}, config={}, data={}),
}
said = {}
for name, call in calls.items():
    begun = time.monotonic()
    try:
        what = call()
    except UserError as error:
        what = f"{type(error).__name__}: {error}"
    said[name] = (what, time.monotonic() - begun)
os.kill(service, signal.SIGCONT)
peers.jax.process_count = lambda: 1
said["after"] = coordination.get("key", 60)
Path(answer).write_text(json.dumps(said))
os._exit(0)
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """By call: what it said of a service that is stopped, and after how many seconds."""
    base = tmp_path_factory.mktemp("stopped")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [sys.executable, "-m", "jaxtrain.resilience.service", "127.0.0.1", str(port), "1"]
    env, pipes = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(serve, cwd=ROOT, env=env, **pipes) as service:
        try:
            service.stdout.readline()
            command = [sys.executable, "-c", PROGRAM, f"127.0.0.1:{port}", str(service.pid), str(base / "checkpoints"), str(base / "said")]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        finally:
            os.kill(service.pid, signal.SIGCONT)
            service.kill()
    assert done.returncode == 0, done.stderr
    return json.loads((base / "said").read_text())


@pytest.mark.parametrize(
    "call, waited",
    [
        ("put", "1 s waited to publish key"),
        ("delete", "1 s waited to take known back"),
        ("under", "1 s waited to list known"),
        ("wait", "6 s waited at the barrier all"),
    ],
)
def test_a_stopped_service_is_given_up_at_the_deadline_and_what_was_waited_for_is_named(stopped, call, waited):
    said, seconds = stopped[call]
    assert said.startswith("RunError: the coordination service at 127.0.0.1:") and waited in said and seconds < 12


def test_what_nobody_has_published_is_none_at_the_deadline_there_too(stopped):
    assert stopped["get"][0] is None and stopped["get"][1] < 12


def test_what_was_given_up_arrives_when_the_service_goes_on(stopped):
    assert stopped["after"] == "value"


def test_a_save_waits_no_longer_for_a_stopped_service_than_for_a_disk(stopped):
    """2 s, and the 20 s in which other processes give up a save that is late."""
    said, seconds = stopped["save"]
    assert said.startswith("CheckpointError: the coordination service at ") and "waited to publish checkpoint/" in said
    assert seconds < 30
