"""What supervision, recorder, snapshots and hashes cost a step together, inside a real run.

    python -m benchmarks.overhead [--steps N] [--out FILE.json]

A run of one process with two CPU devices that hold a copy of the state each, under `jaxtrain launch`, with a snapshot every
20 steps, copies compared before each and a row of metrics every 10. Its config wraps the parts in clocks: of each the
seconds that the loop's thread spends in it (a comparison is waited for), and the CPU seconds behind it, of the snapshots'
thread and of the supervisor. Their sum is given per step, as a part of the step's time and of 500 ms. CPU time behind the
loop counts in full, as if both cores belonged to the step; beside accelerators it would cost nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import program
from jaxtrain.errors import ConfigError

STEP_S = 0.5  # the step's time that the goal speaks of
EVERY = 20  # steps from one snapshot to the next
FIRST = 44  # steps that are not counted: programs are compiled, both slots get their memory, that of step 40 is written
CONFIG = """
import dataclasses
from benchmarks.overhead import clocked
from jaxtrain.observe.sinks import Console, Jsonl, TensorBoard
from jaxtrain.resilience.health import Health
from jaxtrain.resilience.policy import SnapshotConfig
from meshes import MeshConfig
from models.llama import Config
from tests.tiny import TINY
model = Config(vocab_size=64, dim=384, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=64, ffn=1024)
config = dataclasses.replace(
    TINY, name="overhead", model=model, steps={steps}, batch=2, seq_len=128, log_every=10, eval=None,
    mesh=MeshConfig(data=-1, fsdp=1), health=Health(hash_every=100), snapshot=SnapshotConfig(every={every}),
    sinks=(Console(), Jsonl(), TensorBoard()), runs_dir={runs!r},
)
clocked({out!r}, config)
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 200
    out: Path | None = None


def main() -> None:
    import tyro

    options = tyro.cli(Options)
    if counted(options.steps) < EVERY:
        raise ConfigError(
            f"--steps {options.steps} leaves nothing to count.",
            rule=f"{FIRST} steps to warm up, at least {EVERY} from snapshot to snapshot, and the last one, with its save",
            fix=f"--steps {FIRST + EVERY + 1}",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.py").write_text(
            CONFIG.format(steps=options.steps, every=EVERY, runs=str(folder / "runs"), out=str(folder / "clocks.json"))
        )
        command = [sys.executable, "-m", "jaxtrain", "launch", "--processes", "1", "--devices-per-process", "2"]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        load = os.getloadavg()[0]
        subprocess.run([*command, str(folder / "config.py")], env=env, check=True)
        found = json.loads((folder / "clocks.json").read_text())
    steps, rows = found["steps"], found["seconds"]
    step_s, total = found["wall"] / steps, sum(rows.values()) / steps
    for name, seconds in rows.items():
        print(f"{name:<48}{1e3 * seconds / steps:>8.3f} ms a step")
    print(f"{'together':<48}{1e3 * total:>8.3f} ms a step of {1e3 * step_s:.0f}: {total / step_s:.2%}; of 500 ms: {total / STEP_S:.2%}")
    result = {"options": asdict(options), "load before": load, "step_seconds": step_s}
    result |= {"ms_per_step": {name: 1e3 * seconds / steps for name, seconds in rows.items()}}
    result |= {"of_step": total / step_s, "of_500_ms": total / STEP_S}
    program.write(options.out, result | program.facts("jax", "jaxlib"))


def counted(steps: int) -> int:
    """Of a run's steps those from FIRST on that come in whole periods, so that each part is there as often as it should be."""
    return (steps - 1 - FIRST) // EVERY * EVERY


def clocked(out: str, config: Any) -> None:
    """By the config of the run, in its trainer: puts clocks around the parts; the last update writes what they say."""
    if "jaxtrain.resilience.trainer" not in " ".join(sys.orig_argv):
        return
    import jax

    from jaxtrain.observe.recorder import Recorder
    from jaxtrain.resilience.corruption import Copies
    from jaxtrain.resilience.pulse import Pulse
    from jaxtrain.resilience.snapshots import Snapshots

    seconds: dict[str, float] = defaultdict(float)
    counts = {"on": False}
    behind = "snapshots: CPU behind the loop"

    def around(owner: type, method: str, name: str, clock: Callable[[], float], waits: bool = False) -> None:
        plain, finish = getattr(owner, method), jax.block_until_ready if waits else lambda x: x

        def timed(*arguments: Any, **named: Any) -> Any:
            finish(arguments[1:])  # the step that made them is none of its cost
            start = clock()
            try:
                return finish(plain(*arguments, **named))
            finally:
                if counts["on"]:
                    seconds[name] += clock() - start

        setattr(owner, method, timed)

    around(Pulse, "beat", "supervision: beats", time.perf_counter)
    around(Recorder, "write", "recorder: rows", time.perf_counter)
    around(Recorder, "flush", "recorder: flushed before a snapshot", time.perf_counter)
    around(Snapshots, "save", "snapshots: the call", time.perf_counter)
    around(Snapshots, "_finish", behind, time.thread_time)
    around(Copies, "compare", "hashes: a comparison of copies", time.perf_counter, waits=True)
    beat, begun = Pulse.beat, {}

    def counting(self: Pulse, phase: str, step: int) -> None:
        if phase == "data" and step == FIRST:
            counts["on"], begun["at"], begun["supervisor"] = True, time.perf_counter(), _cpu_seconds(os.getppid())
        if phase == "data" and step == FIRST + counted(config.steps):
            counts["on"] = False
            seconds["supervision: CPU of the supervisor"] = _cpu_seconds(os.getppid()) - begun["supervisor"]
            wall = time.perf_counter() - begun["at"]
            Path(out).write_text(json.dumps({"steps": step - FIRST, "wall": wall, "seconds": seconds}))
        beat(self, phase, step)

    Pulse.beat = counting


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    program.run(main)
