"""A trainer or a standby that is interrupted before it trains: it leaves at once, and says nothing of itself."""

import json
import signal
import subprocess
import sys
import time

import pytest

from jaxtrain.exits import Exit
from jaxtrain.resilience.child import READY
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
