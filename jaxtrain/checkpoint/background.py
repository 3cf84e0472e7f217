"""Work beside the training loop at low priority, and deadlines for those who wait for it. It retries nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

# A tenth of a core's time where the loop wants all of it, the idle moments between. At 0 the loop lost 0.21 of a save's
# own time and more, at 10 and 19 0.15; at 19 a save may starve on a host with other busy processes.
_NICENESS = 19


class Deadline:
    """A moment some seconds from now."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; not negative."""
        return max(0.0, self._end - time.monotonic())


def in_background(work: Callable[[], T]) -> Future[T]:
    """Starts `work` on a thread of its own; the future holds its value or its exception.

    The thread, and all threads that it starts (Orbax's, and TensorStore's pool if this is its first use), yield to the
    loop. They are daemons: a write that hangs does not keep a process from leaving.
    """
    future: Future[T] = Future()

    def run() -> None:
        if sys.platform == "linux":  # elsewhere a priority is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
