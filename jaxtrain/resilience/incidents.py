"""A run's incidents: a row each in incidents.jsonl of its folder, also of those that outlived their supervisor.

One that is not over is incidents/N.json; whoever leads next makes a row of it. Nobody who watches waits for a disk longer
than DISK_S: what cannot be written is said, and left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtrain.background import Deadline, in_background, within
from jaxtrain.resilience import verdict
from jaxtrain.resilience.say import as_lead
from jaxtrain.resilience.verdict import Verdict

FILE, FOLDER = "incidents.jsonl", "incidents"
DISK_S = 2.0  # for the run folder to answer


@dataclass
class Incident:
    """One failure and its recovery; times of time.monotonic."""

    number: int
    verdict: Verdict
    step: int  # that the run had reached
    began: float  # when the trainer ended, or was last heard
    noticed: float
    times: dict[str, float] = field(default_factory=dict)  # when each part of the recovery was done
    restored: int | None = None
    tier: str = ""  # of the recovery: which processes
    state: str = ""  # from which tier: "snapshot" or "checkpoint"; "" from nothing

    def row(self) -> dict[str, Any]:
        """JSON: seconds of each part, from what ended the one before it."""
        ends = {"detection": self.noticed} | self.times
        starts = [self.began, *ends.values()]
        parts = {name: round(end - start, 3) for (name, end), start in zip(ends.items(), starts)}
        last = max(ends.values())
        return {
            "incident": self.number,
            "step": self.step,
            **verdict.as_json(self.verdict),
            "tier": f"{self.tier}, {self.state or 'nothing'}",
            "restored_step": self.restored,
            "replayed_steps": None if self.restored is None else max(0, self.step - self.restored),
            "recovery_seconds": round(last - self.began, 3),
            "seconds": parts,
        }


class Record:
    """To be used by one lead at a time. `number`: the last incident's."""

    def __init__(self, run_dir: Path):
        self.folder, self._rows, self.number = run_dir / FOLDER, run_dir / FILE, 0
        try:
            self.number = within(Deadline(DISK_S), self._taken_up)
        except OSError as error:
            as_lead(f"the incidents before are not known: {error}")

    def begin(self, incident: Incident) -> None:
        """Waits for nothing."""
        self.number = incident.number
        row = incident.row() | {"tier": "its supervisor was lost first", "recovery_seconds": None}
        in_background(lambda: self._write(self._of(incident.number), json.dumps(row)))

    def end(self, incident: Incident) -> None:
        line = json.dumps(incident.row()) + "\n"

        def work() -> None:
            _append(self._rows, line)
            self._of(incident.number).unlink(missing_ok=True)

        try:
            within(Deadline(DISK_S), work)
        except OSError as error:  # a full disk is no reason to stop a run that goes on
            as_lead(f"incident {incident.number} is not recorded: {error}")

    def _of(self, number: int) -> Path:
        return self.folder / f"{number:04}.json"

    def _write(self, path: Path, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, path)

    def _taken_up(self) -> int:
        """The last number, after what was left unfinished has become rows."""
        lines = self._rows.read_text().splitlines() if self._rows.exists() else []
        known = {number for number, _ in enumerate(lines, 1)}
        for path in sorted(self.folder.glob("*.json")):
            number = int(path.stem)
            if number not in known:
                _append(self._rows, path.read_text() + "\n")
                known.add(number)
            path.unlink()
        return max(known, default=0)


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(line)
