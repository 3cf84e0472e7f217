"""Turns a step's device metrics and the clock into rows, and hands them to the sinks. Only the lead process has sinks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.errors import RunError
from jaxtrain.observe.sinks import Row, Sink, Value, Writer


class Recorder:
    """One per run. `sinks` is empty on all processes but the lead."""

    def __init__(self, sinks: tuple[Sink, ...], run_dir: Path, first_step: int, steps: int):
        self._run_dir = run_dir
        self._writers = []
        for sink in sinks:
            with self._telling(sink):
                self._writers.append(sink.open(run_dir, first_step, steps))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Raises RunError where a sink cannot write: a run that records nothing is not to go on unseen."""
        row = {"step": step} | {name: plain(value) for name, value in metrics.items()}
        self._each("write", row)

    def flush(self) -> None:
        self._each("flush")

    def close(self) -> None:
        self._each("close")

    def _each(self, verb: str, *args: Row) -> None:
        for writer in self._writers:
            with self._telling(writer):
                getattr(writer, verb)(*args)

    @contextmanager
    def _telling(self, sink: Sink | Writer) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write metrics into {self._run_dir}.",
                got=f"{error.strerror} ({type(sink).__name__})",
                fix="free space or give write permission, then run the same command again",
            ) from error


def plain(value: Any) -> Value:
    """A Python number; an fp32 becomes the shortest decimal that rounds to it, so that JSON text is exact and short.

    An array becomes a list, of lists where it has more dims.
    """
    value = np.asarray(value)
    if value.ndim:
        return [plain(part) for part in value]
    if np.issubdtype(value.dtype, np.integer):
        return int(value)
    return float(str(value[()])) if value.dtype == np.float32 else float(value)


class StepClock:
    """Seconds per step and tokens per second between two readings, from the times at which metrics arrived."""

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak_flops: float, first_step: int):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self.restart(first_step)

    def restart(self, step: int) -> None:
        """Count from here: what came before (compilation, evaluation, a save) was no step."""
        self._last = (step, time.perf_counter())

    def tick(self, step: int) -> dict[str, float]:
        """The rates since the last tick or restart."""
        last_step, last_time = self._last
        self.restart(step)
        seconds = (self._last[1] - last_time) / (step - last_step)
        return {
            "time/step_seconds": seconds,
            "throughput/tokens_per_second": self._tokens / seconds,
            "throughput/mfu": self._flops / seconds / self._peak,
        }
