"""Whether devices that hold copies of the same shard hold the same bits, and where one does not. It restores nothing.

A bit that flips in one copy stays: gradients are the same on all copies, and change them alike. What was wrong before
it was shared out (one device's part of a gradient) is in all copies alike: only a replay sees that (replay.py).
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

import meshes
from jaxtrain.background import Deadline, in_background
from jaxtrain.checkpoint import peers
from jaxtrain.checkpoint.hashing import shard_sums
from jaxtrain.checkpoint.names import named


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One device's copy of one array, `leaf`, that is not as the others; `coordinates` are the device's on the mesh."""

    leaf: str
    device: int
    coordinates: dict[str, int]
    process: int
    host: str

    def __str__(self) -> str:
        place = ", ".join(f"{axis} {i}" for axis, i in self.coordinates.items()) or "the only one"
        return f"{self.leaf} on device {self.device} ({place}) of process {self.process} on {self.host}"


class Copies:
    """Compares the copies within a state of this blueprint: one program, compiled on a thread from now on."""

    def __init__(self, blueprint: Any):
        every = named(blueprint.abstract)
        self.mesh = blueprint.mesh
        self.shapes = {name: x for name, x in every.items() if _idle(self.mesh, x.sharding.spec)}
        self.num_alone = len(every) - len(self.shapes)  # arrays without a second copy anywhere
        specs = tuple(x.sharding.spec for x in self.shapes.values())
        self._made = in_background(lambda: _program(self.mesh, specs).lower(*self.shapes.values()).compile())
        self._sums: Array | None = None

    def compare(self, state: Any) -> Array:
        """-> int32, replicated: how many arrays have unequal copies. Returns at once; `state` may then be donated."""
        if not self.shapes:
            return jnp.zeros((), jnp.int32)
        arrays = named(state)
        unequal, self._sums = self._made.result()(*(arrays[name] for name in self.shapes))
        return unequal

    def sums(self) -> np.ndarray:
        """uint32[device, array, lane] of the last comparison, the same on every process; all of them call it."""
        assert self._sums is not None, "nothing was compared yet"
        replicated = meshes.sharding(self.mesh, "", {})
        return np.asarray(jax.jit(lambda x: x, out_shardings=replicated)(self._sums))

    def suspects(self, sums: np.ndarray, truth: np.ndarray | None = None) -> tuple[list[Suspect], bool]:
        """-> the copies that are wrong, and whether that is certain: all processes call it.

        By majority; by `truth`, the sums of the same state computed again, where they are given. Two copies that differ
        are both suspect without it.
        """
        hosts = peers.agree(peers.new_round(), socket.gethostname, lambda hosts: hosts, Deadline(60))
        found, certain = [], True
        for column, (name, shape) in enumerate(self.shapes.items()):
            for devices in _groups(self.mesh, shape):
                own = {i: tuple(sums[i, column].tolist()) for i in devices}
                if len({*own.values()}) == 1:
                    continue
                right = _most(tuple(x[i, column].tolist()) for i in devices for x in [sums if truth is None else truth])
                certain &= right in own.values()
                found += [self._suspect(name, i, hosts) for i, value in own.items() if value != right]
        return found, certain

    def _suspect(self, name: str, number: int, hosts: list[str]) -> Suspect:
        device, sizes = self.mesh.devices.flat[number], self.mesh.devices.shape
        place = dict(zip(self.mesh.axis_names, map(int, np.unravel_index(number, sizes)), strict=True))
        coordinates = {axis: i for axis, i in place.items() if self.mesh.shape[axis] > 1}
        host = hosts[device.process_index]
        return Suspect(leaf=name, device=device.id, coordinates=coordinates, process=device.process_index, host=host)


def _most(values: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The value that comes more often than any other; None where there is no such."""
    most = Counter(values).most_common(2)
    return most[0][0] if len(most) == 1 or most[0][1] > most[1][1] else None


def _groups(mesh: Mesh, shape: Any) -> list[list[int]]:
    """The numbers of the devices, in the mesh's order, that hold the same shard of an array."""
    number = {device: i for i, device in enumerate(mesh.devices.flat)}
    groups: dict[str, list[int]] = defaultdict(list)
    for device, index in shape.sharding.devices_indices_map(shape.shape).items():
        groups[str(index)].append(number[device])
    return [sorted(group) for group in groups.values()]


def _idle(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes along which an array of this spec is copied."""
    used = {axis for part in spec if part is not None for axis in (part if isinstance(part, tuple) else (part,))}
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in used)


def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """(arrays) -> (how many have unequal copies, uint32[device, array, lane]). By hand: XLA takes copies for equal."""
    along: dict[tuple[str, ...], list[int]] = defaultdict(list)  # arrays by the axes that they are copied along
    for i, spec in enumerate(specs):
        along[_idle(mesh, spec)].append(i)

    def local(*shards: Array) -> tuple[Array, Array]:
        sums = jnp.stack([shard_sums(x, jnp.zeros(x.ndim, jnp.uint32)) for x in shards])
        unequal = jnp.zeros(len(shards), jnp.int32)
        for axes, rows in along.items():
            part = sums[np.array(rows)]
            differs = (lax.pmax(part, axes) != lax.pmin(part, axes)).any(axis=1)
            unequal = unequal.at[np.array(rows)].set(differs.astype(jnp.int32))
        return lax.pmax(unequal, mesh.axis_names).sum(), sums[None]

    out = (PartitionSpec(), PartitionSpec(mesh.axis_names))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
