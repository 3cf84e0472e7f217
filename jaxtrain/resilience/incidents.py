"""A run's incidents: a row each in incidents.jsonl of its folder, also of those that outlived their supervisor.

One that is not over is incidents/N.json, locked while its supervisor lives; whoever leads next makes a row of it. Nobody
who watches waits for a disk longer than DISK_S: what cannot be written is said, and left out. So is what cannot be read.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from jaxtrain.background import Deadline, in_background, within
from jaxtrain.cluster import few
from jaxtrain.observe.sinks import append, row_of, whole_lines
from jaxtrain.resilience import verdict
from jaxtrain.resilience.say import as_lead
from jaxtrain.resilience.verdict import Verdict

FILE, FOLDER = "incidents.jsonl", "incidents"
DISK_S = 2.0  # for the run folder to answer
FAILED, UNSEEN = "the recovery failed", "not seen to its end"


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
    lost: str = ""  # why no generation got as far again
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
            "tier": self.lost or f"{self.tier}, {self.state or 'nothing'}",
            "restored_step": self.restored,
            "replayed_steps": None if self.restored is None else max(0, self.step - self.restored),
            "recovery_seconds": None if self.lost else round(last - self.began, 3),
            "seconds": parts,
        }


class Record:
    """To be used by one lead at a time. `number`: the last incident's."""

    def __init__(self, run_dir: Path):
        self.folder, self._rows, self.number = run_dir / FOLDER, run_dir / FILE, 0
        self._waiting: list[str] = []  # rows that a disk did not take
        self._held = ExitStack()  # the file of the incident that is not over, locked
        try:
            self.number = within(Deadline(DISK_S), self._taken_up)
        except OSError as error:
            as_lead(f"the incidents before are not known: {error}")

    def begin(self, incident: Incident) -> None:
        """Waits for nothing."""
        self.number = incident.number
        row = json.dumps(replace(incident, lost=UNSEEN).row())
        in_background(lambda: self._write(self._of(incident.number), row))  # where that fails `end` says so

    def end(self, incident: Incident) -> None:
        """Its row; what a disk does not take is said, and tried again with the next."""
        self._waiting.append(json.dumps(incident.row()) + "\n")

        def work() -> None:
            _append(self._rows, "".join(self._waiting))
            self._of(incident.number).unlink(missing_ok=True)
            self._held.close()

        try:
            within(Deadline(DISK_S), work)
            self._waiting.clear()
        except OSError as error:  # no reason to stop a run that goes on
            as_lead(f"incident {incident.number} is not recorded: {error}")

    def _of(self, number: int) -> Path:
        return self.folder / f"{number:04}.json"

    def _write(self, path: Path, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        file = self._held.enter_context(open(new, "w"))
        _lock(file)
        file.write(text)
        file.flush()
        os.replace(new, path)

    def _taken_up(self) -> int:
        """The last number, after what was left unfinished has become rows."""
        lines = whole_lines(self._rows)
        if self._rows.exists():
            os.truncate(self._rows, sum(len(line) + 1 for line in lines))  # a torn last line, which nobody saw whole
        rows = [row_of(line, "incident") for line in lines]
        if None in rows:
            numbers = [number for number, row in enumerate(rows, 1) if row is None]
            as_lead(f"{self._rows}: line {few(numbers)} cannot be read, and stays as it is")
        known = {row["incident"] for row in rows if row is not None}
        for path in sorted(self.folder.glob("*.json")):
            known |= self._settled(path, known)
        return max(known, default=0)

    def _settled(self, path: Path, known: set[int]) -> set[int]:
        """The number of one that was left unfinished, which is a row then; of one whose supervisor lives, which it is not."""
        with open(path, "r+b") as file:
            row = row_of(file.read(), "incident")
            if row is None:
                as_lead(f"{path} cannot be read, and stays beside the others as {path.stem}.damaged")
                os.replace(path, path.with_suffix(".damaged"))
                return set()
            try:
                _lock(file)
            except BlockingIOError:
                as_lead(f"incident {row['incident']} is not over: another supervisor of this run lives")
                return {row["incident"]}
            if row["incident"] not in known:
                _append(self._rows, json.dumps(row) + "\n")
            path.unlink()
            return {row["incident"]}


def _lock(file: IO[Any]) -> None:
    """The kernel drops it with the process, and for all who see the folder. Raises BlockingIOError where another has it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _append(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        append(file, lines.encode())
