"""Which examples a run has put aside, as a file of its folder, quarantine.jsonl: a row per event. It reads no data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.errors import RunError

FILE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class Put:
    """One example put aside: `example` of source number `source`, `id` in words, met in row `row` of step `step`."""

    step: int
    row: int
    id: str
    source: int
    example: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """Examples put aside together, `examples`, because of `why` at `steps` (first and last, counted as in the metrics).

    They count as put aside from `position` of the order on, so what came before is read as it was trained on. `data` is
    the fingerprint of the data that they are numbers in; `restored` the step that training went on from.
    """

    steps: tuple[int, int]
    why: str
    restored: int
    position: int
    data: str
    examples: tuple[Put, ...]


Record = tuple[Event, ...]


def read(run_dir: Path) -> Record:
    """The events of a run folder in the order of their happening; () where there is none. Raises RunError."""
    path = run_dir / FILE
    if not path.exists():
        return ()
    events = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            events.append(_event(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path}, line {number} is damaged.",
                got=f"{line[:60]} ({error})",
                rule="a line is an event in JSON; the examples of every step follow from all of them",
                fix="bring the line back from a copy; without it the run trains on what it had put aside",
            ) from error
    return tuple(events)


def digest(record: Record) -> str:
    """Equal for equal records."""
    return hashlib.sha256(repr(record).encode()).hexdigest()[:16]


def write(run_dir: Path, record: Record) -> None:
    """The whole file, atomically; it is on the disk when it returns. Raises RunError."""
    path = run_dir / FILE
    fresh = path.with_suffix(".tmp")
    try:
        with open(fresh, "w") as file:
            file.writelines(json.dumps(dataclasses.asdict(event)) + "\n" for event in record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fix = "free space or give write permission, then run the same command again"
        raise RunError(f"cannot write {path}.", got=error.strerror or str(error), fix=fix) from error


def _event(row: dict[str, Any]) -> Event:
    first, last = row.pop("steps")
    examples = tuple(Put(**put) for put in row.pop("examples"))
    return Event(**row, steps=(first, last), examples=examples)
