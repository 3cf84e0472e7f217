"""A cut cable, imitated without root: for some seconds the kernel drops what arrives at the TCP sockets of processes (Linux).

Acknowledgements are dropped too, so that what they send stops after the first packets, and neither side sees an end.
What was sent meanwhile comes when the kernel of the sender tries again: after 0.2 s, and doubling from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache

_SWEEP_S = 0.02  # by which new sockets are found
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)  # a filter of one instruction: keep 0 bytes
_FILTER = struct.pack("HxxxxxxP", 1, ctypes.addressof(_DROP))
_PIDFD_GETFD = 438  # of syscall(2), on every architecture
_TCP = (socket.AF_INET, socket.AF_INET6)

_holds: list[tuple[Callable[[], Iterable[int]], float]] = []  # whom, until when; one thread serves all
_lock = threading.Lock()
_connect_ex = socket.socket.connect_ex


def deafen(pids: Callable[[], Iterable[int]], seconds: float) -> None:
    """Returns at once. `pids` is asked again and again: this process, or children of it."""
    with _lock:
        _holds.append((pids, time.monotonic() + seconds))
        if len(_holds) == 1:
            threading.Thread(target=_serve, name="deafness", daemon=True).start()


def _serve() -> None:
    deaf: set[int] = set()
    while True:
        with _lock:
            _holds[:] = [hold for hold in _holds if hold[1] > time.monotonic()]
            now = {pid for pids, _ in _holds for pid in pids()}
            # A connection that this process makes is deaf from its first packet on.
            socket.socket.connect_ex = _deaf_connect_ex if os.getpid() in now else _connect_ex
            _each(deaf - now, False)
            if not _holds:
                return
            soonest = min(end for _, end in _holds)
        deaf = now
        _each(deaf, True)
        time.sleep(min(_SWEEP_S, max(0.0, soonest - time.monotonic())))


def _deaf_connect_ex(self: socket.socket, address: object) -> int:
    if self.family in _TCP:
        _filter(self, True)
    return _connect_ex(self, address)


def _each(pids: Iterable[int], deaf: bool) -> None:
    for pid in pids:
        try:
            for sock in _sockets(pid):
                with sock:
                    _filter(sock, deaf)
        except PermissionError as error:
            _say(f"fault: the network cannot be cut here: {error}")


@cache
def _say(line: str) -> None:
    """Once."""
    print(line, file=sys.stderr, flush=True)


def _filter(sock: socket.socket, deaf: bool) -> None:
    with contextlib.suppress(OSError):  # it has none to take away
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER if deaf else _SO_DETACH_FILTER, _FILTER if deaf else 0)


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Copies of a process's TCP sockets; none where it is gone. Raises PermissionError."""
    try:
        process, names = os.pidfd_open(pid), os.listdir(f"/proc/{pid}/fd")
    except (ProcessLookupError, FileNotFoundError):
        return
    try:
        for name in names:
            copy = _copy(process, pid, name)
            if copy and copy.family in _TCP and copy.type == socket.SOCK_STREAM:
                yield copy
            elif copy:
                copy.close()
    finally:
        os.close(process)


def _copy(process: int, pid: int, name: str) -> socket.socket | None:
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            return socket.socket(fileno=_descriptor(process, pid, int(name)))
    return None


def _descriptor(process: int, pid: int, number: int) -> int:
    if pid == os.getpid():
        return os.dup(number)
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code)) if code != 9 else FileNotFoundError
    return found
