"""A host of its own, imitated by a network namespace, whose cable is pulled, and whose processes are stopped."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from jaxtrain.resilience.channel import GONE, HERE, SILENT
from tests.resilience.lines import BRIEF, SECRET, a_hub, until

PORT, NET = 7611, "10.77.61"
LINE = f"""
import time
from jaxtrain.resilience.channel import Limits, Line
say = lambda state: print(state, flush=True)
with Line("{NET}.1:{PORT}", "far", {SECRET!r}, print, on_change=say, limits={BRIEF!r}, log=say): time.sleep(60)
"""


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@contextmanager
def a_cable():
    """A bridge here, "cable" on it, and the cable's other end in a namespace."""
    name = f"jt{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", name, "type", "bridge")
        ip("address", "add", f"{NET}.1/24", "dev", name)
        ip("link", "add", f"{name}c", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"{name}c", "master", name, "up")
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{NET}.2/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield name
    finally:
        for words in (("netns", "del", name), ("link", "del", name), ("link", "del", f"{name}c")):
            subprocess.run(["ip", *words], capture_output=True, timeout=20)


@pytest.fixture
def cable():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    with a_cable() as name:
        yield name


def test_a_cut_network_or_a_stopped_host_is_silent_and_comes_back(opened, cable):
    hub, _, states = a_hub(opened, address=f"{NET}.1:{PORT}", limits=BRIEF)
    command = ["ip", "netns", "exec", cable, sys.executable, "-c", LINE]
    far = opened(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        until(lambda: states == [("far", HERE)])
        ip("link", "set", f"{cable}c", "nomaster")
        until(lambda: states[1:] == [("far", SILENT)])
        assert [far.stdout.readline().strip() for _ in range(2)] == [HERE, SILENT]
        ip("link", "set", f"{cable}c", "master", cable)
        assert far.stdout.readline().strip() == HERE
        until(lambda: hub.peer("far").state == HERE)
        far.send_signal(signal.SIGSTOP)
        until(lambda: states[-1] == ("far", SILENT))
        far.send_signal(signal.SIGCONT)
        until(lambda: states[-1] == ("far", HERE) and ("far", GONE) not in states)
    finally:
        far.kill()
    until(lambda: states[-1] == ("far", GONE))
