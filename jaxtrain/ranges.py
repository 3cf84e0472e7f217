"""What a config's fields may hold: numbers in ranges, which are values, and patterns. What fields mean together it leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtrain.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; `text` says so after "is"."""

    text: str
    least: float
    most: float = math.inf
    open: tuple[float, ...] = ()  # ends that are not in it

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and math.isfinite(value)
        return number and self.least <= value <= self.most and value not in self.open


POSITIVE = Range("a positive number", 0.0, open=(0.0,))
FROM_ZERO = Range("zero or a positive number", 0.0)
FROM_ONE = Range("at least 1", 1.0)
PART = Range("from 0 to 1", 0.0, 1.0)
BELOW_ONE = Range("at least 0 and less than 1", 0.0, 1.0, open=(1.0,))  # what a moving average keeps


def check(owner: str, config: Any, /, **fields: Range) -> None:
    """Raises ConfigError for a field outside its range. None passes: it stands for no number where the type has it.

    `owner`: the path of the config's own flags; "" for the run's.
    """
    for name, allowed in fields.items():
        value, path = getattr(config, name), f"{owner}.{name}".removeprefix(".")
        if value is not None and not allowed.holds(value):
            raise ConfigError(f"{path} = {value!r} is out of range.", rule=f"{path} is {allowed.text}")


def check_patterns(path: str, patterns: Iterable[str]) -> None:
    """Raises ConfigError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{path}: {pattern!r} is no regular expression.", got=str(error)) from error
