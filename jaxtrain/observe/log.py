"""logs/process_N.log: what this process's libraries log, how it ended, and its stacks on a crash or on SIGUSR1."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from jaxtrain.errors import RunError


@contextmanager
def process_log(run_dir: Path, index: int) -> Iterator[None]:
    """Within the block this process appends to its own file; `kill -USR1 PID` adds the stacks of all its threads.

    The stacks are written by C code that needs no lock of Python's, so a hung process still gives them. A line that a
    full disk refuses is left out: it must not hide how the run ended. Raises RunError where there can be no file.
    """
    with _opened(run_dir / "logs" / f"process_{index}.log") as file:
        handler = logging.StreamHandler(file)
        handler.handleError = lambda record: None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        _line(file, "started")
        try:
            yield
        except BaseException as error:
            _line(file, f"{type(error).__name__}: {error}")
            raise
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            faulthandler.disable()
            logging.getLogger().removeHandler(handler)
            _line(file, "ended")


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)  # a buffer would be written again, and fail again, at the end
        return io.TextIOWrapper(file, encoding="utf-8", write_through=True)
    except OSError as error:
        fix = "free space or give write permission, then run the same command again"
        raise RunError(f"cannot write {path}.", got=error.strerror, fix=fix) from error


def _line(file: TextIO, text: str) -> None:
    with contextlib.suppress(OSError):
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
