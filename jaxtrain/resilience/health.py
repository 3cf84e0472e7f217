"""What a run does when its numbers go wrong, as values, and the judge of each step's metrics. It touches no device.

The judge is a pure function of the metrics that it was shown. Those are replicated, so every process comes to the same
verdict by itself, at the same step; and what it remembers travels in the checkpoints, so a resumed run judges as one
that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jaxtrain import ranges

WATCHED = ("train/loss", "train/grad_norm")


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run ends with a NumericsError that names the last good checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The update is not applied: parameters and optimizer state stay, the step counts. The compiled step does it.

    More than `limit` such updates in a row end the run: then it is not the examples.
    """

    limit: int = 10

    def __post_init__(self) -> None:
        ranges.check("Skip", self, limit=ranges.whole(1))


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """The newest good state from before the bad steps comes back, and other examples take the place of theirs.

    `margin`: so many steps before the bad ones lose their examples too. Where the same step is bad again, each time one
    step more. The run ends when `limit` rollbacks because of one step, or to one state, did not help.

    PaLM went back some 100 steps before a spike and left out 200 to 500 batches, those before and during it; the spike
    did not come again, and the same batches met from another state made none (Chowdhery et al. 2022, arXiv 2204.02311,
    section 5.1). So what is quarantined need not be bad: it met these parameters at the wrong moment.
    """

    margin: int = 0
    limit: int = 5

    def __post_init__(self) -> None:
        ranges.check("RollBack", self, margin=ranges.whole(0), limit=ranges.whole(1))


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """Spikes of a finite loss are left alone."""


@dataclass(frozen=True, kw_only=True)
class RollBackSpikes(RollBack):
    """As RollBack, where `lasting` losses in a row lie above median + max(`deviations` x MAD, `least`).

    Median and MAD (the median distance from the median) are of the last `window` losses before the first such one: a
    few wild values move neither. For normal noise 12 MAD are 8 standard deviations. A single batch of odd text is no
    spike, so several in a row are asked for; the first `warmup` steps, where the loss has no level yet, are never judged.
    """

    window: int = 128  # losses
    deviations: float = 12.0
    least: float = 0.1  # nats per token
    lasting: int = 3  # losses
    warmup: int = 1000  # steps

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = dict(window=ranges.whole(8), lasting=ranges.whole(1), warmup=ranges.whole(0))
        ranges.check("RollBackSpikes", self, **counts, deviations=ranges.FROM_ONE, least=ranges.FROM_ZERO)


@dataclass(frozen=True, kw_only=True)
class Health:
    """`not_finite`: what follows a loss or gradient norm that is nan or infinite; `spikes`: a loss that leaps.

    `hash_every`: steps between two comparisons of the copies that different devices hold of parameters and optimizer
    state; with it, also before every save. 0: never.
    """

    not_finite: Stop | Skip | RollBack = Stop()
    spikes: Ignore | RollBackSpikes = Ignore()
    hash_every: int = 0

    def __post_init__(self) -> None:
        ranges.check("health", self, hash_every=ranges.whole(0))


@dataclass(frozen=True)
class Verdict:
    """On one step; `why` in words."""

    why: str


class Halted(Verdict):
    """The run ends here."""


class Skipped(Verdict):
    """The step has left parameters and optimizer state alone."""


@dataclass(frozen=True)
class Rewind(Verdict):
    """Back to before step `first`, without the examples of steps `first` to `last`, both counted as in the metrics."""

    first: int
    last: int
    policy: RollBack


class Judge:
    """Shown the metrics of every step in order. `memory`: what `memory` gave after the step before."""

    def __init__(self, health: Health, memory: Mapping[str, Any] | None = None):
        memory = memory or {}
        self._health = health
        self._skipped: int = memory.get("skipped", 0)  # in a row
        self._losses: list[float] = list(memory.get("losses", ()))  # the window
        self._high: list[float] = list(memory.get("high", ()))  # losses in a row above the window's limit

    def verdict(self, step: int, metrics: Mapping[str, Any]) -> Verdict | None:
        """None where all is well."""
        bad = [name for name in WATCHED if not math.isfinite(metrics[name])]
        if bad:
            return self._not_finite(step, f"{bad[0]} is {float(metrics[bad[0]])} at step {step}")
        self._skipped = 0
        return self._spike(step, float(metrics["train/loss"]))

    def memory(self) -> dict[str, Any]:
        """JSON, for a checkpoint; {} where there is nothing to remember."""
        kept = {"skipped": self._skipped, "losses": self._losses, "high": self._high}
        return {name: value for name, value in kept.items() if value}

    def _not_finite(self, step: int, why: str) -> Verdict:
        policy = self._health.not_finite
        if isinstance(policy, RollBack):
            return Rewind(why, step, step, policy)
        if isinstance(policy, Stop):
            return Halted(why)
        self._skipped += 1
        if self._skipped > policy.limit:
            return Halted(f"{why}, and so were the {policy.limit} before it, which were skipped")
        return Skipped(why)

    def _spike(self, step: int, loss: float) -> Verdict | None:
        policy = self._health.spikes
        if isinstance(policy, Ignore):
            return None
        judged = step > policy.warmup and len(self._losses) == policy.window
        if not judged or loss <= (limit := spike_limit(self._losses, policy)):
            self._losses = [*self._losses, *self._high, loss][-policy.window :]
            self._high = []
            return None
        self._high.append(loss)
        if len(self._high) < policy.lasting:
            return None
        why = f"train/loss is {loss:.4g} at step {step}, above {limit:.4g} for {len(self._high)} steps"
        return Rewind(why, step - len(self._high) + 1, step, policy)


def spike_limit(losses: Sequence[float], policy: RollBackSpikes) -> float:
    """The largest loss after these that is no spike."""
    middle = median(losses)
    spread = median(abs(loss - middle) for loss in losses)
    return middle + max(policy.deviations * spread, policy.least)
