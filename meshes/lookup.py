"""A look-up in a table whose rows may be apart: each device looks among its own rows, and one sum over them follows.

Its gradient is added up where the rows are: each device its own, then one sum into stored parts. Left to the partitioner,
that gradient is a scatter for which, within a shard_map, it gathers all devices' activations; and on jax 0.12 it aborts
on the look-up itself.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from meshes.place import axis_size, by_hand, constrain, current, cutting, platform, store

BLOCK = 512  # rows: its products cost 512 / (12 D) of a layer's, and the scan has a few dozen turns


def look_up(table_VD: Array, ids_BS: Array) -> Array:
    """-> rows_BSD, laid out as "BSD". The table comes as it is stored, and is gathered here."""
    return _look_up(table_VD, ids_BS) if current() else table_VD[ids_BS]


@jax.custom_vjp
def _look_up(table_VD, ids_BS):
    local = by_hand(partial(_found, parts=cutting("V")), ("V_", "BS"), "BS_", over="BSV")
    return constrain(local(constrain(table_VD, "VD"), ids_BS), "BSD")


def _forward(table_VD, ids_BS):
    return _look_up(table_VD, ids_BS), (ids_BS, table_VD)


def _backward(kept, dx_BSD):
    ids_BS, table = kept
    height = table.shape[0] // axis_size("V")
    local = partial(_added_up, shape=(height, table.shape[1]), parts=cutting("V"))
    parts_BSVD = by_hand(local, ("BS", "BS_"), "BSV_", over="BSV")(ids_BS, constrain(dx_BSD, "BSD"))
    parts_VD = parts_BSVD.reshape(-1, *table.shape)  # one dim: summed over two, XLA makes two sums of it
    return store(parts_VD.sum(0), "VD").astype(table.dtype), None


_look_up.defvjp(_forward, _backward)


def _found(table_VD, ids_BS, parts):
    """-> rows_BSD: one device has each row, the others add nothing."""
    if not parts:
        return table_VD[ids_BS]
    place = ids_BS - lax.axis_index(parts) * table_VD.shape[0]
    here = (place >= 0) & (place < table_VD.shape[0])
    return lax.psum(jnp.where(here[..., None], table_VD[jnp.where(here, place, 0)], 0), parts)


def _added_up(ids_BS, dx_BSD, shape, parts):
    """-> (1, 1, V, D) in float32, of the rows of the table that are here."""
    first = lax.axis_index(parts) * shape[0] if parts else 0
    here = (ids_BS >= first) & (ids_BS < first + shape[0])
    place = jnp.where(here, ids_BS - first, shape[0])  # beyond the end, where nothing is added
    add = block_by_block if platform() == "gpu" else _at_once
    return add(jnp.zeros(shape, jnp.float32), place.reshape(-1), dx_BSD.reshape(-1, dx_BSD.shape[-1]))[None, None]


def _at_once(table_VD, place_T, dx_TD):
    return table_VD.at[place_T].add(dx_TD.astype(jnp.float32), mode="drop")


def block_by_block(table_VD: Array, place_T: Array, dx_TD: Array) -> Array:
    """table_VD with the rows of dx_TD added at place_T, always in one order; those beyond its end are left out.

    A GPU's scatter adds equal rows by atomics, in any order, so that two runs would differ. Here a product with the
    matrix of equal places adds up a block's equal rows first, and the scatter meets no place twice.
    """
    blocks = -(-place_T.size // BLOCK)
    pad = blocks * BLOCK - place_T.size
    place_MT = jnp.pad(place_T, (0, pad), constant_values=table_VD.shape[0]).reshape(blocks, BLOCK)
    dx_MTD = jnp.pad(dx_TD, ((0, pad), (0, 0))).reshape(blocks, BLOCK, -1)

    def add(table_VD, block):
        place_T, dx_TD = block
        equal_TT = place_T[:, None] == place_T[None]
        sums_TD = jnp.dot(equal_TT.astype(dx_TD.dtype), dx_TD, precision="highest", preferred_element_type=jnp.float32)
        again_T = jnp.argmax(equal_TT, axis=1) < jnp.arange(BLOCK)
        once_T = jnp.where(again_T | (place_T >= len(table_VD)), len(table_VD) + jnp.arange(BLOCK), place_T)
        return table_VD.at[once_T].add(sums_TD, mode="drop", unique_indices=True), None

    return lax.scan(add, table_VD, (place_MT, dx_MTD))[0]
