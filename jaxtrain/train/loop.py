"""The loop: the only place with time in it. It orders steps, metrics, evaluation, saves and stops; each is another's work.

The contract, for every update n:
  1. take batch n, which the loader's thread has made
  2. dispatch update n; the call returns at once
  3. read the metrics of update n - 1: the host waits for that one only, while the device works on n
  4. copies that differ and numbers gone wrong end the loop, where the run's policy does not go on; saves that failed too
     often in a row end the run; a stop that any process asked for ends the loop after n
  5. where an evaluation, a snapshot, a save or the end follows update n, read its metrics too, so that the row stands
     before the evaluation's row and a bad state is never saved; a comparison of copies comes before that
  6. evaluate, then take a snapshot, then save, so that either of step n implies that all rows up to n are on disk.
     While a disk refuses rows there is no snapshot; a checkpoint that it takes nevertheless is worth more than they are
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.errors import NumericsError
from jaxtrain.observe.recorder import Recorder, StepClock
from jaxtrain.resilience.health import Halted, Judge, Rewind, Skipped
from jaxtrain.train.signals import StopFlag
from jaxtrain.train.state import State


class Rewound(Exception):
    """The loop ends in a state that is not to be used: training goes on from before it, as the verdict says."""

    def __init__(self, verdict: Rewind):
        super().__init__(verdict.why)
        self.verdict = verdict


class Unequal(Exception):
    """The loop ends at `step`, where copies of an array differ between devices."""

    def __init__(self, step: int):
        super().__init__(f"copies differ at step {step}")
        self.step = step


@dataclass
class Loop:
    """What the loop drives. `evaluate` and `save` act on a state whose metrics were read and that was judged good.

    `compare` gives a replicated number, nonzero where copies of the state differ between devices; `agreed` is told of
    each step at which none did.
    """

    config: RunConfig
    step: Callable[[State, Any, Any], tuple[State, dict[str, Any]]]
    stop: StopFlag
    recorder: Recorder
    clock: StepClock
    evaluate: Callable[[int, State], None]
    save: Callable[[int, State], None]
    check_save: Callable[[], dict[str, int]]  # fields of the row; raises where too many saves have failed
    last_good: Callable[[], str]  # the newest checkpoint, in words
    beat: Callable[[str, int], None]  # tells the supervisor what the loop does now, and how many updates are done
    judge: Judge
    compare: Callable[[State], Any]
    agreed: Callable[[int], None]
    say: Callable[[str], None]
    inline: bool = False  # an update is done when its call returns, so 3 is of update n
    snapshot: Callable[[int, State], None] | None = None

    def run(self, state: State, batches: Iterable[tuple[int, Any]], first_step: int) -> tuple[State, int]:
        """Trains from `first_step` completed updates to the end or a stop. -> (state, the signal that stopped it or 0).

        Raises Rewound, Unequal and NumericsError, each on all processes at the same step.
        """
        self._first, self._stopped, pending = first_step, 0, None
        self.beat("data", first_step)
        for index, batch in batches:
            self.beat("compile" if index == first_step else "step", index)
            state, metrics = self.step(state, batch, self.stop.flags())
            if index == first_step and not self.inline:
                self.clock.restart(index)  # the call waited for the compilation
            if pending:
                self.beat("metrics", index)
                self._read(*pending)
            done, pending = index + 1, (index + 1, metrics)
            if self._compares(done):
                metrics["copies"] = self.compare(state)
            due = self._due(done)
            if due or self.inline:
                self.beat("metrics", done)
                self._read(*pending)
                pending = None
            if due:
                self._after(done, state)
                if self._stopped:
                    break
            self.beat("data", done)
        return state, self._stopped

    def _due(self, done: int) -> bool:
        return self._keeps(done) or self._evaluates(done) or self._snapshots(done)

    def _evaluates(self, done: int) -> bool:
        evaluation = self.config.eval
        return evaluation is not None and (done == self.config.steps or _every(evaluation.every, done))

    def _keeps(self, done: int) -> bool:
        last = done == self.config.steps or bool(self._stopped)
        return last or _every(self.config.checkpoint.every, done)

    def _compares(self, done: int) -> bool:
        """Before whatever follows an update too: then what is kept is of a step at which all copies agreed."""
        every = self.config.health.hash_every
        return every > 0 and (_every(every, done) or self._due(done))

    def _snapshots(self, done: int) -> bool:
        return self.snapshot is not None and _every(self.config.snapshot.every, done)

    def _after(self, done: int, state: State) -> None:
        evaluates, saves, snapshots = self._evaluates(done), self._keeps(done), self._snapshots(done)
        if evaluates:
            self.beat("evaluate", done)
            self.evaluate(done, state)
        if saves or snapshots:
            self.beat("snapshot" if snapshots else "save", done)
            self.recorder.flush()
        if self.snapshot and snapshots:
            self.snapshot(done, state)
        if saves:
            if snapshots:
                self.beat("save", done)
            self.save(done, state)
        if evaluates or saves:  # a snapshot is part of what its step takes
            self.clock.restart(done)

    def _read(self, done: int, metrics: dict[str, Any]) -> None:
        """Waits for update `done`, judges it, writes its row if one is due."""
        metrics = jax.device_get(metrics)
        self._stopped = max(self._stopped, int(metrics.pop("stop")))
        self.stop.agreed(self._stopped)
        if "copies" in metrics:
            if metrics.pop("copies"):
                raise Unequal(done)
            self.agreed(done)
        skipped = self._judged(done, metrics)
        if skipped:
            metrics = {name: value for name, value in metrics.items() if np.isfinite(value).all()}
        if skipped or done % self.config.log_every == 0 or done == self.config.steps:
            self.recorder.write(done, metrics | self.clock.tick(done) | self.check_save())
        elif done == self._first + 1:
            self.clock.restart(done)  # the first update found nothing warm

    def _judged(self, done: int, metrics: dict[str, Any]) -> bool:
        """Whether the update was skipped. Raises where the loop is not to go on."""
        verdict = self.judge.verdict(done, metrics)
        if isinstance(verdict, Halted):
            raise NumericsError(
                f"{verdict.why}.",
                rule="loss and gradient norm are finite",
                fix=f"the state of this step is not saved; {self.last_good()}",
            )
        if isinstance(verdict, Rewind):
            raise Rewound(verdict)
        if skipped := isinstance(verdict, Skipped):
            self.say(f"{verdict.why}: its update is skipped")
        return skipped


def _every(period: int, done: int) -> bool:
    return period > 0 and done % period == 0
