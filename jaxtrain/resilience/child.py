"""One child process: started in a session of its own, its output headed by its name, its end noticed at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from jaxtrain.resilience import say

READY = "\0ready"  # a line by which a child says that it waits for orders; what a trainer prints is text


class Child:
    """`changed` is set whenever it becomes ready or ends. To be made by the main thread: a child dies with its maker's thread."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], head: str, changed: threading.Event):
        self.head, self.ready, self.ended = head, False, None
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._changed = changed
        for source, sink in ((self._process.stdout, say.OUT), (self._process.stderr, say.ERR)):
            threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return None if self.ended is None else self._process.returncode

    def tell(self, line: str) -> None:
        """One line on its stdin. A child that is gone does not read it."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """To the child and what it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self, deadline_s: float) -> bool:
        """SIGKILL, and whether it is gone for certain."""
        self.signal(signal.SIGKILL)
        end = time.monotonic() + deadline_s
        while self.ended is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.ended is not None

    def stopped(self) -> bool:
        """Whether it stands still by SIGSTOP or a debugger (Linux)."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "Tt"
        except (OSError, IndexError):
            return False

    def _wait(self) -> None:
        self._process.wait()
        self.ended = time.monotonic()
        with contextlib.suppress(OSError):  # what it did not read
            self._process.stdin.close()
        self._changed.set()

    def _copy(self, source: IO[bytes], sink: say.Writer) -> None:
        for raw in source:
            line = raw.decode(errors="replace").rstrip()
            if line == READY:
                self.ready = True
                self._changed.set()
                continue
            sink.put(f"{self.head}{line}")
        source.close()


def die_with_parent() -> None:
    """The kernel will kill this process when the thread that started it ends, and lets its parent look into it until then.
    prctl(2): PR_SET_PDEATHSIG = 1, PR_SET_PTRACER = 0x59616d61 (Linux)."""
    if sys.platform == "linux":
        parent, kernel = os.getppid(), ctypes.CDLL(None)
        kernel.prctl(1, signal.SIGKILL)
        kernel.prctl(0x59616D61, parent, 0, 0, 0)  # py-spy is its sibling, whom Yama refuses; a kernel without Yama, this
        if os.getppid() != parent:  # it died meanwhile; earlier, and stdin is at its end. A supervisor may be process 1
            os._exit(1)
