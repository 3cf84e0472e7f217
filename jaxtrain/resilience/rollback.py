"""Back to the last good state without the examples of the bad steps: which state, which examples, and when to give up.

It judges nothing (health.py) and stores nothing: where states come from is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.data.dataset import Dataset
from jaxtrain.data.quarantine import Event, Record
from jaxtrain.errors import NumericsError
from jaxtrain.resilience.health import Rewind


@dataclass(frozen=True)
class Start:
    """A good state and what was kept with it: `step` completed updates, `data` the JSON that was saved beside it.

    `tier`: "snapshot" or "checkpoint", and `why` that one in words; "" for a state that was drawn.
    """

    state: Any
    step: int
    data: Mapping[str, Any] = field(default_factory=dict)
    tier: str = ""
    why: str = ""


def roll_back(
    verdict: Rewind, record: Record, data: Dataset, newest: Callable[[int], Start]
) -> tuple[Event, Start]:
    """-> what is put aside, and the state to go on from.

    `data` is without the record's examples; `newest(step)` gives the newest good state of that step or before. It
    follows from the metrics and the record alone, so all processes come to the same. Raises NumericsError where the
    policy's limit is reached.
    """
    # Where the same step is bad again with other examples, what made it bad may be the update before it.
    again = sum(event.steps[1] == verdict.last for event in record)
    first = max(1, verdict.first - verdict.policy.margin - again)
    start = newest(first - 1)
    tried = max(again, sum(event.restored == start.step for event in record))
    if tried >= verdict.policy.limit:
        raise NumericsError(
            f"{verdict.why}, and {tried} rollbacks did not help.",
            rule="other examples make a bad step good",
            fix=f"look elsewhere (learning rate, precision, a device); the last good state is step {start.step}",
        )
    examples = tuple(put for step in range(first, verdict.last + 1) for put in data.examples(step - 1))
    event = Event(
        steps=(first, verdict.last),
        why=verdict.why,
        restored=start.step,
        position=(first - 1) * data.batch,
        data=data.fingerprint,
        examples=examples,
    )
    return event, start
