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
    """From `least` to `most`; `text` says so after "is". `whole`: a float is not in it, even without a fraction."""

    text: str
    least: float
    most: float = math.inf
    open: tuple[float, ...] = ()  # ends that are not in it
    whole: bool = False

    def takes(self, value: Any) -> bool:
        """Whether it is of the range's kind, be it in it or not. True and False are no numbers."""
        return isinstance(value, int if self.whole else int | float) and not isinstance(value, bool)

    def holds(self, value: Any) -> bool:
        number = self.takes(value) and abs(value) < math.inf  # math.isfinite cannot take an int above 1e308
        return number and self.least <= value <= self.most and value not in self.open


def whole(least: int) -> Range:
    """Whole numbers from `least` on."""
    return Range(f"a whole number, at least {least}", least, whole=True)


POSITIVE = Range("a positive number", 0.0, open=(0.0,))
FROM_ZERO = Range("zero or a positive number", 0.0)
FROM_ONE = Range("at least 1", 1.0)
PART = Range("from 0 to 1", 0.0, 1.0)
BELOW_ONE = Range("at least 0 and less than 1", 0.0, 1.0, open=(1.0,))  # what a moving average keeps
# jax.random.key drops the upper bits: 2**32 would start from the parameters of 0. The data's order would take 64 bits.
SEED = Range("a whole number from 0 to 4294967295, the 32 bits that jax.random.key keeps", 0, 2**32 - 1, whole=True)


def check(owner: str, config: Any, /, **fields: Range) -> None:
    """Raises ConfigError for a field outside its range. None passes where the field's type has it.

    `owner`: the path of the config's own flags; "" for the run's.
    """
    for name, allowed in fields.items():
        value, path = getattr(config, name), f"{owner}.{name}".removeprefix(".")
        if allowed.holds(value) or value is None and "None" in str(config.__dataclass_fields__[name].type):
            continue
        rule = f"{path} is {allowed.text}"
        if allowed.takes(value):
            raise ConfigError(f"{path} = {value!r} is out of range.", rule=rule)
        fix = f"{path} = {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ConfigError(f"{path} = {value!r} is of another kind.", got=type(value).__name__, rule=rule, fix=fix)


def check_patterns(path: str, patterns: Iterable[str]) -> None:
    """Raises ConfigError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{path}: {pattern!r} is no regular expression.", got=str(error)) from error
