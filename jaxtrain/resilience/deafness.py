"""A cut cable, imitated without root: for some seconds the kernel drops whatever arrives at the TCP sockets of processes (Linux).

Acknowledgements are dropped too, so that what they send stops after the first packets, and neither side sees an end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator

_SWEEP_S = 0.02  # by which new sockets are found
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)  # a filter of one instruction: keep 0 bytes
_FILTER = struct.pack("HxxxxxxP", 1, ctypes.addressof(_DROP))
_PIDFD_GETFD = 438  # of syscall(2), on every architecture


def deafen(pids: Callable[[], Iterable[int]], seconds: float) -> None:
    """Returns at once. `pids` is asked again and again: this process, or children of it."""
    threading.Thread(target=_hold, args=(pids, time.monotonic() + seconds), name="deafness", daemon=True).start()


def _hold(pids: Callable[[], Iterable[int]], end: float) -> None:
    connect_ex = socket.socket.connect_ex
    if os.getpid() in pids():  # a connection that this process makes is deaf from its first packet on
        socket.socket.connect_ex = lambda self, address: _filter(self, True) or connect_ex(self, address)
    while time.monotonic() < end:
        _each(pids(), True)
        time.sleep(min(_SWEEP_S, max(0.0, end - time.monotonic())))
    socket.socket.connect_ex = connect_ex
    _each(pids(), False)


def _each(pids: Iterable[int], deaf: bool) -> None:
    for pid in pids:
        for sock in _sockets(pid):
            with sock:
                _filter(sock, deaf)


def _filter(sock: socket.socket, deaf: bool) -> None:
    with contextlib.suppress(OSError):  # it has none to take away
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER if deaf else _SO_DETACH_FILTER, _FILTER if deaf else 0)


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Copies of a process's TCP sockets."""
    with contextlib.suppress(OSError):  # it is gone
        process = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                copy = _copy(process, pid, name)
                if copy and copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    yield copy
                elif copy:
                    copy.close()
        finally:
            os.close(process)


def _copy(process: int, pid: int, name: str) -> socket.socket | None:
    with contextlib.suppress(OSError):  # closed meanwhile
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            descriptor = ctypes.CDLL(None).syscall(_PIDFD_GETFD, process, int(name), 0)
            return socket.socket(fileno=descriptor) if descriptor >= 0 else None
    return None
