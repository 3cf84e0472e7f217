"""Work on threads beside the main one, and deadlines for those who wait for it. It retries nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_NICENESS = 19  # the lowest priority: 1.5 % of a core that something else wants, and all of its idle moments


class Deadline:
    """A moment some seconds from now."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; not negative."""
        return max(0.0, self._end - time.monotonic())


def within(deadline: Deadline, work: Callable[[], T]) -> T:
    """`work()`, on a thread of its own that is left behind at the deadline: a file system may never answer.

    Raises TimeoutError then, which is an OSError.
    """
    future = in_background(work)
    try:
        return future.result(deadline.left())
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {deadline.seconds:g} s") from None


class Lately:
    """What `work` answered last, asked again beside the caller each time: it waits for nothing. None until it is known."""

    def __init__(self, work: Callable[[], object]):
        self._work, self._last = work, None
        self._asked: Future[object] | None = None

    def __call__(self) -> object:
        if self._asked is None or self._asked.done():
            if self._asked and not self._asked.exception():
                self._last = self._asked.result()
            self._asked = in_background(self._work)
        return self._last


def in_background(work: Callable[[], T], *, yielding: bool = False) -> Future[T]:
    """Starts `work` on a thread of its own; the future holds its value or its exception.

    `yielding`: it, and the threads that it starts (Orbax's and TensorStore's), leave the CPU to whoever wants it. Where
    a step computes on the CPU that halves what the loop loses to a save. Beside accelerators, whose hosts have cores to
    spare, it would gain nothing, and starve a save on a host that is busy with something else.

    The threads are daemons: a write that hangs does not keep a process from leaving.
    """
    future: Future[T] = Future()

    def run() -> None:
        if yielding and sys.platform == "linux":  # elsewhere a priority is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future
