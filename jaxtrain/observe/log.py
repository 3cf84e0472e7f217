"""logs/process_N.log: what this process's libraries log, how it ended, and its stacks on a crash or on SIGUSR1."""

from __future__ import annotations

import faulthandler
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def process_log(run_dir: Path, index: int) -> Iterator[None]:
    """Within the block this process appends to its own file; `kill -USR1 PID` adds the stacks of all its threads.

    The stacks are written by C code that needs no lock of Python's, so a hung process still gives them.
    """
    path = run_dir / "logs" / f"process_{index}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", buffering=1) as file:
        handler = logging.StreamHandler(file)
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


def _line(file, text: str) -> None:
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
