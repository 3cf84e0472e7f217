"""Faults as values, and their injection into a running trainer at a step and phase. What follows is the supervisor's work."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

from jaxtrain.errors import ConfigError, closest

KINDS = {
    "kill": "SIGKILL",
    "stop": "SIGSTOP: it lives, and does nothing",
    "slow": "every update takes `seconds` longer",
    "exception": "Python code raises",
    "sigterm": "SIGTERM, as a cluster manager sends it",
    "exit": "the process ends by itself, with code 1 and no word",
    "hang": "Python code waits for ever",
    "kill-supervisor": "SIGKILL of the host's supervisor; its trainers die with it",
    "abort": "native code ends the process, as XLA does when it finds itself in a wrong state",
}
ENDING = ("kill", "stop", "exception", "exit", "hang", "abort")  # those that end a generation
LATER = ("slow",)  # those that act at every step from theirs on


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong where: in `process`, when it has completed `step` updates and enters `phase`, in `generation`."""

    kind: str
    process: int = 0
    step: int = 1
    phase: str = "step"
    generation: int = 1
    seconds: float = 1.0  # of slow


def parse(text: str) -> Fault:
    """`kill:process=1,step=30`. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"there is no fault {kind!r}.", got=text, fix=closest(kind, KINDS))
    kinds = {field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(Fault)}
    values = {}
    for pair in filter(None, rest.split(",")):
        name, _, value = pair.partition("=")
        if name not in kinds or name == "kind":
            raise ConfigError(f"a fault has no {name!r}.", got=text, fix=closest(name, kinds))
        try:
            values[name] = kinds[name](value)
        except ValueError:
            rule = f"{name} is of type {kinds[name].__name__}"
            raise ConfigError(f"{name} cannot be {value!r}.", got=text, rule=rule) from None
    return Fault(kind=kind, **values)


def as_flag(fault: Fault) -> str:
    """The text that `parse` reads."""
    values = [f"{name}={value}" for name, value in asdict(fault).items() if name != "kind"]
    return f"{fault.kind}:{','.join(values)}"


def environment(faults: list[Fault], generation: int) -> dict[str, str]:
    """What tells the trainers of a generation of their faults."""
    mine = [asdict(fault) for fault in faults if fault.generation == generation]
    return {"JAXTRAIN_FAULTS": json.dumps(mine)} if mine else {"JAXTRAIN_FAULTS": ""}


def mine(env: Mapping[str, str] = os.environ) -> Callable[[str, int], None] | None:
    """What a trainer calls at every phase: None where nothing is to go wrong."""
    index = int(env.get("JAXTRAIN_PROCESS_ID", "0"))
    given = [Fault(**fault) for fault in json.loads(env.get("JAXTRAIN_FAULTS") or "[]")]
    waiting = [fault for fault in given if fault.process == index]
    return _Injector(waiting) if waiting else None


class _Injector:
    def __init__(self, waiting: list[Fault]):
        self._waiting = waiting

    def __call__(self, phase: str, step: int) -> None:
        for fault in [fault for fault in self._waiting if phase == fault.phase and step >= fault.step]:
            if fault.kind not in LATER:
                self._waiting.remove(fault)
                print(f"fault: {fault.kind} at step {step}, phase {phase}", file=sys.stderr, flush=True)
            _ACTS[fault.kind](fault)


def _raise(fault: Fault) -> None:
    raise RuntimeError("injected fault")


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
}
