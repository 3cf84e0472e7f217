"""How long a phase may last before it counts as a hang: learned from the run's own times. It watches nobody."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtrain.resilience.pulse import Beat

# Seconds before anything was learned: what people wait for before they look.
UNKNOWN = dict(
    start=300.0, restore=900.0, compile=3600.0, data=600.0, step=600.0, metrics=600.0,
    evaluate=3600.0, snapshot=300.0, save=1800.0, end=3600.0,
)  # fmt: skip
ENOUGH = dict(data=8, step=8, metrics=8)  # times before a phase is known; the others: once
FACTOR = 8.0  # over the longest so far


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """`floor`: seconds that any phase may last, and so the least time after which a hang is noticed.

    `lease`: where there are several hosts, seconds for which trainers may run without word from the lead, and a lead
    without word from the run folder or all others. Half of it after it was last heard a host is lost.
    """

    floor: float = 10.0
    lease: float = 10.0

    def allowed(self, phase: str, seen: Iterable[Beat]) -> float:
        """Seconds that a trainer may be in this phase. `seen`: the pulses of the run, this generation's and older."""
        known = [beat.longest[phase] for beat in seen if beat.counts[phase] >= ENOUGH.get(phase, 1)]
        return max(self.floor, FACTOR * max(known)) if known else max(self.floor, UNKNOWN[phase])
