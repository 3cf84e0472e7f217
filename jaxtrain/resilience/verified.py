"""Up to which step all copies of a run's state were found equal, as files of its folder. It compares nothing.

verified.json says so of the run as it stands, and whether the last comparison found a difference: then the next start
takes no state from after `agreed`. corruption.jsonl keeps every difference: step, copies, hosts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.files import write_durably
from jaxtrain.errors import RunError
from jaxtrain.resilience.tenure import still_valid

FILE, EVENTS = "verified.json", "corruption.jsonl"


class Verified:
    """One run's record: read by all processes, written by the lead."""

    def __init__(self, run_dir: Path, hash_every: int, lead: bool):
        self._run_dir, self._every, self._lead = run_dir, hash_every, lead
        self._kept = _read(run_dir / FILE)
        self.agreed = 0

    def limit(self) -> int | None:
        """The last step whose state may be restored; None: any. It is there until training has begun again."""
        return self._kept["agreed"] if "differs" in self._kept else None

    def begin(self, step: int) -> None:
        """Training goes on from the state of `step`, whose copies were all made of one."""
        self.agreed = min(step, self._kept.get("agreed", step))
        self._kept = {"agreed": self.agreed}
        if self._lead and self._every:
            self._write()
        elif self._lead:  # from here on nobody compares: what it says would not be true
            (self._run_dir / FILE).unlink(missing_ok=True)

    def agree(self, step: int) -> None:
        """All copies were equal after `step`."""
        self.agreed = step
        self._kept = {"agreed": step}
        if self._lead:
            self._write()

    def differ(self, step: int, suspects: Sequence[Any], found_by: str) -> None:
        """Copies were not; written before anybody acts on it."""
        self._kept = {"agreed": self.agreed, "differs": step}
        if not self._lead:
            return
        self._write()
        row = {"step": step, "agreed": self.agreed, "found_by": found_by}
        row["suspects"] = [*map(dataclasses.asdict, suspects)]
        with open(self._run_dir / EVENTS, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write(self) -> None:
        still_valid(self._run_dir)
        try:
            write_durably(self._run_dir / FILE, json.dumps(self._kept).encode() + b"\n")
        except OSError as error:
            fix = "free space or give write permission, then run the same command again"
            raise RunError(f"cannot write {self._run_dir / FILE}.", got=error.strerror or str(error), fix=fix) from error


def accused(run_dir: Path) -> list[int]:
    """The processes that the last difference was found in, where it is certain; else none."""
    path = run_dir / EVENTS
    lines = path.read_text().splitlines() if path.exists() else []
    row = json.loads(lines[-1]) if lines else {"found_by": "", "suspects": []}
    certain = row["found_by"] in ("majority", "replay")
    return sorted({suspect["process"] for suspect in row["suspects"]}) if certain else []


def _read(path: Path) -> dict[str, int]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        fix = "remove it: copies are then taken for equal up to the step that the run resumes from"
        raise RunError(f"{path} is damaged.", got=str(error), rule="it says how far copies agreed", fix=fix) from error
