"""Hears that this process is to end: Ctrl-C, SIGTERM, a notice file; and ends it where nothing would be lost.

That all processes stop after the same step is signals.py's work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn

from jaxtrain.errors import RunError
from jaxtrain.exits import Exit

FILE = "JAXTRAIN_NOTICE"  # when a file of this path is there, that counts as SIGTERM
GRACE = "JAXTRAIN_GRACE_SECONDS"  # how long after SIGTERM whoever sent it sends SIGKILL
HEARD = (signal.SIGINT, signal.SIGTERM)
POLL_S = 1.0
USED = 0.9  # of the grace; the rest is for exit codes to be seen before the kill


class Notice:
    """Listens as a context of the main thread, from before anything slow until the process has nothing more to do.

    A thread acts on what is heard, so that it counts while the main thread compiles, or hangs in a collective. Before
    `guard` and after `release` a signal ends the process: nothing would be lost. Between them it is kept in `signal`,
    a second Ctrl-C ends the process, and so does the grace time. A second SIGTERM is the first again: Slurm and systemd
    send it to all processes of a job, and a launcher that got it sends it on.
    """

    def __init__(self, env: Mapping[str, str] = os.environ):
        self.signal = 0  # the gravest that was heard here
        self._grace_s, self._file = grace_seconds(env), env.get(FILE)
        self._guarded = False
        self._late: threading.Timer | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Notice:
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _wake) for number in HEARD}
        threading.Thread(target=self._listen, name="notice", daemon=True).start()
        if self._file:
            threading.Thread(target=self._watch, args=(self._file,), name="notice file", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._outbox.close()  # the listener reads its end
        if self._late:
            self._late.cancel()

    def guard(self) -> None:
        """From here on there is something to be saved."""
        self._guarded = True

    def release(self) -> None:
        """All is saved."""
        self._guarded = False

    def agreed(self, number: int) -> None:
        """All processes stop because one of them heard `number`: the grace time runs here too."""
        if number == signal.SIGTERM and self._late is None and self._grace_s is not None:
            self._late = threading.Timer(USED * self._grace_s, self._too_late)
            self._late.daemon = True
            self._late.start()

    def _listen(self) -> None:
        with self._inbox:
            while data := self._inbox.recv(1):
                if data[0] in HEARD:
                    self._hear(data[0])

    def _hear(self, number: int) -> None:
        again, self.signal = self.signal, max(self.signal, number)
        name = signal.Signals(number).name
        if not self._guarded:
            _leave(_code(number), f"{name}: nothing to save; the same command continues")
        if again and number == signal.SIGINT:
            _leave(Exit.INTERRUPTED, f"{name} again: stopping at once")
        if not again:
            within = f", within {self._grace_s:g} s" if number == signal.SIGTERM and self._grace_s is not None else ""
            _say(f"{name}: saving and stopping after this step{within}; Ctrl-C{' again' * (number == signal.SIGINT)} to stop at once")
        self.agreed(number)

    def _watch(self, path: str) -> None:
        """A thread of its own: a stat may hang, on a file server that does not answer."""
        while not os.path.exists(path):
            if self._closed.wait(POLL_S):
                return
        _say(f"there is a notice: {path}")
        os.kill(os.getpid(), signal.SIGTERM)

    def _too_late(self) -> None:
        if not self._guarded:
            _leave(Exit.PREEMPTED, "all is saved; leaving before the kill, and the same command continues")
        kept = "the same command continues from the checkpoint before"  # which one, a disk that hangs could not say
        _leave(Exit.UNSAVED, f"not saved within {USED * self._grace_s:g} s of {self._grace_s:g} s grace: leaving; {kept}")


def grace_seconds(env: Mapping[str, str]) -> float | None:
    """The seconds between SIGTERM and SIGKILL that the environment tells; None: nobody kills. Raises RunError."""
    text = env.get(GRACE)
    if text is None:
        return None
    if not (text.isascii() and text.replace(".", "", 1).isdecimal() and float(text) > 0):
        raise RunError(f"{GRACE} is no time.", got=repr(text), rule="seconds from SIGTERM to SIGKILL, more than 0")
    return float(text)


def _code(number: int) -> Exit:
    return Exit.PREEMPTED if number == signal.SIGTERM else Exit.INTERRUPTED


def _wake(number: int, frame: object) -> None:
    """Nothing: that it is there makes the interpreter write the number to the listener, whatever the main thread does."""


def _say(line: str) -> None:
    """A full disk under stderr loses the line: the thread that says it has still to act."""
    if sys.__stderr__:  # None is one that was closed before the start
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"{line}\n".encode())  # the main thread may hold the lock of sys.stderr


def _leave(code: Exit, line: str) -> NoReturn:
    _say(line)
    os._exit(code)
