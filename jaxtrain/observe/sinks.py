"""Where metrics rows go, as values: console, JSONL, TensorBoard, Weights & Biases. A sink only writes what it is given."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from io import FileIO
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.cluster import few
from jaxtrain.errors import RunError

Value = float | int | list["Value"]  # a list holds one value of each of many: of each expert, by layer
Row = dict[str, Value]


class Writer(Protocol):
    """An open sink of the lead process."""

    def write(self, row: Row) -> None:
        """One row: `step` and metrics named "group/metric"."""

    def flush(self) -> None:
        """Everything written so far survives a crash of the machine."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Console:
    """One dense line per row on stdout, and a progress bar with the time left where stdout is a terminal."""

    def open(self, run_dir: Path, first_step: int, steps: int) -> Writer:
        from jaxtrain.observe.console import ConsoleWriter

        return ConsoleWriter(first_step, steps)


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """metrics.jsonl: one JSON object per row, floats as the shortest text that reads back to the same fp32 value."""

    def open(self, run_dir: Path, first_step: int, steps: int) -> Writer:
        return JsonlWriter(run_dir / "metrics.jsonl", first_step)


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files in tensorboard/; on a resume, events after the restored step are purged. Lists are left to the JSONL."""

    def open(self, run_dir: Path, first_step: int, steps: int) -> Writer:
        return TensorBoardWriter(run_dir / "tensorboard", first_step)


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases, where the package is installed (the extra `wandb`). The run id is the run folder's name."""

    project: str
    entity: str | None = None

    def open(self, run_dir: Path, first_step: int, steps: int) -> Writer:
        try:
            import wandb
        except ImportError as error:
            raise RunError(
                "the sink Wandb needs the package wandb, which is not installed.",
                fix="pip install 'jaxtrain[wandb]', or drop the sink from the config",
            ) from error
        where = dict(project=self.project, entity=self.entity, id=run_dir.name, resume="allow", dir=run_dir)
        try:
            return WandbWriter(wandb.init(**where))
        except Exception as error:  # the library's own, and those of what it calls
            if isinstance(error, OSError) and error.errno:
                raise  # a disk's, which the recorder waits for
            raise RunError(
                "wandb.init failed.",
                got=f"{type(error).__name__}: {error}",
                rule="the sink Wandb has a key, and reaches the service",
                fix="`wandb login`, or WANDB_MODE=offline in the environment, or leave the sink out of the config",
            ) from error


Sink = Console | Jsonl | TensorBoard | Wandb


class JsonlWriter:
    """Appends rows; opening cuts rows after `first_step` and a torn last line, which a killed process may have left.

    Lines before that which are no rows stay, and are said: a log is no reason to stop a run.
    """

    def __init__(self, path: Path, first_step: int):
        self._file = open(path, "ab", buffering=0)
        lines = whole_lines(path)
        kept = list(takewhile(lambda row: row is None or row["step"] <= first_step, (row_of(line) for line in lines)))
        self._file.truncate(sum(len(line) + 1 for line in lines[: len(kept)]))  # in place: a full disk has room for that
        if damaged := [number for number, row in enumerate(kept, 1) if row is None]:
            with contextlib.suppress(OSError):  # stderr may be a file on the same disk
                print(f"{path}: line {few(damaged)} cannot be read, and stays as it is", file=sys.stderr, flush=True)

    def write(self, row: Row) -> None:
        append(self._file, json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def append(file: FileIO, data: bytes) -> None:
    """One write: whole, or an error and nothing; torn where the process is killed in it, which the next run leaves out."""
    end = os.fstat(file.fileno()).st_size
    if (written := file.write(data)) < len(data):
        if written:
            os.ftruncate(file.fileno(), end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole_lines(path: Path) -> list[bytes]:
    """Of a file that may not exist, without what was torn off at its end."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def row_of(line: bytes, key: str = "step") -> Row | None:
    """The JSON object of a line, which has a whole number at `key`; None where a line is no such row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get(key), int) else None


def read_rows(path: Path, key: str = "step") -> list[Row]:
    """The rows of a metrics.jsonl, or of another such file; lines that are no rows are left out."""
    return [row for line in whole_lines(path) if (row := row_of(line, key)) is not None]


class TensorBoardWriter:
    """Appends an event per row, in TFRecord framing. tensorboardX's own writer is a thread: on a full disk it dies with
    a traceback, and the loop hangs when its queue is full."""

    def __init__(self, directory: Path, first_step: int):
        from tensorboardX.proto.event_pb2 import SessionLog

        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = open(directory / name, "ab", buffering=0)
        try:
            self._append(file_version="brain.Event:2")
            self._append(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # purges from there on
        except OSError:  # it is opened again, as another file
            if not os.fstat(self._file.fileno()).st_size:
                (directory / name).unlink()
            self._file.close()
            raise

    def write(self, row: Row) -> None:
        scalars = {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        self._append(step=row["step"], summary={"value": values})

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=time.time(), **event).SerializeToString()
        size = struct.pack("<Q", len(data))
        crcs = (struct.pack("<I", masked_crc32c(part)) for part in (size, data))
        append(self._file, size + next(crcs) + data + next(crcs))


class WandbWriter:
    def __init__(self, run: Any):
        self._run = run

    def write(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def flush(self) -> None:
        """Its own process sends and keeps what it was given."""

    def close(self) -> None:
        self._run.finish()
