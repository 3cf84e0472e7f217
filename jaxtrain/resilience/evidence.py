"""Stacks and connections of trainers that hang, gathered within seconds, while they live, into the run folder. It judges nobody."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain.background import Deadline, within
from jaxtrain.resilience.links import Link, links
from jaxtrain.resilience.say import as_host
from jaxtrain.resilience.verdict import Status

GATHER_S = 7.0  # for the stacks
WRITE_S = 1.0  # for the files
NATIVE_S = 2.0  # for native stacks, which take a second of CPU time each, and which no verdict needs
_OURS = re.compile(r"^\s+(\S+) \((.*?):(\d+)\)$")  # a frame as py-spy prints it: function (file:line)


def gather(statuses: Sequence[Status], folder: Path) -> list[Status]:
    """The statuses, with frames and links. Of each that lives pN.txt has state, connections, Python and native stacks;
    says so where the folder does not take it."""
    end = time.monotonic() + GATHER_S
    running = [status for status in statuses if status.code is None]
    plain = {s.index: _spy(s.pid, "--nonblocking") for s in running}
    texts = {index: _output(process, end) for index, process in plain.items()}
    connected = {s.index: links(s.pid) for s in running}
    native = {s.index: _spy(s.pid, "--native") for s in running if not s.stopped}
    end = min(end, time.monotonic() + NATIVE_S)
    files = {}
    for status in running:
        deep = _output(native.get(status.index), end)
        parts = [_about(status), _stuck(connected[status.index]), _kernel(status.pid), texts[status.index], deep]
        files[f"p{status.index}.txt"] = "\n\n".join(filter(None, parts)) + "\n"
    _keep(folder, files)
    told = lambda s: {"frame": _frame(texts.get(s.index, "")), "links": connected.get(s.index, ())}  # noqa: E731
    return [dataclasses.replace(s, **told(s)) for s in statuses]


def _keep(folder: Path, files: Mapping[str, str]) -> None:
    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)

    try:
        within(Deadline(WRITE_S), write)
    except OSError as error:
        as_host(f"the evidence is not kept: {error}")


def _about(status: Status) -> str:
    beat = status.beat
    told = f"step {beat.step}, phase {beat.phase} since {beat.age():.1f} s, sequence {beat.sequence}" if beat else "no beat"
    return f"{status.place}, pid {status.pid}: {told}{', stopped' if status.stopped else ''}"


def _stuck(ends: Sequence[Link]) -> str:
    return "\n".join(f"  from {end.local} to {end.remote} sent {end.resends} times again" for end in ends if end.stuck)


def _kernel(pid: int) -> str:
    """What the kernel says of its threads: state, and where they sleep."""
    rows = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        try:
            name, state = (task / "comm").read_text().strip(), (task / "stat").read_text().rpartition(")")[2].split()[0]
            rows.append(f"  thread {task.name} {name:<16} {state} {(task / 'wchan').read_text().strip()}")
        except OSError:
            continue  # it ended meanwhile
    return "\n".join(rows)


def _spy(pid: int, how: str) -> subprocess.Popen[str] | None:
    """py-spy, which reads another process's memory: it needs nothing of a process that hangs."""
    found = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if found is None:
        return None
    pipe = subprocess.PIPE
    return subprocess.Popen([found, "dump", how, "--pid", str(pid)], stdout=pipe, stderr=subprocess.STDOUT, text=True)


def _output(process: subprocess.Popen[str] | None, end: float) -> str:
    if process is None:
        return ""
    try:
        return process.communicate(timeout=max(0.1, end - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def _frame(text: str) -> str:
    """Of the main thread, the innermost frame that is not jax's or the standard library's: `get (loader.py:72)`."""
    main = text.partition('"MainThread"')[2].partition("\nThread ")[0]
    frames = [match.groups() for line in main.splitlines() if (match := _OURS.match(line))]
    own = [frame for frame in frames if frame[1].startswith("jaxtrain/") or "/jaxtrain/" in frame[1]]
    return "{} ({}:{})".format(*(own or frames)[0]) if frames else ""
