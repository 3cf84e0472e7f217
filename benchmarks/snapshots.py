"""What snapshots cost the loop beside them. On the CPU, whose cores both want: beside accelerators only the call counts.

    python -m benchmarks.snapshots [--megabytes N] [--step SECONDS] [--every N] [--rounds N] [--folder DIR] [--out FILE.json]

A round is `every` steps without a snapshot and `every` steps with one behind the first of them, in turn: the metrics
are flushed to disk, the state is copied into the slot, checksums and header are written beside the steps, which donate
their state. `lost` is the difference of both times over the time without, all of the kernel's and the memory's work
included; `bound` is what can be lost at most: the flush, the call, and all CPU time of the thread behind it, over the
time of `every` steps. Other work on the machine disturbs `lost` by more than it measures, and `bound` hardly.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax import lax

from benchmarks import program
from benchmarks.checkpoint import PACKAGES, Step, busy_elsewhere, training
from jaxtrain import runtime
from jaxtrain.observe.recorder import Recorder
from jaxtrain.observe.sinks import Jsonl, TensorBoard
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.resilience.snapshots import Snapshots

NAMES = {
    "step": "step without snapshots, s",
    "flush": "metrics flushed, s",
    "blocked": "the call, s",
    "behind": "CPU time behind it, s",
    "bound": "lost at most, part of step time",
    "lost": "lost as seen, part of step time",
    "others": "cores that other processes kept busy",
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=SnapshotConfig().every)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    runtime.start()  # as a training run does: steps find the memory again that they have freed
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, tempfile.TemporaryDirectory() as disk:
        rounds = measure(Path(folder) / "snapshots", Path(disk), options)
    rows = {"state, MB": options.megabytes, "every, steps": options.every, "rounds": len(rounds)}
    rows |= {text: statistics.median(r[name] for r in rounds) for name, text in NAMES.items()}
    for name, value in rows.items():
        print(f"{name:<40}{value:>10.4f}")
    program.write(options.out, program.facts(*PACKAGES) | {"rows": rows, "rounds": rounds})
    return 0


def measure(folder: Path, disk: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    state, step = of_length(options.step, *training(options.megabytes))
    snapshots = Snapshots(folder, SnapshotConfig(every=options.every), run="benchmark", generation=0)
    recorder = Recorder((Jsonl(), TensorBoard()), disk, 0, 10**9)
    for number in range(2):  # makes both slots' memory: not timed
        snapshots.save(number, state, data={})
        snapshots.wait()
    rounds: list[dict[str, float]] = []
    for number in range(2, options.rounds + 2):
        others = busy_elsewhere()
        without, state = timed(options.every, step, state)
        row, begun = {}, time.perf_counter()
        _, state = timed(1, step, state)
        row["flush"] = seconds(lambda: (recorder.write(number, {"train/loss": 1.0}), recorder.flush()))
        row["blocked"] = seconds(lambda: snapshots.save(number, state, data={}))
        _, state = timed(options.every - 1, step, state)
        beside = time.perf_counter() - begun
        assert snapshots.wait() == number
        row |= {"step": without / options.every, "lost": beside / without - 1, "others": others()}
        row["behind"] = behind(snapshots, -number, state)
        row["bound"] = (row["flush"] + row["blocked"] + row["behind"]) / without
        rounds.append(row)
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
    return rounds


def of_length(wanted: float, state: Any, step: Step) -> tuple[Any, Step]:
    """The step over and over within one program, so that it takes this many seconds."""
    _, state = timed(2, step, state)
    took, state = timed(10, step, state)
    times = max(1, round(10 * wanted / took))
    longer = jax.jit(lambda s: lax.fori_loop(0, times, lambda _, s: step(s), s), donate_argnums=0)
    return timed(1, longer, state)[1], longer


def timed(steps: int, step: Step, state: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    for _ in range(steps):
        state = jax.block_until_ready(step(state))
    return time.perf_counter() - begun, state


def seconds(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def behind(snapshots: Snapshots, number: int, state: Any) -> float:
    """CPU time of this process between a call's return and the end of its snapshot, with no step beside it."""
    snapshots.save(number, state, data={})
    begun = time.process_time()
    snapshots.wait()
    return time.process_time() - begun


if __name__ == "__main__":
    program.run(main)
