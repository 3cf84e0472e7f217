"""The only maker of NamedSharding: letters and rules to shardings, constraints, global batches. It computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from meshes.errors import LayoutError
from meshes.fit import check_alphabet, check_axes, check_letters, check_mesh, check_shape
from meshes.rules import Axes, Letters, Rules, axes_of, dims_of


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that lay arrays out on it."""

    mesh: Mesh
    rules: Rules


# A jax user context and not a contextvar: it is part of jit's cache key, so a function traced under one layout is
# traced again under another instead of keeping the first one's constraints.
_layout = jax.make_user_context(None)


@contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[Layout]:
    """Within the block, `constrain` and `axis_size` in this thread follow `rules` on `mesh`.

    Raises LayoutError for a mesh whose axes are not Auto, or have names that no rules have.
    """
    check_mesh(mesh.shape, {})
    _check_auto(mesh)
    layout = Layout(mesh, rules)
    with _layout(layout):
        yield layout


def _check_auto(mesh: Mesh) -> None:
    """jax.make_mesh makes Explicit axes unless told otherwise, and those take no constraint."""
    if set(mesh.axis_types) - {AxisType.Auto}:
        raise LayoutError(
            "the mesh's axes are not Auto.",
            got=", ".join(f"{axis} {kind.name}" for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)),
            rule="constraints lay arrays out along Auto axes, and the partitioner does the rest",
            fix=f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)} where the mesh is made",
        )


def current() -> Layout | None:
    """The layout of the innermost `use` around this call, if any."""
    return _layout.value


def spec(letters: Letters, mapping: Mapping[str, Axes]) -> PartitionSpec:
    """"BSF" -> PartitionSpec with the axes of each letter, of sizes 1 too. Raises LayoutError as `check` does.

    It knows no mesh, so it takes the axes in AXES alone; `sharding` takes those of a mesh as well.
    """
    check_letters(letters, mapping, "an array")
    check_axes({}, mapping, letters)
    return _spec(letters, mapping, keep=lambda axis: True)


def _spec(letters: Letters, mapping: Mapping[str, Axes], keep: Any) -> PartitionSpec:
    kept = [tuple(filter(keep, axes)) for axes in dims_of(mapping, letters)]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in kept))


def sharding(mesh: Mesh, letters: Letters, mapping: Mapping[str, Axes]) -> NamedSharding:
    """"BSF" -> its sharding on `mesh`; axes that the mesh lacks, or has at size 1, are left out of the spec."""
    return _sharding(mesh, letters, mapping, "an array")


def _sharding(mesh: Mesh, letters: Letters, mapping: Mapping[str, Axes], name: str) -> NamedSharding:
    check_letters(letters, mapping, name)
    check_axes(mesh.shape, mapping, letters)
    return NamedSharding(mesh, _spec(letters, mapping, keep=lambda axis: mesh.shape.get(axis, 1) > 1))


def aligned(like: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding for an array of another first dim, or of one dim more or less before the others: whole if it must."""
    spec = (None, *like.spec)[1 + len(like.spec) - len(shape) :]
    names = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    divides = [dim % math.prod(like.mesh.shape[axis] for axis in axes) == 0 for dim, axes in zip(shape, names, strict=True)]
    return NamedSharding(like.mesh, PartitionSpec(*(axes if fits else None for axes, fits in zip(spec, divides))))


def shardings(mesh: Mesh, mapping: Mapping[str, Axes], letters: Any) -> Any:
    """A pytree of letters -> the same tree of NamedSharding. A leaf None or "" is replicated. Errors name the leaf."""

    def of(path: tuple, leaf: Letters | None) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "an array"
        return _sharding(mesh, leaf or "", mapping, name)

    return jax.tree_util.tree_map_with_path(of, letters, is_leaf=lambda leaf: leaf is None)


def per_device(mesh: Mesh) -> NamedSharding:
    """Of an array with one element for each device of the mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def check(mesh: Mesh, mapping: Mapping[str, Axes], letters: Letters, shape: tuple[int, ...], name: str) -> None:
    """Raises LayoutError where an array `name` of this shape cannot be laid out by these letters."""
    check_letters(letters, mapping, name)
    check_axes(mesh.shape, mapping, letters)
    check_shape(mesh.shape, mapping, letters, shape, name)


def constrain(x: jax.Array, letters: Letters) -> jax.Array:
    """x_BSF, "BSF" -> the same values, laid out by the current `acts` rules; x itself where no layout is in use.

    A weight at its use is `constrain(w_DF, "DF")`: that is where FSDP gathers it. Inside a shard_map the manual axes
    are left out. Raises LayoutError as `check` does.
    """
    return _laid_out(x, letters, None, "acts", "an activation")


def store(w: jax.Array, letters: Letters, mapping: Mapping[str, Axes] | None = None) -> jax.Array:
    """w_DF, "DF" -> the same values, laid out by the current `params` rules, as `constrain` does by `acts`.

    `mapping` is another map to store by.
    """
    return _laid_out(w, letters, mapping, "params", "a parameter")


def _laid_out(x: jax.Array, letters: Letters, mapping: Mapping[str, Axes] | None, side: str, name: str) -> jax.Array:
    layout = current()
    if layout is None:
        return x
    mapping = getattr(layout.rules, side) if mapping is None else mapping
    mesh, sizes = free_axes(layout)
    check_letters(letters, mapping, name)
    check_shape(sizes, mapping, letters, x.shape, name)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(letters, mapping, keep=sizes.__contains__)))


def by_hand(local: Callable, given: Any, made: Any, over: Letters | None = None) -> Callable:
    """`local` on each device's part: a shard_map over the axes that cut `over`, the others staying with the partitioner.

    `given` and `made`: a tree of letters for each argument and for the result, cut by the current `acts` rules; "_" is a
    dim that nothing cuts. Over all axes that no shard_map around has taken where `over` is None; `local` itself where
    there is no axis or no layout in use.
    """
    layout = current()
    mesh, free = free_axes(layout) if layout else (None, {})
    axes = set(free) if over is None else {axis for letter in over for axis in cutting(letter)}
    if not axes:
        return local
    cut = lambda tree: jax.tree.map(lambda letters: _spec(letters, layout.rules.acts, keep=axes.__contains__), tree)  # noqa: E731
    return jax.shard_map(local, mesh=mesh, axis_names=axes, in_specs=cut(given), out_specs=cut(made), check_vma=False)


def cutting(letter: str) -> tuple[str, ...]:
    """The axes that cut dims of this letter here by the current `acts` rules, outer to inner; () without a layout."""
    layout = current()
    if layout is None:
        return ()
    free = free_axes(layout)[1]
    return tuple(axis for axis in axes_of(layout.rules.acts, letter) if axis in free)


def free_axes(layout: Layout) -> tuple[Mesh | AbstractMesh, dict[str, int]]:
    """The mesh for a shard_map or a sharding here, and its axes of several devices that no shard_map around has taken."""
    inside = jax.sharding.get_abstract_mesh()
    mesh = inside if inside.manual_axes else layout.mesh
    return mesh, {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in inside.manual_axes}


def axis_size(letters: Letters) -> int:
    """Into how many shards the current `acts` rules cut these letters' dims together; 1 where no layout is in use.

    Inside a shard_map the manual axes do not count: what is seen there is one shard of them. Raises LayoutError for no
    letter of the alphabet.
    """
    check_alphabet(letters, "dims")
    layout = current()
    if layout is None:
        return 1
    free = free_axes(layout)[1]
    return math.prod(free.get(axis, 1) for axes in dims_of(layout.rules.acts, letters) for axis in axes)


def platform() -> str:
    """"gpu", "cpu" or "tpu": where the current layout's devices are, or the default backend's where there is none.

    While a program is compiled for devices that are not here the two differ: choose kernels by this one.
    """
    layout = current()
    kind = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
    return "gpu" if kind in ("cuda", "rocm") else kind


def local_rows(mesh: Mesh, rules: Rules, num_rows: int, *, process_index: int | None = None) -> np.ndarray:
    """The row numbers, ascending, of a batch of `num_rows` that this process (or the one named) must provide.

    Processes may share rows. Raises LayoutError where the rows do not divide, or are no whole number.
    """
    if not isinstance(num_rows, int | np.integer) or num_rows < 0:  # jax would keep a shape with 8.0 for one with 8
        raise LayoutError(f"num_rows = {num_rows!r} is no number of rows.", rule="a whole number, 0 or more")
    check(mesh, rules.acts, "B", (num_rows,), "a batch")
    me = jax.process_index() if process_index is None else process_index
    blocks = sharding(mesh, "B", rules.acts).devices_indices_map((num_rows,)).items()
    spans = {index[0].indices(num_rows)[:2] for device, index in blocks if device.process_index == me}
    return np.concatenate([np.arange(*span) for span in sorted(spans)] or [np.arange(0)])


def globalize(tree: Any, mesh: Mesh, rules: Rules, num_rows: int, letters: Letters = "BS") -> Any:
    """A tree of host arrays x_BS, holding this process's `local_rows`, -> global arrays of `num_rows` rows.

    A process holds its rows whole; each of its devices takes its part of the other dims. Raises LayoutError.
    """
    if letters[:1] != "B":
        raise LayoutError(
            f"a batch {letters!r} does not begin with its rows.",
            rule="B is the first dim: rows are what processes hold",
            fix="arrays with the batch first, and letters as 'BS'",
        )
    rows = local_rows(mesh, rules, num_rows)
    return jax.tree.map(lambda x: _global(np.asarray(x), rows, mesh, rules, num_rows, letters), tree)


def _global(x: np.ndarray, rows: np.ndarray, mesh: Mesh, rules: Rules, num_rows: int, letters: Letters) -> jax.Array:
    if x.ndim == 0:
        raise LayoutError(
            f"a batch holds {x.item()!r}, which has no rows.",
            rule="every leaf of the tree is an array of rows; a list is a tree of its own",
            fix="np.asarray for a list of rows, and no numbers beside arrays",
        )
    if len(x) != len(rows):
        raise LayoutError(
            f"this process was given {len(x)} rows of the batch.",
            got=f"{num_rows} rows in all",
            rule=f"it holds the {len(rows)} that local_rows names",
        )
    shape = (num_rows, *x.shape[1:])
    check(mesh, rules.acts, letters, shape, "a batch")

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(num_rows)
        start = int(np.searchsorted(rows, first))  # a device's rows are consecutive, and all in `rows`
        return x[(slice(start, start + last - first), *index[1:])]

    dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # a process without a device of the mesh has no part to tell it by
    return jax.make_array_from_callback(shape, sharding(mesh, letters, rules.acts), part, dtype=dtype)
