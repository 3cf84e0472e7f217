"""DiLoCo's step: every replica updates its own parameters, and fragments of them meet in outer steps. Values: replicas.py.

By hand over mesh axis `replica` alone; within a replica all other axes stay with the partitioner. Between outer steps
nothing but three scalars of metrics crosses replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

import meshes
from meshes.place import free_axes
from meshes.rules import Axes, dims_of

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
    """The outer step of one fragment: (params, mine, momentum, error) -> the same, moved."""

    def meet(params: Any, mine: Any, momentum: Any, error: Any) -> tuple[Any, ...]:
        parts, tree = jax.tree.flatten(letters)
        columns = [tree.flatten_up_to(x) if x != () else [None] * len(parts) for x in (params, mine, momentum, error)]
        places = _places(config.fragments, parts, [x.shape for x in columns[0]])
        moved = [_moved(config, *leaf) for leaf in zip(parts, [place[fragment] for place in places], *columns, strict=True)]
        params, mine, momentum, left = (tree.unflatten(column) for column in zip(*moved))
        return params, mine, momentum, left if error != () else ()

    return meet


def _places(fragments: int, letters: list[str], shapes: list[tuple[int, ...]]) -> list[list[slice | None]]:
    """Of each array, by fragment, the rows that belong to it: every so many-th layer; other arrays whole, to the
    fragment that is least so far, the largest first."""
    sizes, places = [0] * fragments, [[slice(f, None, fragments) for f in range(fragments)] for _ in letters]
    whole = [i for i, name in enumerate(letters) if not name.startswith("L")]
    for i in sorted(whole, key=lambda i: -math.prod(shapes[i])):
        to = sizes.index(min(sizes))
        sizes[to] += math.prod(shapes[i])
        places[i] = [slice(None) if f == to else None for f in range(fragments)]
    return places


def _moved(
    config: DiLoCo, letters: str, rows: slice | None, theta: Array, mine: Array, momentum: Array, error: Array | None
):
    """One array's outer step in these rows: theta and momentum by Nesterov's rule, mine to the new theta."""
    if rows is None:
        return theta, mine, momentum, error
    rows = () if theta.ndim == 0 else rows
    delta = theta[rows] - mine[rows]
    layout = meshes.current()
    stored = layout.rules.stored(letters, theta.shape, layout.mesh.shape)
    mean, left = _mean(config.sent, letters, stored, delta if error is None else delta + error[rows])
    m = config.momentum * momentum[rows] + mean
    new = theta[rows] - config.lr * (mean + config.momentum * m)
    error = error if error is None else error.at[rows].set(left)
    return theta.at[rows].set(new), mine.at[rows].set(new), momentum.at[rows].set(m), error


def _mean(sent: str, letters: str, stored: Mapping[str, Axes], delta: Array) -> tuple[Array, Array]:
    """-> the mean of what all replicas sent, and what this one's rounding left over.

    Rounded differences are gathered and added in fp32 in the order of the replicas, so the sum has no rounding of its
    own dtype, and the wire carries that dtype's bytes: those of the part that a device stores.
    """
    if sent == "float32":
        return lax.pmean(delta, AXIS), jnp.zeros_like(delta)
    if sent == "bfloat16":
        parts = (delta.astype(jnp.bfloat16), jnp.ones((), jnp.float32))
    else:  # int8, with a scale for each row
        scale = jnp.maximum(jnp.abs(delta).max(axis=-1, keepdims=True), 1e-30) / 127.0
        parts = (jnp.round(delta / scale).astype(jnp.int8), scale)
    read = lambda rounded, scale: rounded.astype(jnp.float32) * scale  # noqa: E731
    mean = _on_parts(lambda *parts: jax.vmap(read)(*lax.all_gather(parts, AXIS)).mean(axis=0), letters, stored, *parts)
    return mean, delta - read(*parts)


def _on_parts(
    function: Callable[[Array, Array], Array], letters: str, stored: Mapping[str, Axes], x: Array, scale: Array
) -> Array:
    """`function` of what each device stores of x: left to the partitioner, a gather takes x whole. A fragment's rows may
    not divide as all rows do."""
    mesh, free = free_axes(meshes.current())
    cut = [tuple(axis for axis in axes if axis in free) for axes in dims_of(stored, letters)]
    cut = [axes if size % math.prod(free[axis] for axis in axes) == 0 else () for axes, size in zip(cut, x.shape)]
    if not (names := {axis for axes in cut for axis in axes}):
        return function(x, scale)
    whole = PartitionSpec(*(axes or None for axes in cut))
    of_scale = PartitionSpec(*(axes if size > 1 else None for axes, size in zip(whole, scale.shape)))
    how = dict(mesh=mesh, axis_names=names, in_specs=(whole, of_scale), out_specs=whole, check_vma=False)
    return jax.shard_map(function, **how)(x, scale)
