"""A trainer or a standby that is interrupted before it trains: it leaves at once, and says nothing of itself."""

import json
import signal
import subprocess
import sys
import time

import jax
import pytest

from jaxtrain.exits import Exit
from jaxtrain.resilience.child import READY
from jaxtrain.resilience.trainer import in_words
from tests.resilience.lines import LONG_S
from tests.resilience.supervisors import ROOT

CONFIG = "configs/quickstart.py"


def interrupted(process):
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=LONG_S)[1]
    assert (process.returncode, errors) == (Exit.INTERRUPTED, "")


@pytest.fixture
def standby():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-m", "jaxtrain.resilience.trainer", CONFIG], cwd=ROOT, text=True, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("seconds", [0.6, 1.2])
def test_while_it_imports(standby, seconds):
    time.sleep(seconds)
    interrupted(standby)


def test_while_it_waits_for_orders(standby):
    assert standby.stdout.readline().strip() == READY
    interrupted(standby)


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_while_it_begins_a_run(standby, tmp_path, seconds):
    assert standby.stdout.readline().strip() == READY
    order = {"env": {"JAX_PLATFORMS": "cpu"}, "argv": ["train", CONFIG, "--runs-dir", str(tmp_path)]}
    standby.stdin.write(json.dumps(order) + "\n")
    standby.stdin.flush()
    time.sleep(seconds)
    standby.send_signal(signal.SIGINT)
    errors = standby.communicate(timeout=LONG_S)[1]
    assert standby.returncode == Exit.INTERRUPTED and "Traceback" not in errors, errors


def test_a_collective_whose_peer_is_gone_is_one_line_and_any_other_error_has_its_traceback():
    lost = jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1\nand more")
    assert in_words(lost) == (
        "a collective failed, for another process is gone: INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1"
    )
    for other in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OSError("Connection reset by peer")):
        try:
            raise other
        except Exception as error:
            assert in_words(error).startswith("Traceback") and in_words(error).rstrip().endswith(str(other))
