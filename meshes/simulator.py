"""What a pipeline's table means: whether it is legal, what it costs, which buffers it needs, how it looks.

It runs no model and imports no jax; an executor takes from here the slot of every value that waits between two ticks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from meshes.errors import LayoutError
from meshes.schedules import BACKWARD_WEIGHT, IDLE, MAKES, NAMES, NEVER, Table, mark, needs, spell

LETTERS = ".FBbw"  # by kind; B is b and w in one


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long one action takes; a whole backward takes both of its halves. Any unit; whole numbers stay exact."""

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1

    @property
    def by_kind(self) -> np.ndarray:
        halves = self.backward_input, self.backward_weight
        return np.array([0, self.forward, sum(halves), *halves])


def executed(table: Table, keep: str = "residuals") -> Costs:
    """What actions cost as `meshes.pipeline` runs them, where a forward and each half of a backward take 1 by themselves.

    Where only inputs are kept (`meshes.rules.KEEPS`), whatever goes back runs the forward again; and the second half of
    a backward runs the first again. What layers rematerialise by themselves is not in it.
    """
    again, apart = int(keep == "inputs"), bool((table.kind == BACKWARD_WEIGHT).any())
    return Costs(backward_input=1 + again, backward_weight=2 + again if apart else 1)


class Timing(NamedTuple):
    """The time of one step, and the share of it in which a stage idles on average."""

    total: float
    bubble: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Buffer:
    """Where values wait: the slot that each stage writes, reads and frees at each tick, (ticks, stages), -1 for none.

    A tick writes before it reads, and frees at its end: a slot that tick t frees can be written at t + 1.
    """

    sizes: tuple[int, ...]  # slots on each stage; they are numbered from 0
    write: np.ndarray
    read: np.ndarray
    free: np.ndarray

    @property
    def size(self) -> int:
        """Slots of a program that is the same on all stages."""
        return max(self.sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """What a legal table costs and needs.

    `lockstep` is the time where all stages start every tick together, as in one program that exchanges messages at
    every tick: a tick takes as long as its longest action. `asynchronous` is the time that papers count: each stage
    runs its actions in the table's order, each as soon as what it needs is made. Messages take no time in either.

    Four buffers keep values between ticks, one microbatch's on one virtual stage in each slot:
    - `activations` that arrived: written on arrival, before the action of that tick; read and freed by their forward.
      The first virtual stage has none.
    - `gradients` that arrived: likewise, for the backward or the backward for the input. The last has none.
    - `saved`, what a forward leaves for its backward: read by both halves, freed by the one for the weights.
    - `residuals`, what a backward for the input leaves for that for the weights.
    """

    table: Table
    idle: float  # share of the cells
    lockstep: Timing
    asynchronous: Timing
    activations: Buffer
    gradients: Buffer
    saved: Buffer
    residuals: Buffer

    @property
    def live(self) -> tuple[int, ...]:
        """The most microbatches (of one chunk each) whose activations each stage keeps at any time."""
        return self.saved.sizes


def simulate(table: Table, costs: Costs = Costs()) -> Simulation:
    """A table -> what it costs and needs. Raises LayoutError, naming tick, stage and rule, where it is not legal."""
    made = _check(table)
    output, input_gradient, weight_gradient = made
    virtual = np.broadcast_to(np.arange(table.num_virtual)[:, None], output.shape)
    halves = input_gradient < weight_gradient
    return Simulation(
        table=table,
        idle=float((table.kind == IDLE).mean()),
        lockstep=_timing(table, costs, costs.by_kind[table.kind].max(axis=1).sum()),
        asynchronous=_timing(table, costs, _asynchronous(table, costs)),
        activations=_buffer(table, virtual[1:], output[:-1] + 1, output[1:]),
        gradients=_buffer(table, virtual[:-1], input_gradient[1:] + 1, input_gradient[:-1]),
        saved=_buffer(table, virtual, output, input_gradient, weight_gradient),
        residuals=_buffer(table, virtual[halves], input_gradient[halves], weight_gradient[halves]),
    )


def _check(table: Table) -> np.ndarray:
    """The tick at which each thing is made: (what, virtual stage, microbatch)."""
    kind, microbatch, virtual = table.kind, table.microbatch, table.virtual
    limits = {"kind": len(NAMES), "microbatch": table.num_microbatches, "chunk": table.num_chunks}
    for name, limit in limits.items():
        values = getattr(table, name)
        _refuse(table, (values < 0) | (values >= limit), f"{name} is 0 to {limit - 1}")
    ticks = np.arange(table.num_ticks)[:, None]
    made = np.full((3, table.num_virtual + 1, table.num_microbatches), NEVER)
    made[:, -1] = -1  # the model's input
    for tick in reversed(range(table.num_ticks)):  # so that the first of several stays
        mark(made, kind[tick], virtual[tick], microbatch[tick], tick)
    before = np.where(np.moveaxis(MAKES[kind], -1, 0), made[:, virtual, microbatch], NEVER).min(axis=0)
    _refuse(table, before < ticks, "every action comes once", before, "it comes at tick {} already")
    if (made == NEVER).any():
        raise _lost(table, made)
    ready = made[(*needs(kind, virtual, table.num_virtual), microbatch)]
    early = (kind != IDLE) & (ready >= ticks)
    _refuse(table, early, "an action comes after what it needs is made", ready, "that is made at tick {}")
    return made[:, :-1]


def _refuse(table: Table, bad: np.ndarray, rule: str, other: np.ndarray | None = None, got: str = "") -> None:
    """Raises for the first bad cell; `got` may tell of another tick, given for every cell."""
    if not bad.any():
        return
    place = tuple(int(index) for index in np.argwhere(bad)[0])
    cell = spell(*(int(values[place]) for values in (table.kind, table.microbatch, table.chunk)))
    raise LayoutError(
        f"tick {place[0]}, stage {place[1]}: the schedule cannot have {cell} there.",
        got="" if other is None else got.format(other[place]),
        rule=rule,
    )


def _lost(table: Table, made: np.ndarray) -> LayoutError:
    virtual, microbatch = (int(index) for index in np.argwhere((made == NEVER).any(axis=0))[0])
    lost = made[:, virtual, microbatch] == NEVER
    kind = int(((MAKES <= lost).all(axis=1) * MAKES.sum(axis=1)).argmax())  # what would make most of it
    chunk, stage = divmod(virtual, table.num_stages)
    return LayoutError(
        f"ticks 0 to {table.num_ticks - 1}, stage {stage}: the schedule has no {spell(kind, microbatch, chunk)}.",
        rule="every action comes once",
    )


def _timing(table: Table, costs: Costs, total: np.number) -> Timing:
    area, busy = total * table.num_stages, costs.by_kind[table.kind].sum()
    return Timing(total.item(), float((area - busy) / area))


def _asynchronous(table: Table, costs: Costs) -> np.number:
    cost = costs.by_kind[table.kind]
    end = np.zeros((3, table.num_virtual + 1, table.num_microbatches), cost.dtype)
    clock = np.zeros(table.num_stages, cost.dtype)  # when each stage is done with its actions so far
    for kind, virtual, microbatch, taken in zip(table.kind, table.virtual, table.microbatch, cost, strict=True):
        ready = end[(*needs(kind, virtual, table.num_virtual), microbatch)]
        clock = np.where(kind == IDLE, clock, np.maximum(clock, ready) + taken)
        mark(end, kind, virtual, microbatch, clock)
    return clock.max()


def _buffer(table: Table, virtual: np.ndarray, written: np.ndarray, *reads: np.ndarray) -> Buffer:
    """Values by the ticks that write and read them -> slots, as few on each stage as it keeps values at once.

    Interval colouring: in the order of their first ticks, each takes the lowest slot that is free.
    """
    by_start = np.argsort(written, axis=None, kind="stable")
    stage, first, *ticks = (values.ravel()[by_start] for values in (virtual % table.num_stages, written, *reads))
    held: list[list[int]] = [[] for _ in range(table.num_stages)]  # until which tick, by slot
    slots = []
    for until, start, end in zip([held[s] for s in stage], first.tolist(), ticks[-1].tolist(), strict=True):
        slot = next((slot for slot, last in enumerate(until) if last < start), len(until))
        until[slot : slot + 1] = [end]
        slots.append(slot)
    write, read, free = np.full((3, *table.kind.shape), -1, np.int32)
    write[first, stage] = slots
    for tick in ticks:
        read[tick, stage] = slots
    free[ticks[-1], stage] = slots
    return Buffer(sizes=tuple(map(len, held)), write=write, read=read, free=free)


def draw(table: Table) -> str:
    """The table as text: a row for each stage, a column for each tick, and the legend."""
    cells = [[_cell(table, tick, stage) for tick in range(table.num_ticks)] for stage in range(table.num_stages)]
    width = 1 + max(len(cell) for row in cells for cell in row)
    rows = {f"stage {stage}": "".join(cell.ljust(width) for cell in row) for stage, row in enumerate(cells)}
    ruler = {"tick": "".join(str(tick).ljust(5 * width) for tick in range(0, table.num_ticks, 5))}
    margin = max(map(len, rows))
    kinds = ", ".join(f"{LETTERS[kind]} {NAMES[kind]}" for kind in np.unique(table.kind))
    legend = f"{kinds}; number: microbatch{'.chunk' if table.num_chunks > 1 else ''}"
    return "\n".join([*(f"{name:<{margin}} {row}".rstrip() for name, row in (ruler | rows).items()), legend])


def _cell(table: Table, tick: int, stage: int) -> str:
    kind, microbatch, chunk = (values[tick, stage] for values in (table.kind, table.microbatch, table.chunk))
    if kind == IDLE:
        return LETTERS[IDLE]
    return f"{LETTERS[kind]}{microbatch}" + (f".{chunk}" if table.num_chunks > 1 else "")
