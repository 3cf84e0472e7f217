"""What a supervisor's child asks of the kernel."""

import ctypes
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxtrain.resilience.child import die_with_parent
from tests.resilience.supervisors import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def test_a_child_dies_with_its_parent_and_may_be_looked_into_by_what_its_parent_starts(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *words: calls.append(words)))
    die_with_parent()
    assert calls == [(1, signal.SIGKILL), (int.from_bytes(b"Yama"), os.getppid(), 0, 0, 0)]


def test_a_kernel_with_or_without_yama_lets_the_child_live_on():
    script = "from jaxtrain.resilience.child import die_with_parent; die_with_parent(); print('lives')"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60).stdout == b"lives\n"
