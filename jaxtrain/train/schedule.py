"""Learning-rate schedules as values: the factor on the peak rate at a step. They hold no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtrain import ranges


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 to `final` at the last step (Loshchilov and Hutter 2017, eq. 5)."""

    warmup: int = 100
    final: float = 0.1

    def __post_init__(self) -> None:
        ranges.check("optim.schedule", self, warmup=ranges.whole(0), final=ranges.PART)

    def factor(self, step: Any, steps: int) -> Any:
        import jax.numpy as jnp

        done = _progress(step, self.warmup, steps)
        return _warmed(step, self.warmup, self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up, then a straight line from 1 to `final` at the last step."""

    warmup: int = 100
    final: float = 0.0

    def __post_init__(self) -> None:
        ranges.check("optim.schedule", self, warmup=ranges.whole(0), final=ranges.PART)

    def factor(self, step: Any, steps: int) -> Any:
        return _warmed(step, self.warmup, 1 - (1 - self.final) * _progress(step, self.warmup, steps))


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay: 1 until the last `decay` fraction of the steps, then a line to `final` (MiniCPM 2024, 4.2)."""

    warmup: int = 100
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        ranges.check("optim.schedule", self, warmup=ranges.whole(0), decay=ranges.PART, final=ranges.PART)

    def factor(self, step: Any, steps: int) -> Any:
        start = steps - max(1, round(self.decay * steps))
        return _warmed(step, self.warmup, 1 - (1 - self.final) * _progress(step, start, steps))


Schedule = Cosine | WSD | Linear


def _progress(step: Any, start: int, end: int) -> Any:
    """0 until `start`, 1 from the last update (number end - 1) on; 0 throughout where that one is `start`."""
    import jax.numpy as jnp

    return jnp.clip((step - start) / max(1, end - 1 - start), 0.0, 1.0)


def _warmed(step: Any, warmup: int, factor: Any) -> Any:
    """Rises from 1/warmup at update 0 to 1 at update warmup - 1, so that no update is wasted at rate zero."""
    import jax.numpy as jnp

    return factor * jnp.minimum(1.0, (step + 1) / max(1, warmup))
