"""How supervisors speak: lines on stderr, headed by who says them, and what their children print. Nobody waits for a reader.

One thread writes each stream: a pipe that is full, as before a log disk that stands still, would stop whoever writes to it,
and with it the run. What is said meanwhile is kept, up to a bound; beyond it lines are dropped and counted. On a full
disk the line is lost, and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import IO

KEPT_BYTES = 4 << 20  # days of what a supervisor says, seconds of what trainers may print
FLUSH_S = 3.0  # at the end, for a stream that stands still


class Writer:
    """`stream`: says which it is now. Lines come out in the order in which they were put."""

    def __init__(self, stream: Callable[[], IO[str] | None]):
        self._stream, self._thread = stream, None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._waiting, self._dropped = 0, 0  # bytes; lines
        self._lock = threading.RLock()  # a signal handler may speak while its thread does

    def put(self, line: str) -> None:
        """Returns at once. Where one was dropped all are until the rest is written: so it can be said where they were."""
        data = f"{line}\n".encode(errors="backslashreplace")
        with self._lock:
            if self._dropped or self._waiting + len(data) > KEPT_BYTES:
                self._dropped += 1
            else:
                self._add(data)

    def flush(self, seconds: float = FLUSH_S) -> None:
        """Until all is written, or so long."""
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:
            time.sleep(0.002)

    def _add(self, data: bytes) -> None:
        self._waiting += len(data)
        self._lines.put(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            data = self._lines.get()
            with contextlib.suppress(OSError, ValueError):  # a reader that left, a full disk, a stream that is closed
                self._write(data)
            with self._lock:
                self._waiting -= len(data)
                if self._dropped and not self._waiting:
                    self._add(f"[host] {self._dropped} lines are left out here: nobody took them\n".encode())
                    self._dropped = 0

    def _write(self, data: bytes) -> None:
        """Past the stream's buffer: at exit Python would wait for the lock of one that a thread is writing to."""
        stream = self._stream()
        if stream is None:  # it was closed when this process began: its descriptor may be another file's
            return
        try:
            descriptor = stream.fileno()
        except OSError:  # a stream of Python's alone
            stream.write(data.decode())
            return
        while data:
            data = data[os.write(descriptor, data) :]


OUT, ERR = Writer(lambda: sys.stdout), Writer(lambda: sys.stderr)


def flush() -> None:
    """Before this process prints by itself, and before it ends."""
    end = time.monotonic() + FLUSH_S
    for writer in (OUT, ERR):
        writer.flush(end - time.monotonic())


def _say(who: str, line: str) -> None:
    ERR.put(f"[{who}] {line}")


as_lead, as_host, as_channel = partial(_say, "lead"), partial(_say, "host"), partial(_say, "channel")
atexit.register(flush)
