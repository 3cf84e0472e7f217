"""Snapshots back to arrays on any mesh and any number of processes, from whichever files hold the parts. It writes none."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.background import Deadline
from jaxtrain.checkpoint import peers
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.checkpoint.names import named, renamed
from jaxtrain.cluster import few
from jaxtrain.resilience import slots
from jaxtrain.resilience.slots import Box, Kind, Moment, Piece, Snapshot

Holders = dict[str, dict[Box, tuple[Snapshot, Piece]]]  # by array and box, what was checked and will be read


@dataclass(frozen=True)
class Known:
    """The moments that all processes find whole, newest first, and of the others why not."""

    whole: list[Moment]
    lacking: dict[Moment, str]


@dataclass(frozen=True)
class Recalled:
    """A state, the data position that was given with it, and whose memory it came from in words."""

    state: Any
    data: dict[str, Any]
    origin: str


def box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """jax's index of a shard as begins and ends."""
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def known(own: Path, run: str, abstract: Any, deadline: Deadline) -> Known:
    """Which snapshots of a run every process can make its shards of `abstract` from; all processes call it."""
    needs = _needs(abstract)
    kinds = {name: Kind(str(leaf.dtype), tuple(leaf.shape)) for name, leaf in named(abstract).items()}

    def report() -> dict[str, list[Any]]:
        parts = _parts(own, run)
        groups = slots.by_moment(parts)
        alike = {moment: those for moment, those in groups.items() if those[0].header.arrays == kinds}
        whole = [moment for moment, those in alike.items() if slots.covered(those, needs)]
        restarts = {(part.header.moment.generation, part.header.since) for part in parts}
        return {"seen": list(groups), "other": list(groups.keys() - alike), "whole": whole, "restarts": list(restarts)}

    whole, lacking = peers.agree(peers.new_round(), report, _agreed, deadline)
    return Known([Moment(*m) for m in whole], {Moment(*m): why for m, why in lacking})


def recall(own: Path, run: str, moment: Moment, abstract: Any, deadline: Deadline) -> Recalled:
    """One snapshot as a tree like `abstract` (shapes, dtypes, shardings). Raises DamagedError, on every process.

    Every byte is checked before the first array is made. Of a part that several files hold, the first whole one counts.
    """
    parts = [part for part in _parts(own, run) if part.header.moment == moment]
    holders: Holders = {}

    def report() -> list[tuple[int, bool]]:
        holders.update(_checked(parts, _needs(abstract)))
        used = [part for boxes in holders.values() for part, _ in boxes.values()]
        return list({(part.header.process, part.path.parent != own) for part in used})

    origin = peers.agree(peers.new_round(), report, _origin, deadline)
    arrays = {name: _array(holders.get(name, {}), leaf) for name, leaf in named(abstract).items()}
    return Recalled(renamed(abstract, arrays), parts[0].header.data, origin)


def forget(own: Path, run: str, after: int) -> None:
    """Removes what has not happened (later steps than were gone on from) and what is of other runs."""
    for part in (part for folder in slots.folders(own) for part in slots.snapshots(folder)):
        if part.header.run != run or part.header.moment.step > after:
            part.path.with_suffix(".json").unlink(missing_ok=True)  # the memory serves the next one


def _parts(own: Path, run: str) -> list[Snapshot]:
    return [part for folder in slots.folders(own) for part in slots.snapshots(folder) if part.header.run == run]


def _needs(abstract: Any) -> dict[str, set[Box]]:
    """The boxes of each array that this process's devices hold."""
    return {
        name: {box(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
        for name, leaf in named(abstract).items()
    }


def _agreed(reports: list[dict[str, list[Any]]]) -> tuple[list[Moment], list[tuple[Moment, str]]]:
    """By the lead: what is whole for all and has not been undone; of the rest, why not."""
    restarts = {tuple(pair) for report in reports for pair in report["restarts"]}
    whole_of = [{Moment(*m) for m in report["whole"]} for report in reports]
    other = {Moment(*m) for report in reports for m in report["other"]}
    whole, lacking = [], []
    for moment in sorted({Moment(*m) for report in reports for m in report["seen"]}, reverse=True):
        without = [process for process, found in enumerate(whole_of) if moment not in found]
        if slots.undone(moment, restarts):
            lacking.append((moment, "a restart went on from before it"))
        elif moment in other:
            lacking.append((moment, "its arrays have other shapes (of another number of replicas that train apart?)"))
        elif without:
            lacking.append((moment, f"process {few(without)} does not find all parts of it"))
        else:
            whole.append(moment)
    return whole, lacking


def _checked(parts: list[Snapshot], needs: Mapping[str, set[Box]]) -> Holders:
    """For each box that is needed, the first file that holds it undamaged. Raises DamagedError."""
    candidates: dict[tuple[str, Box], list[tuple[Snapshot, Piece]]] = defaultdict(list)
    for part in parts:
        for piece in part.header.pieces:
            if any(slots.volume(slots.overlap(piece.box, wanted)) for wanted in needs[piece.name]):
                candidates[piece.name, piece.box].append((part, piece))
    holders: Holders = defaultdict(dict)
    for (name, where), those in candidates.items():
        holders[name][where] = _undamaged(those)
    return holders


def _undamaged(candidates: Sequence[tuple[Snapshot, Piece]]) -> tuple[Snapshot, Piece]:
    for last, (part, piece) in zip([False] * (len(candidates) - 1) + [True], candidates):
        try:
            part.read(piece)
            return part, piece
        except DamagedError as error:
            if last:
                raise
            print(f"another copy is taken: {error}", file=sys.stderr, flush=True)
    raise AssertionError("a box is held by somebody")


def _origin(reports: list[list[tuple[int, bool]]]) -> str:
    """By the lead: "memory of 4 processes and buddy copies of 1"."""
    used = {tuple(row) for report in reports for row in report}
    own = {process for process, copied in used if not copied}
    copies = {process for process, copied in used if copied} - own
    texts = [f"memory of {len(own)} process{'es' * (len(own) > 1)}"] if own else []
    texts += [f"buddy copies of {len(copies)} process{'es' * (len(copies) > 1)}"] if copies else []
    return " and ".join(texts)


def _array(holders: dict[Box, tuple[Snapshot, Piece]], leaf: Any) -> jax.Array:
    made: dict[Box, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        wanted = box(index, leaf.shape)
        if wanted not in made:
            made[wanted] = _composed(wanted, leaf.dtype, holders)
        return made[wanted]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


def _composed(wanted: Box, dtype: Any, holders: dict[Box, tuple[Snapshot, Piece]]) -> np.ndarray:
    """In memory of its own: jax may keep the array as the device's buffer, and the slot will be written again."""
    out = np.empty([end - begin for begin, end in wanted], dtype)
    for where, (part, piece) in holders.items():
        common = slots.overlap(wanted, where)
        if slots.volume(common):
            source = np.frombuffer(part.bytes(piece), dtype).reshape([end - begin for begin, end in where])
            out[_within(common, wanted)] = source[_within(common, where)]
    return out


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(begin - first, end - first) for (begin, end), (first, _) in zip(inner, outer, strict=True))
