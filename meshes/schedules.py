"""Pipeline schedules as data: which stage does what at which tick; and layers divided among stages by their cost.

It runs nothing and imports no jax; `meshes.simulator` checks, times and draws a table. Letters are those of the papers:
p stages, m microbatches, v chunks of layers per stage; F, B and W the costs of a forward, of a backward for the input
and of one for the weights. In every schedule each virtual stage takes the microbatches in ascending order, so that all
schedules sum gradients in the same order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, zip_longest
from typing import Any, NamedTuple

import numpy as np

from meshes.errors import LayoutError

# What a cell does: the branches of an executor's switch. BACKWARD is the two after it in one.
IDLE, FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(5)
NAMES = ("idle", "forward", "backward", "backward for the input", "backward for the weights")
# What actions make, and which of these each kind of action makes.
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
    """The one thing that each action waits for: (what, made by which virtual stage), -1 being the model's input.

    A forward waits for the forward of the virtual stage before; a backward for the backward of the one after, on the
    last for its own forward; a backward for the weights for that for the input. All else follows from these. An idle
    cell's entry means nothing.
    """
    forward, weights = kind == FORWARD, kind == BACKWARD_WEIGHT
    turn = ~forward & ~weights & (virtual == num_virtual - 1)
    what = np.where(forward | turn, OUTPUT, INPUT_GRADIENT)
    return what, np.where(forward, virtual - 1, np.where(weights | turn, virtual, virtual + 1))


def mark(made: np.ndarray, kind: np.ndarray, virtual: np.ndarray, microbatch: np.ndarray, when: Any) -> None:
    """Writes into `made` (what, virtual stage, microbatch) when the actions of one tick, one per stage, made it."""
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
        turn = ready & ((kind == FORWARD) != was_forward)  # of the direction that the tick before did not go
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
    """All forwards, then all backwards: a bubble of (p-1)/(m+p-1) of the time, and the activations of all m kept.

    Huang et al. 2019, "GPipe" (arXiv 1811.06965), section 2.3.
    """
    _check(stages=stages, microbatches=microbatches)
    return _whole_backwards([range(microbatches)], 1, [microbatches] * stages)


def one_f_one_b(stages: int, microbatches: int) -> Table:
    """One forward, one backward: GPipe's bubble of (p-1)/(m+p-1), with the activations of p - s kept on stage s.

    PipeDream-Flush: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM" (arXiv 2104.04473), section 2.2.1. Neighbours do opposite things within a tick, so in lockstep almost
    every tick costs a backward: 4/3 of the time where B + W = 2F. `interleaved` with one chunk avoids that.
    """
    _check(stages=stages, microbatches=microbatches)
    return _whole_backwards([range(microbatches)], 1, [stages - stage for stage in range(stages)])


def interleaved(stages: int, microbatches: int, chunks: int) -> Table:
    """1F1B with v chunks of layers per stage: a bubble of (p-1)/(vm+p-1) of the time, in lockstep too, where m >= p.

    Narayanan et al. 2021, section 2.2.2. Microbatches go through the chunks in groups of p, of p to 2p - 1 where p does
    not divide m. With g the largest group, stage s keeps the activations of (v-1)g + 2(p-s) - 1 microbatches of a
    chunk; for g = p that is L(1 + (p-1)/pv) layers' on the first stage, as in Korthikanti et al. 2022 (arXiv
    2205.05198), section 4.2.3. With one chunk it is the eager 1F1B of Zhuang et al. 2022 (arXiv 2211.05322): 2p - 1
    activations instead of p are the price of being aligned. Fewer microbatches than stages take 2(vp + m - 1) ticks.
    """
    _check(stages=stages, microbatches=microbatches, chunks=chunks)
    groups = np.array_split(range(microbatches), max(1, microbatches // stages))  # the larger ones first
    leads = [2 * (stages - stage - 1) + (chunks - 1) * len(groups[0]) + 1 for stage in range(stages)]
    return _whole_backwards(groups, chunks, leads, aligned=True)


def zero_bubble(stages: int, microbatches: int) -> Table:
    """ZB-H1: backwards in two halves, the second of which fill two thirds of 1F1B's bubble, in 1F1B's memory.

    Qi et al. 2023, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), section 2.1: stage s runs its backwards for
    the weights s microbatches late. Beside m(F+B+W) of work stands a bubble of (p-1)(F+B-W) where W <= B (table 2), of
    (p-1)F otherwise. In lockstep that holds for F = B = W.
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
    """Costs of the layers in order -> how many of them each virtual stage gets, so that the dearest costs the least.

    `first` and `last` are what the two ends do beside their layers: embedding; unembedding and loss. Exact: of all best
    divisions it is the most even one (least sum of squares), of those the one with the fewest layers early, where most
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


def _cut(
    num: int, pieces: int, score: Callable[[int, int], int], join: Callable[[int, int], int]
) -> tuple[int, list[int]]:
    """The least score of `num` layers cut into pieces, where score(i, j) is that of layers i to j; and the lengths."""
    best = {i: (score(i, num), [num - i]) for i in range(pieces - 1, num)}
    for before in reversed(range(pieces - 1)):  # pieces before the one that starts at layer i
        best = {
            i: min((join(score(i, j), rest), [j - i, *lengths]) for j, (rest, lengths) in best.items() if j > i)
            for i in range(before, num - pieces + before + 1)
        }
    return best[0]
