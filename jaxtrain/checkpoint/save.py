"""A run's checkpoints: saved beside the loop, committed by a manifest, the newest good one found. It chooses no step.

A save that fails is said on stderr and counted; the run goes on until `patience` in a row have failed.

A save, in order:
  1. the caller's thread hashes the arrays on the devices and takes a copy that the next step cannot touch;
  2. a background thread of each process writes its shards and checksums its own files; the lead's first removes the
     checkpoints that the policy lets go;
  3. the lead's merges the parts, checksums the rest, writes the manifest, renames STEP.saving to STEP.
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import complaints, describe, files, hashing, load, manifest, peers, storage
from jaxtrain.background import Deadline, in_background, within
from jaxtrain.checkpoint.manifest import DamagedError, Manifest
from jaxtrain.checkpoint.names import named
from jaxtrain.checkpoint.policy import CheckpointConfig, expired
from jaxtrain.checkpoint.snapshot import HostBuffers, on_cpu
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.resilience.tenure import still_valid

_SLACK_SECONDS = 20.0  # for a background thread to report after its own deadline
_WAIT_SECONDS = 60.0  # that the loop waits for a save under way when the next is due; then it goes on without the next

_GIVEN_UP = "a save that was given up"


@dataclass(frozen=True)
class _Save:
    """One save under way. `copied` is set when the caller's arrays are no longer needed, or never will be.

    `claim` is taken once: by the thread that is about to read the arrays, or by the caller who waits for them no longer
    because a file system does not answer, after which nobody reads them.
    """

    step: int
    draft: Manifest
    hashing: hashing.Hashing
    key: str
    deadline: Deadline
    copied: threading.Event = field(default_factory=threading.Event)
    claim: threading.Lock = field(default_factory=threading.Lock)

    def overdue(self) -> bool:
        return self.deadline.left() == 0


class Checkpoints:
    """The checkpoints in one folder. Every process makes one, and calls its methods in the same order.

    Opening it makes the folder and removes what unfinished saves left there. `changes`: how states of another form are
    restored (load.restore_whole). Raises CheckpointError, here and below.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig, changes: load.Changes = lambda saved, wanted: None):
        self.directory, self.config, self._changes = Path(directory).absolute(), config, changes
        self._buffers = HostBuffers()
        self._pending: tuple[_Save, Future[None]] | None = None
        self._stuck: Future[None] | None = None  # a save that was given up, and may write still
        self._error: CheckpointError | None = None  # of the last save
        self._failed_saves = 0  # in a row
        self._damaged: set[int] = set()
        self._by_lead(f"checkpoints cannot be kept in {self.directory}.", self._open)

    def save(self, step: int, state: Any, *, config: dict, data: dict, letters: Any = None) -> None:
        """Returns when `state`, a tree of arrays, may be donated; it is on the disk after `wait`.

        `config` and `data` (the data position) are JSON and go into the manifest; `letters` is a tree like `state` of
        strings, one letter per dim. First waits for the save before it, up to a minute; while that one is not done
        there is no other. Raises when `patience` saves in a row have failed, and for a step that is no count of updates.
        """
        step = _index(step)
        if not self._ready(step):
            return
        arrays = describe.storable(named(state))
        draft = describe.draft(step, arrays, named(letters) if letters is not None else {}, config, data)
        json.dumps([config, data])  # a TypeError belongs to the caller
        save = _Save(step, draft, hashing.Hashing(arrays), peers.new_round(), self._deadline())
        if computes_here := on_cpu(arrays):
            arrays = self._buffers.copy(arrays)
            save.copied.set()
        self._pending = save, in_background(lambda: self._write(save, arrays), yielding=computes_here)
        if not save.copied.wait(min(_WAIT_SECONDS, save.deadline.left())) and not save.claim.acquire(blocking=False):
            save.copied.wait(save.deadline.left())

    def wait(self) -> None:
        """Returns when the last save is committed on every process. Raises what went wrong with it, once."""
        self.settle()
        self._raise_error()

    def settle(self) -> None:
        """Returns when the last save has ended, well or not, or is given up; a failure is said and counted."""
        if self._pending is None:
            return
        save, future = self._pending
        try:
            future.result(save.deadline.left() + _SLACK_SECONDS)
        except CheckpointError as error:
            self._failed(error, said=peers.is_lead())
        except TimeoutError:
            self._stuck = future
            self._buffers.clear()  # the thread that hangs may still read them
            self._failed(complaints.too_slow(save.step, self.directory, save.deadline.seconds), said=True)
        else:
            self._failed_saves, self._error = 0, None
        self._pending = None

    def check(self) -> dict[str, int]:
        """What is to be said of saving in a row of metrics: nothing while it goes well. Does not wait.

        Raises when `patience` saves in a row have failed.
        """
        if self._pending is not None and self._pending[1].done():
            self.settle()
        if self._failed_saves >= self.config.patience:
            self._raise_error()
        return {"checkpoint/failed_saves": self._failed_saves} if self._failed_saves else {}

    def close(self) -> None:
        """Waits for the last save, removes what the policy lets go and gives the memory back."""
        try:
            self.wait()
            if peers.is_lead() and self._stuck is None:
                self._on_disk("checkpoints that the policy lets go were not removed.", self._expire)
        finally:
            self._buffers.clear()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return files.steps(self.directory)

    def newest(self) -> int | None:
        """The newest step that has a checkpoint not known to be damaged."""
        return max(set(self.steps()) - self._damaged, default=None)

    def latest(self, abstract_state: Any, up_to: int | None = None) -> tuple[Any, Manifest] | None:
        """The newest whole checkpoint as a tree like `abstract_state` (shapes, dtypes, shardings), verified; None if there is none.

        `up_to`: the last step that counts, as the lead has it. Says on stderr which ones it skipped and why. Raises
        CheckpointError where all are damaged, or where the newest is of another tree, shape or dtype.
        """
        steps = self.agreed_steps(up_to)
        for step in reversed(steps):
            try:
                return self.restore(step, abstract_state)
            except DamagedError as error:
                if peers.is_lead():
                    print(f"skipped the checkpoint of step {step}: {error}", file=sys.stderr, flush=True)
        if steps:
            raise self.none_whole(steps)
        return None

    def agreed_steps(self, up_to: int | None = None) -> list[int]:
        """`steps` up to one, as the lead has them, and those whose manifest is gone; waits for the last save."""
        self.settle()
        self.check()
        list_them = lambda: [step for step in files.numbered(self.directory) if up_to is None or step <= up_to]  # noqa: E731
        return self._by_lead("the checkpoints cannot be listed.", list_them)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Manifest]:
        """One checkpoint as `latest` would give it. Raises DamagedError, on every process."""
        try:
            return load.restore_whole(self.directory / str(step), abstract_state, self._deadline(), self._changes)
        except DamagedError:
            self._damaged.add(step)
            raise

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: what they hold was trained on what the run has put aside, or is corrupt."""
        self.settle()

        def remove() -> None:
            still_valid(self.directory.parent)
            for later in (s for s in self.steps() if s > step):
                files.delete(self.directory / str(later))

        self._by_lead(f"checkpoints after step {step} were not removed.", remove)

    def none_whole(self, steps: list[int]) -> CheckpointError:
        """Where all of these were tried in vain."""
        return CheckpointError(
            f"none of the checkpoints in {self.directory} is whole.",
            got=f"steps {steps}, all damaged",
            rule="a run resumes from a whole checkpoint and never starts over by itself",
            fix="restore the folder from a copy, or give it another name to start over",
        )

    def _deadline(self) -> Deadline:
        return Deadline(self.config.deadline_seconds)

    def _by_lead(self, what: str, work: Callable[[], Any]) -> Any:
        """`work()`, done once; its value on every process, or `what` went wrong."""
        return peers.agree(peers.new_round(), lambda: None, lambda _: self._on_disk(what, work), self._deadline())

    def _on_disk(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return within(self._deadline(), work)
        except OSError as error:
            raise complaints.unusable(what, error, self.directory, self.config.deadline_seconds) from error

    def _open(self) -> None:
        """A folder that is new must take a file; a run that goes on does so where it takes none, as when a save fails."""
        fresh = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in files.leftovers(self.directory):
            files.remove(path)
        try:
            files.write_durably(self.directory / ".writable", b"")
            (self.directory / ".writable").unlink()
        except OSError as error:
            if fresh:
                self.directory.rmdir()
                raise
            what = f"{self.directory} takes no file now ({manifest.in_words(error)}); the run goes on, and tries to save"
            print(what, file=sys.stderr, flush=True)

    def _ready(self, step: int) -> bool:
        """Whether no process has a save under way any more; all come to the same answer, and to one count of failures."""
        if self._pending is not None:
            futures.wait([self._pending[1]], min(_WAIT_SECONDS, self._pending[0].deadline.left() + _SLACK_SECONDS))
        if self._pending is not None and (self._pending[1].done() or self._pending[0].overdue()):
            self.settle()
        others = Deadline(self.config.deadline_seconds + _SLACK_SECONDS)  # which may still give theirs up, as above
        reports = peers.agree(peers.new_round(), self._report, list, others)
        waiting = {process: what for process, (_, what) in enumerate(reports) if what}
        settled = set(waiting.values()) <= {_GIVEN_UP}
        if settled:  # else a process counts the save before the last
            self._failed_saves = max(count for count, _ in reports)
        if waiting:
            self._not_begun(step, waiting)
        if settled and self._failed_saves >= self.config.patience:
            self._raise_error()
        return not waiting

    def _report(self) -> tuple[int, str]:
        """Failures in a row, and what this process still waits for."""
        if self._stuck is not None and self._stuck.done():
            self._stuck = None
        if self._stuck is not None:
            return self._failed_saves, _GIVEN_UP
        return self._failed_saves, "" if self._pending is None else f"that of step {self._pending[0].step}"

    def _not_begun(self, step: int, waiting: Mapping[int, str]) -> None:
        """Says so; it is a failure where a disk holds a save that was given up, and a delay where one is under way."""
        error = complaints.not_begun(step, waiting)
        if _GIVEN_UP in waiting.values():
            self._failed(error, said=peers.is_lead())
        else:
            self._error = error
            if peers.is_lead():
                print(error, file=sys.stderr, flush=True)

    def _failed(self, error: CheckpointError, said: bool) -> None:
        self._failed_saves, self._error = self._failed_saves + 1, error
        if said:
            complaints.failed(error, self._failed_saves, self.config.patience)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, save: _Save, arrays: Mapping[str, jax.Array]) -> None:
        try:
            peers.agree(
                save.key, lambda: self._write_part(save, arrays), lambda parts: self._commit(save, parts), save.deadline
            )
        except UserError:
            if peers.is_lead() and self._may_write():  # else it may be that of the generation after this one
                shutil.rmtree(self._saving(save.step), ignore_errors=True)
            raise
        finally:
            save.copied.set()

    def _write_part(self, save: _Save, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """This process's shards; returns the entries of its files and its share of the content hashes."""
        folder = self._saving(save.step) / describe.ARRAYS
        try:
            still_valid(self.directory.parent)
            if peers.is_lead():
                self._expire(save.step)
                self._check_space(save)
            folder.mkdir(parents=True, exist_ok=True)
            if not save.claim.acquire(blocking=False):
                raise TimeoutError
            writes = storage.begin_write(folder, arrays)
            save.copied.set()
            storage.end_write(writes, save.deadline)
            written = files.checksums(folder.parent, storage.written_by(folder, jax.process_index()))
            return {"files": written, "sums": save.hashing.sums()}
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise ValueError and bare Exception too
            raise self._why(save, error) from error

    def _commit(self, save: _Save, parts: list[dict[str, Any]]) -> None:
        """By the lead, when all parts are written."""
        folder, final = self._saving(save.step), self.directory / str(save.step)
        entries = {name: files.FileEntry(*row) for part in parts for name, row in part["files"].items()}
        try:
            storage.merge(folder / describe.ARRAYS)
            rest = [path for path in folder.rglob("*") if path.relative_to(folder).as_posix() not in entries]
            entries |= files.checksums(folder, rest)
            hashes = hashing.total([part["sums"] for part in parts])
            complaints.warn_of_unequal_copies(save.step, hashes)
            manifest.write(folder, describe.completed(save.draft, {n: copies[0] for n, copies in hashes.items()}, entries))
            still_valid(self.directory.parent)
            old = files.doomed(final) if (final / files.MANIFEST).exists() else None
            if final.exists():
                files.put_aside(final)
            folder.rename(final)
            files.sync_folder(self.directory)
            self._damaged.discard(save.step)
            if old:  # only now: to remove a large one takes seconds, in which a kill would have taken both
                shutil.rmtree(old, ignore_errors=True)  # the new one is there; what is left goes with the next save
        except CheckpointError:
            raise
        except Exception as error:  # as above
            raise self._why(save, error) from error

    def _may_write(self) -> bool:
        try:
            within(self._deadline(), lambda: still_valid(self.directory.parent))
        except (CheckpointError, OSError):
            return False
        return True

    def _expire(self, saving: int | None = None) -> None:
        """Before the next save's first byte, not after the last one's: the kernel writes again to the memory that held
        the expired files. Memory that it has to fetch anew cost a virtual machine 1.3 s per 500 MB, of the loop's CPUs.
        """
        for path in files.leftovers(self.directory):  # of saves that failed where they could not be cleaned up
            if saving is None or path != self._saving(saving):  # which other processes may have begun
                with contextlib.suppress(OSError):
                    files.remove(path)
        for step in expired(set(self.steps()) - self._damaged, self.config):
            files.delete(self.directory / str(step))

    def _check_space(self, save: _Save) -> None:
        needed = describe.num_bytes(save.draft)
        if needed > (free := shutil.disk_usage(self.directory).free):
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")

    def _saving(self, step: int) -> Path:
        return self.directory / f"{step}{files.SAVING}"

    def _why(self, save: _Save, error: Exception) -> CheckpointError:
        if isinstance(error, TimeoutError):
            return complaints.too_slow(save.step, self.directory, save.deadline.seconds)
        what = f"the checkpoint of step {save.step} was not saved."
        return complaints.unusable(what, error, self.directory, save.deadline.seconds)


def _index(step: Any) -> int:
    """As an int; numpy's and jax's are taken too."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise CheckpointError(f"step = {step!r} cannot be saved.", rule="a whole number of updates, 0 or more")
    return number
