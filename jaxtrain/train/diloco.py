"""DiLoCo's step: every replica updates its own parameters, and fragments of them meet in outer steps. Values: replicas.py.

By hand over mesh axis `replica` alone; within a replica all other axes stay with the partitioner. Between outer steps
nothing but three scalars of metrics crosses replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

import meshes
from meshes.place import free_axes
from meshes.rules import dims_of

from jaxtrain.train.replicas import DiLoCo

AXIS = "replica"
LETTER = "G"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outer:
    """What the outer optimizer keeps. `local`: each replica's own parameters and `error`: what rounding left unsent of
    its differences (() where they are sent as they are), with a leading dim G; `momentum`: like the parameters."""

    local: Any
    momentum: Any
    error: Any = ()


def start(config: DiLoCo, replicas: int, params: Any) -> Outer:
    """The outer state before the first step: every replica starts from the shared parameters."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Outer(copies(replicas, params), zeros, () if config.sent == "float32" else copies(replicas, zeros))


def copies(replicas: int, tree: Any) -> Any:
    """Each x -> G of it along a new first dim."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (replicas, *x.shape)), tree)


def step(
    config: DiLoCo, mesh: Mesh, letters: Any, update: Callable[..., Any], state: tuple[Any, ...], batch: Any
) -> tuple[Any, Any]:
    """((completed, params, opt, outer), batch) -> ((params, opt, outer), what `update` says, summed over replicas).

    `update(completed, params, opt, batch)` gives (params, opt, sums) of one replica. `letters` is a tree like params.
    """
    own, shared = PartitionSpec(AXIS), PartitionSpec()
    outer = Outer(local=own, momentum=shared, error=own)

    def local(completed: Array, params: Any, opt: Any, outer: Outer, batch: Any) -> tuple[Any, Any]:
        opt, mine, error = jax.tree.map(lambda x: x[0], (opt, outer.local, outer.error))
        mine, opt, sums = update(completed, mine, opt, batch)
        due = _due(config, completed + 1)
        meetings = [lambda *kept: kept, *(_meeting(config, letters, f) for f in range(config.fragments))]
        params, mine, momentum, error = lax.switch(due, meetings, params, mine, outer.momentum, error)
        opt, mine, error = jax.tree.map(lambda x: x[None], (opt, mine, error))
        return (params, opt, Outer(mine, momentum, error)), lax.psum(sums, AXIS)

    specs = dict(in_specs=(shared, shared, own, outer, own), out_specs=((shared, own, outer), shared))
    return jax.shard_map(local, mesh=mesh, axis_names={AXIS}, check_vma=False, **specs)(*state, batch)


def _due(config: DiLoCo, completed: Array) -> Array:
    """The number of the fragment that meets after this many steps, from 1; 0: none."""
    turns = jnp.array([f * config.every // config.fragments for f in range(config.fragments)])
    met = turns == completed % config.every
    return jnp.where(met.any(), 1 + jnp.argmax(met), 0)


def _meeting(config: DiLoCo, letters: Any, fragment: int) -> Callable[..., tuple[Any, ...]]:
    """The outer step of one fragment: (params, mine, momentum, error) -> the same, moved.

    By hand over all axes, on what each device stores: the partitioner aborts on a scatter into rows that one axis cuts
    beside another, and takes what is gathered whole.
    """
    names, tree = jax.tree.flatten(letters)

    def meet(params: Any, mine: Any, momentum: Any, error: Any) -> tuple[Any, ...]:
        mesh, cuts, free = _cuts(names, jax.tree.leaves(params))

        def local(*kept: Any) -> tuple[Any, ...]:
            columns = [tree.flatten_up_to(x) if x != () else [None] * len(names) for x in kept]
            places = _places(config.fragments, names, [x.shape for x in columns[0]])
            leaves = zip([place[fragment] for place in places], [cut[-1] if cut else () for cut in cuts], *columns, strict=True)
            *moved, left = (tree.unflatten(column) for column in zip(*(_moved(config, *leaf) for leaf in leaves)))
            return *moved, left if error != () else ()

        kept = (params, mine, momentum, error)
        if not free:
            return local(*kept)
        stored = tree.unflatten([PartitionSpec(*(axes or None for axes in cut)) for cut in cuts])
        specs = tuple(stored if x != () else () for x in kept)
        return jax.shard_map(local, mesh=mesh, axis_names=free, in_specs=specs, out_specs=specs, check_vma=False)(*kept)

    return meet


def _cuts(letters: list[str], arrays: list[Array]) -> tuple[Any, list[list[tuple[str, ...]]], set[str]]:
    """The mesh, the axes that cut each dim of each array where it is stored, and all axes that are left to cut."""
    layout = meshes.current()
    mesh, free = free_axes(layout)
    stored = [dims_of(layout.rules.stored(n, x.shape, layout.mesh.shape), n) for n, x in zip(letters, arrays, strict=True)]
    return mesh, [[tuple(axis for axis in axes if axis in free) for axes in dims] for dims in stored], set(free)


def _places(fragments: int, letters: list[str], shapes: list[tuple[int, ...]]) -> list[list[slice | None]]:
    """Of each array as a device stores it, by fragment, the rows that belong to it: every so many-th layer; arrays
    without layers, or with fewer than fragments, whole, to the fragment that is least so far, the largest first."""
    sizes, places = [0] * fragments, [[slice(f, None, fragments) for f in range(fragments)] for _ in letters]
    layers = [shape[0] if name.startswith("L") else 0 for name, shape in zip(letters, shapes, strict=True)]
    for i in sorted(range(len(letters)), key=lambda i: -math.prod(shapes[i])):
        if layers[i] < fragments:
            to = sizes.index(min(sizes))
            sizes[to] += math.prod(shapes[i])
            places[i] = [slice(None) if f == to else None for f in range(fragments)]
    return places


def _moved(
    config: DiLoCo,
    rows: slice | None,
    last: tuple[str, ...],
    theta: Array,
    mine: Array,
    momentum: Array,
    error: Array | None,
):
    """One array's outer step in these rows: theta and momentum by Nesterov's rule, mine to the new theta.

    `last`: the axes that cut its last dim.
    """
    if rows is None:
        return theta, mine, momentum, error
    rows = () if theta.ndim == 0 else rows
    delta = theta[rows] - mine[rows]
    mean, left = _mean(config.sent, delta if error is None else delta + error[rows], last)
    m = config.momentum * momentum[rows] + mean
    new = theta[rows] - config.lr * (mean + config.momentum * m)
    error = error if error is None else error.at[rows].set(left)
    return theta.at[rows].set(new), mine.at[rows].set(new), momentum.at[rows].set(m), error


def _mean(sent: str, delta: Array, last: tuple[str, ...]) -> tuple[Array, Array]:
    """-> the mean of what all replicas sent, and what this one's rounding left over.

    Rounded differences are gathered and added in fp32 in the order of the replicas, so the sum has no rounding of its
    own dtype, and the wire carries that dtype's bytes: those of the part that a device stores.
    """
    if sent == "float32":
        return lax.pmean(delta, AXIS), jnp.zeros_like(delta)
    if sent == "bfloat16":
        parts = (delta.astype(jnp.bfloat16), jnp.ones((), jnp.float32))
    else:  # int8, with a scale for each row, the same on all devices that store a part of it
        largest = jnp.abs(delta).max(axis=-1, keepdims=True)
        scale = jnp.maximum(lax.pmax(largest, last) if last else largest, 1e-30) / 127.0
        parts = (jnp.round(delta / scale).astype(jnp.int8), scale)
    read = lambda rounded, scale: rounded.astype(jnp.float32) * scale  # noqa: E731
    return jax.vmap(read)(*lax.all_gather(parts, AXIS)).mean(axis=0), delta - read(*parts)
