"""From a failure to the next completed step, part by part.

    python -m benchmarks.recovery [--kills N] [--hangs N] [--processes N] [--floor SECONDS] [--seed N] [--out FILE.json]

A small run of four processes on CPU devices under `jaxtrain launch`; its trainers are killed or stopped from outside, one
after the other, at a random moment after the standbys for the next generation are there. Prints medians of detection,
verdict, fencing, start, restore, first step and catch-up (steps computed again).
"""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import program

CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Console, Jsonl
from jaxtrain.resilience.deadlines import Deadlines
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, name="recovery", steps=1_000_000, log_every=50, eval=None, watch=Deadlines(floor={floor}),
    checkpoint=CheckpointConfig(every=100), sinks=(Console(), Jsonl()), runs_dir={runs!r},
)
"""
PARTS = ("detection", "verdict", "fencing", "start", "restore", "first step")
KINDS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
PATIENCE_S = 180  # for the standbys to import, or for one recovery


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 7
    hangs: int = 3
    processes: int = 4
    floor: float = 10.0  # seconds, the least deadline of a phase
    seed: int = 0
    out: Path | None = None


def main() -> None:
    import tyro

    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as name:
        rows = measured(options, Path(name))
    medians = {kind: _medians([row for row in rows if (row["what"] == "hang") == (kind == "hang")]) for kind in KINDS}
    columns = list(next(iter(filter(None, medians.values()))))
    print(f"{'seconds':<9}" + "".join(f"{column:>15}" for column in columns))
    for kind, parts in medians.items():
        print(f"{kind:<9}" + "".join(f"{value:>15.2f}" for value in parts.values()))
    result = {"options": asdict(options), "medians": medians, "incidents": rows}
    program.write(options.out, result | program.facts("jax", "jaxlib", "orbax-checkpoint"))


def measured(options: Options, folder: Path) -> list[dict[str, Any]]:
    """The incidents of one run, in their order, with the load of the machine when each was caused."""
    from jaxtrain.resilience.soak import incidents

    (folder / "config.py").write_text(CONFIG.format(floor=options.floor, runs=str(folder / "runs")))
    run, chance, loads = Run(folder, options.processes), random.Random(options.seed), []
    kinds = ["kill"] * options.kills + ["hang"] * options.hangs
    try:
        for number, kind in enumerate(kinds, start=1):
            run.wait_for("standbys are ready")
            time.sleep(1 + chance.random())
            loads.append(os.getloadavg()[0])
            os.kill(run.pid(number, chance.randrange(options.processes)), KINDS[kind])
            run.wait_for(f"incident {number}: over")
            print(f"{kind} {number} of {len(kinds)}: {run.line}", flush=True)
        run.wait_for("standbys are ready")  # so that the last is not ended half way
    finally:
        run.end()
    return [row | {"load": load} for row, load in zip(incidents(folder / "runs" / "recovery"), loads)]


class Run:
    """A supervised run, and what it says."""

    def __init__(self, folder: Path, processes: int):
        from jaxtrain.resilience.host import memory_folder

        self.line, self._memory = "", memory_folder(folder / "runs" / "recovery")
        on = ["--processes", str(processes), "--devices-per-process", "1"]  # CPUs, whatever else the machine has
        command = [sys.executable, "-m", "jaxtrain", "launch", *on, str(folder / "config.py")]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [self._lines.put(line) for line in self._process.stdout], daemon=True).start()

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + PATIENCE_S
        self.line = ""
        while not (self.line.startswith("[lead]") and words in self.line):
            self.line = self._lines.get(timeout=max(0.1, end - time.monotonic())).rstrip()

    def pid(self, generation: int, process: int) -> int:
        from jaxtrain.resilience import pulse

        return pulse.read(self._memory / f"{generation}.{process}.pulse").pid

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each part; of their sum, from the failure to the next completed step; of that without a hang's deadline."""
    if not rows:
        return {}
    median = statistics.median
    parts = {part: median([row["seconds"][part] for row in rows]) for part in PARTS}
    sums = [sum(row["seconds"][part] for part in PARTS) for row in rows]
    beyond = [took - _allowed(row["line"]) for took, row in zip(sums, rows)]
    catch_up = median([row["seconds"]["catch-up"] for row in rows])
    return parts | {"to next step": median(sums), "over deadline": median(beyond), "catch-up": catch_up}


def _allowed(line: str) -> float:
    """The deadline that a hang's verdict names."""
    found = re.search(r"allowed: ([\d.]+) s", line)
    return float(found.group(1)) if found else 0.0


if __name__ == "__main__":
    program.run(main)
