"""Tokens to experts and back over a sharded expert axis. It takes the choice as given: routers are a model's matter.

Whatever the transport, a token's choice has a place in a buffer of rows, and a row of the buffer one choice or none:
filling the buffer, emptying it and both their gradients are gathers by those two lists. Nothing is scattered and added,
so two runs give the same bits.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from meshes.context import columns
from meshes.fit import check_exchange, check_experts
from meshes.place import Layout, by_hand, constrain, current, cutting, platform
from meshes.rules import Capacity, Ragged

BLOCK = 64  # rows of one expert that are multiplied at once on CPU, where `ragged_dot` multiplies all by all experts

Product = Callable[[Array, Array], Array]  # rows and an expert's weights -> rows


class Weights(NamedTuple):
    """SwiGLU, one of each per expert: (silu(x gate) * x up) down."""

    gate_EDF: Array
    up_EDF: Array
    down_EFD: Array


class Place(NamedTuple):
    """What a device knows of the layout: mesh axes of size 1, and those that a surrounding shard_map took, left out."""

    experts: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    scattered: bool = False  # the sequence of the result is cut over `width` too
    columns: np.ndarray | None = None  # the place in the sequence of each column, where another order is in use


def apply(weights: Weights, x_BSD: Array, chosen_BSk: Array, gates_BSk: Array) -> tuple[Array, Array]:
    """-> y_BRD, the sum over k of gate times expert's output, and dropped_E, choices that found no room (fp32, global).

    chosen: expert numbers, int32; the number of experts stands for none. The current rules say how: `experts` the
    transport, `acts` the layout ("BSD" in, "BRD" out, weights as "EDF"). Raises LayoutError where they do not fit.
    """
    weights = Weights(*(constrain(w, letters) for w, letters in zip(weights, ("EDF", "EDF", "EFD"), strict=True)))
    layout = current()
    if layout is None:
        return _local(Ragged(), Place(), x_BSD, chosen_BSk, gates_BSk, weights)
    place, way = _place(layout)._replace(columns=columns(x_BSD.shape[1])), layout.rules.experts
    _announce(way, place)
    given = ("BS_", "BS_", "BS_", Weights("EDF", "EDF", "EFD"))
    run = by_hand(partial(_local, way, place), given, ("BR_" if place.scattered else "BS_", ""))
    y_BRD, dropped_E = run(constrain(x_BSD, "BSD"), constrain(chosen_BSk, "BS_"), constrain(gates_BSk, "BS_"), weights)
    return constrain(y_BRD, "BRD"), dropped_E


def per_token(function: Callable[..., tuple[Array, Array]], *xs_BRE: Array) -> tuple[Array, Array]:
    """function(x_BRE, ...) -> BR_, BR_, each device for its own tokens: the partitioner would gather all of them for a
    `top_k`, and exchange parts to look something up by it."""
    run = by_hand(function, ("BR_",) * len(xs_BRE), ("BR_", "BR_"))
    return run(*(constrain(x_BRE, "BR_") for x_BRE in xs_BRE))


def _place(layout: Layout) -> Place:
    acts = layout.rules.acts
    over, batch, sequence, width = map(cutting, "EBSF")
    check_experts(acts, over, batch + sequence)
    scattered = bool(width) and cutting("R") == sequence + width
    return Place(over, batch, sequence, width, scattered)


def _announce(way: Ragged | Capacity, place: Place) -> None:
    if place.experts and (reason := check_exchange(way, platform())):
        _say(f"experts: {reason}: an all-to-all padded to the worst case instead")


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _local(way, place: Place, x_BSD, chosen_BSk, gates_BSk, weights: Weights) -> tuple[Array, Array]:
    """One device's tokens, experts and part of F."""
    send = _fixed if isinstance(way, Capacity) else _dropless
    out_BSkD, dropped_E = send(way, place, x_BSD, chosen_BSk, weights)
    y_BSD = jnp.einsum("BSkD,BSk->BSD", out_BSkD, gates_BSk.astype(out_BSkD.dtype))
    if place.scattered:
        y_BSD = lax.psum_scatter(y_BSD, place.width, scatter_dimension=1, tiled=True)
    elif place.width:
        y_BSD = lax.psum(y_BSD, place.width)
    return y_BSD, lax.psum(lax.stop_gradient(dropped_E), place.batch + place.sequence)


# Dropless


def _dropless(way: Ragged, place: Place, x_BSD, chosen_BSk, weights: Weights) -> tuple[Array, Array]:
    B, S, D = x_BSD.shape
    k, here = chosen_BSk.shape[2], len(weights.gate_EDF)
    peers = lax.axis_size(place.experts) if place.experts else 1
    counts_E, rank_T = _ranks(chosen_BSk.reshape(-1), here * peers)
    block = 1 if platform() == "gpu" else max(1, min(BLOCK, B * S * k // (here * peers)))
    tables = _gathered(counts_E, place.experts)
    groups = _aligned(tables, block, here)
    if place.experts:
        starts_E, num_rows = _before(counts_E), B * S * k
    else:
        starts_E, num_rows = groups.starts_XE[0], B * S * k + here * block
    slots_T = _slots(chosen_BSk.reshape(-1), rank_T, starts_E, num_rows)
    rows = fill(x_BSD.reshape(-1, D), slots_T, num_rows)
    if place.experts:
        there, back = _routes(tables, groups, place.experts[0], B * S * k)
        most = peers * B * S * min(k, here) + here * block
        rows = exchange(rows, there, back, most)
    sizes_E = groups.sizes_XE[lax.axis_index(place.experts) if place.experts else 0]
    rows = _swiglu(weights, rows, lambda x, w: multiply(x, w, sizes_E, block))
    if place.experts:
        rows = exchange(rows, back, there, num_rows)
    return empty(rows, slots_T).reshape(B, S, k, D), jnp.zeros(here * peers, jnp.float32)


def _ranks(chosen_T, num_experts: int) -> tuple[Array, Array]:
    """-> how many chose each expert, and of each choice how many came before it to the same expert."""
    order_T = jnp.argsort(chosen_T, stable=True)
    ends = jnp.searchsorted(chosen_T[order_T], jnp.arange(num_experts + 1), side="right").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[:-1]
    place_T = jnp.zeros_like(order_T).at[order_T].set(jnp.arange(len(order_T)), unique_indices=True)
    return (ends - starts)[:-1], place_T - starts[chosen_T]


def _slots(chosen_T, rank_T, starts_E, num_rows: int) -> Array:
    """The row of each choice; `num_rows`, which is none, for the choice of no expert."""
    none = chosen_T >= len(starts_E)
    return jnp.where(none, num_rows, starts_E.at[chosen_T].get(mode="clip") + rank_T)


def _before(counts) -> Array:
    """Sums of what comes before, along the last dim."""
    return jnp.cumsum(counts, axis=-1, dtype=jnp.int32) - counts


def _gathered(counts_E, axes: tuple[str, ...]) -> Array:
    """-> counts_XE of every device along the axis."""
    return lax.all_gather(counts_E, axes) if axes else counts_E[None]


class Groups(NamedTuple):
    """Where each expert's rows lie on its device: by device and expert there; starts and sizes are multiples of a block."""

    starts_XE: Array
    sizes_XE: Array


def _aligned(tables_XE, block: int, here: int) -> Groups:
    sizes_XE = -(-tables_XE.sum(0).reshape(-1, here) // block) * block
    return Groups(_before(sizes_XE), sizes_XE)


class Route(NamedTuple):
    """One direction of an exchange, as `ragged_all_to_all` takes it: segments sent, by peer and expert, and received."""

    axis: str
    most: int  # rows from one device to another
    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


def _routes(tables_XE, groups: Groups, axis: str, most: int) -> tuple[Route, Route]:
    """To the experts' devices, each segment to its place in its expert's group, and back to where it was sorted."""
    me, (peers, experts) = lax.axis_index(axis), tables_XE.shape
    here = experts // peers
    sorted_XE = _before(tables_XE)
    grouped_XE = groups.starts_XE.reshape(1, experts) + _before(tables_XE.T).T
    mine = lambda table: lax.dynamic_slice_in_dim(table, me * here, here, axis=1).reshape(-1)  # noqa: E731
    there = Route(axis, most, sorted_XE[me], tables_XE[me], grouped_XE[me], mine(tables_XE))
    return there, Route(axis, most, mine(grouped_XE), mine(tables_XE), mine(sorted_XE), tables_XE[me])


def exchange(rows: Array, there: Route, back: Route, num_rows: int) -> Array:
    """Segments of `rows` to other devices' `num_rows` rows, zero where nothing is written; the gradient goes `back`."""

    @jax.custom_vjp
    def move(rows, there, back):
        return _moved(rows, there, num_rows, axis, most)

    def backward(kept, grads):
        return _moved(grads, kept, num_sent, axis, most), None, None

    axis, most, num_sent = there.axis, there.most, len(rows)
    move.defvjp(lambda rows, there, back: (move(rows, there, back), back), backward)
    return move(rows, there[2:], back[2:])


def _moved(rows, route: tuple, num_rows: int, axis: str, most: int) -> Array:
    if platform() == "gpu":
        return lax.ragged_all_to_all(rows, jnp.zeros((num_rows, rows.shape[1]), rows.dtype), *route, axis_name=axis)
    return _padded(rows, route, num_rows, axis, most)


def _padded(rows, route: tuple, num_rows: int, axis: str, most: int) -> Array:
    """`ragged_all_to_all` by an `all_to_all` of as many rows to each peer as there could be."""
    peers = lax.axis_size(axis)
    offsets, sizes, targets = (x.reshape(peers, -1) for x in route[:3])
    ends, row = jnp.cumsum(sizes, axis=1), jnp.arange(most)
    segment = jax.vmap(partial(jnp.searchsorted, side="right"), (0, None))(ends, row)
    of_segment = lambda x: jnp.take_along_axis(x, jnp.minimum(segment, x.shape[1] - 1), axis=1)  # noqa: E731
    within = row[None] - of_segment(ends - sizes)
    valid = row[None] < ends[:, -1:]
    source = jnp.where(valid, of_segment(offsets) + within, len(rows))
    target = jnp.where(valid, of_segment(targets) + within, num_rows)
    received = lax.all_to_all(_take(rows, source), axis, 0, 0)
    target = lax.all_to_all(target, axis, 0, 0).reshape(-1)
    return _take(received.reshape(-1, rows.shape[1]), _inverse(target, num_rows))


# Fixed capacity


def _fixed(way: Capacity, place: Place, x_BSD, chosen_BSk, weights: Weights) -> tuple[Array, Array]:
    """In each sequence the first `room` choices of an expert find a place, whatever the mesh."""
    (B, S, D), k, here = x_BSD.shape, chosen_BSk.shape[2], len(weights.gate_EDF)
    peers = lax.axis_size(place.experts) if place.experts else 1
    shards = lax.axis_size(place.sequence) if place.sequence else 1
    room = capacity(way.factor, S * shards, k, here * peers)
    rank_BSk = _in_sequence(place, chosen_BSk, here * peers)
    kept_BSk = rank_BSk < room
    kept_BT, rank_BT = (x.reshape(B, -1) for x in (jnp.where(kept_BSk, chosen_BSk, here * peers), rank_BSk))
    if place.sequence:  # the place in this device's part of it
        rank_BT = _ranks_of_rows(kept_BT, here * peers)
    dropped_E = ((chosen_BSk[..., None] == np.arange(here * peers)[None, None, None]) & ~kept_BSk[..., None]).sum((0, 1, 2))
    space = min(room, S)
    num_rows = here * peers * B * space
    row_BT = (kept_BT * B + jnp.arange(B)[:, None]) * space + rank_BT
    slots_T = jnp.where(kept_BT < here * peers, row_BT, num_rows).reshape(-1)
    rows = fill(x_BSD.reshape(-1, D), slots_T, num_rows).reshape(peers, here, -1, D)
    if place.experts:
        rows = lax.all_to_all(rows, place.experts, 0, 0)
    rows = jnp.moveaxis(rows, 1, 0).reshape(here, -1, D)
    rows = _swiglu(weights, rows, partial(jnp.einsum, "ECD,EDF->ECF"))
    rows = jnp.moveaxis(rows.reshape(here, peers, -1, D), 1, 0)
    if place.experts:
        rows = lax.all_to_all(rows, place.experts, 0, 0)
    out_TD = empty(rows.reshape(-1, D), slots_T)
    return out_TD.reshape(B, S, k, D), dropped_E.astype(jnp.float32)


def capacity(factor: float, seq_len: int, num_chosen: int, num_experts: int) -> int:
    """The choices of one sequence that an expert takes, at most: `factor` times the mean, rounded up."""
    return math.ceil(round(factor * seq_len * num_chosen / num_experts, 9))  # 1.1 x 100 is 110.00000000000001


def _in_sequence(place: Place, chosen_BSk, num_experts: int) -> Array:
    """Of each choice how many of its sequence came before it to the same expert, wherever the mesh has cut it."""
    B, S, k = chosen_BSk.shape
    if place.sequence:
        chosen_BSk = lax.all_gather(chosen_BSk, place.sequence, axis=1, tiled=True)
    columns = np.arange(chosen_BSk.shape[1]) if place.columns is None else place.columns
    in_order = chosen_BSk[:, np.argsort(columns)].reshape(B, -1)
    rank_BSk = _ranks_of_rows(in_order, num_experts).reshape(chosen_BSk.shape)[:, columns]
    here = lax.axis_index(place.sequence) * S if place.sequence else 0
    return lax.dynamic_slice_in_dim(rank_BSk, here, S, axis=1)


def _ranks_of_rows(chosen_BT, num_experts: int) -> Array:
    return jax.vmap(lambda chosen_T: _ranks(chosen_T, num_experts)[1])(chosen_BT)


# Rows


def fill(x_TD: Array, slots: Array, num_rows: int) -> Array:
    """x_TD -> rows: token t in the rows slots[t k : (t + 1) k], zeros elsewhere. A slot of `num_rows` is none."""
    k = len(slots) // len(x_TD)
    choice = _inverse(slots, num_rows)
    return _filled(x_TD, choice, slots, k)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _filled(x_TD, choice, slots, k: int) -> Array:
    return _take(x_TD, choice // k)  # the choice of none is T k, its token T


def _filled_forward(x_TD, choice, slots, k):
    return _filled(x_TD, choice, slots, k), slots


def _filled_backward(k, slots, grads):
    return _take(grads, slots).reshape(-1, k, grads.shape[1]).sum(1), None, None


_filled.defvjp(_filled_forward, _filled_backward)


def empty(rows: Array, slots: Array) -> Array:
    """rows -> those at `slots`, each at most once; zeros for a slot past the end."""
    return _emptied(rows, slots, _inverse(slots, len(rows)))


@jax.custom_vjp
def _emptied(rows, slots, choice) -> Array:
    return _take(rows, slots)


_emptied.defvjp(lambda rows, slots, choice: (_take(rows, slots), choice), lambda choice, g: (_take(g, choice), None, None))


def _take(rows, index) -> Array:
    """rows[index], zeros where the index is past the end."""
    return rows.at[index].get(mode="fill", fill_value=0)


def _inverse(slots, num_rows: int) -> Array:
    """Of each row the one slot that names it; their number where none does."""
    return jnp.full(num_rows, len(slots), jnp.int32).at[slots].set(
        jnp.arange(len(slots), dtype=jnp.int32), mode="drop", unique_indices=True
    )


# Products


def _swiglu(weights: Weights, rows, product: Product) -> Array:
    hidden = jax.nn.silu(product(rows, weights.gate_EDF)) * product(rows, weights.up_EDF)
    return product(hidden, weights.down_EFD)


def multiply(rows: Array, w_EDF: Array, sizes_E: Array, block: int) -> Array:
    """rows -> rows times the weights of their expert: the first sizes_E[0] are expert 0's, and so on; zeros after all.

    Sizes are multiples of `block`. On GPU one `ragged_dot`; elsewhere a block at a time, as many as there are.
    """
    if platform() == "gpu":
        used = jnp.arange(len(rows))[:, None] < sizes_E.sum()
        return jnp.where(used, lax.ragged_dot(rows, w_EDF, sizes_E), 0)
    return _blocks(rows, w_EDF, sizes_E, block)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocks(rows, w_EDF, sizes_E, block: int) -> Array:
    def one(i, out):
        x, expert = _block(rows, i, block), _expert(sizes_E, i, block)
        return lax.dynamic_update_slice_in_dim(out, x @ w_EDF[expert], i * block, axis=0)

    return lax.fori_loop(0, sizes_E.sum() // block, one, jnp.zeros((len(rows), w_EDF.shape[2]), rows.dtype))


def _blocks_forward(rows, w_EDF, sizes_E, block):
    return _blocks(rows, w_EDF, sizes_E, block), (rows, w_EDF, sizes_E)


def _blocks_backward(block, kept, grads):
    rows, w_EDF, sizes_E = kept

    def one(i, dw_EDF):
        x, g, expert = _block(rows, i, block), _block(grads, i, block), _expert(sizes_E, i, block)
        return dw_EDF.at[expert].add(jnp.matmul(x.T, g, preferred_element_type=jnp.float32))

    dw_EDF = lax.fori_loop(0, sizes_E.sum() // block, one, jnp.zeros(w_EDF.shape, jnp.float32))
    return _blocks(grads, w_EDF.swapaxes(1, 2), sizes_E, block), dw_EDF.astype(w_EDF.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _block(rows, i, block: int) -> Array:
    return lax.dynamic_slice_in_dim(rows, i * block, block)


def _expert(sizes_E, i, block: int) -> Array:
    return jnp.searchsorted(jnp.cumsum(sizes_E), i * block, side="right")
