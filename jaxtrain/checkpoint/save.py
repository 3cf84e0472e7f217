"""A run's checkpoints: saved beside the loop, committed by a manifest, the newest good one found. It chooses no step.

A save, in order:
  1. the caller's thread hashes the arrays on the devices and takes a copy that the next step cannot touch;
  2. a background thread of each process writes its shards and checksums its own files; the lead's first removes the
     checkpoints that the policy lets go;
  3. the lead's merges the parts, checksums the rest, writes the manifest, renames STEP.saving to STEP.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import describe, files, hashing, load, manifest, peers, storage
from jaxtrain.background import Deadline, in_background
from jaxtrain.checkpoint.manifest import DamagedError, Manifest, in_words
from jaxtrain.checkpoint.names import named
from jaxtrain.checkpoint.policy import CheckpointConfig, expired
from jaxtrain.checkpoint.snapshot import HostBuffers, on_cpu
from jaxtrain.errors import CheckpointError, UserError

_SLACK_SECONDS = 20.0  # for a background thread to report after its own deadline


@dataclass(frozen=True)
class _Save:
    """One save under way. `copied` is set when the caller's arrays are no longer needed, or never will be."""

    step: int
    draft: Manifest
    hashing: hashing.Hashing
    key: str
    deadline: Deadline
    copied: threading.Event = field(default_factory=threading.Event)


class Checkpoints:
    """The checkpoints in one folder. Every process makes one, and calls its methods in the same order.

    Opening it makes the folder and removes what unfinished saves left there. Raises CheckpointError, here and below.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig):
        self.directory, self.config = Path(directory).absolute(), config
        self._buffers = HostBuffers()
        self._pending: tuple[_Save, Future[None]] | None = None
        self._damaged: set[int] = set()
        peers.agree(peers.new_round(), lambda: None, lambda _: self._open(), self._deadline())

    def save(self, step: int, state: Any, *, config: dict, data: dict, letters: Any = None) -> None:
        """Returns when `state`, a tree of arrays, may be donated; it is on the disk after `wait`.

        `config` and `data` (the data position) are JSON and go into the manifest; `letters` is a tree like `state` of
        strings, one letter per dim. First waits for the save before it, and raises if that one failed.
        """
        self.wait()
        arrays = describe.storable(named(state))
        draft = describe.draft(step, arrays, named(letters) if letters is not None else {}, config, data)
        json.dumps([config, data])  # a TypeError belongs to the caller
        save = _Save(step, draft, hashing.Hashing(arrays), peers.new_round(), self._deadline())
        if computes_here := on_cpu(arrays):
            arrays = self._buffers.copy(arrays)
            save.copied.set()
        self._pending = save, in_background(lambda: self._write(save, arrays), yielding=computes_here)
        if not save.copied.wait(save.deadline.left()):
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed on every process. Raises what went wrong with it, once."""
        if self._pending is None:
            return
        (save, future), self._pending = self._pending, None
        try:
            future.result(save.deadline.left() + _SLACK_SECONDS)
        except TimeoutError as error:
            self._buffers.clear()  # the thread that hangs may still read them
            raise _too_slow(save, self.directory) from error

    def check(self) -> None:
        """Raises what went wrong with the last save, if it has ended; does not wait."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def close(self) -> None:
        """Waits for the last save, removes what the policy lets go and gives the memory back."""
        try:
            self.wait()
            if peers.is_lead():
                self._expire()
        except OSError as error:
            raise _unwritable("checkpoints that the policy lets go were not removed.", error, self.directory) from error
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
        self.wait()
        steps = peers.agree(peers.new_round(), lambda: None, lambda _: self._steps(up_to), self._deadline())
        for step in reversed(steps):
            try:
                return load.restore_whole(self.directory / str(step), abstract_state, self._deadline())
            except DamagedError as error:
                self._damaged.add(step)
                if peers.is_lead():
                    print(f"skipped the checkpoint of step {step}: {error}", file=sys.stderr, flush=True)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} is whole.",
                got=f"steps {steps}, all damaged",
                rule="a run resumes from a whole checkpoint and never starts over by itself",
                fix="restore the folder from a copy, or give it another name to start over",
            )
        return None

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: what they hold was trained on what the run has put aside, or is corrupt."""
        self.wait()

        def remove(_: Any) -> None:
            for later in set(self.steps()) - set(self._steps(step)):
                files.delete(self.directory / str(later))

        try:
            peers.agree(peers.new_round(), lambda: None, remove, self._deadline())
        except OSError as error:
            raise _unwritable(f"checkpoints after step {step} were not removed.", error, self.directory) from error

    def _steps(self, up_to: int | None) -> list[int]:
        return [step for step in self.steps() if up_to is None or step <= up_to]

    def _deadline(self) -> Deadline:
        return Deadline(self.config.deadline_seconds)

    def _open(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in files.leftovers(self.directory):
                shutil.rmtree(path)
            files.write_durably(self.directory / ".writable", b"")
            (self.directory / ".writable").unlink()
        except OSError as error:
            raise _unwritable(f"checkpoints cannot be kept in {self.directory}.", error, self.directory) from error

    def _write(self, save: _Save, arrays: Mapping[str, jax.Array]) -> None:
        try:
            peers.agree(
                save.key, lambda: self._write_part(save, arrays), lambda parts: self._commit(save, parts), save.deadline
            )
        except UserError:
            if peers.is_lead():
                shutil.rmtree(self._saving(save.step), ignore_errors=True)
            raise
        finally:
            save.copied.set()

    def _write_part(self, save: _Save, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """This process's shards; returns the entries of its files and its share of the content hashes."""
        folder = self._saving(save.step) / describe.ARRAYS
        try:
            if peers.is_lead():
                self._expire()
                self._check_space(save)
            folder.mkdir(parents=True, exist_ok=True)
            writes = storage.begin_write(folder, arrays)
            save.copied.set()
            storage.end_write(writes, save.deadline)
            written = files.checksums(folder.parent, storage.written_by(folder, jax.process_index()))
            return {"files": written, "sums": save.hashing.sums()}
        except Exception as error:  # Orbax and TensorStore raise ValueError and bare Exception too
            raise self._failed(save, error) from error

    def _commit(self, save: _Save, parts: list[dict[str, Any]]) -> None:
        """By the lead, when all parts are written."""
        folder, final = self._saving(save.step), self.directory / str(save.step)
        entries = {name: files.FileEntry(*row) for part in parts for name, row in part["files"].items()}
        try:
            storage.merge(folder / describe.ARRAYS)
            rest = [path for path in folder.rglob("*") if path.relative_to(folder).as_posix() not in entries]
            entries |= files.checksums(folder, rest)
            hashes = hashing.total([part["sums"] for part in parts])
            _warn_of_unequal_copies(save.step, hashes)
            manifest.write(folder, describe.completed(save.draft, {n: copies[0] for n, copies in hashes.items()}, entries))
            if (final / files.MANIFEST).exists():
                files.delete(final)
            folder.rename(final)
            files.sync_folder(self.directory)
            self._damaged.discard(save.step)
        except Exception as error:  # as above
            raise self._failed(save, error) from error

    def _expire(self) -> None:
        """Before the next save's first byte, not after the last one's: the kernel writes again to the memory that held
        the expired files. Memory that it has to fetch anew cost a virtual machine 1.3 s per 500 MB, of the loop's CPUs.
        """
        for step in expired(set(self.steps()) - self._damaged, self.config):
            files.delete(self.directory / str(step))

    def _check_space(self, save: _Save) -> None:
        needed = describe.num_bytes(save.draft)
        if needed > (free := shutil.disk_usage(self.directory).free):
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")

    def _saving(self, step: int) -> Path:
        return self.directory / f"{step}{files.SAVING}"

    def _failed(self, save: _Save, error: Exception) -> CheckpointError:
        if isinstance(error, TimeoutError):
            return _too_slow(save, self.directory)
        return _unwritable(f"the checkpoint of step {save.step} was not saved.", error, self.directory)


def _warn_of_unequal_copies(step: int, hashes: Mapping[str, list[str]]) -> None:
    """Devices that should hold the same bits do not: a failing device, or kernels that are not deterministic."""
    unequal = [name for name, copies in hashes.items() if len({*copies}) > 1]
    if unequal:
        few = ", ".join(unequal[:8]) + (f" and {len(unequal) - 8} more" if len(unequal) > 8 else "")
        print(f"step {step}: the copies of {few} on different devices differ; the first is saved", file=sys.stderr, flush=True)


def _unwritable(what: str, error: Exception, directory: Path) -> CheckpointError:
    full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return CheckpointError(
        what,
        got=in_words(error),
        rule="the disk has room for one checkpoint more than are kept" if full else f"{directory} can be written",
        fix="free space, or a smaller checkpoint.keep_last" if full else "give write permission, or another --runs-dir",
    )


def _too_slow(save: _Save, directory: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {save.step} was not saved in time.",
        got=f"{save.deadline.seconds:.0f} s, and the disk under {directory} has not taken it",
        rule="a save ends within checkpoint.deadline_seconds",
        fix="a faster disk, or a larger checkpoint.deadline_seconds",
    )
