"""`jaxtrain faults`: what can go wrong, and campaigns in which it does. The failing and the recovering are others' work."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.command import parse
from jaxtrain.errors import ConfigError, RunError, closest
from jaxtrain.resilience.faults import ENDING, KINDS, Fault, as_flag

COLUMNS = ("fault", "step", "detected_as", "culprit_named", "tier", "recovery_seconds", "replayed_steps")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain faults soak` beside the config's own overrides."""

    count: int = 20
    seed: int = 0
    processes: int = 4
    kinds: tuple[str, ...] = ENDING  # drawn with equal chances
    json: str = ""  # a file for one JSON object per fault, and a last one with hash_equal


def main(argv: list[str]) -> int:
    """jaxtrain faults [soak CONFIG [--count N] [--seed N] [--processes N] [--kinds KIND ...] [--json FILE] [overrides]]"""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {main.__doc__}\n\n" + "\n".join(f"  {kind:<12}{what}" for kind, what in KINDS.items()))
        return 0
    if argv[0] != "soak":
        raise ConfigError(f"jaxtrain faults has no {argv[0]!r}.", fix=closest(argv[0], ["soak"]))
    call = parse("jaxtrain faults soak", Options, argv[1:], doc=main.__doc__)
    options, config = call.options, call.load()
    if unknown := set(options.kinds) - set(ENDING):
        raise ConfigError(f"a campaign has no {min(unknown)!r}.", fix=closest(min(unknown), ENDING))
    faults = draw(options, config.steps)
    command = [str(call.config), *call.overrides, "--runs-dir", config.runs_dir]
    plain, disturbed = f"{config.name}-undisturbed", f"{config.name}-soak"
    for name, given in ((plain, []), (disturbed, faults)):
        if (config.run_dir.parent / name / "checkpoints").exists():
            raise RunError(f"there is a run {name} already.", fix=f"another --runs-dir, or remove {config.runs_dir}/{name}")
        launch([*command, "--name", name], options.processes, given, config.run_dir.parent / f"{name}.log")
    rows = table(faults, incidents(config.run_dir.parent / disturbed))
    equal = digest(config.run_dir.parent / plain) == digest(config.run_dir.parent / disturbed)
    show(rows, equal)
    if options.json:
        lines = [*rows, {"hash_equal": equal, "faults": len(faults), "incidents": len(rows)}]
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return 0 if equal and len(rows) == len(faults) else 1


def draw(options: Options, steps: int) -> list[Fault]:
    """Faults spread evenly over the run, each in the generation after the one before it, at a random step and process."""
    chance, span = random.Random(options.seed), steps / (options.count + 1)
    return [
        Fault(
            kind=chance.choice(options.kinds),
            process=chance.randrange(options.processes),
            step=1 + int(span * (number + chance.random())),
            phase=chance.choice(("data", "step", "metrics")),
            generation=number + 1,
        )
        for number in range(options.count)
    ]


def launch(command: Sequence[str], processes: int, faults: Sequence[Fault], log: Path) -> None:
    """One supervised run to its end. Raises RunError where it fails."""
    flags = [word for fault in faults for word in ("--fault", as_flag(fault))]
    full = [sys.executable, "-m", "jaxtrain", "launch", "--processes", str(processes), *flags, *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        code = subprocess.run(full, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code:
        raise RunError("a run of the campaign ended before its last step.", got=f"exit code {code}", fix=f"see {log}")


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of incidents.jsonl."""
    path = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(run_dir: Path) -> str:
    """The hash of the newest checkpoint."""
    command = [sys.executable, "-m", "jaxtrain", "checkpoint", "hash", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def table(faults: Sequence[Fault], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per incident, beside the fault that caused it."""
    return [
        {
            "fault": fault.kind,
            "step": row["step"],
            "detected_as": row["what"],
            "culprit_named": row["culprits"] == [fault.process],
            "tier": row["tier"],
            "recovery_seconds": row["recovery_seconds"],
            "replayed_steps": row["replayed_steps"],
        }
        for fault, row in zip(faults, rows)
    ]


def show(rows: Sequence[dict[str, Any]], equal: bool) -> None:
    lines = [COLUMNS, *([str(row[name]) for name in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())
    named = sum(row["culprit_named"] for row in rows)
    print(f"{len(rows)} incidents, the culprit named in {named}; final hash {'equal' if equal else 'DIFFERENT'}")
