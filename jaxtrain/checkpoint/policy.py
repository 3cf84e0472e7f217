"""When checkpoints are made and which of them stay: a config value and the rule. It touches no file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxtrain import ranges


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` steps; the newest `keep_last` stay, and for ever those whose step `keep_every` divides.

    What no longer stays is removed when the next save begins or the run ends. Saves that fail are said and made up for
    by the next; `patience` of them in a row end the run. They are counted, not timed: a count is the same on every
    process, where clocks would let one process go on and another end.
    """

    every: int = 1000  # steps
    keep_last: int = 3
    keep_every: int = 0  # steps; 0: none stays for ever
    deadline_seconds: float = 1800.0  # for one save, one restore and each wait within them
    patience: int = 3  # saves in a row

    def __post_init__(self) -> None:
        from_one = dict.fromkeys(("every", "keep_last", "patience"), ranges.whole(1))
        ranges.check("checkpoint", self, **from_one, keep_every=ranges.whole(0), deadline_seconds=ranges.FROM_ONE)


def expired(steps: Collection[int], config: CheckpointConfig) -> list[int]:
    """The steps, ascending, whose checkpoints the policy lets go."""
    newest = sorted(steps)[-config.keep_last :]
    return [step for step in sorted(steps) if step not in newest and not _for_ever(step, config)]


def _for_ever(step: int, config: CheckpointConfig) -> bool:
    return config.keep_every > 0 and step % config.keep_every == 0
