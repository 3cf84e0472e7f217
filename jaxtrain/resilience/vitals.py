"""What a host's machine says before it fails: disk, memory, GPUs; and a run that slows down. It complains, and ends nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import ModuleType

from jaxtrain.background import in_background

EVERY_S = 5.0
ANSWER_S = 10.0  # for a disk or a driver
FREE_DISK = 0.02  # of the run folder's disk
FREE_MEMORY = 0.05  # of the host's: below that the kernel soon kills
APART = ("start", "prepare", "restore", "compile", "evaluate", "save", "end")  # phases that are no steps
WINDOW_S = 30.0  # over which a pace is taken
SLOWER = 1.5  # than the median of the windows so far
WINDOWS = 64
ABSENT = (9, 12)  # NVML's errors: no driver is loaded, there is no library
UNASKED = (3, 13)  # this card does not count it, or this driver does not know the question
DISK = "disk"  # a kind of complaint that all hosts of a job share, as they share the run folder

Complaints = Iterator[tuple[str, str]]  # the kind and, where there are several, the device; in words


class Vitals:
    """Looks at this host's machine beside whoever asks, for a disk or a driver may never answer.

    `gpus`: NVML; by default pynvml, where it is installed.
    """

    def __init__(self, run_dir: Path, memory: str = "/proc/meminfo", gpus: ModuleType | None = None):
        self._looks: dict[str, Callable[[], Complaints]] = {
            f"the disk of {run_dir}": lambda: _disk(run_dir),
            memory: lambda: _memory(Path(memory)),
            "the GPUs' driver": lambda: _gpus(gpus),
        }
        self._asked: dict[str, tuple[float, Future[list[tuple[str, str]]]]] = {}
        self._said: set[str] = set()

    def complaints(self) -> Iterator[str]:
        """In words, and of each kind and device once, what `look` gives."""
        for kind, line in self.look():
            if kind not in self._said:
                self._said.add(kind)
                yield line

    def look(self) -> Complaints:
        """What was close to its limit or reported an error when it was last looked at; looks again."""
        for name, look in self._looks.items():
            since, found = self._asked.get(name, (0.0, None))
            if found and not found.done():
                if time.monotonic() > since + ANSWER_S:
                    yield f"{name}: no answer", f"{name} does not answer"
                continue
            yield from found.result() if found else ()
            self._asked[name] = time.monotonic(), in_background(partial(_looked, name, look))


class Pace:
    """Seconds per step, window by window; says so when they grow."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._windows: deque[float] = deque(maxlen=WINDOWS)

    def restart(self) -> None:
        """What comes now is no window: a new generation, an evaluation, a save."""
        self._start = None

    def at(self, now: float, step: int) -> str:
        """Takes note that `step` updates are done; a complaint, or nothing."""
        if self._start is None:
            self._start = now, step
        begin, first = self._start
        if now - begin < WINDOW_S or step == first:
            return ""
        seconds, usual = (now - begin) / (step - first), self._usual()
        self._start = now, step
        self._windows.append(seconds)
        if usual is None or seconds <= SLOWER * usual:
            return ""
        return f"steps take {seconds:.3g} s, {seconds / usual:.1f} times as long as usual ({usual:.3g} s)"

    def _usual(self) -> float | None:
        return statistics.median(self._windows) if len(self._windows) >= 3 else None


def _looked(name: str, look: Callable[[], Complaints]) -> list[tuple[str, str]]:
    try:
        return list(look())
    except (OSError, LookupError, ValueError) as error:  # as a file server that has lost its disk
        return [(f"{name}: error", f"{name} cannot be looked at: {error}")]


def _disk(run_dir: Path) -> Complaints:
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    if usage.free < FREE_DISK * usage.total:
        yield DISK, f"the disk of {run_dir} has {usage.free / 1e9:.1f} GB left of {usage.total / 1e9:.0f} GB"


def _memory(path: Path) -> Complaints:
    if not path.exists():
        return
    rows = dict(line.split(":") for line in path.read_text().splitlines() if ":" in line)
    free, total = (int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    if free < FREE_MEMORY * total:
        yield "memory", f"{os.uname().nodename} has {free / 1e6:.1f} GB of memory left of {total / 1e6:.0f} GB"


def _gpus(nvml: ModuleType | None) -> Complaints:
    """Uncorrected memory errors since the driver was loaded, rows that could not be replaced, and cards that are lost."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        if error.value not in ABSENT:
            yield "driver", f"the GPUs' driver answers with an error: {error}"
        return
    for index in range(count):
        try:
            yield from _gpu(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError as error:
            yield f"GPU {index}", f"GPU {index} answers with an error: {error}"


def _gpu(nvml: ModuleType, index: int, device: object) -> Complaints:
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    if errors := _answer(nvml, lambda: nvml.nvmlDeviceGetTotalEccErrors(device, kind, since)):
        yield f"GPU {index}: errors", f"GPU {index} has {errors} uncorrected memory errors"
    if _answer(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(device)[3]):
        yield f"GPU {index}: rows", f"GPU {index} could not replace a bad row of its memory"


def _answer(nvml: ModuleType, question: Callable[[], int]) -> int:
    """0 from a card without error correction."""
    try:
        return question()
    except nvml.NVMLError as error:
        if error.value in UNASKED:
            return 0
        raise
