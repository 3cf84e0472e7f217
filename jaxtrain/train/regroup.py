"""A state that other replicas saved than go on from it: which saved array each wanted one is made of, and how. It reads none.

The mean over those that were saved keeps the mean difference that the next outer step would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from jaxtrain.checkpoint.load import Change, Source
from jaxtrain.train import diloco

Shapes = Mapping[str, tuple[int, ...]]

PARAMS, OPT, LOCAL, MOMENTUM, ERROR = "params/", "opt/", "outer/local/", "outer/momentum/", "outer/error/"


def change(saved: Shapes, wanted: Shapes) -> Change | None:
    """From the shapes of two States' arrays by name; None where as many replicas train apart in both, or none do."""
    before, now = _replicas(saved), _replicas(wanted)
    if before == now:
        return None
    sources = {name: _source(name, saved, before, now) for name in wanted}
    used = {source.name for source in sources.values()}
    dropped = frozenset(name for name in saved if name.startswith((PARAMS, "outer/")) and name not in used)
    return Change(sources, dropped, _in_words(before, now, any(name.startswith(ERROR) for name in dropped)))


def _replicas(shapes: Shapes) -> int:
    """How many train apart; 0: none."""
    return next((shape[0] for name, shape in shapes.items() if name.startswith(LOCAL)), 0)


def _source(name: str, saved: Shapes, before: int, now: int) -> Source:
    branch = next((branch for branch in (PARAMS, OPT, LOCAL, MOMENTUM, ERROR) if name.startswith(branch)), name)
    rest = name.removeprefix(branch)
    copied = (lambda x: diloco.copies(now, x)) if now else _same
    regrouped = (lambda x: copied(_mean(x))) if before else copied
    if branch == OPT or (branch in (LOCAL, ERROR) and name in saved):
        return Source(name, regrouped)
    if branch == LOCAL:
        return Source(PARAMS + rest, copied)
    if branch == PARAMS and not now:
        return Source(LOCAL + rest, _mean)
    if branch in (MOMENTUM, ERROR) and name not in saved:
        zeros: Callable[[Array], Array] = copied if branch == ERROR else _same
        return Source(PARAMS + rest, lambda x: zeros(jnp.zeros_like(x)))
    return Source(name, _same)


def _same(x: Array) -> Array:
    return x


def _mean(x: Array) -> Array:
    """Over the replicas; their counts are equal."""
    return x[0] if jnp.issubdtype(x.dtype, jnp.integer) else x.mean(axis=0)


def _in_words(before: int, now: int, rounded: bool) -> str:
    unsent = "what rounding left unsent is dropped"
    if not now:
        more = f"; {unsent}, and the outer momentum" if rounded else "; the outer momentum is dropped"
        return f"{before} replicas trained apart and go on together, from their mean{more}"
    if not before:
        return f"{now} replicas train apart from here on, each from the same"
    return f"{before} replicas trained apart and {now} go on, each from their mean{f'; {unsent}' if rounded else ''}"
