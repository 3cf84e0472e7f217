"""How often snapshots are taken, where they lie and what they may cost a host: a config value and the rule. It writes no file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtrain import ranges

FOLDER = "JAXTRAIN_SNAPSHOTS"  # the variable by which a supervisor names its folder in memory
SLOTS = 2  # the newest whole one, and the one being written


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """A snapshot of the state in host memory every `every` steps, where a supervisor has named a folder for it.

    A host holds two of its own at a time, and two of its buddy's. Where that is more than `memory_gb`, or than the
    folder has room for, none are taken, and the run says so. Nor does a host take more from others than that.
    """

    every: int = 20  # steps; 0: none. at 500 ms a step 100 MB cost 0.4 % (benchmarks/snapshots.py)
    memory_gb: float | None = None  # of one host; None: half of what is free in the folder
    buddies: bool = True  # another host, where there is one, keeps a copy
    folder: str | None = None  # on a local disk, instead of the supervisor's in memory; each run has its own within it
    deadline_seconds: float = 60.0  # for one snapshot to be written, copied to the buddy and agreed on

    def __post_init__(self) -> None:
        ranges.check(
            "snapshot", self, every=ranges.whole(0), memory_gb=ranges.FROM_ZERO, deadline_seconds=ranges.FROM_ONE
        )


@dataclass(frozen=True)
class Shelf:
    """The folder of a host's snapshots and copies, and what they may take there."""

    folder: Path
    memory_gb: float | None

    def used(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.data"))

    def room(self) -> float:
        """Bytes, those that are used among them. Raises OSError where there is no folder."""
        free = shutil.disk_usage(self.folder).free + self.used()
        return free / 2 if self.memory_gb is None else min(free, self.memory_gb * 1e9)


def place(config: SnapshotConfig, run: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of this host's snapshots of the run of this name; None where there are none."""
    if config.every == 0 or not environment.get(FOLDER):
        return None
    return Path(config.folder).absolute() / run if config.folder else Path(environment[FOLDER]).absolute() / "snapshots"


def too_large(config: SnapshotConfig, hosts: list[str], room: list[int], sizes: list[int]) -> list[str]:
    """A line for each host whose budget the snapshots exceed, in bytes; host, room and a snapshot's size by process."""
    own = {host: sum(size for size, other in zip(sizes, hosts) if other == host) for host in hosts}
    room_of = {host: min(free for free, other in zip(room, hosts) if other == host) for host in hosts}
    lines = []
    for host in own:
        theirs = max((own[other] for other in own if other != host), default=0) if config.buddies else 0
        needed = SLOTS * (own[host] + theirs)
        if needed > room_of[host]:
            copies = f" + {SLOTS} x {theirs / 1e9:.3f} GB of its buddy's" if theirs else ""
            lines.append(
                f"{host}: {SLOTS} x {own[host] / 1e9:.3f} GB{copies} = {needed / 1e9:.3f} GB, "
                f"budget {room_of[host] / 1e9:.3f} GB"
            )
    return lines
