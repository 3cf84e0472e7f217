"""DiLoCo's step: every replica updates its own parameters, and fragments of them meet in outer steps. Values: replicas.py.

A step is by hand over mesh axis `replica` alone; within a replica all other axes stay with the partitioner. Between
outer steps what crosses replicas is what a step says of itself: the loss's sums, the gradient's norm, and the model's
extras, for a mixture two numbers for each expert of each layer.
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

from jaxtrain.train.replicas import DiLoCo
from meshes.rules import Axes

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


def inner(mesh: Mesh, update: Callable[..., Any], completed: Array, mine: Any, opt: Any, batch: Any) -> tuple[Any, ...]:
    """-> (mine, opt, sums over replicas): one step of every replica on its own part of the batch.

    `update(completed, params, opt, batch)` gives (params, opt, sums) of one replica, the sums by `summed`.
    """

    def local(completed: Array, mine: Any, opt: Any, batch: Any) -> tuple[Any, ...]:
        mine, opt, sums = update(completed, *jax.tree.map(lambda x: x[0], (mine, opt)), batch)
        return *jax.tree.map(lambda x: x[None], (mine, opt)), sums

    own, shared = PartitionSpec(AXIS), PartitionSpec()
    specs = dict(in_specs=(shared, own, own, own), out_specs=(own, own, shared))
    return jax.shard_map(local, mesh=mesh, axis_names={AXIS}, check_vma=False, **specs)(completed, mine, opt, batch)


def summed(sums: Any) -> Any:
    """Over replicas, within an `update`."""
    return lax.psum(sums, AXIS)


def meet(config: DiLoCo, last: int, mesh: Mesh, letters: Any, shardings: Any, completed: Array, kept: Any) -> Any:
    """(params, outer) -> the same after the outer step that is due: after `last` steps, the run's, that of all fragments.

    `letters` is a tree like params, `shardings` one like `kept`. By hand over all axes, on what each device stores: the
    partitioner aborts on a scatter into rows that one axis cuts beside another, and takes what is gathered whole.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    turns = dict.fromkeys([*((config.fragments, fragment) for fragment in range(config.fragments)), (1, 0)])
    meetings = [lambda *kept: kept, *(_meeting(config, letters, specs[0], *turn) for turn in turns)]

    def local(completed: Array, kept: Any) -> Any:
        params, outer = kept
        mine, error = jax.tree.map(lambda x: x[0], (outer.local, outer.error))
        params, mine, momentum, error = lax.switch(_due(config, last, completed), meetings, params, mine, outer.momentum, error)
        mine, error = jax.tree.map(lambda x: x[None], (mine, error))
        return params, Outer(mine, momentum, error)

    how = dict(in_specs=(PartitionSpec(), specs), out_specs=specs, check_vma=False)
    return jax.shard_map(local, mesh=mesh, **how)(completed, kept)


def _due(config: DiLoCo, last: int, completed: Array) -> Array:
    """The number of the fragment that meets after this many steps, from 1; the number after several: all; 0: none."""
    closing = config.fragments + (config.fragments > 1)
    turns = jnp.array([f * config.every // config.fragments for f in range(config.fragments)])
    met = turns == completed % config.every
    return jnp.where(completed == last, closing, jnp.where(met.any(), 1 + jnp.argmax(met), 0))


def _meeting(config: DiLoCo, letters: Any, specs: Any, fragments: int, fragment: int) -> Callable[..., tuple[Any, ...]]:
    """The outer step of one of so many fragments: (params, mine, momentum, error) -> the same, moved."""
    names, tree = jax.tree.flatten(letters)
    lasts = [spec[-1] if spec else None for spec in tree.flatten_up_to(specs)]

    def meeting(*kept: Any) -> tuple[Any, ...]:
        columns = [tree.flatten_up_to(x) if x != () else [None] * len(names) for x in kept]
        places = _places(fragments, names, [x.shape for x in columns[0]])
        leaves = zip([place[fragment] for place in places], lasts, *columns, strict=True)
        *moved, left = (tree.unflatten(column) for column in zip(*(_moved(config, *leaf) for leaf in leaves)))
        return *moved, left if kept[-1] != () else ()

    return meeting


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
    last: Axes,
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


def _mean(sent: str, delta: Array, last: Axes) -> tuple[Array, Array]:
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
