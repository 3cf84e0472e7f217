"""What is said of saves that fail, or that succeed and show something strange. It decides nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.manifest import in_words
from jaxtrain.cluster import few
from jaxtrain.errors import CheckpointError

_ROOM = ("the disk has room for one checkpoint more than are kept", "free space, or a smaller checkpoint.keep_last")
_IN_PLACE = ("{} can be a folder", "remove the file in its way, or another --runs-dir")
_FILES = ("a process may have the files of a checkpoint open", "a larger ulimit -n")
_FIXES = {  # TensorStore's errors have the system's words, and no number
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EEXIST: _IN_PLACE,
    errno.ENOTDIR: _IN_PLACE,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EACCES: ("{} can be written", "give write permission, or another --runs-dir"),
}


def leave_out_echoes() -> None:
    """No log, warning or traceback of Orbax's and TensorStore's for what they also raise, and then is said here.

    When a write fails Orbax closes the event loop on which others still end; nothing else here has coroutines.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    say = sys.unraisablehook
    sys.unraisablehook = lambda found: None if _is_echo(found) else say(found)


def _is_echo(found: Any) -> bool:
    """Of a loop that is closed, or that could not be opened for want of files."""
    return str(found.exc_value) == "Event loop is closed" or found.object is asyncio.BaseEventLoop.__del__


def warn_of_unequal_copies(step: int, hashes: Mapping[str, list[str]]) -> None:
    """Devices that should hold the same bits do not: a failing device, or kernels that are not deterministic."""
    unequal = [name for name, copies in hashes.items() if len({*copies}) > 1]
    if unequal:
        what = f"the copies of {few(unequal)} on different devices differ; the first is saved"
        print(f"step {step}: {what}", file=sys.stderr, flush=True)


def failed(error: CheckpointError, count: int, patience: int) -> None:
    """Loud, as nothing else will stop for it yet."""
    goes_on = f"the run goes on until {patience} have failed in a row (checkpoint.patience)"
    print(f"SAVE FAILED, {count} in a row; {goes_on}: {error}", file=sys.stderr, flush=True)


def unusable(what: str, error: Exception, directory: Path, seconds: float) -> CheckpointError:
    """A folder that cannot be written, has no room, or does not answer."""
    if isinstance(error, TimeoutError):
        got, rule = f"no answer from {directory} in {seconds:.0f} s", "the file system answers within checkpoint.deadline_seconds"
        return CheckpointError(what, got=got, rule=rule, fix="look at the file system and its server, or another --runs-dir")
    found = {getattr(error, "errno", None)} | {number for number in _FIXES if os.strerror(number) in str(error)}
    rule, fix = next((row for number, row in _FIXES.items() if number in found), _FIXES[errno.EACCES])
    return CheckpointError(what, got=in_words(error), rule=rule.format(directory), fix=fix)


def too_slow(step: int, directory: Path, seconds: float) -> CheckpointError:
    """A save that was given up at its deadline."""
    return CheckpointError(
        f"the checkpoint of step {step} was not saved in time.",
        got=f"{seconds:.0f} s, and the disk under {directory} has not taken it",
        rule="a save ends within checkpoint.deadline_seconds",
        fix="a faster disk, or a larger checkpoint.deadline_seconds",
    )


def not_begun(step: int, waiting: Mapping[int, str]) -> CheckpointError:
    """`waiting`: by process, what it still writes."""
    return CheckpointError(
        f"the checkpoint of step {step} was not begun.",
        got=f"process {few(list(waiting))} is still busy with {next(iter(waiting.values()))}",
        rule="one save at a time",
        fix="a faster disk, or a larger checkpoint.every",
    )
