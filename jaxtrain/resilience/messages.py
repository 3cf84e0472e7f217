"""What supervisors say to each other, field by field, and a check that a message is one of these. It sends nothing.

All hosts of a job run the same code: what is not here, to the last field, no supervisor says.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxtrain.resilience.pulse import PHASES
from jaxtrain.resilience.wire import Message, Refused

MOST = 1 << 53  # of a whole number: nothing here counts further, and a pulse has room for no more than 2^63
DIGITS = 9  # of a number that is an object's key

Check = Callable[[Any], bool]
Checks = Mapping[str, Check]  # by the field that tells a message of this kind from all others


def checked(message: Message, checks: Checks) -> Message:
    """The same message. Raises Refused."""
    kinds = [kind for kind in checks if kind in message]
    if len(kinds) != 1 or not checks[kinds[0]](message):
        raise Refused("malformed")
    return message


# Of values


def whole(value: Any) -> bool:
    return type(value) is int and abs(value) < MOST


def number(value: Any) -> bool:
    return whole(value) or (type(value) is float and math.isfinite(value))


def text(value: Any) -> bool:
    """Half a pair of UTF-16, which JSON can hold, cannot be written anywhere."""
    return type(value) is str and (value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value))


def path(value: Any) -> bool:
    return text(value) and "\0" not in value


def owner(value: Any) -> bool:
    """A folder's name: of a host, which the job may have had in an earlier life."""
    return path(value) and "/" not in value and value not in ("", ".", "..")


def flag(value: Any) -> bool:
    return type(value) is bool


def nothing(value: Any) -> bool:
    return value is None


def one_of(values: Collection[Any]) -> Check:
    allowed = {*values}
    return lambda value: type(value) in (str, int) and value in allowed


def many(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def row(*checks: Check) -> Check:
    return lambda value: type(value) is list and len(value) == len(checks) and all(c(v) for c, v in zip(checks, value))


def table(key: Check, check: Check) -> Check:
    return lambda value: type(value) is dict and all(key(k) and check(v) for k, v in value.items())


def record(**checks: Check) -> Check:
    """An object with these fields and no others."""
    return lambda value: type(value) is dict and value.keys() == checks.keys() and all(c(value[k]) for k, c in checks.items())


def either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def digits(value: Any) -> bool:
    return type(value) is str and value.isdecimal() and len(value) <= DIGITS


# Of what is told. The fields of Status, Beat, Link, Plan and Part are held equal to these by a test

BEAT = dict(
    sequence=whole, pid=whole, generation=whole, step=whole, phase=one_of(PHASES), since=number, about=text, restored=text,
    counts=record(**{phase: whole for phase in PHASES}), longest=record(**{phase: number for phase in PHASES}),
)  # fmt: skip
STATUS = dict(
    index=whole, host=text, pid=whole, code=either(nothing, whole), ended=either(nothing, number),
    beat=either(nothing, record(**BEAT)), stopped=flag, frame=text, links=row(),  # these come with the evidence
)  # fmt: skip
LINK = dict(local=text, remote=text, resends=whole)
PART = dict(owner=owner, process=whole, step=whole, generation=whole, of=whole, size=whole)
_PART = row(*PART.values())
PARTS = many(_PART)


def plan(names: Collection[str]) -> dict[str, Check]:
    return dict(
        generation=whole, service=text, first=whole, count=whole, env=table(text, text), argv=many(text),
        buddy=either(nothing, one_of(names)),
    )  # fmt: skip


# By who hears it. `names`: the job's hosts

_SAID = dict(term=whole, generation=whole, running=whole)
_ANSWERS = [
    dict(alive=many(text)),
    dict(gathered=table(digits, record(frame=text, links=many(row(*LINK.values()))))),
    dict(parts=PARTS),
    dict(sent=flag),
]
TO_LEAD: Checks = {
    "ping": record(ping=number, echo=number, term=whole),
    "hello": record(hello=record(instance=text, shape=text, aside=flag), **_SAID),
    "report": record(report=many(record(**STATUS)), complaints=table(text, text), news=flag, ready=flag, **_SAID),
    "done": either(*(record(done=whole, term=whole, **answer) for answer in _ANSWERS)),
}
WITH_PAYLOAD: Checks = {
    "part": record(part=_PART, number=whole, count=whole),  # a piece of one process's snapshot
    "offer": record(offer=whole),  # whose payload are PARTS
}
_END = record(end=whole, term=whole)
TO_SENDER: Checks = {"part": record(part=_PART, trouble=text), "offer": record(offer=whole, trouble=text), "end": _END}


def to_host(names: Collection[str]) -> Checks:
    numbers = one_of([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    lots = table(one_of(names), PARTS)
    fields = dict(
        prepare={}, aside={}, know=dict(generation=whole), start=dict(plan=record(**plan(names))), signal=dict(number=numbers),
        fence=dict(id=whole), gather=dict(folder=path, id=whole), inventory=dict(id=whole), send=dict(lots=lots, id=whole),
    )  # fmt: skip
    orders = {name: record(order=text, term=whole, **those) for name, those in fields.items()}
    known = one_of(orders)
    return {
        "pong": record(pong=number, left=number, now=number, term=whole),
        "end": _END,
        "order": lambda message: known(message["order"]) and orders[message["order"]](message),
    }
