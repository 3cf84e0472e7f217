"""The executor of pipeline schedules: any legal table as one SPMD program over `stage`. It knows no model, makes no table.

The program is manual over `stage`, and over axes whose sums may wait; all others stay with the partitioner. A scan over
the ticks takes exactly the table's; in each, a stage branches on the kind of its cell, so that an idle tick computes
nothing, and what it made goes to both neighbours by two `ppermute`. Arrivals, and what a forward keeps for its
backward, lie in buffers indexed by the simulator's slots. The first virtual stage embeds, the last computes the loss,
in its backward: the parameters of both ends are on all stages, and so are the sums of their gradients until they are
added over `stage`.

What a forward keeps decides memory and time (`meshes.rules.KEEPS`). A backward in two halves runs the chain of the
first half again in the second, which has only what comes in at either end: zero bubble's W costs B + W here, beside
memory that is 1F1B's and one gradient more for each backward that waits.

Within a branch a collective must join devices of one stage alone. The partitioner's do; but a collective-permute waits
for all devices that it names, also those of stages in another branch: no function of `Work` may contain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from meshes.place import current
from meshes.schedules import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, IDLE
from meshes.simulator import Simulation


def _same(tree: Any) -> Any:
    return tree


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model as the functions that virtual stages run, each on one microbatch: a tree like the batch without its M.

    `layers` says for every virtual stage how many rows of each stack of weights it runs; no others are touched.
    `through` is given these rows of one stack, at least one, and the stack's number. It returns extras whose shapes do
    not depend on how many; where "objective" is among them, it is added to the objective. The three `lay` functions
    constrain, within the program: x, a tuple of stacks, the ends.
    """

    layers: tuple[tuple[int, ...], ...]
    first: Callable[[Any, Any], Any]  # ends, microbatch -> x
    through: Callable[[int, Any, Any, Any], tuple[Any, dict[str, Any]]]  # stack, rows, x, microbatch -> x, extras
    last: Callable[[Any, Any, Any], tuple[Any, Any]]  # ends, x, microbatch -> objective, sums
    lay_x: Callable[[Any], Any] = _same
    lay_weights: Callable[[Any], Any] = _same
    lay_ends: Callable[[Any], Any] = _same
    keep: str = "residuals"


class Totals(NamedTuple):
    """Sums over all microbatches: of `last`, of each stack's extras, and the gradients in fp32.

    Extras and gradients of weights have the leading dims (stages, chunks) of the weights; the ends' have (stages,),
    still to be added, so that the partitioner may scatter what it adds.
    """

    sums: Any
    extras: Any
    ends: Any
    weights: Any


class _Cell(NamedTuple):
    """What one stage does in one tick, and with which slots; -1, the last, is the one that nobody reads."""

    kind: Any
    microbatch: Any
    chunk: Any
    virtual: Any
    layers: Any  # which of the distinct numbers of layers
    arrival: Any  # slot of the activation that arrived
    activation: Any
    gradient_arrival: Any
    gradient: Any
    keep: Any
    kept: Any
    waiting: Any  # slot of the gradient that waits for the second half
    waited: Any


class _Carry(NamedTuple):
    activations: Any  # arrived
    gradients: Any
    sent: tuple[Any, Any]  # to the next stage, to the one before; between two ticks: what came from them
    kept: list[Any]
    waiting: Any
    totals: Totals


class _Made(NamedTuple):
    """What one action makes; the rest is zero. Weights' gradients are one chunk's, (rows, ...)."""

    sent: tuple[Any, Any]
    kept: list[Any]
    waiting: Any
    totals: Totals


def gradients(
    mesh: Mesh,
    simulation: Simulation,
    work: Work,
    ends: Any,
    weights: Any,
    batch: Any,
    scale: Any,
    once: tuple[str, ...] = (),
) -> Totals:
    """Runs the table: sums, and the gradients of `scale` times the objective's sum over all microbatches.

    `weights` is a tuple of trees, one per stack, of leaves (stages, chunks, rows, ...), `ends` what both ends are given,
    `batch` a tree of leaves (microbatches, rows, ...). Virtual stage c * stages + s is chunk c of stage s. The rows are
    cut over the mesh axes `once`, which hold copies of the weights and are summed over after the last tick; what the
    partitioner sums over the other axes, it sums in every backward.
    """
    kinds, shapes = sorted({*simulation.table.kind.flat}), sorted(set(work.layers))
    cells = _cells(simulation, kinds, [shapes.index(layers) for layers in work.layers])
    per_tick, stage, anywhere = PartitionSpec(None, "stage"), PartitionSpec("stage"), PartitionSpec()
    rows, parts = PartitionSpec(None, once), PartitionSpec("stage", once)

    @partial(
        jax.shard_map,
        mesh=mesh,
        axis_names={"stage", *once},
        in_specs=(per_tick, stage, anywhere, rows, anywhere),
        out_specs=Totals(anywhere, parts, parts, parts),
        check_vma=False,
    )
    def run(cells: _Cell, weights: Any, ends: Any, batch: Any, scale: Any) -> Totals:
        weights = work.lay_weights(jax.tree.map(lambda w: w[0], weights))
        stage = _Stage(simulation, work, shapes, work.lay_ends(ends), weights, batch, scale)
        branches = [stage.actions[kind] for kind in kinds]

        def tick(carry: _Carry, cell: _Cell) -> tuple[_Carry, None]:
            cell = jax.tree.map(lambda x: x[0], cell)
            carry = stage.receive(carry, cell)
            carry = stage.store(carry, cell, lax.switch(cell.kind, branches, carry, cell))
            return carry._replace(sent=tuple(map(_pass_on, carry.sent, (1, -1)))), None

        totals = lax.scan(tick, stage.start(), cells)[0].totals
        summed = jax.tree.map(lambda x: lax.psum(x, ("stage", *once)), totals.sums)
        return Totals(summed, *jax.tree.map(lambda x: x[None, None], totals[1:]))

    totals = run(cells, weights, ends, batch, scale)
    return Totals(totals.sums, *jax.tree.map(lambda x: x.sum(1), totals[1:]))


def in_stage() -> bool:
    """Whether what is traced here runs within a stage: then weights that are not given as they came are kept, copied."""
    layout = current()
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return layout is not None and layout.rules.pipeline is not None and "stage" in manual


def _cells(simulation: Simulation, kinds: Sequence[int], shape_of: Sequence[int]) -> _Cell:
    table = simulation.table
    saved, waiting = simulation.saved, simulation.residuals
    return _Cell(
        kind=np.searchsorted(kinds, table.kind).astype(np.int32),
        microbatch=table.microbatch,
        chunk=table.chunk,
        virtual=table.virtual.astype(np.int32),
        layers=np.array(shape_of, np.int32)[table.virtual],
        arrival=simulation.activations.write,
        activation=simulation.activations.read,
        gradient_arrival=simulation.gradients.write,
        gradient=simulation.gradients.read,
        keep=saved.write,
        kept=saved.read,
        waiting=waiting.write,
        waited=waiting.read,
    )


def _pass_on(tree: Any, by: int) -> Any:
    """To the stage that is `by` further round the ring."""
    count = lax.axis_size("stage")
    return jax.tree.map(lambda x: lax.ppermute(x, "stage", [(i, (i + by) % count) for i in range(count)]), tree)


class _Stage:
    """The actions of a stage, traced within the program: the carry and a cell -> what that action makes."""

    def __init__(self, simulation, work: Work, shapes, ends, weights, batch, scale):
        self._simulation, self._work = simulation, work
        self._ends, self._weights, self._batch, self._scale = ends, weights, batch, scale
        self._last = simulation.table.num_virtual - 1
        part = jax.tree.map(lambda x: x[0], batch)
        self._x = jax.eval_shape(work.first, ends, part)
        self._sums = jax.eval_shape(work.last, ends, self._x, part)[1]
        self._pulls = [_Pull(work, layers, weights, self._x, part) for layers in shapes]
        self._layout = _Layout(self._pulls)
        self.actions = {
            IDLE: lambda carry, cell: self._nothing(),
            FORWARD: self._forward,
            BACKWARD: partial(self._backward, to_input=True, to_weights=True),
            BACKWARD_INPUT: partial(self._backward, to_input=True, to_weights=False),
            BACKWARD_WEIGHT: partial(self._backward, to_input=False, to_weights=True),
        }

    def start(self) -> _Carry:
        simulation, chunks = self._simulation, self._simulation.table.num_chunks
        nothing = self._nothing()
        extras = jax.tree.map(lambda x: jnp.zeros((chunks, *x.shape), x.dtype), nothing.totals.extras)
        weights = self._work.lay_weights(_zeros(self._weights, jnp.float32))
        return _Carry(
            activations=self._slots(simulation.activations.size),
            gradients=self._slots(simulation.gradients.size),
            sent=nothing.sent,
            kept=self._layout.zeros(simulation.saved.size),
            waiting=self._slots(simulation.residuals.size),
            totals=nothing.totals._replace(
                extras=extras, ends=self._work.lay_ends(_zeros(self._ends, jnp.float32)), weights=weights
            ),
        )

    def _slots(self, count: int) -> Any:
        """One more than `count`, the last: what nobody reads goes there."""
        return jax.tree.map(lambda x: jnp.zeros((count + 1, *x.shape), x.dtype), self._x)

    def _nothing(self) -> _Made:
        x = self._work.lay_x(_zeros(self._x))
        ends, weights = self._work.lay_ends(_zeros(self._ends)), _zeros(jax.tree.map(lambda w: w[0], self._weights))
        totals = Totals(_zeros(self._sums), _zeros(self._pulls[0].extras), ends, self._work.lay_weights(weights))
        return _Made((x, x), [slots[0] for slots in self._layout.zeros(1)], x, totals)

    def receive(self, carry: _Carry, cell: _Cell) -> _Carry:
        """What came with the last tick goes to its slots, before the action that may read it."""
        activation, gradient = carry.sent
        return carry._replace(
            activations=_put(carry.activations, cell.arrival, activation),
            gradients=_put(carry.gradients, cell.gradient_arrival, gradient),
        )

    def store(self, carry: _Carry, cell: _Cell, made: _Made) -> _Carry:
        """What the action made goes to its slots and sums: after the switch, which would copy what it passes through."""
        totals, new = carry.totals, made.totals
        ends, weights = _where(
            cell.kept >= 0,  # any backward
            lambda old: (
                self._work.lay_ends(_add(old[0], new.ends)),
                self._work.lay_weights(_add_at(old[1], cell.chunk, new.weights)),
            ),
            (totals.ends, totals.weights),
        )
        sums, extras = _add(totals.sums, new.sums), _add_at(totals.extras, cell.chunk, new.extras)
        return carry._replace(
            sent=made.sent,
            kept=_where(cell.keep >= 0, lambda old: _put(old, cell.keep, made.kept), carry.kept),
            waiting=_put(carry.waiting, cell.waiting, made.waiting),
            totals=Totals(sums, extras, ends, weights),
        )

    def _forward(self, carry: _Carry, cell: _Cell) -> _Made:
        work, part, nothing = self._work, _at(self._batch, cell.microbatch), self._nothing()
        arrived = lambda: work.lay_x(_at(carry.activations, cell.activation))  # noqa: E731
        x = lax.cond(cell.virtual == 0, lambda: work.lay_x(work.first(self._ends, part)), arrived)

        def run(pull: _Pull) -> _Made:
            y, extras, kept = pull.forward(pull.rows(self._weights, cell.chunk), x, part)
            return nothing._replace(
                sent=(work.lay_x(y), nothing.sent[1]),
                kept=self._layout.fill(nothing.kept, pull, kept),
                totals=nothing.totals._replace(extras=extras),
            )

        return lax.switch(cell.layers, [partial(run, pull) for pull in self._pulls])

    def _backward(self, carry: _Carry, cell: _Cell, *, to_input: bool, to_weights: bool) -> _Made:
        part, nothing = _at(self._batch, cell.microbatch), self._nothing()

        def run(pull: _Pull) -> _Made:
            kept = self._layout.at(carry.kept, cell.kept, pull)
            y, backward = pull.backward(pull.rows(self._weights, cell.chunk), kept, part)
            made = nothing
            if to_input:
                dy, sums, ends = self._gradient_of_output(y, carry, cell, part)
                made = made._replace(waiting=dy, totals=made.totals._replace(sums=sums, ends=ends))
            else:
                dy = self._work.lay_x(_at(carry.waiting, cell.waited))
            dweights, dx = backward(dy, self._scale)
            if to_weights:
                whole = self._work.lay_weights(pull.pad(dweights, made.totals.weights))
                made = made._replace(totals=made.totals._replace(weights=whole))
            return self._send_back(made, cell, dx, part) if to_input else made

        return lax.switch(cell.layers, [partial(run, pull) for pull in self._pulls])

    def _gradient_of_output(self, y: Any, carry: _Carry, cell: _Cell, part: Any) -> tuple[Any, Any, Any]:
        """From the loss on the last virtual stage, with its sums and the ends' gradient; on others what arrived."""

        def from_loss() -> tuple[Any, Any, Any]:
            _, pull, sums = jax.vjp(lambda ends, y: self._work.last(ends, y, part), self._ends, y, has_aux=True)
            dends, dy = pull(self._scale)
            return self._work.lay_x(dy), sums, self._work.lay_ends(dends)

        def arrived() -> tuple[Any, Any, Any]:
            dy = self._work.lay_x(_at(carry.gradients, cell.gradient))
            return dy, _zeros(self._sums), self._nothing().totals.ends

        return lax.cond(cell.virtual == self._last, from_loss, arrived)

    def _send_back(self, made: _Made, cell: _Cell, dx: Any, part: Any) -> _Made:
        """To the stage before; on the first virtual stage, into the embedding."""

        def embed() -> Any:
            (dends,) = jax.vjp(lambda ends: self._work.first(ends, part), self._ends)[1](dx)
            return self._work.lay_ends(_add(made.totals.ends, dends))

        ends = lax.cond(cell.virtual == 0, embed, lambda: made.totals.ends)
        return made._replace(totals=made.totals._replace(ends=ends), sent=(made.sent[0], self._work.lay_x(dx)))


class _Pull:
    """The layers of a virtual stage, forward and backward, with what is kept between the two as a list of arrays.

    Forward and backward are traced apart, so the backward functions of the stacks are flattened: their leaves are
    weights and the microbatch, which are there anyway, and the rest, which is `kept`; first in it the output, which the
    loss needs. `roles` says of each kept array what it is: equal ones of two virtual stages are laid out alike.
    """

    def __init__(self, work: Work, layers: tuple[int, ...], weights: Any, x: Any, part: Any):
        self._work, self._layers = work, layers
        self._stacks = [stack for stack, rows in enumerate(layers) if rows]
        # A stack of no layers has the extras' shapes of one.
        one = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, *w.shape[2:]), w.dtype), weights)
        self.extras = tuple(jax.eval_shape(partial(work.through, i), one[i], x, part)[1] for i in range(len(layers)))
        _, _, self.kept = jax.eval_shape(self.forward, self.rows(weights, 0), x, part)

    def rows(self, stacks: Any, chunk: Any) -> Any:
        """The leading rows of each stack's chunk: (chunks, rows, ...) -> (layers, ...)."""
        pairs = zip(stacks, self._layers, strict=True)
        return tuple(jax.tree.map(lambda w: _at(w, chunk)[:count], stack) for stack, count in pairs)  # noqa: B023

    def pad(self, parts: Any, nothing: Any) -> Any:
        """(layers, ...) -> (rows, ...), with zeros."""
        return jax.tree.map(_fill, nothing, parts)

    def forward(self, weights: Any, x: Any, part: Any) -> tuple[Any, Any, list[Any]]:
        extras = list(_zeros(self.extras))
        if self._work.keep == "inputs":
            self.roles, y = ["input"], x
            for i in self._stacks:
                y, extras[i] = self._work.through(i, weights[i], y, part)
            return y, tuple(extras), [x]
        y, extras, pulls = self._pulls(weights, x, part)
        kept, self.roles, self._trees, self._sources = [y], ["output"], [], []
        for i, pull in zip(self._stacks, pulls, strict=True):
            leaves, tree = jax.tree.flatten(pull)
            places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves((weights, part)))}
            for number, leaf in enumerate(leaves):
                if id(leaf) not in places:
                    places[id(leaf)] = -1 - len(kept)
                    kept.append(leaf)
                    self.roles.append((i, len(leaves), number))
            self._trees.append(tree)
            self._sources.append([places[id(leaf)] for leaf in leaves])
        return y, extras, kept

    def _pulls(self, weights: Any, x: Any, part: Any) -> tuple[Any, Any, list[Callable]]:
        """-> the output, extras, and the backward function of each stack that has layers."""
        extras, pulls = list(_zeros(self.extras)), []
        for i in self._stacks:
            (x, extras[i]), pull = jax.vjp(lambda w, x, i=i: self._work.through(i, w, x, part), weights[i], x)
            pulls.append(pull)
        return x, tuple(extras), pulls

    def backward(self, weights: Any, kept: list[Any], part: Any) -> tuple[Any, Callable]:
        """-> the output, and a function: its gradient and that of the objective -> those of the weights and the input."""
        if self._work.keep == "inputs":
            y, _, pulls = self._pulls(weights, *kept, part)
        else:
            y, known = kept[0], jax.tree.leaves((weights, part))
            parts = [[known[i] if i >= 0 else kept[-1 - i] for i in sources] for sources in self._sources]
            pulls = list(map(jax.tree.unflatten, self._trees, parts))

        def backward(dy: Any, scale: Any) -> tuple[Any, Any]:
            grads = list(_zeros(weights))
            for i, pull in zip(reversed(self._stacks), reversed(pulls), strict=True):
                zeros = _zeros(self.extras[i])
                grads[i], dy = pull((dy, zeros | ({"objective": scale} if "objective" in zeros else {})))
            return tuple(grads), dy

        return y, backward


class _Layout:
    """Buffers that hold what any of several virtual stages keeps.

    Two stages share a buffer for what has the same role in both, of any number of layers: it is laid out alike. Arrays
    of two roles would be exchanged between devices on their way through one buffer.
    """

    def __init__(self, pulls: Sequence[_Pull]):
        self._shapes: dict[tuple, jax.ShapeDtypeStruct] = {}
        for key, leaf in [pair for pull in pulls for pair in self._keyed(pull)]:
            most = max(leaf, self._shapes.get(key, leaf), key=lambda x: x.shape)
            self._shapes[key] = jax.ShapeDtypeStruct(most.shape, most.dtype)
        self._places = {key: i for i, key in enumerate(self._shapes)}

    def _keyed(self, pull: _Pull) -> list[tuple[tuple, Any]]:
        pairs = zip(pull.roles, pull.kept, strict=True)
        return [((role, leaf.ndim, leaf.shape[1:], leaf.dtype), leaf) for role, leaf in pairs]

    def zeros(self, slots: int) -> list[Any]:
        return [jnp.zeros((slots, *x.shape), x.dtype) for x in self._shapes.values()]

    def fill(self, slots: list[Any], pull: _Pull, kept: Sequence[Any]) -> list[Any]:
        slots = list(slots)
        for (key, _), leaf in zip(self._keyed(pull), kept, strict=True):
            place = self._places[key]
            slots[place] = _fill(slots[place], leaf)
        return slots

    def at(self, buffers: list[Any], slot: Any, pull: _Pull) -> list[Any]:
        buffers = [(buffers[self._places[key]], leaf) for key, leaf in self._keyed(pull)]
        return [lax.dynamic_slice(x, (slot, *[0] * leaf.ndim), (1, *leaf.shape))[0] for x, leaf in buffers]


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, index: Any, values: Any) -> Any:
    return jax.tree.map(lambda x, value: lax.dynamic_update_index_in_dim(x, value, index, 0), tree, values)


def _add(totals: Any, parts: Any) -> Any:
    return jax.tree.map(lambda total, part: total + part.astype(total.dtype), totals, parts)


def _add_at(totals: Any, index: Any, parts: Any) -> Any:
    return jax.tree.map(lambda total, part: total.at[index].add(part.astype(total.dtype)), totals, parts)


def _fill(whole: Any, part: Any) -> Any:
    """`part`, which may have fewer rows, with the rows of `whole` below."""
    return part if whole.shape == part.shape else lax.dynamic_update_slice(whole, part, [0] * part.ndim)


def _zeros(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def _where(condition: Any, change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree, changed in place where the condition holds.

    A loop of one round or none: what a conditional passes through, XLA copies (checked in the compiled program).
    """
    return lax.fori_loop(0, condition.astype(jnp.int32), lambda _, tree: change(tree), tree)
