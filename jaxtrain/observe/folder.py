"""The run folder: who owns it, which config it belongs to, what it ran on. Metrics and checkpoints are others' files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from jaxtrain.checkpoint.files import numbered
from jaxtrain.config import FREE_TO_CHANGE, RunConfig, differences, encode
from jaxtrain.errors import ConfigError, HeldError, RunError


class RunFolder:
    """The lead process's hold on runs/NAME: locked while it lives, whatever ends it.

    Raises HeldError where another live process holds it, RunError where it cannot be written, ConfigError where it belongs
    to another config and `accept_changes` is not given; an accepted change is kept beside the first config, never over it. Where the
    run exists, what it can do without is tried only: a disk that is full must not keep it from going on.
    """

    def __init__(self, config: RunConfig, environment: dict[str, Any], accept_changes: bool = False):
        self.path = config.run_dir
        try:
            with ExitStack() as undo:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context(open(self.path / "lock", "a+"))
                _lock(self._lock, self.path)
                exists = (self.path / "config.json").exists()
                self._keep_config(encode(config), accept_changes)
                _write(self.path / "environment.json", environment, needed=not exists)
                undo.pop_all()
        except OSError as error:
            raise RunError(
                f"cannot write the run folder {self.path}.",
                got=error.strerror or str(error),
                fix="free space, give write permission, or choose another --runs-dir",
            ) from error

    def close(self) -> None:
        self._lock.close()

    def _keep_config(self, new: dict, accept_changes: bool) -> None:
        kept = _config_files(self.path)
        if not kept or not numbered(self.path / "checkpoints"):  # nothing yet that could be continued
            another = not kept or _is_another(kept[-1], new)
            if kept and another:
                self._put_aside(kept)
            for later in kept[1:]:
                later.unlink(missing_ok=True)
            return _write(self.path / "config.json", new, needed=another)
        changed = differences(_read_json(kept[-1]), new)
        if not changed:
            return None
        strict = _strict(changed)
        if strict and not accept_changes:
            raise ConfigError(
                f"{self.path} belongs to a run of another config.",
                got=_table(strict),
                rule="a run folder continues one config",
                fix="another --name, or --accept-changes to continue this run with the new config",
            )
        print(f"continuing {self.path} with a changed config:\n        {_table(changed)}", flush=True)
        return _write(self.path / f"config.{len(kept)}.json", new, needed=bool(strict))

    def _put_aside(self, kept: list[Path]) -> None:
        """What a run of another config has left here, where there is more of it than the config."""
        rows = self.path / "metrics.jsonl"
        if rows.exists() and rows.stat().st_size:
            aside = next(path for n in count(1) if not (path := self.path / f"before.{n}").exists())
            aside.mkdir()
            for path in (rows, *kept):
                os.replace(path, aside / path.name)
            print(f"{self.path} starts over with another config; what was trained before is in {aside.name}", flush=True)


def _strict(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {path: pair for path, pair in changed.items() if path.split(".")[0] not in FREE_TO_CHANGE}


def _is_another(path: Path, new: dict) -> bool:
    """Whether the config that is kept there would stand for another run than this, or for none."""
    try:
        return bool(_strict(differences(json.loads(path.read_text()), new)))
    except ValueError:
        return True


def _table(changed: dict[str, tuple[Any, Any]]) -> str:
    return "\n        ".join(f"{path}: {old!r} -> {now!r}" for path, (old, now) in changed.items())


def _config_files(run_dir: Path) -> list[Path]:
    """config.json, then config.1.json, ... in the order of their writing."""
    later = [path for path in run_dir.glob("config.*.json") if path.name.split(".")[1].isdecimal()]
    later.sort(key=lambda path: int(path.name.split(".")[1]))
    first = run_dir / "config.json"
    return [first, *later] if first.exists() else []


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged.",
            got=str(error),
            rule="it is compared with the config that is to continue the run",
            fix=f"remove it and it is written anew; jaxtrain checkpoint show {path.parent} has what was trained with",
        ) from error


def _lock(file: TextIO, run_dir: Path) -> None:
    """Takes a lock that the kernel drops with the process. The file's text names the holder."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HeldError(
            f"the run folder {run_dir} is in use by a live process.",
            got=_name(file),
            rule="one run writes one folder",
            fix="end that process, or choose another --name",
        ) from error
    file.truncate(0)
    with contextlib.suppress(OSError):  # the lock holds without a name; past the buffer, which closing would write again
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def holder(run_dir: Path) -> str:
    """The process that writes the run folder now; "" where there is none."""
    try:
        with open(run_dir / "lock", "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _name(file)
    except FileNotFoundError:
        pass
    return ""


def _name(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "a holder that has not written its name yet"


def write_json(path: Path, value: Any) -> None:
    """Atomic: a reader sees the old file or the new one."""
    data, fresh = json.dumps(value, indent=1).encode() + b"\n", path.with_suffix(".tmp")
    if path.exists() and path.read_bytes() == data:
        return
    try:
        fresh.write_bytes(data)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _write(path: Path, value: Any, needed: bool) -> None:
    """As `write_json`; what is not needed and cannot be written is said, and left as it is."""
    try:
        write_json(path, value)
    except OSError as error:
        if needed:
            raise
        with contextlib.suppress(OSError):  # stderr may be a file on the same disk
            print(f"{path} is not written ({error.strerror or error}); the run goes on", file=sys.stderr, flush=True)
