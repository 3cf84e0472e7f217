"""The console's line per row and its progress bar. It decides nothing but the text."""

from __future__ import annotations

import errno
import math
import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtrain.observe.sinks import Row

# metric -> how it reads on the line; the rest of a row is for the files
_TRAIN = {
    "train/loss": "loss {:.4f}",
    "train/grad_norm": "grad {:.3f}",
    "train/learning_rate": "lr {:.2e}",
    "experts/max_load": "load {:.2f}x",
    "experts/dropped_fraction": "dropped {:.1%}",
    "time/step_seconds": "{:.3f} s",
    "throughput/tokens_per_second": "{:,.0f} tok/s",
    "throughput/mfu": "mfu {:.1%}",
}
_EVAL = {"eval/loss": "held-out loss {:.4f}", "eval/bits_per_byte": "{:.4f} bits/byte"}


def line(row: Row, steps: int) -> str:
    """`step  120/1000  loss 2.3456  grad 0.531  ...`"""
    parts = [text.format(row[name]) for name, text in (_TRAIN | _EVAL).items() if name in row]
    return "  ".join([f"step {row['step']:>{len(str(steps))}}/{steps}", *parts])


class Unread(BrokenPipeError):
    """Whoever read stdout has left. No disk of which room may be waited for: it ends the command, as `print` would."""


class Stdout(Console):
    """rich's, that leaves it to the command how it ends and to the terminal what it looks like then."""

    def on_broken_pipe(self) -> None:
        """Raises Unread; rich would end the process with 1. More that is written on the way out is dropped."""
        self.quiet = True
        raise Unread(errno.EPIPE, os.strerror(errno.EPIPE))

    def show_cursor(self, show: bool = True) -> bool:
        """Never hidden: after SIGKILL, or a second Ctrl-C, it would stay so."""
        return False


class ConsoleWriter:
    """`console`: another than that of this process."""

    def __init__(self, first_step: int, steps: int, console: Stdout | None = None):
        self._steps, self._bar = steps, None
        self._console = console or Stdout(highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            columns = TextColumn("training"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
            # the time left is by the last 1,000 rows however far apart: of rich's 30 s two slow ones are never in
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=math.inf, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=first_step)
            self._bar.start()

    def write(self, row: Row) -> None:
        self._console.print(line(row, self._steps))
        if self._bar:
            self._bar.update(self._task, completed=row["step"])

    def flush(self) -> None:
        self._console.file.flush()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
