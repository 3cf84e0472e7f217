"""Faults as values: what goes wrong where and when, as text and back. How they come about is injection.py."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

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
    "oom": "memory that it asks for is refused",
    "stall-data": "the loader's thread waits for ever for its source",
    "stall-save": "the next save's files are written `seconds` later",
    "disk-full": "the next save finds no room",
    "flip-bit": "a bit changes, `where`: params, opt, grads, or file (of the newest checkpoint)",
    "nan": "an example that is read next has a weight that is no number",
    "clock-jump": "the wall clock goes `seconds` ahead",
    "cut-network": "nothing comes through to it for `seconds`; of several hosts, to all trainers of its host and their supervisor",
    "delay-network": "in each step what is sent to it for `seconds` is lost, and comes when it is sent again, 0.2 s later",
}
HANGING = ("stop", "hang", "stall-data", "cut-network")
ENDING = ("kill", "exception", "exit", "abort", "oom", *HANGING)  # those that end a generation
TOLERATED = ("slow", "stall-save", "disk-full", "clock-jump", "delay-network")  # those with which it goes on
LEAVING = ("sigterm", "kill-supervisor")  # those that end the launch: the same command goes on
PHASES = ("data", "step", "metrics")  # through which every update goes
OTHER_PHASES = ("prepare", "restore", "compile", "evaluate", "snapshot", "save", "end")
SECONDS = {"cut-network": 600.0, "delay-network": 0.2}  # of the others: 1
WHERE = ("params", "opt", "grads", "file")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong where: in `process`, when it has completed `step` updates and enters `phase`, in `generation`."""

    kind: str
    process: int | None = None  # None, here and below: left to `placed`
    step: int | None = None
    phase: str | None = None
    generation: int = 1
    seconds: float = 1.0  # of slow, stall-save, clock-jump and the network's
    where: str = "params"  # of flip-bit
    seed: int = 0  # what is left to `placed` is drawn with it; 0: process 0, step 1, phase step


def described() -> str:
    """The kinds, a line each."""
    return "\n".join(f"  {kind:<{max(map(len, KINDS)) + 2}}{what}" for kind, what in KINDS.items())


def parse(text: str) -> Fault:
    """`kill:process=1,step=30`, `stop:seed=7`. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"there is no fault {kind!r}.", got=text, fix=closest(kind, KINDS))
    types = {"int": int, "float": float, "str": str}
    kinds = {field.name: types[field.type.removesuffix(" | None")] for field in fields(Fault)}
    values = {"seconds": SECONDS.get(kind, 1.0)}
    for pair in filter(None, rest.split(",")):
        name, _, value = pair.partition("=")
        if name not in kinds or name == "kind":
            raise ConfigError(f"a fault has no {name!r}.", got=text, fix=closest(name, kinds))
        try:
            values[name] = kinds[name](value)
        except ValueError:
            rule = f"{name} is of type {kinds[name].__name__}"
            raise ConfigError(f"{name} cannot be {value!r}.", got=text, rule=rule) from None
    if (where := values.get("where", "params")) not in WHERE:
        raise ConfigError(f"no bit can be flipped in {where!r}.", got=text, fix=closest(where, WHERE))
    if (phase := values.get("phase", "step")) not in (*PHASES, *OTHER_PHASES):
        raise ConfigError(f"a trainer has no phase {phase!r}.", got=text, fix=closest(phase, (*PHASES, *OTHER_PHASES)))
    return Fault(kind=kind, **values)


def as_flag(fault: Fault) -> str:
    """The text that `parse` reads."""
    values = [f"{name}={value}" for name, value in asdict(fault).items() if name != "kind" and value is not None]
    return f"{fault.kind}:{','.join(values)}"


def placed(fault: Fault, processes: int, steps: int) -> Fault:
    """With a process, step and phase, for a run of so many processes and steps. Raises ConfigError."""
    chance = random.Random(fault.seed)
    drawn = {"process": chance.randrange(processes), "step": chance.randrange(1, max(2, steps)), "phase": chance.choice(PHASES)}
    chosen = drawn if fault.seed else {"process": 0, "step": 1, "phase": "step"}
    whole = replace(fault, seed=0, **{name: value for name, value in chosen.items() if getattr(fault, name) is None})
    for name, most in (("process", processes - 1), ("step", steps)):
        if not 0 <= getattr(whole, name) <= most:
            raise ConfigError(f"the fault {as_flag(fault)} would never come.", rule=f"{name} is from 0 to {most}")
    return whole


def environment(faults: Sequence[Fault], generation: int) -> dict[str, str]:
    """What tells the trainers of a generation of their faults."""
    mine = [asdict(fault) for fault in faults if fault.generation == generation]
    return {"JAXTRAIN_FAULTS": json.dumps(mine) if mine else ""}


def mine(env: Mapping[str, str] = os.environ) -> Callable[[str, int], None] | None:
    """What a trainer calls at every phase: None where nothing is to go wrong."""
    index = int(env.get("JAXTRAIN_PROCESS_ID", "0"))
    given = [Fault(**fault) for fault in json.loads(env.get("JAXTRAIN_FAULTS") or "[]")]
    if not (waiting := [fault for fault in given if fault.process == index]):
        return None
    from jaxtrain.resilience.injection import Injector

    return Injector(waiting)
