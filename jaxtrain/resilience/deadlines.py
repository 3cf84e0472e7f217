"""How long a phase may last before it counts as a hang: learned from the run's own times. It watches nobody."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtrain import ranges
from jaxtrain.resilience.pulse import Beat

# Seconds before anything was learned: what people wait for before they look.
UNKNOWN = dict(
    start=300.0, prepare=600.0, restore=900.0, compile=3600.0, data=600.0, step=600.0, metrics=600.0,
    evaluate=3600.0, snapshot=300.0, save=1800.0, end=3600.0,
)  # fmt: skip
# Seconds that these may take though they took less before: a peer still imports; files of the data are read before more of
# it is written, which renews the phase; a checkpoint is read and no snapshot; another host's compilation cache is empty;
# the loop waits 60 s for the save before and 60 s for a disk to take a copy.
LEAST = dict(start=120.0, prepare=600.0, restore=600.0, compile=300.0, save=150.0)
ENOUGH = dict(data=8, step=8, metrics=8)  # times before a phase is known; the others: once
FEW_S = 60.0  # the least that is allowed where it came fewer times
FACTOR = 8.0  # over the longest so far


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """`floor`: seconds that any phase may last, and so the least time after which a hang is noticed; of some it is LEAST.

    `lease`: where there are several hosts, seconds for which trainers may run without word from the lead, and a lead
    without word from the run folder or all others. Half of it after it was last heard a host is lost.
    """

    floor: float = 10.0
    lease: float = 10.0

    def __post_init__(self) -> None:
        ranges.check("watch", self, floor=ranges.POSITIVE, lease=ranges.POSITIVE)

    def allowed(self, phase: str, seen: Iterable[Beat]) -> float:
        """Seconds in this phase, since its last renewal. `seen`: the pulses of the run, this generation's and older."""
        came = [(beat.counts[phase], beat.longest[phase]) for beat in seen if beat.counts[phase]]
        learned = FACTOR * max(longest for _, longest in came) if came else UNKNOWN[phase]
        if max((count for count, _ in came), default=0) < ENOUGH.get(phase, 1):
            learned = max(FEW_S, learned)
        return max(self.floor, LEAST.get(phase, 0.0), learned)
