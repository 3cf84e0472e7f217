"""Optimizers as values: each gives an optax transformation of unit rate. Clipping and the rate itself belong to the step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from jaxtrain import ranges
from jaxtrain.errors import ConfigError
from jaxtrain.train.schedule import Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all optimizers share.

    `clip` bounds the global gradient norm, None leaves it. `no_decay` are regular expressions on parameter paths
    ("blocks/attn_norm"): a match is not decayed; each must match something. Weight decay is decoupled.
    """

    peak_lr: float = 3e-4
    schedule: Schedule = field(default_factory=Cosine)
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("norm",)
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("peak_lr", "clip"), ranges.POSITIVE)
        ranges.check("optim", self, **positive, weight_decay=ranges.FROM_ZERO)
        ranges.check_patterns("optim.no_decay", self.no_decay)

    def transform(self, letters: Any) -> Any:
        """The optax transformation whose update is subtracted after scaling by the learning rate."""
        import optax

        return optax.chain(self.direction(letters), optax.add_decayed_weights(self.weight_decay, self.decayed(letters)))

    def direction(self, letters: Any) -> Any:
        raise NotImplementedError

    def decayed(self, letters: Any) -> Any:
        """A tree of bool like the parameters: True where weight decay applies. Raises ConfigError on an idle pattern."""
        import jax

        paths = jax.tree.leaves(_paths(letters))
        for pattern in self.no_decay:
            if not any(re.search(pattern, path) for path in paths):
                raise ConfigError(
                    f"optim.no_decay: {pattern!r} matches no parameter.",
                    rule="every pattern matches at least one path",
                    fix=f"one of the paths: {', '.join(paths)}",
                )
        return jax.tree.map(lambda path: not any(re.search(p, path) for p in self.no_decay), _paths(letters))


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check("optim", self, b1=ranges.BELOW_ONE, b2=ranges.BELOW_ONE, eps=ranges.POSITIVE)

    def direction(self, letters: Any) -> Any:
        import optax

        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023, algorithm 2)."""

    peak_lr: float = 3e-5
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check("optim", self, b1=ranges.BELOW_ONE, b2=ranges.BELOW_ONE)

    def direction(self, letters: Any) -> Any:
        import optax

        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices inside blocks; Adam for embeddings, unembedding and norms (Jordan 2024).

    A matrix's update has the root mean square of Adam's, 0.2 sqrt(max(in, out)), so one rate serves both (Liu et al.
    2025, eq. 4).
    """

    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check("optim", self, **dict.fromkeys(("momentum", "b1", "b2"), ranges.BELOW_ONE), eps=ranges.POSITIVE)

    def direction(self, letters: Any) -> Any:
        import jax
        import optax
        from optax.contrib import MuonDimensionNumbers, scale_by_muon

        kinds = jax.tree.map(lambda x: "adam" if _matrix(x) is None else "muon", letters)
        is_dims = lambda x: isinstance(x, MuonDimensionNumbers)  # noqa: E731
        dims = jax.tree.map(lambda x: MuonDimensionNumbers(*_matrix(x)) if _matrix(x) else optax.MaskedNode(), letters)

        def like_adam(updates, params=None):
            return jax.tree.map(lambda d, u: u * _rms_factor(d, u.shape), dims, updates, is_leaf=is_dims)

        return optax.partition(
            {
                "muon": optax.chain(
                    scale_by_muon(beta=self.momentum, weight_dimension_numbers=dims), optax.stateless(like_adam)
                ),
                "adam": optax.scale_by_adam(self.b1, self.b2, self.eps),
            },
            kinds,
        )


Optim = AdamW | Lion | Muon

_STACKED = set("LEP")  # dims over which there is one matrix each
_OUTER = set("V")  # a vocabulary dim: an embedding, which is no linear map of activations


def _matrix(letters: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(reduction dims, output dims) of the matrices in an array of these letters; None where it holds none.

    The model dim D, or the latent A where there is no D, is one side, whatever else is not stacked the other: "LDNH" ->
    ((1,), (2, 3)).
    """
    dims = [i for i, letter in enumerate(letters) if letter not in _STACKED]
    inner = "D" if "D" in letters else "A"
    model = tuple(i for i in dims if letters[i] == inner)
    other = tuple(i for i in dims if letters[i] != inner)
    if not model or not other or _OUTER & set(letters):
        return None
    return (model, other) if letters.index(inner) == dims[0] else (other, model)


def _rms_factor(dims: Any, shape: tuple[int, ...]) -> float:
    sides = [math.prod(shape[i] for i in side) for side in (dims.reduction_axis, dims.output_axis)]
    return 0.2 * math.sqrt(max(sides))


def _paths(tree: Any) -> Any:
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree)
