"""A process's TCP connections as the kernel sees them, and which of them nobody acknowledges (Linux). It judges nobody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RESENDS = 3  # of one segment, in 1.4 s, after which a link is stuck; for a process that hangs the kernel acknowledges
_ESTABLISHED = "01"


class Link(NamedTuple):
    """One end. Addresses as /proc/net/tcp writes them: what is local here is remote on the other side."""

    local: str
    remote: str
    resends: int  # of what was sent last, without an acknowledgement

    @property
    def stuck(self) -> bool:
        return self.resends >= RESENDS


def links(pid: int, proc: Path = Path("/proc")) -> tuple[Link, ...]:
    """None where the process is gone, or somebody else's."""
    inodes = {*_sockets(proc / str(pid) / "fd")}
    rows = [row for name in ("tcp", "tcp6") for row in _table(proc / str(pid) / "net" / name)]
    return tuple(Link(row[1], row[2], int(row[6], 16)) for row in rows if row[3] == _ESTABLISHED and row[9] in inodes)


def _sockets(folder: Path) -> Iterator[str]:
    """The inodes of a process's sockets."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed meanwhile
                kind, _, inode = os.readlink(folder / name).partition(":")
                if kind == "socket":
                    yield inode.strip("[]")


def _table(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()[1:]]
    except OSError:
        return []
