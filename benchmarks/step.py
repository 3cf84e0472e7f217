"""Our training step beside a tuned hand-written one, and the time from process start to the first step.

    python -m benchmarks.step [--rounds N] [--start-rounds N] [--out FILE.json]

Both steps run in one process, alternately, on the same shapes; other work on the machine hits both. Prints medians and
ratios of wall and CPU time.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import program

FACTS = ("system", "python", "versions", "code", "devices", "xla_flags")  # of the environment: what a reader compares
START = """
import dataclasses
from benchmarks.step import run_config
config = dataclasses.replace(run_config(), name="start", steps=1, runs_dir="runs", log_every=1)
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    rounds: int = 15  # of one call of each step
    start_rounds: int = 3  # process starts with a warm cache; one more with a cold one. 0 leaves them out
    out: Path | None = None


def run_config():
    """The workload as a config of ours: d_model 256, 4 layers, 8 heads over 4 of 32, d_ff 768, vocab 8192, 8 x 512, AdamW."""
    from jaxtrain.config import RunConfig
    from jaxtrain.data.source import Synthetic
    from jaxtrain.train.schedule import WSD
    from jaxtrain.train.optim import AdamW
    from models.llama import Config

    return RunConfig(
        name="step",
        model=Config(
            vocab_size=8192, dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, ffn=768, rope_theta=10_000.0
        ),
        data=Synthetic(vocab_size=8192),
        steps=1000,
        batch=8,
        seq_len=512,
        optim=AdamW(schedule=WSD(warmup=0)),
    )


def ours() -> Callable[[], Any]:
    """-> a call that does one update and returns its loss, of the step that `jaxtrain train` runs, packed documents and all."""
    import jax
    import numpy as np

    import meshes
    from jaxtrain.data import open_dataset
    from jaxtrain.train.state import Blueprint
    from jaxtrain.train.step import train_step

    config = run_config()
    mesh = meshes.make(config.mesh)
    blueprint = Blueprint(config, mesh)
    data = open_dataset(
        config.data, seq_len=config.seq_len, batch=config.batch, seed=0, vocab_size=config.model.vocab_size, cache_dir="."
    )
    batch = meshes.globalize(data.rows(0, np.arange(config.batch)), mesh, blueprint.rules, config.batch)
    stop = jax.device_put(np.zeros(mesh.devices.size, np.int32), meshes.per_device(mesh))
    return _repeated(train_step(blueprint), blueprint.init(), (batch, stop), "train/loss")


def theirs() -> Callable[[], Any]:
    """-> the same of the hand-written step."""
    from benchmarks import handwritten

    state, step, batch = handwritten.make()
    return _repeated(step, state, (batch,), "loss")


def _repeated(step: Callable, state: Any, arguments: tuple, loss: str) -> Callable[[], Any]:
    def once() -> Any:
        nonlocal state
        state, metrics = step(state, *arguments)
        return metrics[loss].block_until_ready()

    return once


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Alternate calls; wall and process CPU seconds of each."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in calls}
    for call in calls.values():
        call(), call()
    for turn in range(rounds):
        for name in sorted(calls, reverse=turn % 2 == 1):
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def start_seconds(folder: Path, name: str) -> float:
    """Seconds of `jaxtrain train` from process start until the row of its first step is written."""
    root = Path(__file__).parents[1]
    env = os.environ | {"JAXTRAIN_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jaxtrain", "train", "config.py", "--name", name]
    begin = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step"):
                seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds


def starts(rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.py").write_text(START)
        cold = start_seconds(folder, "cold")
        return {"cold": cold, "warm": statistics.median(start_seconds(folder, f"warm{i}") for i in range(rounds))}


def import_seconds() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jaxtrain"], check=True)
    return time.perf_counter() - begin


def main() -> None:
    import tyro

    from jaxtrain import runtime

    options = tyro.cli(Options)
    begins = starts(options.start_rounds) if options.start_rounds else {}  # first: while this process has no devices
    times = measure({"ours": ours(), "handwritten": theirs()}, options.rounds)
    medians = {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}
    ratios = {
        kind: statistics.median(a / b for a, b in zip(times["ours"][kind], times["handwritten"][kind])) for kind in ("wall", "cpu")
    }
    print(f"{'':<14}{'wall s':>10}{'cpu s':>10}")
    for name, kinds in medians.items():
        print(f"{name:<14}{kinds['wall']:>10.3f}{kinds['cpu']:>10.3f}")
    print(f"{'ratio':<14}{ratios['wall']:>10.3f}{ratios['cpu']:>10.3f}   median over {options.rounds} pairs")
    result = {"options": dataclasses.asdict(options), "seconds": medians, "ratio": ratios, "import_seconds": import_seconds()}
    print(f"import jaxtrain {result['import_seconds']:.2f} s")
    if begins:
        result["start_to_first_step_seconds"] = begins
        print("process start to first step: cold {cold:.1f} s, warm {warm:.1f} s".format(**begins))
    where = {name: fact for name, fact in runtime.environment().items() if name in FACTS}
    program.write(options.out, result | where)


if __name__ == "__main__":
    program.run(main)
