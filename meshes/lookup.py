"""A look-up in a table whose gradient is added up where the rows are: each device its own, then one sum into stored parts.

Left to the partitioner, that gradient is a scatter for which, within a shard_map, it gathers all devices' activations.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from meshes.place import constrain, current, store
from meshes.rules import axes_of


def look_up(table_VD: Array, ids_BS: Array) -> Array:
    """-> rows_BSD, laid out as "BSD". The table comes as it is stored, and is gathered here."""
    return _look_up(table_VD, ids_BS) if current() else table_VD[ids_BS]


@jax.custom_vjp
def _look_up(table_VD, ids_BS):
    # Within a pipeline's stage jax 0.12's partitioner aborts on a look-up in a table whose rows are apart.
    staged = "stage" in jax.sharding.get_abstract_mesh().manual_axes
    return constrain(constrain(table_VD, "_D" if staged else "VD")[ids_BS], "BSD")


def _forward(table_VD, ids_BS):
    return _look_up(table_VD, ids_BS), (ids_BS, table_VD)


def _backward(kept, dx_BSD):
    ids_BS, table = kept
    layout, inside = current(), jax.sharding.get_abstract_mesh()
    mesh = inside if inside.manual_axes else layout.mesh
    free = {axis for axis, size in mesh.shape.items() if size > 1 and axis not in inside.manual_axes}
    rows, columns, parts = (tuple(a for a in axes_of(layout.rules.acts, letter) if a in free) for letter in "BSV")
    height = table.shape[0] // math.prod(mesh.shape[axis] for axis in parts)
    local = partial(_added_up, shape=(height, table.shape[1]), parts=parts)
    if names := {*rows, *columns, *parts}:
        ins, outs = PartitionSpec(rows or None, columns or None), PartitionSpec((*rows, *columns) or None, parts or None)
        local = jax.shard_map(local, mesh=mesh, axis_names=names, in_specs=(ins, ins), out_specs=outs, check_vma=False)
    return store(local(ids_BS, constrain(dx_BSD, "BSD")).sum(0), "VD").astype(table.dtype), None


_look_up.defvjp(_forward, _backward)


def _added_up(ids_BS, dx_BSD, shape, parts):
    """-> (1, V, D) in float32, of the rows of the table that are here."""
    first = lax.axis_index(parts) * shape[0] if parts else 0
    here = (ids_BS >= first) & (ids_BS < first + shape[0])
    place = jnp.where(here, ids_BS - first, shape[0])  # beyond the end, where nothing is added
    return jnp.zeros(shape, jnp.float32).at[place].add(dx_BSD.astype(jnp.float32), mode="drop")[None]
