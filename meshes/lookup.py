"""A look-up in a table whose rows may be apart: each device looks among its own rows, and one sum over them follows.

Its gradient is added up where the rows are: each device its own, then one sum into stored parts. Left to the partitioner,
that gradient is a scatter for which, within a shard_map, it gathers all devices' activations; and on jax 0.12 it aborts
on the look-up itself.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from meshes.place import constrain, current, free_axes, store
from meshes.rules import axes_of


def look_up(table_VD: Array, ids_BS: Array) -> Array:
    """-> rows_BSD, laid out as "BSD". The table comes as it is stored, and is gathered here."""
    return _look_up(table_VD, ids_BS) if current() else table_VD[ids_BS]


@jax.custom_vjp
def _look_up(table_VD, ids_BS):
    rows, columns, parts, mesh = _axes()
    names, ids = {*rows, *columns, *parts}, PartitionSpec(rows or None, columns or None)
    local = partial(_found, parts=parts)
    if names:
        ins = (PartitionSpec(parts or None), ids)
        local = jax.shard_map(local, mesh=mesh, axis_names=names, in_specs=ins, out_specs=ids, check_vma=False)
    return constrain(local(constrain(table_VD, "VD"), ids_BS), "BSD")


def _forward(table_VD, ids_BS):
    return _look_up(table_VD, ids_BS), (ids_BS, table_VD)


def _backward(kept, dx_BSD):
    ids_BS, table = kept
    rows, columns, parts, mesh = _axes()
    height = table.shape[0] // math.prod(mesh.shape[axis] for axis in parts)
    local = partial(_added_up, shape=(height, table.shape[1]), parts=parts)
    if names := {*rows, *columns, *parts}:
        ins, outs = PartitionSpec(rows or None, columns or None), PartitionSpec((*rows, *columns) or None, parts or None)
        local = jax.shard_map(local, mesh=mesh, axis_names=names, in_specs=(ins, ins), out_specs=outs, check_vma=False)
    return store(local(ids_BS, constrain(dx_BSD, "BSD")).sum(0), "VD").astype(table.dtype), None


_look_up.defvjp(_forward, _backward)


def _axes():
    """The axes that cut B, S and V, and the mesh; what is by hand already is no axis here."""
    layout = current()
    mesh, free = free_axes(layout)
    return *(tuple(a for a in axes_of(layout.rules.acts, letter) if a in free) for letter in "BSV"), mesh


def _found(table_VD, ids_BS, parts):
    """-> rows_BSD: one device has each row, the others add nothing."""
    if not parts:
        return table_VD[ids_BS]
    place = ids_BS - lax.axis_index(parts) * table_VD.shape[0]
    here = (place >= 0) & (place < table_VD.shape[0])
    return lax.psum(jnp.where(here[..., None], table_VD[jnp.where(here, place, 0)], 0), parts)


def _added_up(ids_BS, dx_BSD, shape, parts):
    """-> (1, V, D) in float32, of the rows of the table that are here."""
    first = lax.axis_index(parts) * shape[0] if parts else 0
    here = (ids_BS >= first) & (ids_BS < first + shape[0])
    place = jnp.where(here, ids_BS - first, shape[0])  # beyond the end, where nothing is added
    return jnp.zeros(shape, jnp.float32).at[place].add(dx_BSD.astype(jnp.float32), mode="drop")[None]
