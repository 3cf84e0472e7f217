"""Rules: which mesh axes shard which letter, once for storage and once for compute. It knows no mesh and no array."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, ClassVar, get_args

from meshes.axes import AXES, LETTERS
from meshes.errors import LayoutError, closest

if TYPE_CHECKING:
    from meshes.schedules import Table

Letters = str  # "BSD": one letter of the alphabet per dim
Axes = str | tuple[str, ...] | None  # one mesh axis, or several from outer to inner, or none

GATHERS = {
    "layer": "just before each layer uses them, again in the backward pass (FSDP)",
    "step": "once, at the start of the step (ZeRO-1)",
}
REDUCTIONS = {
    "step": "once, after the last microbatch; until then each device adds up its own, in float32",
    "microbatch": "after each microbatch, so that only a stored part of them is ever kept (ZeRO-2)",
}
MATMULS = {
    "whole": "after the whole gather, before the whole scatter",
    "ring": "part by part, each beside a hop of the ring over `tensor` that gathers or scatters (collective matmul)",
}
WAYS = {"gather": GATHERS, "reduce": REDUCTIONS, "matmul": MATMULS}
_OF_ACTIVATIONS = frozenset("BSRCMP")


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Every token reaches all its experts: sorted, exchanged by `ragged_all_to_all`, multiplied by `ragged_dot`.

    Only GPUs have the exchange; elsewhere an all-to-all padded to the worst case, which says so, or fails by `require`.
    """

    require: bool = False


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Of each sequence an expert takes `factor` times its mean share of choices, the first that come, and drops the rest.

    Lepikhin et al. 2020, arXiv 2006.16668, section 2.2, with a sequence for a group: so the mesh changes no result.
    """

    factor: float = 1.25

    def __post_init__(self):
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not (number and 0 < self.factor < math.inf):
            raise LayoutError(f"experts.factor = {self.factor!r} leaves no room.", rule="a positive number", fix="factor = 1.25")


Experts = Ragged | Capacity


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Each device gathers the keys and values of the whole sequence, a layer at a time: one collective, nothing waits.

    The keys and values of a layer do not shrink with the axis: for grouped-query models of moderate length.
    """

    zigzag: bool = True  # columns in an order that makes causal attention equal work for all


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Keys and values go from device to device while the ones at hand are multiplied: memory falls with the axis."""

    zigzag: bool = True


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    """Two all-to-alls a layer give each device whole sequences of some heads, for any kernel; heads must divide."""

    zigzag: ClassVar[bool] = False  # whole sequences are equal work as they are


Context = Gathered | Ring | Ulysses


def _check_name(name: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise LayoutError(f"{name} = {value!r} is not known.", fix=closest(value, known))


def axes_of(mapping: Mapping[str, Axes], letter: str) -> tuple[str, ...]:
    """The mesh axes that shard `letter`, outer to inner; () where none does."""
    axes = mapping.get(letter) or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def dims_of(mapping: Mapping[str, Axes], letters: Letters) -> list[tuple[str, ...]]:
    """The mesh axes that shard each dim of an array. In one of experts the axes of E are E's alone: D and A leave them."""
    of_experts = axes_of(mapping, "E") if "E" in letters else ()
    return [tuple(a for a in axes_of(mapping, x) if x not in "DA" or a not in of_experts) for x in letters]


KEEPS = {
    "residuals": "what the layers' own rematerialisation keeps, never a copy of a weight: nothing is computed twice",
    "inputs": "the input of the stage's layers: the least memory, and the forward once more in each backward",
}


@dataclass(frozen=True, kw_only=True)
class _Pipeline:
    """What all pipelines share: `keep` says what a forward keeps for its backward (KEEPS). `meshes.schedules` has the
    tables, with what each costs."""

    keep: str = "residuals"

    def __post_init__(self):
        _check_name("pipeline.keep", self.keep, KEEPS)

    def table(self, stages: int, microbatches: int) -> Table:
        from meshes import schedules

        return getattr(schedules, self._schedule)(stages, microbatches)

    @property
    def num_chunks(self) -> int:
        """Of layers, on each stage."""
        return 1


class GPipe(_Pipeline):
    """All forwards, then all backwards: the activations of all microbatches are kept."""

    _schedule = "gpipe"


class OneFOneB(_Pipeline):
    """One forward, one backward: the activations of p microbatches at most, and 4/3 of the time in lockstep."""

    _schedule = "one_f_one_b"


class ZeroBubble(_Pipeline):
    """ZB-H1: 1F1B with backwards in two halves; see `meshes.pipeline` for what the second costs."""

    _schedule = "zero_bubble"


@dataclass(frozen=True, kw_only=True)
class Interleaved(_Pipeline):
    """1F1B with `chunks` of layers on every stage, aligned for lockstep: with one chunk, 2p - 1 activations at most."""

    chunks: int = 1

    def __post_init__(self):
        super().__post_init__()
        if type(self.chunks) is not int or self.chunks < 1:
            raise LayoutError(f"pipeline.chunks = {self.chunks!r} is no number of chunks.", rule="1 or more", fix="chunks = 1")

    def table(self, stages: int, microbatches: int) -> Table:
        from meshes import schedules

        return schedules.interleaved(stages, microbatches, self.chunks)

    @property
    def num_chunks(self) -> int:
        return self.chunks


Pipeline = GPipe | OneFOneB | Interleaved | ZeroBubble
CHOICES = {"experts": Experts, "pipeline": Pipeline | None, "context": Context}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Letters to mesh axes: `params` where parameters and optimizer state are STORED, `acts` what COMPUTE uses.

    `acts` lays out activations, and weights at the moment of their use. `gather` says when stored weights take that
    layout: "layer" or "step"; `reduce`, when the gradients of several microbatches are summed over the devices that
    hold copies: "step" or "microbatch"; `matmul`, when products of gathered or scattered activations are taken: "whole"
    or "ring". Where both maps agree nothing moves. `pipeline` runs layers over the axis `stage`, which then shards
    nothing else in compute (`staged`); without one it is an axis like others. `experts` is how tokens reach experts that
    axes keep apart, `context` how attention reads a sequence that axes cut. Raises LayoutError on what is not known.
    """

    params: dict[str, Axes]
    acts: dict[str, Axes]
    gather: str = "layer"
    reduce: str = "step"
    matmul: str = "whole"
    experts: Experts = Ragged()
    pipeline: Pipeline | None = None
    context: Context = Ring()

    def __post_init__(self):
        for side in ("params", "acts"):
            if not isinstance(mapping := getattr(self, side), Mapping):
                rule = "letters to mesh axes; {} shards nothing"
                raise LayoutError(f"rules.{side} = {mapping!r} is no map.", rule=rule, fix=f"{side} = {{}}")
            object.__setattr__(self, side, {letter: _checked(side, mapping, letter) for letter in mapping})
        for name, known in WAYS.items():
            _check_name(f"rules.{name}", getattr(self, name), known)
        for name, kinds in CHOICES.items():
            _check_choice(name, getattr(self, name), kinds)

    def shards(self, letter: str, sizes: Mapping[str, int]) -> int:
        """Into how many parts compute cuts a dim of this letter, on a mesh of these axis sizes."""
        return math.prod(sizes.get(axis, 1) for axis in axes_of(self.acts, letter))

    def reduced_once(self) -> tuple[str, ...]:
        """The batch's axes over which gradients may wait for the last microbatch: those that cut no weight meanwhile."""
        between = [self.acts] if self.gather == "step" else [self.acts, self.params]
        weights = [(mapping, letter) for mapping in between for letter in mapping if letter not in _OF_ACTIVATIONS]
        cut = {axis for mapping, letter in weights for axis in axes_of(mapping, letter)}
        return tuple(axis for axis in axes_of(self.acts, "B") if axis not in cut) if self.reduce == "step" else ()

    def stored(self, letters: Letters, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Mapping[str, Axes]:
        """The map that stores an array of this shape, on a mesh of these axis sizes: `params`.

        But where a pipeline runs, `stage` shards the layers L, if their number divides, and no other dim.
        """
        stages = sizes.get("stage", 1)
        if self.pipeline is None or stages == 1 or "L" not in letters or shape[letters.index("L")] % stages:
            return self.params
        return self.within_stage | {"L": ("stage",)}

    @property
    def staged(self) -> Rules:
        """These rules where the pipeline runs: `stage` shards nothing else in compute."""
        return replace(self, acts=_without_stage(self.acts))

    @property
    def within_stage(self) -> Mapping[str, Axes]:
        """How a stage stores what is on it."""
        return _without_stage(self.params)

    def __hash__(self) -> int:
        how = self.gather, self.reduce, self.matmul, self.pipeline, self.experts, self.context
        return hash((_frozen(self.params), _frozen(self.acts), *how))


def _check_choice(name: str, choice: object, kinds: UnionType) -> None:
    """A name or a class would be taken for another algorithm, as none of the isinstance checks further on knows it."""
    if not isinstance(choice, kinds):
        known = ["None" if kind is NoneType else f"{kind.__name__}()" for kind in get_args(kinds)]
        fix = closest(getattr(choice, "__name__", str(choice)), known)
        raise LayoutError(f"rules.{name} = {choice!r} is not known.", rule="a value, with its ()", fix=fix)


def _without_stage(mapping: Mapping[str, Axes]) -> dict[str, Axes]:
    return {letter: tuple(axis for axis in axes_of(mapping, letter) if axis != "stage") for letter in mapping}


def _frozen(mapping: Mapping[str, Axes]) -> frozenset:
    return frozenset(mapping.items())


def _checked(side: str, mapping: Mapping[str, Axes], letter: str) -> tuple[str, ...]:
    if letter not in LETTERS:
        raise LayoutError(f"{side} maps {letter!r}, which is no letter of the alphabet.", fix=closest(letter, LETTERS))
    written = isinstance(mapping[letter], str | tuple | list | None)
    axes = axes_of(mapping, letter) if written else (mapping[letter],)
    for axis in axes:
        if not isinstance(axis, str) or axis not in AXES:
            raise LayoutError(f"{side} puts {letter} on {axis!r}, which is no mesh axis.", fix=closest(axis, AXES))
    if len(set(axes)) < len(axes):
        raise LayoutError(f"{side} puts {letter} twice on one axis.", got=f"{letter} -> {axes}")
    return axes


def _map(axes: Iterable[str], letters: str) -> dict[str, Axes]:
    return dict.fromkeys(letters, tuple(axes))


# Every preset puts every axis to use, so that any mesh is right, and none is idle, under any of them:
# the batch takes all axes but `context` (and `tensor`, where the preset splits layers), the sequence takes `context`.
_BATCH = ("replica", "data", "stage", "fsdp", "expert")
_SEQUENCE = ("context",)
_ALL = tuple(AXES)
_PLAIN = _map((*_BATCH, "tensor"), "B") | _map(_SEQUENCE, "SR") | _map(_ALL, "C")
_SPLIT = _map(("tensor",), "FNKV")
_TENSOR = _map(_BATCH, "B") | _map(_SEQUENCE, "SR") | _map((*_BATCH, *_SEQUENCE), "C") | _SPLIT
_TENSOR_SP = _TENSOR | _map((*_SEQUENCE, "tensor"), "R")

DP = Rules(params={}, acts=_PLAIN)
ZERO1 = Rules(params=_map(_ALL, "DA"), acts=_PLAIN, gather="step")
ZERO2 = Rules(params=_map(_ALL, "DA"), acts=_PLAIN, gather="step", reduce="microbatch")
FSDP = Rules(params=_map(_ALL, "DA"), acts=_PLAIN)
HSDP = Rules(params=_map(("fsdp",), "DA"), acts=_PLAIN)
TP = Rules(params=_SPLIT, acts=_TENSOR)
TP_SP = Rules(params=_SPLIT, acts=_TENSOR_SP)
FSDP_TP = Rules(params=_map((*_BATCH, *_SEQUENCE), "DA") | _SPLIT, acts=_TENSOR)
# `expert` shards E where there is one, and C cannot be on it too; without E it is one more axis of the batch, over which
# weights are stored as over `fsdp`. `context` ranks hold equal weights, so storing a part each costs no more traffic than
# all-reducing their gradients; `replica` and `data` are there to hold copies. `stage` comes last in D: what is stored
# over it goes to the stages' layers by one all-to-all.
DEFAULT = Rules(
    params=_map(("fsdp", "expert", "context", "stage"), "DA") | _SPLIT | _map(("expert",), "E"),
    acts=_TENSOR_SP | _map(("replica", "data", "stage", "fsdp", "context"), "C") | _map(("expert",), "E"),
    pipeline=Interleaved(),
)

PRESETS: dict[str, Rules] = {
    "DP": DP,
    "ZERO1": ZERO1,
    "ZERO2": ZERO2,
    "FSDP": FSDP,
    "HSDP": HSDP,
    "TP": TP,
    "TP_SP": TP_SP,
    "FSDP_TP": FSDP_TP,
    "DEFAULT": DEFAULT,
}
