"""Snapshots of a run's state in host memory that outlives the process, taken beside the loop. It restarts nothing.

A snapshot, in order:
  1. the caller's thread copies this process's shards into the slot that does not hold the newest whole snapshot;
     when it returns, the state may be donated;
  2. a background thread takes the checksums and writes the header, then waits for the buddy to have a copy, where one
     is kept;
  3. when the processes agree that all have done so, the snapshot is the newest whole one, which no slot may lose.
Of what several devices hold alike, the first process of each host keeps one copy: a lost host takes no only copy.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.background import Deadline, in_background
from jaxtrain.checkpoint import describe, peers
from jaxtrain.checkpoint.manifest import in_words
from jaxtrain.checkpoint.names import named
from jaxtrain.checkpoint.snapshot import on_cpu
from jaxtrain.errors import CheckpointError
from jaxtrain.resilience import buddies, recall, slots
from jaxtrain.resilience.policy import Shelf, SnapshotConfig, too_large
from jaxtrain.resilience.slots import Header, Kind, Moment, Piece

_AHEAD = 16  # shards on their way from the devices while one is written: each device's link is busy, host memory is not full


class _Part(NamedTuple):
    """A shard that this process keeps: which of its array's local ones, and where its bytes go."""

    shard: int
    piece: Piece


class Snapshots:
    """One host's snapshots of one run, in `folder`. Every process makes one, and calls its methods in the same order.

    `run` names the run folder's content (`tiers.run_name`): snapshots of anything else are not looked at. No failure of a
    snapshot stops the run; each kind is said once on stderr.
    """

    def __init__(self, folder: Path, config: SnapshotConfig, *, run: str, generation: int):
        self.folder, self.config = folder, config
        self._run, self._since = run, 0
        self._newest: Moment | None = None
        self._parts: list[_Part] | None = None
        self._pending: Future[None] | None = None
        self._said: set[str] = set()
        rows = peers.agree(peers.new_round(), self._open, list, self._deadline())
        self._hosts, self._names, self._room, troubles, last = map(list, zip(*rows))
        self._generation = max(generation, 1 + max(last))  # a folder on a disk has seen other supervisors' generations
        self._off = any(troubles)
        if self._off:
            self._say("there are no snapshots.", next(filter(None, troubles)))

    def save(self, step: int, state: Any, *, data: dict, trouble: str = "") -> None:
        """Returns when `state`, a tree of arrays, may be donated. `data` (the data position) is JSON.

        `trouble`: why this process must not go on from this step; then there is no such snapshot, and that is said.
        """
        if self._off:
            return
        arrays = describe.storable(named(state))
        if self._parts is None and not self._plan(arrays):
            return
        key, deadline, header = peers.new_round(), self._deadline(), self._header(step, arrays, data)
        if before := self._unfinished():
            view, trouble = None, "the one before is not finished"
        elif trouble:
            view = None
        else:
            view, trouble = self._copied(arrays, header.size)
        work = partial(self._finish, before, key, header, view, trouble, deadline)
        self._pending = in_background(work, yielding=on_cpu(arrays))

    def wait(self) -> int | None:
        """The step of the newest whole snapshot, once no other is under way."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending], 2 * self.config.deadline_seconds)
        return self._newest and self._newest.step

    def known(self, abstract: Any) -> recall.Known:
        """Which snapshots this run can go on from; `abstract` is a tree of shapes, dtypes and shardings."""
        self.wait()
        return recall.known(self.folder, self._run, abstract, self._deadline())

    def restore(self, moment: Moment, abstract: Any) -> recall.Recalled:
        """A snapshot as a tree like `abstract`; call `go_on_from` next. Raises DamagedError, on every process."""
        return recall.recall(self.folder, self._run, moment, abstract, self._deadline())

    def go_on_from(self, step: int, moment: Moment | None) -> None:
        """What was restored, and which snapshot it was: what is later has not happened, and goes.

        Where this process has taken snapshots before, those that follow are another generation's.
        """
        self.wait()
        self._since, self._newest = step, moment
        self._generation += self._parts is not None
        if not self._off:
            recall.forget(self.folder, self._run, step)
            self._slots = slots.Slots(self.folder, jax.process_index())

    def discard(self) -> None:
        """Gives the memory back, when the run is complete; waits for the last snapshot."""
        self.wait()
        if self._mates()[0] == jax.process_index():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> tuple[str, str, float, str, int]:
        """This process's host as a key and as a name, bytes it may use, what is wrong, the last generation seen here."""
        host = socket.gethostname()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            room = Shelf(self.folder, self.config.memory_gb).room()
            self._slots = slots.Slots(self.folder, jax.process_index())
        except OSError as error:
            return host, host, 0, f"{host}: {in_words(error)}", -1
        parts = (part for folder in slots.folders(self.folder) for part in slots.snapshots(folder))
        last = max((part.header.moment.generation for part in parts if part.header.run == self._run), default=-1)
        return f"{host} {self.folder}", host, room, "", last

    def _plan(self, arrays: Mapping[str, jax.Array]) -> bool:
        """Decides once which shards this process keeps; False where some host's budget does not hold its share."""
        self._parts = _parts(arrays, self._hosts)
        mine = sum(part.piece.size for part in self._parts)
        key, deadline = peers.new_round(), self._deadline()
        lines = peers.agree(key, lambda: mine, lambda sizes: self._too_large(sizes), deadline)
        if lines:
            self._off = True
            self._say("there are no snapshots.", "; ".join(lines), "a host's fit into its budget", _BUDGET_FIX)
        return not lines

    def _too_large(self, sizes: list[int]) -> list[str]:
        return too_large(self.config, self._hosts, self._room, sizes)

    def _header(self, step: int, arrays: Mapping[str, jax.Array], data: dict) -> Header:
        return Header(
            run=self._run,
            moment=Moment(step, self._generation),
            since=self._since,
            keep=self._newest,
            process=jax.process_index(),
            processes=jax.process_count(),
            data=data,
            arrays={name: Kind(str(x.dtype), x.shape) for name, x in arrays.items()},
            pieces=[part.piece for part in self._parts or ()],
        )

    def _unfinished(self) -> Future[None] | None:
        """The snapshot that is still under way. Raises what no process can go on from, such as a lost coordinator."""
        if self._pending is not None and self._pending.done():
            self._pending.result()
            self._pending = None
        return self._pending

    def _copied(self, arrays: Mapping[str, jax.Array], size: int) -> tuple[memoryview | None, str]:
        """The slot with this process's shards in it, and what went wrong."""
        try:
            view = self._slots.begin(size, self._newest)
        except OSError as error:
            return None, in_words(error)
        shards = [arrays[piece.name].addressable_shards[shard].data for shard, piece in self._parts or ()]
        for i, (_, piece) in enumerate(self._parts or ()):
            for shard in shards[i : i + _AHEAD] if i == 0 else shards[i + _AHEAD - 1 : i + _AHEAD]:
                shard.copy_to_host_async()
            source = np.asarray(shards[i])
            target = np.frombuffer(view, source.dtype, source.size, piece.offset)
            np.copyto(target, source.reshape(-1))
            shards[i] = None  # the host's copy goes; on CPUs it is a view, and holds the buffer from the step
        return view, ""

    def _finish(self, before: Any, key: str, header: Header, view: Any, trouble: str, deadline: Deadline) -> None:
        if before is not None:
            concurrent.futures.wait([before], deadline.left())
        what = f"the snapshot of step {header.moment.step} is not whole."

        def report() -> str:
            if trouble:
                raise CheckpointError(what, got=f"{self._here()}: {trouble}")
            try:
                self._commit(header, view)
            except OSError as error:
                raise CheckpointError(what, got=f"{self._here()}: {in_words(error)}") from error
            waited = self.config.deadline_seconds / 2
            late = self.config.buddies and not buddies.wait_for_copy(self.folder, header.moment, waited)
            return f"{self._here()}: its buddy has no copy after {waited:.0f} s" if late else ""

        try:
            late = peers.agree(key, report, lambda texts: list(filter(None, texts)), deadline)
        except CheckpointError as error:
            return self._say(error.what, error.got, error.rule, error.fix)
        first, self._newest = self._newest is None or self._newest.generation < self._generation, header.moment
        if late:
            self._say(f"the snapshot of step {header.moment.step} would not survive its host.", "; ".join(late))
        if first:
            self._remove_older()
        return None

    def _commit(self, header: Header, view: memoryview) -> None:
        pieces = [p._replace(crc32=slots.checksum(view[p.offset : p.offset + p.size])) for p in header.pieces]
        self._slots.commit(replace(header, pieces=pieces))

    def _remove_older(self) -> None:
        """What processes of earlier generations left, now that a snapshot of this one is whole."""
        mine = {slots.data_file(self.folder, process, name) for process in self._mates() for name in slots.NAMES}
        for path in set(self.folder.glob("*.data")) - mine:
            slots.remove(path)
        for folder in slots.folders(self.folder)[1:]:
            for part in slots.snapshots(folder):
                if part.header.moment.generation < self._generation:
                    slots.remove(part.path)

    def _mates(self) -> list[int]:
        """The processes of this host."""
        return [process for process, host in enumerate(self._hosts) if host == self._hosts[jax.process_index()]]

    def _here(self) -> str:
        return f"process {jax.process_index()} ({self._names[jax.process_index()]})"

    def _say(self, what: str, got: str, rule: str = "", fix: str = "") -> None:
        if peers.is_lead() and got not in self._said:
            self._said.add(got)
            print(CheckpointError(what, got=got, rule=rule, fix=fix), file=sys.stderr, flush=True)

    def _deadline(self) -> Deadline:
        return Deadline(self.config.deadline_seconds)


_BUDGET_FIX = "a larger snapshot.memory_gb where the host has more; snapshot.every=0 for none"


def _parts(arrays: Mapping[str, jax.Array], hosts: list[str]) -> list[_Part]:
    """Each box of each array that no earlier process of this host holds, once."""
    me = jax.process_index()
    earlier = {process for process in range(me) if hosts[process] == hosts[me]}
    chosen: list[tuple[int, str, slots.Box, int]] = []
    for name, x in arrays.items():
        places = {device: recall.box(index, x.shape) for device, index in x.sharding.devices_indices_map(x.shape).items()}
        taken = {where for device, where in places.items() if device.process_index in earlier}
        for number, shard in enumerate(x.addressable_shards):
            if shard.data.size and places[shard.device] not in taken:
                taken.add(places[shard.device])
                chosen.append((number, name, places[shard.device], shard.data.nbytes))
    offsets = slots.laid_out(size for *_, size in chosen)
    return [_Part(number, Piece(name, where, at, size, "")) for (number, name, where, size), at in zip(chosen, offsets)]
