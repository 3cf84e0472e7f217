"""Supervisors whose output nobody takes: they go on, keep what they can, say what they dropped, and end."""

import re
import subprocess
import sys
import threading
import time

import pytest

from jaxtrain.resilience import say
from tests.resilience.lines import LONG_S
from tests.resilience.supervisors import ROOT

LINE_BYTES = 1000
SPEAKER = f"""
import sys, time
from jaxtrain.resilience import say
began = time.monotonic()
for number in range(int(sys.argv[1])):
    say.as_lead(f"{{number:{LINE_BYTES}}}")
print(time.monotonic() - began, flush=True)
sys.stdin.read()
"""
PARENT = f"""
import os, sys, threading, time
from jaxtrain.resilience.child import Child
script = "print('x' * {say.KEPT_BYTES}); print('x' * {say.KEPT_BYTES}); print('\\\\0ready'); input()"
child = Child([sys.executable, "-uc", script], os.environ, "[p0] ", threading.Event())
end = time.monotonic() + {LONG_S}
while time.monotonic() < end and not child.ready:
    time.sleep(0.01)
child.tell("")
while time.monotonic() < end and child.code is None:
    time.sleep(0.01)
print("ready," if child.ready else "not ready,", f"ended by {{child.code}}", file=sys.stderr, flush=True)
"""
MORE = 2 * say.KEPT_BYTES // LINE_BYTES  # lines than are kept


def speaker(lines):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", SPEAKER, str(lines)], cwd=ROOT, **pipes)


def numbers(text):
    return [int(number) for number in re.findall(rb"^\[lead\] +(\d+)$", text, re.MULTILINE)]


def test_who_speaks_waits_for_no_reader_and_says_in_order_what_it_kept_and_how_many_lines_it_dropped():
    with speaker(MORE) as process:
        assert float(process.stdout.readline()) < 5.0  # and not until somebody reads
        said = process.communicate(timeout=60)[1]
    kept = numbers(said)
    (dropped,) = re.findall(rb"^\[host\] (\d+) lines are left out here", said, re.MULTILINE)
    assert kept == [*range(len(kept))] and len(kept) + int(dropped) == MORE
    assert len(kept) >= 0.9 * say.KEPT_BYTES / (LINE_BYTES + 10)
    assert process.returncode == 0


def test_the_end_waits_no_longer_than_its_bound_for_a_reader():
    with speaker(MORE) as process:
        process.stdout.readline()
        began = time.monotonic()
        process.stdin.close()
        assert process.wait(60) == 0
        assert say.FLUSH_S * 0.9 < time.monotonic() - began < say.FLUSH_S + 5.0


def test_all_that_was_said_is_written_before_the_end():
    with speaker(1000) as process:
        assert numbers(process.communicate(timeout=60)[1]) == [*range(1000)]


def test_a_child_is_heard_to_be_ready_and_ends_though_nobody_takes_its_output():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == b"ready, ended by 0\n"


def test_lines_of_several_threads_come_whole_and_each_threads_in_order(tmp_path):
    with open(tmp_path / "said", "w") as stream:
        writer = say.Writer(lambda: stream)
        threads = [threading.Thread(target=lambda n=n: [writer.put(f"{n} {i}") for i in range(500)]) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        writer.flush()
    rows = [tuple(map(int, line.split())) for line in (tmp_path / "said").read_text().splitlines()]
    assert all([i for who, i in rows if who == n] == [*range(500)] for n in range(4)) and len(rows) == 2000


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_was_closed_at_the_start_loses_its_lines_and_nothing_else(tmp_path, closed):
    script = "from jaxtrain.resilience import say; [w.put('said') for w in (say.OUT, say.ERR) for _ in range(3)]; say.flush()"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, script], cwd=ROOT, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"said\n" * 3)
