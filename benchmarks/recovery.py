"""From a failure to the next completed step: detection, verdict, fencing, start, restore, first step. `python -m benchmarks.recovery`

A small run of four processes on CPU devices under `jaxtrain launch`; trainers are killed or stopped one after the other,
each when the standbys for the next generation are there. Prints medians of each part and writes them as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CONFIG = """
import dataclasses
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Console, Jsonl
from jaxtrain.resilience.deadlines import Deadlines
from tests.tiny import TINY
config = dataclasses.replace(
    TINY, name="recovery", steps={steps}, log_every=50, eval=None, watch=Deadlines(floor={floor}),
    checkpoint=CheckpointConfig(every={every}), sinks=(Console(), Jsonl()), runs_dir={runs!r},
)
"""
PARTS = ("detection", "verdict", "fencing", "start", "restore", "first step")


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 7
    hangs: int = 3
    processes: int = 4
    apart: int = 300  # steps between two failures: as long as standbys take to import
    floor: float = 10.0  # seconds, the least deadline of a phase


def main() -> None:
    import tyro

    from jaxtrain.resilience.faults import Fault
    from jaxtrain.resilience.soak import incidents, launch

    options = tyro.cli(Options)
    kinds = ["kill"] * options.kills + ["stop"] * options.hangs
    faults = [
        Fault(kind=kind, process=number % options.processes, step=(number + 1) * options.apart, generation=number + 1)
        for number, kind in enumerate(kinds)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), (len(kinds) + 1) * options.apart
        (folder / "config.py").write_text(
            CONFIG.format(steps=steps, floor=options.floor, every=options.apart // 6, runs=str(folder / "runs"))
        )
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        launch([str(folder / "config.py")], options.processes, faults, folder / "log")
        rows = incidents(folder / "runs" / "recovery")
    medians = {kind: _medians([row for row in rows if (row["what"] == "hang") == (kind == "hangs")]) for kind in ("kills", "hangs")}
    print(f"{'seconds':<12}" + "".join(f"{part:>12}" for part in (*PARTS, "in all")))
    for kind, parts in medians.items():
        print(f"{kind:<12}" + "".join(f"{value:>12.2f}" for value in parts.values()))
    RESULTS.mkdir(exist_ok=True)
    packages = {name: version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")}
    where = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), "versions": packages}
    result = {"command": "python -m benchmarks.recovery", "options": asdict(options), "medians": medians} | where
    (RESULTS / "recovery.json").write_text(json.dumps(result, indent=1) + "\n")


def _medians(rows: list[dict]) -> dict[str, float]:
    """Of each part, and of their sum: from the failure to the next completed step."""
    if not rows:
        return {}
    parts = {part: statistics.median(row["seconds"][part] for row in rows) for part in PARTS}
    return parts | {"in all": statistics.median(sum(row["seconds"][part] for part in PARTS) for row in rows)}


if __name__ == "__main__":
    main()
