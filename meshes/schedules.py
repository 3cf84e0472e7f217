"""Pipeline schedules as data: which stage does what at which tick; and layers divided among stages by their cost.

It runs nothing and imports no jax: `meshes.simulator` checks, times and draws a table. In every schedule here each
virtual stage takes the microbatches in ascending order, so all of them sum gradients in the same order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, zip_longest
from typing import NamedTuple

import numpy as np

from meshes.errors import LayoutError

# What a cell does: the branches of an executor's switch. BACKWARD is the two below it in one.
IDLE, FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(5)
NAMES = ("idle", "forward", "backward", "backward for the input", "backward for the weights")
# What actions make, and, by kind of action, which of it.
OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)
MAKES = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]], bool)
NEVER = np.iinfo(np.int32).max  # the tick of what is not made


class Action(NamedTuple):
    """What a stage does in one tick: the kind, on which microbatch, with which of the stage's chunks of layers."""

    kind: int
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """What every stage does at every tick: three integer arrays of shape (ticks, stages); an idle cell is all zeros.

    Chunk c of stage s is virtual stage c * stages + s, so that activations go round the ring of stages once per chunk.
    What a stage sends at tick t, its neighbour can read from tick t + 1 on.
    """

    kind: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray
    num_microbatches: int
    num_chunks: int = 1

    @property
    def num_ticks(self) -> int:
        return self.kind.shape[0]

    @property
    def num_stages(self) -> int:
        return self.kind.shape[1]

    @property
    def num_virtual(self) -> int:
        return self.num_chunks * self.num_stages

    @property
    def virtual(self) -> np.ndarray:
        """The virtual stage of every cell, (ticks, stages)."""
        return self.chunk * self.num_stages + np.arange(self.num_stages)


def needs(kind: np.ndarray, virtual: np.ndarray, num_virtual: int) -> tuple[np.ndarray, np.ndarray]:
    """The one thing that each action waits for: (what, of which virtual stage), where -1 is the model's input.

    One is enough, the rest follows: a forward waits for the forward before it, the last virtual stage's backward for
    its own forward, every other for the backward that follows it in the model, one for the weights for that for the
    input. What an idle cell waits for means nothing.
    """
    forward, weights = kind == FORWARD, kind == BACKWARD_WEIGHT
    turn = ~forward & ~weights & (virtual == num_virtual - 1)
    what = np.where(forward | turn, OUTPUT, INPUT_GRADIENT)
    return what, np.where(forward, virtual - 1, np.where(weights | turn, virtual, virtual + 1))


def mark(made: np.ndarray, kind: np.ndarray, virtual: np.ndarray, microbatch: np.ndarray, when: np.ndarray | int) -> None:
    """Notes in `made` (what, virtual stage, microbatch) when the actions of one tick, one per stage, make what."""
    made[:, virtual, microbatch] = np.where(MAKES[kind].T, when, made[:, virtual, microbatch])


def place(
    orders: Sequence[Sequence[Action]], num_microbatches: int, num_chunks: int = 1, *, aligned: bool = False
) -> Table:
    """The order of each stage's actions -> their table: every action at the first tick at which it can run.

    Aligned: within a tick all stages go forward or all backward, in turns, so that none waits for a slower action of
    its neighbour. Raises LayoutError where stages wait for each other for ever.
    """
    stages, num_virtual = np.arange(len(orders)), num_chunks * len(orders)
    queue = np.zeros((len(orders), max(map(len, orders)) + 1, 3), np.int32)  # each order ends in an idle action
    for stage, order in enumerate(orders):
        queue[stage, : len(order)] = order
    made = np.full((3, num_virtual + 1, num_microbatches), NEVER)
    made[:, -1] = -1  # the model's input
    rows: list[np.ndarray] = []
    at, was_forward = np.zeros_like(stages), False
    while (head := queue[stages, at]).any():
        kind, microbatch, chunk = head.T
        virtual = chunk * len(orders) + stages
        ready = (kind != IDLE) & (made[(*needs(kind, virtual, num_virtual), microbatch)] < len(rows))
        if not ready.any():
            raise _deadlock(head, len(rows))
        turn = ready & ((kind == FORWARD) != was_forward)
        if aligned and turn.any():
            ready = turn
        was_forward = bool((ready & (kind == FORWARD)).any())
        mark(made, kind * ready, virtual, microbatch, len(rows))
        rows.append(head * ready[:, None])
        at = at + ready
    return Table(*np.stack(rows).transpose(2, 0, 1), num_microbatches, num_chunks)


def _deadlock(head: np.ndarray, tick: int) -> LayoutError:
    waiting = [f"stage {stage}: {spell(*action)}" for stage, action in enumerate(head.tolist()) if action[0] != IDLE]
    return LayoutError(
        f"tick {tick}, {waiting[0].split(':')[0]}: from here on every stage waits for another.",
        got="; ".join(waiting),
        rule="at every tick the next action of some stage has what it needs",
    )


def spell(kind: int, microbatch: int, chunk: int) -> str:
    """An action in words."""
    name = NAMES[kind] if 0 <= kind < len(NAMES) else f"action {kind}"
    return f"{name} of microbatch {microbatch}, chunk {chunk}"


def gpipe(stages: int, microbatches: int) -> Table:
    """All forwards, then all backwards: a bubble of (p-1)/(m+p-1) of the time, and all m activations kept.

    Huang et al. 2019, "GPipe" (arXiv 1811.06965), section 2.3.
    """
    _check(stages=stages, microbatches=microbatches)
    return _whole_backwards([range(microbatches)], 1, [microbatches] * stages)


def one_f_one_b(stages: int, microbatches: int) -> Table:
    """Backwards and forwards in turns: GPipe's bubble of (p-1)/(m+p-1), and on stage s p - s activations kept at most.

    PipeDream-Flush: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM" (arXiv 2104.04473), section 2.2.1. Within a tick neighbours do opposite things: in lockstep, each tick
    costs the longer of the two. `interleaved` with one chunk avoids that.
    """
    _check(stages=stages, microbatches=microbatches)
    return _whole_backwards([range(microbatches)], 1, [stages - stage for stage in range(stages)])


def interleaved(stages: int, microbatches: int, chunks: int) -> Table:
    """1F1B with `chunks` runs of layers per stage: a bubble of (p-1)/(vm+p-1) of the time, where m >= p.

    Narayanan et al. 2021, section 2.2.2. Microbatches go through the chunks in groups of p, or a few more where p does
    not divide them. With g the largest group, stage s keeps 2(p-s-1) + (v-1)g + 1 activations of a chunk: for g = p
    L(1 + (p-1)/pv) layers' on the first, as in Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.3. Aligned: the
    bubble is the same in lockstep. One chunk is the eager 1F1B of Zhuang et al. 2022 (arXiv 2211.05322), which pays for
    the alignment with up to 2p - 1 activations instead of p.
    """
    _check(stages=stages, microbatches=microbatches, chunks=chunks)
    groups = np.array_split(range(microbatches), max(1, microbatches // stages))  # the larger ones first
    leads = [2 * (stages - stage - 1) + (chunks - 1) * len(groups[0]) + 1 for stage in range(stages)]
    return _whole_backwards(groups, chunks, leads, aligned=True)


def zero_bubble(stages: int, microbatches: int) -> Table:
    """ZB-H1: the backward in two, whose second half fills two thirds of 1F1B's bubble, in 1F1B's memory.

    Qi et al. 2023, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), section 2.1: stage s is s backwards for the
    weights behind. By table 2 the bubble takes (p-1)(F+B-W), beside m(F+B+W) of work.
    """
    _check(stages=stages, microbatches=microbatches)
    return place([list(_zero_bubble(stages, microbatches, stage)) for stage in range(stages)], microbatches)


def _zero_bubble(stages: int, microbatches: int, behind: int) -> Iterator[Action]:
    ahead = stages - behind
    for i in range(min(ahead, microbatches)):
        yield Action(FORWARD, i)
    for i in range(microbatches + behind):
        if i < microbatches:
            yield Action(BACKWARD_INPUT, i)
        if i >= behind:
            yield Action(BACKWARD_WEIGHT, i - behind)
        if i + ahead < microbatches:
            yield Action(FORWARD, i + ahead)


def _whole_backwards(
    groups: Sequence[Sequence[int]], chunks: int, leads: Sequence[int], *, aligned: bool = False
) -> Table:
    """Each group of microbatches goes through all chunks; stage s is leads[s] forwards ahead of its backwards."""
    forwards = [Action(FORWARD, i, chunk) for group in groups for chunk in range(chunks) for i in group]
    backwards = [Action(BACKWARD, i, chunk) for group in groups for chunk in reversed(range(chunks)) for i in group]
    turns = [chain(*zip_longest(backwards, forwards[lead:])) for lead in leads]
    orders = [[*forwards[:lead], *filter(None, turn)] for lead, turn in zip(leads, turns, strict=True)]
    return place(orders, sum(map(len, groups)), chunks, aligned=aligned)


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise LayoutError(f"there is no pipeline of {count} {name}.", rule=f"{name} is 1 or more")


def divide(costs: Sequence[float], stages: int, *, first: float = 0, last: float = 0) -> list[int]:
    """Costs of the layers, in order -> how many of them each virtual stage gets, so that the dearest costs the least.

    `first` and `last` are what the ends do beside their layers: embedding; unembedding and loss. Exact. Of equally good
    divisions it takes the most even one (least sum of squares), of those the one with fewest layers early, where most
    activations are kept. Raises LayoutError where there are fewer layers than stages.
    """
    _check(stages=stages)
    if len(costs) < stages:
        raise LayoutError(
            f"{len(costs)} layers cannot fill {stages} virtual stages.",
            rule="every virtual stage has one layer or more",
            fix="fewer stages or chunks",
        )
    *layers, first, last = _whole_numbers([*costs, first, last])
    num, ends, worst = len(layers), list(accumulate(layers, initial=0)), (sum(layers) + first + last) ** 2 + 1

    def cost(i: int, j: int) -> int:
        return ends[j] - ends[i] + first * (i == 0) + last * (j == num)

    dearest, _ = _cut(num, stages, cost, max)

    def square(i: int, j: int) -> int:
        return cost(i, j) ** 2 if cost(i, j) <= dearest else worst

    return _cut(num, stages, square, operator.add)[1]


def _whole_numbers(costs: Sequence[float]) -> list[int]:
    """The same costs in a unit that divides all of them, so that sums of equal costs are equal."""
    bad = [cost for cost in costs if not 0 <= cost < math.inf]
    if bad:
        raise LayoutError(f"{bad[0]} is no cost of a layer.", rule="costs are finite and not negative")
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * unit) for cost in exact]


def _cut(num: int, pieces: int, score: Callable[[int, int], int], join: Callable[[int, int], int]) -> tuple[int, list[int]]:
    """The least joined score of `num` layers cut into pieces, score(i, j) that of layers i to j, and the lengths."""
    best = {i: (score(i, num), [num - i]) for i in range(pieces - 1, num)}
    for before in reversed(range(pieces - 1)):  # pieces before the one that starts at layer i
        best = {
            i: min((join(score(i, j), rest), [j - i, *lengths]) for j, (rest, lengths) in best.items() if j > i)
            for i in range(before, num - pieces + before + 1)
        }
    return best[0]
