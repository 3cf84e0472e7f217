"""The loop: the only place with time in it. It orders steps, metrics, evaluation, saves and stops; each is another's work.

The contract, for every update n:
  1. take batch n, which the loader's thread has made
  2. dispatch update n; the call returns at once
  3. read the metrics of update n - 1: the host waits for that one only, while the device works on n
  4. a value that is not finite or a save that failed ends the run; a stop that any process asked for ends it after n
  5. where an evaluation, a save or the end follows update n, read its metrics too, so that the row stands before the
     evaluation's row and a bad state is never saved
  6. evaluate, then save, so that a checkpoint of step n implies that all rows up to n are on disk
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from jaxtrain.config import RunConfig
from jaxtrain.errors import NumericsError
from jaxtrain.observe.recorder import Recorder, StepClock
from jaxtrain.train.signals import StopFlag
from jaxtrain.train.state import State


@dataclass
class Loop:
    """What the loop drives. `evaluate` and `save` act on a state whose metrics were read and are finite."""

    config: RunConfig
    step: Callable[[State, Any, Any], tuple[State, dict[str, Any]]]
    stop: StopFlag
    recorder: Recorder
    clock: StepClock
    evaluate: Callable[[int, State], None]
    save: Callable[[int, State], None]
    check_save: Callable[[], None]  # raises what went wrong with a save in the background
    last_good: Callable[[], str]  # the newest checkpoint, in words
    beat: Callable[[str, int], None]  # tells the supervisor what the loop does now, and how many updates are done

    def run(self, state: State, batches: Iterable[tuple[int, Any]], first_step: int) -> tuple[State, int]:
        """Trains from `first_step` completed updates to the end or a stop. -> (state, the signal that stopped it or 0)."""
        self._first, self._stopped, pending = first_step, 0, None
        self.beat("data", first_step)
        for index, batch in batches:
            self.beat("compile" if index == first_step else "step", index)
            state, metrics = self.step(state, batch, self.stop.flags())
            if pending:
                self.beat("metrics", index)
                self._read(*pending)
            done, pending = index + 1, (index + 1, metrics)
            if self._due(done):
                self.beat("metrics", done)
                self._read(*pending)
                pending = None
                self._after(done, state)
            if self._stopped:
                break
            self.beat("data", done)
        return state, self._stopped

    def _due(self, done: int) -> bool:
        last = done == self.config.steps or bool(self._stopped)
        return last or self._evaluates(done) or self._saves(done)

    def _evaluates(self, done: int) -> bool:
        evaluation = self.config.eval
        return evaluation is not None and (done == self.config.steps or _every(evaluation.every, done))

    def _saves(self, done: int) -> bool:
        return _every(self.config.checkpoint.every, done)

    def _after(self, done: int, state: State) -> None:
        if self._evaluates(done):
            self.beat("evaluate", done)
            self.evaluate(done, state)
        if self._saves(done) or done == self.config.steps or self._stopped:
            self.beat("save", done)
            self.recorder.flush()
            self.save(done, state)
        self.clock.restart(done)

    def _read(self, done: int, metrics: dict[str, Any]) -> None:
        """Waits for update `done`, checks it, writes its row if one is due."""
        metrics = jax.device_get(metrics)
        self._stopped = max(self._stopped, int(metrics.pop("stop")))
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(metrics[name]):
                raise NumericsError(
                    f"{name} is {metrics[name]} at step {done}.",
                    rule="loss and gradient norm are finite",
                    fix=f"the state of this step is not saved; {self.last_good()}",
                )
        if done % self.config.log_every == 0 or done == self.config.steps:
            self.recorder.write(done, metrics | self.clock.tick(done))
            self.check_save()
        elif done == self._first + 1:
            self.clock.restart(done)  # the first update held the compilation


def _every(period: int, done: int) -> bool:
    return period > 0 and done % period == 0
