"""`jaxtrain faults`: what can go wrong, and campaigns in which it does. The failing and the recovering are others' work."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtrain.command import parse
from jaxtrain.config import RunConfig
from jaxtrain.errors import ConfigError, RunError, closest
from jaxtrain.exits import AGAIN
from jaxtrain.resilience import pulse
from jaxtrain.resilience.faults import ENDING, HANGING, LEAVING, PHASES, TOLERATED, Fault, as_flag, described
from jaxtrain.resilience.host import memory_folder
from jaxtrain.resilience.verdict import code_in_words

OTHERS = (*TOLERATED, *LEAVING, "flip-bit")
LOOK_S = 0.05
GAP = 2  # steps at least from one fault to the next
SECONDS = {"slow": 0.02, "stall-save": 3.0, "clock-jump": 3600.0, "cut-network": 600.0, "delay-network": 0.05}
COLUMNS = ("fault", "step", "detected_as", "culprit_named", "tier", "recovery_seconds", "replayed_steps")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain faults soak` beside the config's own overrides."""

    count: int = 20
    seed: int = 0
    processes: int = 4
    kinds: tuple[str, ...] = (*ENDING, *TOLERATED)  # drawn with equal chances
    json: str = ""  # a file for one JSON object per fault, and a last one with hash_equal


def main(argv: list[str]) -> int:
    """jaxtrain faults [soak CONFIG [--count N] [--seed N] [--processes N] [--kinds KIND ...] [--json FILE] [overrides]]"""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {main.__doc__}\n\n" + described())
        return 0
    if argv[0] != "soak":
        raise ConfigError(f"jaxtrain faults has no {argv[0]!r}.", fix=closest(argv[0], ["soak"]))
    call = parse("jaxtrain faults soak", Options, argv[1:], doc=main.__doc__)
    options, config = call.options, call.load()
    if unknown := set(options.kinds) - set(ENDING) - set(OTHERS):
        raise ConfigError(f"a campaign has no {min(unknown)!r}.", fix=closest(min(unknown), (*ENDING, *OTHERS)))
    if config.steps < (least := (GAP + 1) * (options.count + 1)):
        rule = f"{GAP + 1} steps to a fault, so that each comes after new steps"
        raise ConfigError(f"{options.count} faults do not fit into {config.steps} steps.", rule=rule, fix=f"--steps {least}")
    faults = draw(options, config)
    command = [str(call.config), *call.overrides, "--runs-dir", config.runs_dir]
    plain, disturbed = (config.run_dir.parent / f"{config.name}-{what}" for what in ("undisturbed", "soak"))
    for folder in (plain, disturbed):
        _log(folder).unlink(missing_ok=True)
        if (folder / "checkpoints").exists():
            raise RunError(f"there is a run {folder.name} already.", fix=f"another --runs-dir, or remove {folder}")
    codes, ends = [], []
    for folder, given in ((plain, []), (disturbed, faults)):
        for part in launches(given):
            ends.append(launch(command, folder, options.processes, part))
            if not (part and part[-1].kind in LEAVING and ends[-1].code in (-signal.SIGKILL, *AGAIN)):
                break
        codes.append(ends[-1].code)
    seen = incidents(disturbed)
    rows = table(faults, seen, _log(disturbed).read_text(), ends[1:])
    equal = not any(codes) and digest(plain) == digest(disturbed)
    last = {"hash_equal": equal, "exit_codes": codes, "faults": len(faults), "incidents": len(seen)}
    last["unplanned"] = [row["line"] for row in seen if row["incident"] > sum(fault.kind in ENDING for fault in faults)]
    show(rows, last)
    if options.json:
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in (*rows, last)))
    if any(codes):
        raise RunError("a run of the campaign ended before its last step.", got=f"exit codes {codes}", fix=f"see {_log(disturbed)}")
    return 0 if equal and not last["unplanned"] and all(row["detected_as"] != "nothing" for row in rows) else 1


def draw(options: Options, config: RunConfig) -> list[Fault]:
    """Faults spread evenly over the run, at a random step and process; the last of a generation, or launch, is one that
    ends it.

    Each comes within its own part of the run, steps after the one before: else nothing would be new in between.
    """
    chance, span, faults, generation = random.Random(options.seed), config.steps / (options.count + 1), [], 1
    for number in range(options.count):
        kind, process, first = chance.choice(options.kinds), chance.randrange(options.processes), 1 + int(span * number)
        steps = range(first, first + max(1, int(span) - GAP))
        places = [(phase, step) for phase in PHASES for step in steps]
        if kind in ENDING and kind not in HANGING:  # a hang is waited for as long as the phase may last
            every = {"snapshot": config.snapshot.every, "save": config.checkpoint.every}
            places += [(phase, step) for phase, n in every.items() for step in steps if n and step % n == 0]
        phase = chance.choice(sorted({phase for phase, _ in places}))
        step = chance.choice([step for other, step in places if other == phase])
        fault = Fault(kind=kind, process=process, step=step, phase=phase, generation=generation)
        faults.append(replace(fault, seconds=SECONDS.get(kind, fault.seconds)))
        generation = 1 if kind in LEAVING else generation + (kind in ENDING)
    return faults


def launches(faults: Sequence[Fault]) -> list[list[Fault]]:
    """The faults of each time that the command is given: up to the one that ends the launch."""
    parts: list[list[Fault]] = [[]]
    for fault in faults:
        parts[-1].append(fault)
        if fault.kind in LEAVING:
            parts.append([])
    return parts


@dataclass(frozen=True)
class Ended:
    """One time that the command was given; times of time.monotonic. `restored`: as a pulse tells it."""

    code: int
    when: float
    first_step: float | None
    restored: str


def launch(command: Sequence[str], run_dir: Path, processes: int, faults: Sequence[Fault]) -> Ended:
    """One supervised run to its end."""
    flags = [word for fault in faults for word in ("--fault", as_flag(fault))]
    on = ["--processes", str(processes), "--devices-per-process", "1"]  # CPUs, whatever else the machine has
    full = [sys.executable, "-m", "jaxtrain", "launch", *on, *flags, *command, "--name", run_dir.name]
    log, began, first = _log(run_dir), time.monotonic(), None
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        child = subprocess.Popen(full, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while child.poll() is None:
                time.sleep(LOOK_S)
                beat = None if first else pulse.read(memory_folder(run_dir) / "1.0.pulse")
                if beat and beat.since > began and beat.counts["metrics"]:
                    first = beat
        finally:
            child.kill()
    return Ended(child.returncode, time.monotonic(), first and first.since, first.restored if first else "")


def _log(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of incidents.jsonl."""
    path = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(run_dir: Path) -> str:
    """The hash of the newest checkpoint."""
    command = [sys.executable, "-m", "jaxtrain", "checkpoint", "hash", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def table(
    faults: Sequence[Fault], seen: Sequence[dict[str, Any]], log: str, ends: Sequence[Ended] = ()
) -> list[dict[str, Any]]:
    """One row per fault. The n-th that ends a generation is incident n, the n-th that ends a launch that of `ends`; of the
    others the log says that they came."""
    by_number = {row["incident"]: row for row in seen}
    came = Counter(re.findall(r"^\[p(\d+)\] fault: (\S+) at", log, re.MULTILINE))
    numbers, left, rows = itertools.count(1), itertools.pairwise(ends), []
    for fault in faults:
        if fault.kind in ENDING:
            rows.append(_ended(fault, by_number.get(next(numbers))))
        elif fault.kind in LEAVING:
            rows.append(_left(fault, *next(left, (None, None))))
        else:
            rows.append(_tolerated(fault, came))
    return rows


def _left(fault: Fault, end: Ended | None, again: Ended | None) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {"fault": fault.kind, "step": fault.step, "detected_as": "nothing"}
    if end is None or again.first_step is None:
        return row
    state, _, restored = again.restored.partition(" ")
    row |= {"detected_as": code_in_words(end.code), "tier": f"same command, {state or 'nothing'}"}
    row |= {"recovery_seconds": round(again.first_step - end.when, 3)}
    return row | {"replayed_steps": max(0, fault.step - int(restored or 0))}


def _ended(fault: Fault, row: dict[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return dict.fromkeys(COLUMNS) | {"fault": fault.kind, "step": fault.step, "detected_as": "nothing", "culprit_named": False}
    return {
        "fault": fault.kind,
        "step": row["step"],
        "detected_as": row["what"],
        "culprit_named": row["culprits"] == [fault.process],
        "tier": row["tier"],
        "recovery_seconds": row["recovery_seconds"],
        "replayed_steps": row["replayed_steps"],
    }


def _tolerated(fault: Fault, came: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Nobody is blamed, nothing is recovered: training went on."""
    as_what = "tolerated" if came[str(fault.process), fault.kind] else "nothing"
    row = {"fault": fault.kind, "step": fault.step, "detected_as": as_what, "culprit_named": None, "tier": "none"}
    return row | {"recovery_seconds": 0.0, "replayed_steps": 0}


def show(rows: Sequence[dict[str, Any]], last: Mapping[str, Any]) -> None:
    lines = [COLUMNS, *([str(row[name]) for name in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())
    ended = [row for row in rows if row["culprit_named"] is not None]
    hangs = [row for row in ended if row["fault"] in HANGING]
    named, of_hangs = (sum(row["culprit_named"] for row in those) for those in (ended, hangs))
    times = [row["recovery_seconds"] for row in ended if row["recovery_seconds"] is not None and row not in hangs]
    print(
        f"{len(rows)} faults, {last['incidents']} incidents; the culprit named in {named} of {len(ended)} that ended a "
        f"generation, of hangs in {of_hangs} of {len(hangs)}; final hash {'equal' if last['hash_equal'] else 'DIFFERENT'}"
    )
    if times:
        print(f"back after {statistics.median(times):.1f} s, the median of those that did not hang")
    for line in last["unplanned"]:
        print(f"not asked for: {line}")
