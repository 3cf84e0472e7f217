"""How the processes of a job agree on the outcome of a save, a restore or an opening. It uses no device."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain import coordination
from jaxtrain.background import Deadline
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.errors import CheckpointError, UserError

_rounds = itertools.count()
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
    report_key = f"{key}/{jax.process_index()}"
    coordination.put(report_key, json.dumps(_outcome(report)))
    if is_lead():
        verdict = _outcome(lambda: decide([_opened(_heard(key, i, deadline)) for i in range(jax.process_count())]))
        coordination.put(f"{key}/verdict", json.dumps(verdict))
    verdict = _heard(key, "verdict", deadline, _GRACE_SECONDS)
    coordination.delete(report_key)  # read by now
    return _opened(verdict)


def _heard(key: str, who: int | str, deadline: Deadline, grace: float = 0.0) -> dict[str, Any]:
    answer = coordination.get(f"{key}/{who}", max(1.0, deadline.left() + grace))
    if answer is None:
        silent = "process 0, which decides," if who == "verdict" else f"process {who}"
        raise CheckpointError(
            f"{silent} did not report on a checkpoint.",
            got=f"{deadline.seconds:.0f} s waited",
            rule="all processes save and restore together, within checkpoint.deadline_seconds",
            fix="look at what that process printed last",
        )
    return json.loads(answer)


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
