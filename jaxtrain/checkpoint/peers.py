"""How the processes of a job agree on the outcome of a save, a restore or an opening. It uses no device."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain import coordination
from jaxtrain.background import Deadline
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.cluster import few
from jaxtrain.errors import CheckpointError, RunError, UserError

_rounds = itertools.count()
_HOSTS = "checkpoint/hosts"
_KINDS = {kind.__name__: kind for kind in (CheckpointError, DamagedError)}
_GRACE_SECONDS = 15.0  # for the lead's verdict to arrive after the lead's own deadline
_LOOK_SECONDS = 5.0  # for what a message or the next agreement can do without
_said_host = threading.Event()


def new_round() -> str:
    """A key for one agreement; all processes ask for theirs in the same order, on their main threads."""
    return f"checkpoint/{next(_rounds)}"


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(key: str, report: Callable[[], Any], decide: Callable[[list[Any]], Any], deadline: Deadline) -> Any:
    """`decide`, called by the lead on the reports of all processes, is the answer on every process (JSON values).

    A UserError in any report, or in deciding, is raised on every process. So is a process's silence at the deadline, and
    that of the coordination service.
    """
    if jax.process_count() == 1:
        return decide([report()])
    try:
        verdict = _verdict(key, report, decide, deadline)
    except RunError as error:
        raise CheckpointError(error.what, got=error.got, rule=error.rule, fix=error.fix) from error
    return _opened(verdict)


def _verdict(key: str, report: Callable[[], Any], decide: Callable[[list[Any]], Any], deadline: Deadline) -> dict[str, Any]:
    _say_host(deadline)
    report_key = f"{key}/{jax.process_index()}"
    _put(report_key, _outcome(report), deadline)
    if is_lead():
        _put(f"{key}/verdict", _outcome(lambda: decide([_opened(answer) for answer in _reports(key, deadline)])), deadline)
    verdict = _heard(f"{key}/verdict", deadline.left() + _GRACE_SECONDS)
    if verdict is None:
        raise _silent([0], deadline)
    with contextlib.suppress(RunError):
        coordination.delete(report_key, _LOOK_SECONDS)  # read by now
    return verdict


def _say_host(deadline: Deadline) -> None:
    """So that whoever waits for this process can say where it is. Once: after an error it may come all the same."""
    if not _said_host.is_set():
        _said_host.set()
        coordination.put(f"{_HOSTS}/{jax.process_index()}", socket.gethostname(), max(_LOOK_SECONDS, deadline.left()))


def _put(key: str, outcome: dict[str, Any], deadline: Deadline) -> None:
    """An outcome that comes at the deadline still has to be told."""
    coordination.put(key, json.dumps(outcome), max(_LOOK_SECONDS, deadline.left()))


def _reports(key: str, deadline: Deadline) -> list[dict[str, Any]]:
    """Of all processes. Raises CheckpointError that names every process that has not reported at the deadline."""
    answers = []
    for process in range(jax.process_count()):
        answers.append(_heard(f"{key}/{process}", max(1.0, deadline.left())))
        if answers[-1] is None:
            there = coordination.under(key, _LOOK_SECONDS)
            raise _silent([i for i in range(jax.process_count()) if str(i) not in there], deadline)
    return answers


def _heard(key: str, seconds: float) -> dict[str, Any] | None:
    answer = coordination.get(key, seconds)
    return None if answer is None else json.loads(answer)


def _silent(processes: list[int], deadline: Deadline) -> CheckpointError:
    hosts = coordination.under(_HOSTS, _LOOK_SECONDS)
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
