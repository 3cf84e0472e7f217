"""Pipeline tables against the papers' closed forms, drawings and memory, a replay of their buffers, and brute force."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from meshes import schedules
from meshes.errors import LayoutError
from meshes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    IDLE,
    Action,
    Table,
    divide,
    gpipe,
    interleaved,
    one_f_one_b,
    place,
    zero_bubble,
)
from meshes.simulator import Buffer, Costs, draw, simulate

BACKWARD_TWICE_FORWARD = Costs()
UNEQUAL = Costs(forward=5, backward_input=4, backward_weight=3)
STAGES = range(2, 17)
TABLES = {
    "gpipe": gpipe(3, 5),
    "1f1b": one_f_one_b(4, 6),
    "eager": interleaved(4, 6, 1),
    "interleaved": interleaved(3, 6, 2),
    "interleaved, unequal groups": interleaved(3, 8, 3),
    "interleaved, few microbatches": interleaved(4, 2, 3),
    "one stage": interleaved(1, 3, 2),
    "zero bubble": zero_bubble(4, 7),
    "zero bubble, few microbatches": zero_bubble(5, 2),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def check_closed_forms(p: int, m: int) -> None:
    """Idle cells and times against (p-1)/(m+p-1), (p-1)/(vm+p-1), (p-1)(F+B-W)/(m(F+B+W)+(p-1)(F+B-W))."""
    tables = [(gpipe(p, m), 1), (one_f_one_b(p, m), 1), *((interleaved(p, m, v), v) for v in range(1, 5))]
    for (table, v), costs in itertools.product(tables, (BACKWARD_TWICE_FORWARD, UNEQUAL)):
        run, slots, bubble = simulate(table, costs), v * m + p - 1, (p - 1) / (v * m + p - 1)
        assert table.num_ticks == 2 * slots and run.idle == bubble
        assert run.asynchronous == (slots * costs.by_kind[BACKWARD] + slots * costs.forward, bubble)
    for costs in (BACKWARD_TWICE_FORWARD, UNEQUAL):
        f, b, w = costs.forward, costs.backward_input, costs.backward_weight
        run, idle, work = simulate(zero_bubble(p, m), costs), (p - 1) * (f + b - w), m * (f + b + w)
        assert run.table.num_ticks == 3 * m + p - 1
        assert run.asynchronous == (work + idle, idle / (work + idle))


@pytest.mark.parametrize("p", STAGES)
def test_bubbles_are_those_of_the_papers(p):
    for m in (p, 2 * p - 1, 64):  # divided by the stages, as uneven as can be, the most
        check_closed_forms(p, m)


@pytest.mark.slow
@pytest.mark.parametrize("p", STAGES)
def test_bubbles_are_those_of_the_papers_on_the_whole_grid(p):
    for m in range(p, 65):
        check_closed_forms(p, m)


@pytest.mark.parametrize("p, m, v", [(2, 2, 1), (2, 7, 4), (3, 7, 3), (4, 8, 2), (5, 13, 2), (7, 64, 4), (16, 29, 1)])
def test_aligned_tables_lose_nothing_in_lockstep(p, m, v):
    run = simulate(interleaved(p, m, v), UNEQUAL)
    assert run.lockstep == run.asynchronous == ((v * m + p - 1) * 12, (p - 1) / (v * m + p - 1))
    assert simulate(gpipe(p, m), UNEQUAL).lockstep == ((m + p - 1) * 12, (p - 1) / (m + p - 1))


@pytest.mark.parametrize("p, m", [(2, 3), (4, 8), (5, 21), (16, 64)])
def test_1f1b_in_lockstep_pays_the_backward_at_every_tick_but_the_first_p(p, m):
    assert simulate(one_f_one_b(p, m)).lockstep.total == p * 1 + (2 * m + p - 2) * 2


@pytest.mark.parametrize("p, m", [(2, 2), (4, 8), (7, 15)])
def test_zero_bubble_loses_nothing_in_lockstep_where_its_three_actions_cost_the_same(p, m):
    run = simulate(zero_bubble(p, m))
    assert run.lockstep == run.asynchronous == (3 * m + p - 1, (p - 1) / (3 * m + p - 1))


@pytest.mark.parametrize("p, m, v", [(4, 1, 2), (4, 3, 3), (7, 2, 4), (16, 15, 2)])
def test_fewer_microbatches_than_stages_take_the_time_of_the_way_round_the_ring(p, m, v):
    assert interleaved(p, m, v).num_ticks == 2 * (v * p - 1 + m)
    assert simulate(one_f_one_b(p, m)).asynchronous.total == 3 * (m + p - 1)
    assert simulate(zero_bubble(p, m)).asynchronous.total <= 3 * (m + p - 1)


@pytest.mark.parametrize("p, m", [(2, 2), (3, 9), (4, 10), (8, 64), (16, 20)])
def test_live_activations_are_those_of_the_papers(p, m):
    stages, half = range(p), [2 * (p - stage) - 1 for stage in range(p)]
    assert simulate(gpipe(p, m)).live == (m,) * p
    assert simulate(one_f_one_b(p, m)).live == tuple(p - stage for stage in stages)
    assert simulate(interleaved(p, m, 1)).live == tuple(min(m, live) for live in half)
    for v in (2, 3):
        group = math.ceil(m / (m // p))
        assert simulate(interleaved(p, m, v)).live == tuple(min(v * m, (v - 1) * group + live) for live in half)
    run = simulate(zero_bubble(p, m))
    assert run.live == (p,) * p
    # Qi et al., section 2.3: device i keeps (p-i+1) activations and (i-1) residuals; one more while the next is made.
    assert run.residuals.sizes == tuple(stage + 1 for stage in stages)


@pytest.mark.parametrize("p, m", [(2, 2), (4, 9), (8, 8)])
def test_zero_bubble_with_dear_weights_waits_for_a_forward_of_each_other_stage(p, m):
    run = simulate(zero_bubble(p, m), Costs(forward=2, backward_input=1, backward_weight=3))
    assert run.asynchronous.total == m * 6 + (p - 1) * 2


@pytest.mark.parametrize("p, v", [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_interleaving_keeps_the_layers_of_korthikanti_on_the_first_stage(p, v):
    layers_per_chunk = Fraction(1, p * v)  # of L = 1
    assert simulate(interleaved(p, 4 * p, v)).live[0] * layers_per_chunk == 1 + Fraction(p - 1, p * v)


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_no_table_is_shorter_than_1f1b_and_none_as_short_keeps_less(p):
    m = (p - 1) ** 2 + 1
    run = simulate(one_f_one_b(p, m))
    # The last stage cannot start before tick p - 1, has 2m actions, and p - 1 backwards follow its last.
    assert run.table.num_ticks == (p - 1) + 2 * m + (p - 1)
    # Stage 0 keeps each of m microbatches for 2p ticks or more, there and back: so many at a time, on average.
    assert run.live[0] == math.ceil(Fraction(2 * p * m, run.table.num_ticks))


FIGURES = {
    "gpipe": (
        gpipe(2, 2),
        """
        tick    0              5
        stage 0 F0 F1 .  .  B0 B1
        stage 1 .  F0 F1 B0 B1 .
        . idle, F forward, B backward; number: microbatch
        """,
    ),
    "1f1b": (
        one_f_one_b(3, 4),
        """
        tick    0              5              10
        stage 0 F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        stage 1 .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        stage 2 .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
        . idle, F forward, B backward; number: microbatch
        """,
    ),
    "eager": (
        interleaved(2, 3, 1),
        """
        tick    0              5
        stage 0 F0 F1 .  F2 B0 .  B1 B2
        stage 1 .  F0 B0 F1 B1 F2 B2 .
        . idle, F forward, B backward; number: microbatch
        """,
    ),
    "interleaved": (
        interleaved(2, 2, 2),
        """
        tick    0                        5
        stage 0 F0.0 F1.0 F0.1 F1.1 .    .    B0.1 B1.1 B0.0 B1.0
        stage 1 .    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0 .
        . idle, F forward, B backward; number: microbatch.chunk
        """,
    ),
    "zero bubble": (
        zero_bubble(2, 3),
        """
        tick    0              5
        stage 0 F0 F1 .  b0 w0 F2 b1 w1 b2 w2
        stage 1 .  F0 b0 F1 b1 w0 F2 b2 w1 w2
        . idle, F forward, b backward for the input, w backward for the weights; number: microbatch
        """,
    ),
}


@pytest.mark.parametrize("table, figure", FIGURES.values(), ids=FIGURES)
def test_tables_look_as_drawn_by_hand(table, figure):
    assert draw(table).splitlines() == [line.strip() for line in figure.strip().splitlines()]


def orders(table: Table) -> list[list[Action]]:
    cells = np.stack([table.kind, table.microbatch, table.chunk], axis=-1).transpose(1, 0, 2).tolist()
    return [[Action(*cell) for cell in row if cell[0] != IDLE] for row in cells]


@pytest.mark.parametrize("p, m, v", [(2, 4, 2), (4, 8, 2), (3, 9, 3)])
def test_interleaved_stages_run_in_the_order_of_megatron(p, m, v):
    """Its k-th forward is of chunk (k mod pv) // p, and there are 2(p-s-1) + (v-1)p of them before the first pair."""
    at = [(k // (p * v) * p + k % p, k % (p * v) // p) for k in range(m * v)]
    forwards = [Action(FORWARD, i, chunk) for i, chunk in at]
    backwards = [Action(BACKWARD, i, v - 1 - chunk) for i, chunk in at]
    for stage, order in enumerate(orders(interleaved(p, m, v))):
        warmup = min(2 * (p - stage - 1) + (v - 1) * p, m * v)
        pairs = zip(forwards[warmup:], backwards, strict=False)
        assert order == [*forwards[:warmup], *itertools.chain(*pairs), *backwards[m * v - warmup :]]


@every_table
def test_gradients_are_summed_in_the_order_of_the_microbatches(table):
    for order in orders(table):
        for chunk in range(table.num_chunks):
            summed = [a.microbatch for a in order if a.kind in (BACKWARD, BACKWARD_WEIGHT) and a.chunk == chunk]
            assert summed == list(range(table.num_microbatches))


# A second reading of the rules: sets and dictionaries, every dependency and not just the last to be met.

HALVES = {FORWARD: "F", BACKWARD: "BW", BACKWARD_INPUT: "B", BACKWARD_WEIGHT: "W"}
Part = tuple[str, int, int]  # F, B or W, virtual stage, microbatch


def parts(table: Table, tick: int, stage: int) -> list[Part]:
    kind, i, chunk = (int(values[tick, stage]) for values in (table.kind, table.microbatch, table.chunk))
    return [(half, chunk * table.num_stages + stage, i) for half in HALVES.get(kind, "")]


def needed(part: Part, last: int) -> set[Part]:
    half, k, i = part
    if half == "F":
        return {("F", k - 1, i)} if k else set()
    return {("F", k, i), ("B", k, i) if half == "W" else ("B", k + 1, i)} - {("B", last + 1, i)}


def every_part(table: Table) -> set[Part]:
    return set(itertools.product("FBW", range(table.num_virtual), range(table.num_microbatches)))


def wrong_places(table: Table) -> set[tuple[int | None, int]]:
    """(tick, stage) of each cell that repeats an action or comes too early; (None, stage) where an action is lost."""
    first: dict[Part, int] = {}
    wrong: set[tuple[int | None, int]] = set()
    cells = list(itertools.product(range(table.num_ticks), range(table.num_stages)))
    for tick, stage in cells:
        for part in parts(table, tick, stage):
            if first.setdefault(part, tick) < tick:
                wrong.add((tick, stage))
    wrong |= {(None, k % table.num_stages) for _, k, _ in every_part(table) - set(first)}
    for tick, stage in cells:
        before = {need for part in parts(table, tick, stage) for need in needed(part, table.num_virtual - 1)}
        if any(first.get(need, table.num_ticks) >= tick for need in before - set(parts(table, tick, stage))):
            wrong.add((tick, stage))
    return wrong


def random_table(seed: int) -> Table:
    """Any legal table: at every tick each stage may run any action that is ready; backwards are whole or in two."""
    rng = random.Random(seed)
    p, m, v = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 3)
    whole = {(k, i): rng.random() < 0.5 for k in range(p * v) for i in range(m)}
    todo = [("F", k, i) for k, i in whole] + [("BW" if whole[at] else "B", *at) for at in whole]
    todo += [("W", *at) for at in whole if not whole[at]]
    done: set[Part] = set()
    rows = []
    while todo:
        row, made = [(IDLE, 0, 0)] * p, set()
        for stage in range(p):
            ready = [a for a in todo if a[1] % p == stage and needed((a[0][0], *a[1:]), p * v - 1) <= done]
            if ready and rng.random() < 0.8:
                halves, k, i = action = rng.choice(ready)
                todo.remove(action)
                row[stage] = {text: kind for kind, text in HALVES.items()}[halves], i, k // p
                made |= {(half, k, i) for half in halves}
        done |= made
        rows.append(row)
    return Table(*np.array(rows).transpose(2, 0, 1), num_microbatches=m, num_chunks=v)


ANY_TABLE = [*TABLES.values(), *map(random_table, range(60))]


def mutate(table: Table, rng: random.Random) -> Table:
    cells = np.stack([table.kind, table.microbatch, table.chunk], axis=-1)
    (t1, s1), (t2, s2) = ((rng.randrange(table.num_ticks), rng.randrange(table.num_stages)) for _ in range(2))
    mutation = rng.choice(["swap", "drop", "repeat"])
    if mutation == "swap":
        cells[[t1, t2], [s1, s2]] = cells[[t2, t1], [s2, s1]]
    else:
        cells[t1, s1] = 0 if mutation == "drop" else cells[t2, s2]
    return Table(*cells.transpose(2, 0, 1), table.num_microbatches, table.num_chunks)


def test_mutated_tables_are_refused_where_a_second_reading_of_the_rules_finds_the_fault():
    rng, num_refused = random.Random(0), 0
    for table in ANY_TABLE:
        assert not wrong_places(table)
        simulate(table)
        for _ in range(20):
            mutant = mutate(table, rng)
            wrong = wrong_places(mutant)
            if not wrong:
                simulate(mutant)
                continue
            with pytest.raises(LayoutError) as refused:
                simulate(mutant)
            place = re.match(r"tick (\d+), stage (\d+): |ticks 0 to \d+, stage (\d+): ", str(refused.value))
            tick, stage, lost_stage = (None if text is None else int(text) for text in place.groups())
            assert ((None, lost_stage) if tick is None else (tick, stage)) in wrong and refused.value.rule
            num_refused += 1
    assert num_refused > 10 * len(ANY_TABLE)


@pytest.mark.parametrize(
    "values, what, rule",
    [
        (dict(kind=9), "tick 4, stage 1: the schedule cannot have action 9 of", "kind is 0 to 4"),
        (dict(microbatch=4), "tick 4, stage 1: the schedule cannot have backward of microbatch 4,", "0 to 3"),
        (dict(chunk=-1), "tick 4, stage 1: the schedule cannot have backward of microbatch 0, chunk -1", "0 to 0"),
        (dict(kind=FORWARD), "tick 4, stage 1: the schedule cannot have forward of microbatch 0,", "comes once"),
        (dict(kind=IDLE), "ticks 0 to 11, stage 1: the schedule has no backward of microbatch 0, chunk 0.", "once"),
        (dict(kind=BACKWARD_INPUT), "stage 1: the schedule has no backward for the weights of microbatch 0", "once"),
    ],
)
def test_a_changed_cell_is_named_with_the_rule_that_it_breaks(values, what, rule):
    table = one_f_one_b(3, 4)
    arrays = {name: getattr(table, name).copy() for name in ("kind", "microbatch", "chunk")}
    for name, value in values.items():
        arrays[name][4, 1] = value
    with pytest.raises(LayoutError, match=rule) as refused:
        simulate(Table(**arrays, num_microbatches=4))
    assert what in refused.value.what


def test_an_action_that_comes_too_early_is_told_when_what_it_needs_is_made():
    idle, forward, backward = Action(IDLE, 0), Action(FORWARD, 0), Action(BACKWARD, 0)
    cells = [[forward, forward], [idle, backward], [backward, idle]]
    with pytest.raises(LayoutError, match="tick 0, stage 1: .* forward of microbatch 0, chunk 0") as refused:
        simulate(Table(*np.array(cells).transpose(2, 0, 1), num_microbatches=1))
    assert refused.value.got == "that is made at tick 0"


def test_orders_that_wait_for_each_other_are_refused():
    first, second = [Action(FORWARD, 0), Action(BACKWARD, 0)], [Action(BACKWARD, 0), Action(FORWARD, 0)]
    with pytest.raises(LayoutError, match="tick 1, stage 0: from here on every stage waits for another"):
        place([first, second], 1)


@pytest.mark.parametrize("shape", [(0, 4, 1), (2, 0, 1), (2, 4, 0)])
def test_no_stages_microbatches_or_chunks_are_refused(shape):
    with pytest.raises(LayoutError, match="is 1 or more"):
        interleaved(*shape)


@pytest.mark.parametrize("table", ANY_TABLE)
def test_times_are_those_of_a_second_reckoning(table):
    run, cost, last = simulate(table, UNEQUAL), {"F": 5, "B": 4, "W": 3}, table.num_virtual - 1
    lockstep, clock = 0, [0] * table.num_stages
    end: dict[Part, int] = {}
    for tick in range(table.num_ticks):
        cells = [parts(table, tick, stage) for stage in range(table.num_stages)]
        taken = [sum(cost[half] for half, *_ in made) for made in cells]
        lockstep += max(taken)
        for stage, made in enumerate(cells):
            before = {need for part in made for need in needed(part, last)} - set(made)
            clock[stage] = max([clock[stage], *(end[need] for need in before)]) + taken[stage]
            end |= dict.fromkeys(made, clock[stage])
    busy = Fraction(len(end) // 3 * sum(cost.values()), table.num_stages)  # of each stage, on average
    assert run.lockstep == (lockstep, float(1 - busy / lockstep))
    assert run.asynchronous == (max(clock), float(1 - busy / max(clock)))


# An executor with names for arrays: buffers by slot, messages that arrive a tick later.


class Slots:
    """One buffer on all stages, as planned: nothing is written over, read or freed where nothing is kept."""

    def __init__(self, plan: Buffer):
        self.plan, self.peak = plan, [0] * len(plan.sizes)
        self.kept: dict[tuple[int, int], tuple[int, int]] = {}

    def write(self, tick: int, stage: int, value: tuple[int, int] | None) -> None:
        slot = int(self.plan.write[tick, stage])
        assert (slot >= 0) == (value is not None) and (stage, slot) not in self.kept
        if value is not None:
            self.kept[stage, slot] = value
        self.peak[stage] = max(self.peak[stage], sum(at == stage for at, _ in self.kept))

    def read(self, tick: int, stage: int) -> tuple[int, int] | None:
        slot = int(self.plan.read[tick, stage])
        return self.kept[stage, slot] if slot >= 0 else None

    def free(self, tick: int) -> None:
        for stage, slot in enumerate(self.plan.free[tick].tolist()):
            if slot >= 0:
                del self.kept[stage, slot]


@pytest.mark.parametrize("table", ANY_TABLE)
def test_a_replay_finds_every_value_in_its_slot_and_no_buffer_is_larger_than_what_it_keeps(table):
    run, last, p = simulate(table), table.num_virtual - 1, table.num_stages
    buffers = {name: Slots(getattr(run, name)) for name in ("activations", "gradients", "saved", "residuals")}
    sent: dict[tuple[str, int], tuple[int, int]] = {}
    for tick in range(table.num_ticks):
        arriving, sent = sent, {}
        for stage in range(p):
            made = {half: (k, i) for half, k, i in parts(table, tick, stage)}
            f, b, w = (made.get(half) for half in "FBW")  # (virtual stage, microbatch)
            writes = arriving.get(("F", stage)), arriving.get(("B", stage)), f, None if w else b
            reads = f if f and f[0] > 0 else None, b if b and b[0] < last else None, b or w, None if b else w
            for slots, write, read in zip(buffers.values(), writes, reads, strict=True):
                slots.write(tick, stage, write)
                assert slots.read(tick, stage) == read
            if f and f[0] < last:
                sent["F", (stage + 1) % p] = (f[0] + 1, f[1])
            if b and b[0] > 0:
                sent["B", (stage - 1) % p] = (b[0] - 1, b[1])
        for slots in buffers.values():
            slots.free(tick)
    assert not any(slots.kept for slots in buffers.values())
    for slots in buffers.values():
        assert tuple(slots.peak) == slots.plan.sizes and slots.plan.size == max(slots.peak)


def cuts(num: int, stages: int) -> list[list[int]]:
    """Every way to give `num` layers to stages, one or more to each."""
    bounds = itertools.combinations(range(1, num), stages - 1)
    return [[j - i for i, j in itertools.pairwise([0, *inner, num])] for inner in bounds]


def test_layers_are_divided_as_well_as_the_best_of_all_divisions():
    rng = random.Random(0)
    for _ in range(200):
        layers = [Fraction(rng.randint(0, 6), rng.choice([1, 2, 4])) for _ in range(rng.randint(1, 9))]
        stages, first, last = rng.randint(1, len(layers)), rng.randint(0, 5), rng.randint(0, 5)

        def rank(counts: list[int]) -> tuple[Fraction, Fraction, list[int]]:
            ends = [0, *itertools.accumulate(counts)]
            sums = [sum(layers[i:j], Fraction(0)) for i, j in itertools.pairwise(ends)]
            sums[0], sums[-1] = sums[0] + first, sums[-1] + last  # noqa: B023
            return max(sums), sum(part**2 for part in sums), counts

        best = min(cuts(len(layers), stages), key=rank)
        assert divide([float(layer) for layer in layers], stages, first=first, last=last) == best


@pytest.mark.parametrize(
    "num_layers, stages, first, last, counts",
    [
        (32, 4, 0, 0, [8, 8, 8, 8]),
        (7, 7, 9, 9, [1] * 7),
        (10, 4, 0, 0, [2, 2, 3, 3]),
        (13, 4, 0, 3, [4, 4, 4, 1]),
        (31, 8, 1, 1, [3, 4, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_equal_layers_are_divided_evenly_with_the_fewest_where_most_activations_are_kept(
    num_layers, stages, first, last, counts
):
    for unit in (1, 0.1, 1e12):  # 0.1 + 0.1 + 0.1 is not 0.3, and must not tip the scale
        assert divide([unit] * num_layers, stages, first=first * unit, last=last * unit) == counts


@pytest.mark.parametrize("costs, stages, rule", [
    ([1, 1], 3, "one layer or more"), ([1], 0, "1 or more"), ([1, -1], 1, "not negative"), ([math.nan], 1, "finite"),
])  # fmt: skip
def test_a_division_that_cannot_be_is_refused(costs, stages, rule):
    with pytest.raises(LayoutError, match=rule):
        divide(costs, stages)


def test_schedules_and_simulator_need_no_jax():
    code = "import sys, meshes.simulator; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(schedules.__file__).parent.parent)
