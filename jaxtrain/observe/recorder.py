"""Turns a step's device metrics and the clock into rows, and hands them to the sinks. Only the lead process has sinks."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.errors import RunError
from jaxtrain.observe.console import Unread
from jaxtrain.observe.sinks import Row, Sink, Value, Writer


WAITING_BYTES = 64 << 20  # of one sink's rows, as JSON, that may wait for a disk


class Recorder:
    """One per run. `sinks` is empty on all processes but the lead.

    Raises RunError where a sink cannot be opened at the run's beginning; that of a run which goes on waits for its disk.
    """

    def __init__(self, sinks: tuple[Sink, ...], run_dir: Path, first_step: int, steps: int):
        with contextlib.ExitStack() as opened:
            # those before one that cannot be opened are closed: the console's bar would be drawn again below the error
            patient = (_Patient(sink, run_dir, first_step, steps) for sink in sinks)
            self._writers = [opened.enter_context(contextlib.closing(writer)) for writer in patient]
            opened.pop_all()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """A row that a disk does not take waits in memory, and that is said. Raises RunError where too many wait."""
        row = {"step": step} | {name: plain(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(row)

    def flush(self) -> None:
        """Raises RunError where a disk took rows and cannot keep them."""
        for writer in self._writers:
            writer.flush()

    def waits(self) -> bool:
        """Whether some rows are in memory alone."""
        return any(writer.waits for writer in self._writers)

    def close(self) -> None:
        """Raises RunError where rows are lost."""
        errors = []
        for writer in self._writers:
            try:
                writer.close()
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class _Patient:
    """A sink's writer that keeps what its disk does not take, and tries again with every further row."""

    def __init__(self, sink: Sink, run_dir: Path, first_step: int, steps: int):
        self._open = lambda: sink.open(run_dir, first_step, steps)
        self._run_dir, self._name = run_dir, type(sink).__name__
        self._writer: Writer | None = None
        self._waiting: deque[Row] = deque()
        self._size, self._why = 0, ""
        try:
            self._writer = self._open()
        except OSError as error:
            if first_step == 0:
                raise _unwritten("cannot write metrics", run_dir, f"{error.strerror} ({self._name})") from error
            self._refused(error)

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        self._try()
        self._size = self._size + len(json.dumps(row)) if self._waiting else 0
        if self._size > WAITING_BYTES:
            raise self._lost()

    def flush(self) -> None:
        """What waits is not there to be kept; but what a disk took and cannot keep has to be computed again."""
        self._try()
        if self._writer and not self._waiting:
            self._final(self._writer.flush)

    def close(self) -> None:
        self._try()
        if self._writer:
            self._final(self._writer.close)
        if self._waiting:
            raise self._lost()

    def _try(self) -> None:
        many = len(self._waiting)
        try:
            self._writer = self._writer or self._open()
            while self._waiting:
                row = self._waiting.popleft()  # before it is written: what is interrupted there is not written twice
                try:
                    self._writer.write(row)
                except OSError:
                    self._waiting.appendleft(row)
                    raise
        except Unread:
            raise
        except OSError as error:
            return self._refused(error)
        if self._why:
            self._say(f"metrics are written again, {many} rows at once")
        self._why = ""

    def _refused(self, error: OSError) -> None:
        if not self._why:
            self._say(f"METRICS ARE NOT WRITTEN ({_reason(error)}): rows wait in memory")
        self._why = _reason(error)

    def _final(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            raise _unwritten("cannot write metrics", self._run_dir, f"{_reason(error)} ({self._name})") from error

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a file on the same disk
            print(f"{self._name}: {line}", file=sys.stderr, flush=True)

    def _lost(self) -> RunError:
        what = f"{len(self._waiting)} rows of metrics were not written"
        return _unwritten(what, self._run_dir, f"{self._why} ({self._name})")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _unwritten(what: str, run_dir: Path, got: str) -> RunError:
    fix = "free space or give write permission, then run the same command again"
    return RunError(f"{what} into {run_dir}.", got=got, fix=fix)


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
        """Count from here: what came before (an evaluation, a save, a compilation whose update has no row) was no step."""
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
