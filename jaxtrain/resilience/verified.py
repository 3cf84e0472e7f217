"""Up to which step all copies of a run's state were found equal, as files of its folder. It compares nothing.

verified.json says so of the run as it stands, and whether the last comparison found a difference: then the next start
takes no state from after `agreed`. corruption.jsonl keeps every difference: step, copies, hosts.

An agreement is written beside the loop. One that is not on the disk costs steps, as an older one counts; a difference that
is not could have its bits restored: it is waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxtrain.background import Deadline, in_background, within
from jaxtrain.checkpoint.files import write_durably
from jaxtrain.errors import RunError
from jaxtrain.observe.sinks import row_of, whole_lines
from jaxtrain.resilience.tenure import still_valid

FILE, EVENTS = "verified.json", "corruption.jsonl"
WRITE_S = 30.0  # for one write of a few bytes


class Verified:
    """One run's record: read by all processes, written by the lead."""

    def __init__(self, run_dir: Path, hash_every: int, lead: bool):
        self._run_dir, self._every, self._lead = run_dir, hash_every, lead
        self._kept = self._on_disk = _read(run_dir / FILE)
        self.agreed = 0
        self._turn = threading.Lock()  # to write: what hangs with an older word lets no newer one pass, to replace it then
        self._trying: Future[None] | None = None
        self._trouble = ""

    def limit(self) -> int | None:
        """The last step whose state may be restored; None: any. It is there until training has begun again."""
        return self._kept["agreed"] if "differs" in self._kept else None

    def begin(self, step: int) -> None:
        """Training goes on from the state of `step`, whose copies were all made of one."""
        self.agreed = min(step, self._kept.get("agreed", step))
        # without comparisons what is there would not be true any more
        self._kept = {"agreed": self.agreed} if self._every else {}
        if self._lead:
            self._try()

    def agree(self, step: int) -> None:
        """All copies were equal after `step`. Waits for nothing."""
        self.agreed, self._kept = step, {"agreed": step}
        if self._lead and (self._trying is None or self._trying.done()):
            if self._trying:
                self._trying.result()  # where it is not the disk's trouble
            self._trying = in_background(self._try)

    def differ(self, step: int, suspects: Sequence[Any], found_by: str) -> None:
        """Copies were not; written before anybody acts on it. Raises RunError."""
        self._kept = {"agreed": self.agreed, "differs": step}
        if not self._lead:
            return
        row = {"step": step, "agreed": self.agreed, "found_by": found_by}
        row["suspects"] = [*map(dataclasses.asdict, suspects)]
        try:
            within(Deadline(WRITE_S), lambda: (self._write(), _append(self._run_dir / EVENTS, row)))
        except OSError as error:
            raise RunError(
                f"cannot write into {self._run_dir} that copies differ at step {step}.",
                got=error.strerror or str(error),
                rule=f"{FILE} and {EVENTS} say so before anybody acts on it",
                fix="free space or give write permission, then run the same command again",
            ) from error

    def settle(self) -> None:
        """Returns when what the lead knows is on the disk, or has had its time to get there."""
        if self._trying is not None and not futures.wait([self._trying], WRITE_S).not_done:
            self._try()

    def _try(self) -> None:
        """What the disk does not take is said once, and tried again at the next comparison."""
        try:
            while self._on_disk != self._kept:
                within(Deadline(WRITE_S), self._write)
            self._trouble = ""
        except OSError as error:
            if not self._trouble:
                with contextlib.suppress(OSError):  # stderr may be a file on the same disk
                    what = f"{FILE} IS NOT WRITTEN ({error.strerror or error}): copies count as equal up to an earlier step"
                    print(what, file=sys.stderr, flush=True)
            self._trouble = str(error)

    def _write(self) -> None:
        if not self._turn.acquire(timeout=WRITE_S):
            raise TimeoutError("an earlier write has not ended")
        try:
            still_valid(self._run_dir)
            path, kept = self._run_dir / FILE, self._kept
            _put(path, json.dumps(kept).encode()) if kept else path.unlink(missing_ok=True)
            self._on_disk = kept
        finally:
            self._turn.release()


def _put(path: Path, data: bytes) -> None:
    """In place where nothing can be put beside it: a full disk has room for that, and a disk takes a sector whole."""
    try:
        return write_durably(path, data)
    except OSError as error:
        try:
            file = os.open(path, os.O_WRONLY)
        except OSError:
            raise error from None
    try:
        os.pwrite(file, data.ljust(os.fstat(file).st_size), 0)
        os.fsync(file)
    finally:
        os.close(file)


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def accused(run_dir: Path) -> list[int]:
    """The processes that the last difference was found in, where it is certain; else none."""
    last = next(reversed(whole_lines(run_dir / EVENTS)), b"")
    row = row_of(last) or {}  # one that is damaged says nothing, and an older one accuses the wrong
    certain = row.get("found_by") in ("majority", "replay")
    return sorted({suspect["process"] for suspect in row["suspects"]}) if certain else []


def _read(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    data = path.read_bytes()
    if (kept := row_of(data, "agreed")) is None or not isinstance(kept.get("differs", 0), int):
        fix = "remove it: copies are then taken for equal up to the step that the run resumes from"
        raise RunError(f"{path} is damaged.", got=repr(data[:60]), rule='{"agreed": STEP}, and "differs": STEP', fix=fix)
    return kept
