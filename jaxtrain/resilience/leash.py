"""A process that kills a host's trainers when their supervisor's right to let them run has ended, or the supervisor has.

A supervisor that was stopped cannot kill anybody, and its trainers would run on while another host takes over. Where the supervisor has ended
it leaves word, in a file, when the last trainer is dead: so nobody has to wait for the right to end. It decides nothing;
what the right is, tenure.py and node.py say. Run as a script it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

NEVER = 1e18


def clock() -> float:
    """Seconds that go on while the machine sleeps; the same for all processes of a host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class Leash:
    """`hold` says again and again whom to kill when. To be used by one thread at a time. `word`: the file."""

    def __init__(self, word: str = "") -> None:
        self._word = word
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self, pids: Iterable[int], until: float, of: str = "-") -> None:
        """These process groups, which are `of` a generation, and no others may live until this moment of `clock`."""
        line = " ".join(map(str, [until, of, *pids])).encode() + b"\n"
        for _ in range(2):
            try:
                if self._process and os.write(self._process.stdin.fileno(), line) == len(line):
                    return
            except OSError:
                pass
            self._start()  # it is dead, or stopped and its pipe is full

    def close(self) -> None:
        """Lets all go."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            process.stdin.close()

    def _start(self) -> None:
        self.close()
        command = [sys.executable, "-I", "-S", __file__, self._word]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        os.set_blocking(self._process.stdin.fileno(), False)


def watch(source: int, word: str) -> None:
    """Until the supervisor closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # cluster managers send them to all processes
        signal.signal(number, signal.SIG_IGN)
    until, of, pids, rest = NEVER, "-", [], b""
    while True:
        ready, _, _ = select.select([source], [], [], min(3600.0, max(0.0, until - clock())) if pids else None)
        if pids and clock() >= until:
            _kill(pids)
            pids = []
        if not ready:
            continue
        data = os.read(source, 65536)
        if not data:
            _kill(pids)
            return _leave_word(word, of, pids) if word else None
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            moment, of, *numbers = lines[-1].decode().split()
            until, pids = float(moment), [*map(int, numbers)]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _leave_word(word: str, of: str, pids: Iterable[int]) -> None:
    while not all(map(_is_dead, pids)):
        time.sleep(0.01)
    with contextlib.suppress(OSError), open(word, "w") as file:
        file.write(of)


def _is_dead(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            ended = file.read().rpartition(")")[2].split()[0] in "ZX"
        return ended and len(os.listdir(f"/proc/{pid}/task")) == 1  # no other thread of it runs on
    except OSError:
        return True


if __name__ == "__main__":
    watch(sys.stdin.fileno(), sys.argv[1])
