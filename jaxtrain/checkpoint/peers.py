"""How the processes of a job agree on the outcome of a save, a restore or an opening. It uses no device."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

from jaxtrain import coordination
from jaxtrain.background import Deadline
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.cluster import few
from jaxtrain.errors import CheckpointError, UserError

_rounds = itertools.count()
_HOSTS = "checkpoint/hosts"
_KINDS = {kind.__name__: kind for kind in (CheckpointError, DamagedError)}
_GRACE_SECONDS = 15.0  # for the lead's verdict to arrive after the lead's own deadline


def new_round() -> str:
    """A key for one agreement; all processes ask for theirs in the same order, on their main threads."""
    return f"checkpoint/{next(_rounds)}"


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(key: str, report: Callable[[], Any], decide: Callable[[list[Any]], Any], deadline: Deadline) -> Any:
    """`decide`, called by the lead on the reports of all processes, is the answer on every process (JSON values).

    A UserError in any report, or in deciding, is raised on every process. So is a process's silence at the deadline.
    """
    if jax.process_count() == 1:
        return decide([report()])
    _say_host()
    report_key = f"{key}/{jax.process_index()}"
    coordination.put(report_key, json.dumps(_outcome(report)))
    if is_lead():
        verdict = _outcome(lambda: decide([_opened(answer) for answer in _reports(key, deadline)]))
        coordination.put(f"{key}/verdict", json.dumps(verdict))
    verdict = _heard(f"{key}/verdict", deadline.left() + _GRACE_SECONDS)
    if verdict is None:
        raise _silent([0], deadline)
    coordination.delete(report_key)  # read by now
    return _opened(verdict)


@cache
def _say_host() -> None:
    """So that whoever waits for this process can say where it is."""
    coordination.put(f"{_HOSTS}/{jax.process_index()}", socket.gethostname())


def _reports(key: str, deadline: Deadline) -> list[dict[str, Any]]:
    """Of all processes. Raises CheckpointError that names every process that has not reported at the deadline."""
    answers = []
    for process in range(jax.process_count()):
        answers.append(_heard(f"{key}/{process}", max(1.0, deadline.left())))
        if answers[-1] is None:
            there = coordination.under(key)
            raise _silent([i for i in range(jax.process_count()) if str(i) not in there], deadline)
    return answers


def _heard(key: str, seconds: float) -> dict[str, Any] | None:
    answer = coordination.get(key, seconds)
    return None if answer is None else json.loads(answer)


def _silent(processes: list[int], deadline: Deadline) -> CheckpointError:
    hosts = coordination.under(_HOSTS)
    return CheckpointError(
        f"process {few([f'{i} ({hosts[str(i)]})' if str(i) in hosts else i for i in processes])} did not report on a save or restore.",
        got=f"{deadline.seconds:.0f} s waited",
        rule="all processes save and restore together, within checkpoint.deadline_seconds",
        fix="look at what that process printed last, and whether its disk answers",
    )


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except UserError as error:
        kind = type(error).__name__ if type(error).__name__ in _KINDS else "CheckpointError"
        return {"kind": kind, "error": dict(what=error.what, got=error.got, rule=error.rule, fix=error.fix)}


def _opened(outcome: dict[str, Any]) -> Any:
    if "error" in outcome:
        raise _KINDS[outcome["kind"]](**outcome["error"])
    return outcome["value"]
