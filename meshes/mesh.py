"""MeshConfig to jax Mesh: fills the one -1, orders devices, refuses uneven inner axes, draws. It shards no array."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from meshes import topology
from meshes.axes import AXES
from meshes.errors import LayoutError

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

INNER = ("expert", "context", "tensor")  # talk within every layer, so they must not straddle domains unevenly


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices along each mesh axis, outer to inner; the one axis at -1 takes what the others leave.

    Raises LayoutError for what is no size, and for two axes at -1.
    """

    replica: int = 1
    data: int = 1
    stage: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or (size < 1 and size != -1):  # True is an int too
                rule = "an axis is a whole number, 1 or more, or -1 for the rest"
                raise LayoutError(f"mesh.{axis} = {size!r} is no size.", rule=rule, fix=f"mesh.{axis} = 1")
        if len(free := self._free) > 1:
            raise LayoutError(
                f"mesh.{' and mesh.'.join(free)} are all -1.",
                rule="one axis at most may be -1 (fsdp is, unless set)",
                fix=" or ".join(f"mesh.{axis} = 1" for axis in free),
            )

    @property
    def _free(self) -> list[str]:
        return [axis for axis in AXES if getattr(self, axis) == -1]

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis name -> size, whose product is `num_devices`. Raises LayoutError where there is no such filling."""
        if num_devices < 1:
            raise LayoutError("a mesh has no devices.", got=f"{num_devices} devices", rule="one or more", fix="jax.devices(), or some of them")
        sizes, free = {axis: getattr(self, axis) for axis in AXES}, self._free
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if num_devices % fixed or (not free and fixed != num_devices):
            raise _does_not_fill(sizes, fixed, num_devices)
        return sizes | {axis: num_devices // fixed for axis in free}


def product(sizes: Mapping[str, int]) -> str:
    """Sizes as text, without the ones: "data 2 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1 device"


def _does_not_fill(sizes: dict[str, int], fixed: int, num_devices: int) -> LayoutError:
    named = {axis: size for axis, size in sizes.items() if size not in (1, -1)}
    exact = -1 not in sizes.values()
    fits = {axis: _nearest(num_devices * size / fixed, size, exact) for axis, size in named.items()}
    return LayoutError(
        f"the mesh cannot fill {_times(num_devices, 'device')}.",
        got=f"{product(named)} = {fixed}",
        rule=f"the product of all axes must {'equal' if exact else 'divide'} the number of devices",
        fix=" or ".join(f"mesh.{axis} = {size}" for axis, size in fits.items() if size) or _filling(sizes, num_devices),
    )


def _nearest(room: float, size: int, exact: bool) -> int | None:
    """The size that fills `room` devices, or where an axis is -1 the largest up to `size` that divides them."""
    if room != int(room):
        return None
    return int(room) if exact else _largest(int(room), size)


def _largest(room: int, most: int) -> int:
    return max(fit for fit in range(1, min(most, room) + 1) if room % fit == 0)


def _filling(sizes: dict[str, int], room: int) -> str:
    """Where no one axis can make it fit: from the inner axes on each as large as it may, fsdp with what is left."""
    fits = {}
    for axis, size in reversed(sizes.items()):
        fits[axis] = size if size == -1 else _largest(room, size)
        room //= abs(fits[axis])
    if room > 1 and -1 not in fits.values():
        fits["fsdp"] = -1
    return " and ".join(f"mesh.{axis} = {fits[axis]}" for axis in sizes if fits[axis] != sizes[axis])


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all seven axes (Auto) over `devices`, or over all there are.

    Devices are sorted by (slice, process, id) and laid out in row-major order: `tensor` runs over neighbours in one
    NVLink domain, `replica` over the most distant. Raises LayoutError where the sizes do not fill the devices, or
    where expert, context or tensor would lie inside a domain in one place and straddle two in another.
    """
    import jax
    import numpy as np

    devices = topology.ordered(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=axis_types)
    if axis := _uneven(domain_grid(mesh)):
        raise _straddles(axis, config, mesh)
    return mesh


def domain_grid(mesh: Mesh) -> np.ndarray:
    """The NVLink domain of every device of the mesh, in the mesh's shape."""
    import numpy as np

    return np.array(topology.domains(list(mesh.devices.flat))).reshape(mesh.devices.shape)


def domains_per_line(grid: np.ndarray, dim: int) -> int | None:
    """How many domains each line of devices along `dim` touches, an equal share in each; None where that varies."""
    import numpy as np

    lines = np.sort(np.moveaxis(grid, dim, -1).reshape(-1, grid.shape[dim]), axis=-1)
    counts = 1 + (np.diff(lines) != 0).sum(axis=-1)
    count = int(counts[0])
    if (counts != count).any() or lines.shape[1] % count:
        return None
    shares = lines.reshape(len(lines), count, -1)
    return count if (shares == shares[:, :, :1]).all() else None


def _uneven(grid: np.ndarray) -> str | None:
    """The first of the inner axes along which domains change unevenly; the grid has all axes."""
    return next((axis for axis in INNER if domains_per_line(grid, list(AXES).index(axis)) is None), None)


def _unit(pod: topology.Topology) -> str:
    return "host" if pod.num_domains == pod.num_hosts else "NVLink domain"


def _straddles(axis: str, config: MeshConfig, mesh: Mesh) -> LayoutError:
    pod = topology.of(list(mesh.devices.flat))
    unit, grid = _unit(pod), domain_grid(mesh)
    size = math.gcd(*Counter(grid.flat).values())  # what fits in every domain
    fits = [str(fit) for fit in range(1, size + 1) if _lies_evenly(replace(config, **{axis: fit}), grid)]
    alone = f"mesh.{axis} = {' or '.join(fits)}"
    together = f"{' x '.join(INNER)} that divides {size}, and one axis at -1 for the rest"
    return LayoutError(
        f"mesh.{axis} = {mesh.shape[axis]} would straddle {unit}s unevenly.",
        got=f"{product(mesh.shape)} over {pod.num_domains} {unit}s of {pod.devices_per_domain} devices",
        rule=f"{', '.join(INNER)} lie whole within one {unit} everywhere, or cover equal parts of several",
        fix=alone if fits else together,
    )


def _lies_evenly(config: MeshConfig, grid: np.ndarray) -> bool:
    try:
        sizes = config.sizes(grid.size)
    except LayoutError:
        return False
    return _uneven(grid.reshape(tuple(sizes.values()))) is None


def describe(mesh: Mesh) -> str:
    """The mesh as text: which axes stay within a host or NVLink domain, which cross, which coordinates sit where."""
    pod = topology.of(list(mesh.devices.flat))
    unit, grid = _unit(pod), domain_grid(mesh)
    head = f"{pod.num_devices} x {pod.device_kind}: {_times(pod.num_hosts, 'host')} of {pod.devices_per_host}"
    if unit != "host":
        head += f", {_times(pod.num_domains, unit)} of {pod.devices_per_domain}"
    used = {axis: dim for dim, axis in enumerate(mesh.axis_names) if mesh.shape[axis] > 1}
    axes = [f"{axis:<8}{mesh.shape[axis]:>5}  {_reach(grid, dim, unit)}" for axis, dim in used.items()]
    places = [f"{unit} {number:<4} {_coordinates(grid == number, used)}".rstrip() for number in range(grid.max() + 1)]
    return "\n".join([head, *axes, *_elided(places)])


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _reach(grid: np.ndarray, dim: int, unit: str) -> str:
    count, size = domains_per_line(grid, dim), grid.shape[dim]
    if count is None:
        return f"unevenly over {unit}s"
    if count in (1, size):
        return f"within one {unit}" if count == 1 else f"across {unit}s"
    return f"{size // count} within one {unit} x {count} across"


def _coordinates(here: np.ndarray, used: Mapping[str, int]) -> str:
    import numpy as np

    places = np.argwhere(here)
    spans = [(axis, places[:, dim].min(), places[:, dim].max()) for axis, dim in used.items()]
    if math.prod(last - first + 1 for _, first, last in spans) == len(places):
        return " ".join(f"{axis} {first}" if first == last else f"{axis} {first}-{last}" for axis, first, last in spans)
    # No box of coordinates: say where the row-major run starts and ends.
    ends = [" ".join(f"{axis} {place[dim]}" for axis, dim in used.items()) for place in (places[0], places[-1])]
    return " to ".join(ends)


def _elided(rows: list[str], keep: int = 4) -> list[str]:
    if len(rows) <= keep + 2:
        return rows
    return [*rows[: keep - 1], f"... {len(rows) - keep} more in the same order", rows[-1]]
