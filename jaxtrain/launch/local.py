"""`jaxtrain launch`: several trainers on this machine's CPU, as a cluster would start them. It trains nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields
from typing import IO

from jaxtrain.errors import ConfigError, closest

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 10.0  # for the others to end by themselves after one has failed, and again between SIGTERM and SIGKILL
STOP_S = 300.0  # for a last checkpoint after a signal to the launcher
FINISH_S = 600.0  # for the others to end after one has ended well
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain launch`; they come before CONFIG."""

    processes: int = 2
    devices_per_process: int = 1  # fake CPU devices of each process


def main(argv: list[str]) -> int:
    """jaxtrain launch [--processes N] [--devices-per-process N] CONFIG [flags and overrides of jaxtrain train]"""
    if "-h" in argv or "--help" in argv:
        flags = "\n".join(f"  --{f.name.replace('_', '-')} N (default: {f.default})" for f in fields(Options))
        print(f"usage: {main.__doc__}\n\n{flags}")
        return 0
    options, rest = parse(argv)
    command = [sys.executable, "-m", "jaxtrain", "train", rest[0]]
    return launch([*command, "--fake-devices", str(options.devices_per_process), *rest[1:]], options.processes)


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The launcher's own flags, which come first, and what follows them: CONFIG and the rest. Raises ConfigError."""
    words, values = list(argv), {}
    known = {f.name for f in fields(Options)}
    while words and words[0].startswith("--"):
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in known:
            names = [f"--{other.replace('_', '-')}" for other in known]
            raise ConfigError(
                f"jaxtrain launch has no flag {flag}.",
                rule="its own flags come before CONFIG, those of jaxtrain train after it",
                fix=closest(flag, names),
            )
        values[name] = _count(flag, value if equals else words.pop(0) if words else "")
    if not words:
        got, fix = " ".join(argv) or "nothing", "a file such as configs/quickstart.py"
        raise ConfigError("jaxtrain launch needs a CONFIG.", got=got, rule=main.__doc__ or "", fix=fix)
    return Options(**values), words


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag} needs a number.", got=repr(text), rule="a whole number, at least 1")
    return int(text)


def launch(command: list[str], processes: int, grace_s: float = GRACE_S) -> int:
    """Runs `command` in `processes` processes that find each other; returns 0, or the first exit code that is not.

    Each output line is headed by its process, `[p0]`. SIGINT and SIGTERM go on to all, a second one kills. When one
    fails the others have `grace_s`, then SIGTERM, then SIGKILL. None outlives the launcher, however it ends (on Linux).
    """
    port = _free_port()
    with _Group(grace_s) as group:
        for index in range(processes):
            group.add(_spawn(command, _environment(port, processes, index)))
        group.pump()
        return group.wait()


class _Group:
    """The trainer processes, their output and their end."""

    def __init__(self, grace_s: float):
        self._grace_s, self._children = grace_s, []
        self._pumps: list[threading.Thread] = []
        self._signals = 0
        self._end = float("inf")  # when whoever still runs is told to stop

    def __enter__(self) -> _Group:
        self._old = {number: signal.signal(number, self._forward) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            _signal(child, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=self._grace_s)
        for pump in self._pumps:
            pump.join(timeout=5.0)  # a grandchild that holds the pipe does not hold the launcher
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def add(self, child: subprocess.Popen[bytes]) -> None:
        self._children.append(child)

    def pump(self) -> None:
        """Copies all output from now on. After the last fork: threads and forks do not mix."""
        lock = threading.Lock()
        for index, child in enumerate(self._children):
            for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                thread = threading.Thread(target=_copy, args=(source, sink, f"[p{index}] ", lock), daemon=True)
                thread.start()
                self._pumps.append(thread)

    def wait(self) -> int:
        """Until all have ended, by themselves or at a deadline; the exit code of the first that failed."""
        failed, running = 0, list(self._children)
        while running:
            for child in [child for child in running if child.poll() is not None]:
                running.remove(child)
                failed = failed or self._ended(child, bool(running))
            if running and time.monotonic() > self._end:
                self._stop(running)
                return failed or 1
            time.sleep(POLL_S)
        return failed

    def _ended(self, child: subprocess.Popen[bytes], others: bool) -> int:
        """Takes note of an exit code, as a shell counts it, and sets the deadline for the others."""
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        limit = STOP_S if self._signals else self._grace_s if code else FINISH_S
        self._end = min(self._end, time.monotonic() + limit)
        if code and others:
            _say(f"process {self._children.index(child)} ended with {code}; the others have {limit:.0f} s")
        return code

    def _stop(self, running: list[subprocess.Popen[bytes]]) -> None:
        """SIGTERM, then SIGKILL to those that are left."""
        _say(f"ending {len(running)} processes that did not end by themselves")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in running:
                _signal(child, number)
            end = time.monotonic() + self._grace_s
            while time.monotonic() < end and any(child.poll() is None for child in running):
                time.sleep(POLL_S)

    def _forward(self, number: int, frame: object) -> None:
        self._signals += 1
        self._end = min(self._end, time.monotonic() + STOP_S)
        for child in self._children:
            _signal(child, number if self._signals == 1 else signal.SIGKILL)


def _spawn(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that a terminal's Ctrl-C comes once, through the launcher."""
    pipe, dying = subprocess.PIPE, functools.partial(_die_with, os.getpid())
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True, preexec_fn=dying
    )


def _environment(port: int, processes: int, index: int) -> dict[str, str]:
    ours = {
        "JAXTRAIN_COORDINATOR": f"127.0.0.1:{port}",
        "JAXTRAIN_NUM_PROCESSES": str(processes),
        "JAXTRAIN_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | ours


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _copy(source: IO[bytes], sink: IO[str], head: str, lock: threading.Lock) -> None:
    for line in source:
        with lock, contextlib.suppress(BrokenPipeError):  # a reader that left does not stop the run
            sink.write(f"{head}{line.decode(errors='replace').rstrip()}\n")
            sink.flush()


def _say(line: str) -> None:
    print(f"[launch] {line}", file=sys.stderr, flush=True)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """To the child and what it started."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def _die_with(parent: int) -> None:
    """Between fork and exec: the kernel will kill this process when its parent dies. prctl(2); PR_SET_PDEATHSIG = 1."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
