"""Makes the faults of faults.py happen in this process. It is imported where one is asked for, and by nothing else.

A fault acts when its phase begins. What has to fail elsewhere (a loader's thread, a save, the step's result) is put in
the place of what it spoils, from outside: the code that trains knows nothing of it.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxtrain.resilience import deafness
from jaxtrain.resilience.faults import Fault
from jaxtrain.resilience.tenure import VARIABLE

LATER = ("slow", "delay-network")  # those that act at every step from theirs on
ROOM = 64 << 20  # bytes that oom leaves


class Injector:
    """Called with every phase and the updates completed."""

    def __init__(self, waiting: list[Fault]):
        self._waiting, self._said = waiting, list[Fault]()
        if any(fault.kind == "flip-bit" for fault in waiting):
            _watch_steps()
            _watch_checkpoints()

    def __call__(self, phase: str, step: int) -> None:
        for fault in [fault for fault in self._waiting if phase == fault.phase and step >= fault.step]:
            if fault not in self._said:
                self._said.append(fault)
                print(f"fault: {fault.kind} at step {step}, phase {phase}", file=sys.stderr, flush=True)
            if fault.kind not in LATER:
                self._waiting.remove(fault)
            _ACTS[fault.kind](fault)


def _raise(fault: Fault) -> None:
    raise RuntimeError("injected fault")


def _exhaust(fault: Fault) -> None:
    """The kernel refuses more: what asks next gets a MemoryError or std::bad_alloc."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    kept = []
    while True:
        kept.append(bytearray(ROOM // 8))


def _spoil_rows(change: Callable[[dict[str, Any]], None]) -> None:
    """The next batch that is read passes through `change`."""
    from jaxtrain.data.dataset import Dataset

    rows = Dataset.rows

    def spoiled(*arguments: Any) -> dict[str, Any]:
        Dataset.rows = rows
        batch = rows(*arguments)
        change(batch)
        return batch

    Dataset.rows = spoiled


def _not_a_number(batch: dict[str, Any]) -> None:
    batch["weights"][:1] = float("nan")


def _before_next_save(act: Callable[[], None]) -> None:
    """`act` comes before the next checkpoint's first byte, on the thread that writes it."""
    from jaxtrain.checkpoint import storage

    begin = storage.begin_write

    def spoiled(*arguments: Any) -> Any:
        storage.begin_write = begin
        act()
        return begin(*arguments)

    storage.begin_write = spoiled


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _jump(fault: Fault) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + fault.seconds
    time.time_ns = lambda: now_ns() + int(1e9 * fault.seconds)


def _cut(fault: Fault) -> None:
    deafness.deafen(lambda: [os.getpid()], fault.seconds)
    if VARIABLE in os.environ:  # of several hosts: the supervisor cuts itself off, and its other trainers
        os.kill(os.getppid(), signal.SIGUSR1)


def obey(faults: Sequence[Fault], pids: Callable[[], tuple[str, list[int]]]) -> None:
    """In a host's supervisor: does what a trainer asks for that is to cut the whole host off, as long as the longest of
    these faults. `pids`: its trainers."""
    seconds = max((fault.seconds for fault in faults if fault.kind == "cut-network"), default=0.0)
    if seconds:
        signal.signal(signal.SIGUSR1, lambda *_: deafness.deafen(lambda: [os.getpid(), *pids()[1]], seconds))


_flips: list[Fault] = []  # of the state that the running step gives


def _flip(fault: Fault) -> None:
    _damage_file() if fault.where == "file" else _flips.append(fault)


def _watch_steps() -> None:
    """What the step gives passes through here from now on."""
    from jaxtrain.train import run

    compiled_ahead = run.compiled_ahead

    def watched(blueprint: Any) -> Any:
        compiled = compiled_ahead(blueprint)

        def step(*arguments: Any) -> Any:
            state, metrics = compiled(*arguments)
            while _flips:
                state = _flipped(state, _flips.pop().where)
            return state, metrics

        return step

    run.compiled_ahead = watched


def _flipped(state: Any, where: str) -> Any:
    """One bit of one number of this process's first copy. Of a gradient that was wrong for one device: of all that the
    update made of it, the parameter and its moments."""
    import jax

    leaves, tree = jax.tree.flatten(state)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    floats = [i for i, x in enumerate(leaves) if x.ndim and x.dtype == "float32" and x.addressable_shards[0].data.size]
    params = [i for i in floats if paths[i].startswith(".params")]
    moments = [i for i in floats if paths[i].startswith(".opt")]
    name = paths[params[0]].removeprefix(".params")
    chosen = {
        "params": params[:1],
        "opt": moments[:1],
        "grads": [i for i in params[:1] + moments if paths[i].endswith(name)],
    }[where]
    for i in chosen:
        leaves[i] = _with_a_bit(leaves[i])
        print(f"fault: a bit of {paths[i]} is another", file=sys.stderr, flush=True)
    return jax.tree.unflatten(tree, leaves)


def _with_a_bit(x: Any, bit: int = 12) -> Any:
    import jax
    import numpy as np

    parts = [np.array(shard.data) for shard in x.addressable_shards]
    parts[0].reshape(-1).view(np.uint32)[:1] ^= np.uint32(1 << bit)
    placed = [jax.device_put(part, shard.device) for part, shard in zip(parts, x.addressable_shards)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)


_checkpoints: list[Any] = []  # of this process, the newest last


def _watch_checkpoints() -> None:
    from jaxtrain.checkpoint.save import Checkpoints

    init = Checkpoints.__init__

    def watched(self: Checkpoints, *arguments: Any) -> None:
        init(self, *arguments)
        _checkpoints.append(self)

    Checkpoints.__init__ = watched


def _damage_file() -> None:
    """A bit in the middle of the largest file of the newest checkpoint."""
    if steps := _checkpoints[-1].steps():
        folder = _checkpoints[-1].directory / str(steps[-1])
        path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        print(f"fault: a bit of {path.name} of step {steps[-1]} is another", file=sys.stderr, flush=True)


_ACTS: dict[str, Callable[[Fault], None]] = {
    "kill": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda fault: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda fault: time.sleep(fault.seconds),
    "exception": _raise,
    "sigterm": lambda fault: os.kill(os.getpid(), signal.SIGTERM),
    "exit": lambda fault: os._exit(1),
    "hang": lambda fault: time.sleep(1e9),
    "kill-supervisor": lambda fault: os.kill(os.getppid(), signal.SIGKILL),
    "abort": lambda fault: os.abort(),
    "oom": _exhaust,
    "stall-data": lambda fault: _spoil_rows(lambda batch: time.sleep(1e9)),
    "stall-save": lambda fault: _before_next_save(lambda: time.sleep(fault.seconds)),
    "disk-full": lambda fault: _before_next_save(_no_room),
    "flip-bit": _flip,
    "nan": lambda fault: _spoil_rows(_not_a_number),
    "clock-jump": _jump,
    "cut-network": _cut,
    "delay-network": lambda fault: deafness.deafen(lambda: [os.getpid()], fault.seconds),
}
