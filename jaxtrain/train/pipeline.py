"""A model in a pipeline: its layers divided and laid out over `stage`, and the step's sums and gradients from the executor.

What is stored and checkpointed is the same with and without. It makes no table (meshes.schedules) and runs none itself
(meshes.pipeline).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

import meshes
from jaxtrain.config import RunConfig
from jaxtrain.errors import RunError
from jaxtrain.layout import layers_per_stage, num_microbatches, within_stages
from jaxtrain.observe.hlo import collectives
from jaxtrain.protocols import Extras, Model
from jaxtrain.train.loss import Sums, cross_entropy
from jaxtrain.train.state import Blueprint
from meshes import Rules, pipeline
from meshes.rules import Axes
from meshes.simulator import Simulation, executed, simulate

Stacks = tuple[dict[str, Any], ...]


def describe(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """What runs, in a line."""
    simulation = _simulation(config, sizes)
    layers = " ".join(map(str, layers_per_stage(config, sizes)))
    line = (
        f"pipeline {config.rules.pipeline}: {simulation.table.num_microbatches} microbatches, layers {layers}; "
        f"{simulation.lockstep.bubble:.0%} of the time idle"
    )
    gathers = within_stages(config, sizes).context != config.rules.context
    return f"{line}; attention gathers keys, for within a stage a ring takes shards by powers of two" if gathers else line


def check(program: jax.stages.Compiled, mesh: Mesh) -> None:
    """Raises RunError for a program whose stages would wait for each other for ever, as far as its text can be read.

    XLA's permute on CPU waits for all devices that it names, also those of stages in another branch. A branch that is
    not in the loop over ticks is one that all devices take.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return
    with contextlib.suppress(ValueError):  # text of another version
        for found in collectives(program.as_text(), mesh):
            if found.branch and found.times > 1 and found.kind == "collective-permute":
                raise RunError(
                    "this layout's pipeline would hang on CPUs.",
                    got=f"the compiler exchanges parts over {' x '.join(found.axes)} within a stage, in {found.op}",
                    rule="within a stage devices of that stage alone meet",
                    fix="another layout; and report this one: it is an error of jaxtrain",
                )


def unstaged(blueprint: Blueprint) -> Rules:
    """The rules for what runs without the pipeline: `stage` is an axis like others, where the batch divides."""
    flat = without_pipeline(blueprint)
    fits = blueprint.config.batch % flat.shards("B", blueprint.mesh.shape) == 0
    return flat if fits else dataclasses.replace(blueprint.rules, pipeline=None)


def without_pipeline(blueprint: Blueprint) -> Rules:
    """The rules without the pipeline, `stage` being an axis like others."""
    return dataclasses.replace(blueprint.rules, pipeline=None, acts=blueprint.config.rules.acts)


def _simulation(config: RunConfig, sizes: Mapping[str, int]) -> Simulation:
    table = config.rules.pipeline.table(sizes["stage"], num_microbatches(config, sizes))
    return simulate(table, executed(table, config.rules.pipeline.keep))


def gradients(blueprint: Blueprint, params: Any, batch: dict[str, Array]) -> tuple[tuple[Sums, Extras], Any]:
    """Sums and extras of the whole batch, and the gradient of the mean objective, fp32, laid out as stored.

    `batch` has a leading dim of microbatches. The embedding, the final norm and the unembedding are on all stages, in
    the compute dtype; the first stage uses the one, the last the others, and the gradients are added over `stage`.
    """
    model = _Model(blueprint, params)
    count = jnp.maximum(batch["weights"].sum(), 1.0)
    inside, sizes = jax.sharding.get_abstract_mesh(), blueprint.mesh.shape
    apart = inside.manual_axes
    once = tuple(axis for axis in blueprint.rules.reduced_once() if sizes.get(axis, 1) > 1 and axis not in apart)
    mesh = inside if apart else blueprint.mesh
    totals = pipeline.gradients(mesh, model.simulation, model.work, model.ends, model.weights, batch, 1.0 / count, once)
    return (totals.sums, model.extras(totals.extras)), model.gradient(totals)


@dataclass(frozen=True)
class Division:
    """Which layers each virtual stage runs: `counts[virtual][stack]`, and for every stack where its rows lie.

    `rows[stack]` (stages, chunks, rows) numbers the layers there, 0 where there is none; `places[stack]` (layers,) is
    the inverse, into (stages x chunks x rows).
    """

    counts: tuple[tuple[int, ...], ...]
    rows: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]

    def in_order(self, stack: int) -> bool:
        """The layers lie as they are stored, so that nothing needs to move."""
        return self.rows[stack].size == len(self.places[stack]) and not np.diff(self.rows[stack].ravel(), 2).any()


def divide(depths: tuple[int, ...], lengths: list[int], stages: int) -> Division:
    """Stacks of so many layers, and how many consecutive layers each virtual stage runs -> where each layer lies."""
    stack_of = np.repeat(np.arange(len(depths)), depths)
    virtual_of = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.stack([np.bincount(stack_of[virtual_of == i], minlength=len(depths)) for i in range(len(lengths))])
    found = [_places(virtual_of[stack_of == stack], counts[:, stack], stages) for stack in range(len(depths))]
    rows, places = zip(*found, strict=True)
    return Division(tuple(map(tuple, counts.tolist())), rows, places)


def _places(virtual_of: np.ndarray, counts: np.ndarray, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one stack, with the virtual stage of each of its layers and the number on each."""
    first = np.searchsorted(virtual_of, virtual_of)  # the first layer on the same virtual stage
    chunk, stage = np.divmod(virtual_of, stages)
    shape = stages, len(counts) // stages, counts.max()
    rows = np.zeros(shape, int)
    where = stage, chunk, np.arange(len(virtual_of)) - first
    rows[where] = np.arange(len(virtual_of))
    return rows, np.ravel_multi_index(where, shape)


class _Model:
    """A run's model over its parameters, as the executor takes it; traced within a step."""

    def __init__(self, blueprint: Blueprint, params: Any):
        self._blueprint, self._rules = blueprint, blueprint.rules
        self._letters, self._tree = jax.tree.flatten(blueprint.letters.params)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        copy = blueprint.compute_copy(params)
        self._stacks = self._stacks_of(copy)
        leaves = zip(jax.tree.leaves(copy), self._letters, strict=True)
        self.ends = self._lay_ends([leaf for leaf, letters in leaves if not _is_stacked(letters)])

    @cached_property
    def simulation(self) -> Simulation:
        return _simulation(self._blueprint.config, self._blueprint.mesh.shape)

    @cached_property
    def division(self) -> Division:
        depths = tuple(len(next(iter(stack.values()))) for stack in self._stacks)
        lengths = layers_per_stage(self._blueprint.config, self._blueprint.mesh.shape)
        return divide(depths, lengths, self._blueprint.mesh.shape["stage"])

    @cached_property
    def work(self) -> pipeline.Work:
        return pipeline.Work(
            layers=self.division.counts,
            first=lambda ends, part: self._of_ends(ends).embed(part["tokens"]),
            through=self._through,
            last=self._last,
            lay_x=lambda x_BRD: meshes.constrain(x_BRD, "BRD"),
            lay_weights=self._lay_weights,
            lay_ends=self._lay_ends,
            keep=self._rules.pipeline.keep,
        )

    @property
    def weights(self) -> Stacks:
        """All layers as (stages, chunks, rows, ...), over `stage` and within a stage as stored."""
        return tuple(
            {name: self._spread(w, name, stack) for name, w in weights.items()}
            for stack, weights in enumerate(self._stacks)
        )

    def gradient(self, totals: pipeline.Totals) -> Any:
        """The executor's sums -> a tree like the parameters, laid out as they are stored."""
        stacks = tuple(
            {name: self._gathered(w, name, stack) for name, w in weights.items()}
            for stack, weights in enumerate(totals.weights)
        )
        (tree,) = jax.linear_transpose(self._stacks_of, self._shapes)(stacks)
        ends = (end.sum(axis=0) for end in totals.ends)
        leaves = zip(jax.tree.leaves(tree), self._letters, strict=True)
        grads = [leaf if _is_stacked(letters) else next(ends) for leaf, letters in leaves]
        return self._tree.unflatten(map(self._store, grads, self._letters))

    def _store(self, w: Array, letters: str) -> Array:
        return meshes.store(w, letters, self._rules.stored(letters, w.shape, self._blueprint.mesh.shape))

    def extras(self, found: tuple[Extras, ...]) -> Extras:
        """The executor's extras, (stages, chunks, ...) of each stack, -> the model's: of all layers in order."""
        columns: dict[str, list[Array]] = {}
        for stack, places in zip(found, self.division.places, strict=True):
            for name, rows in stack.items():
                # First whole, a few numbers a layer: where `replica` is manual, XLA aborts on a gather over `stage`.
                rows = meshes.constrain(rows, "_" * rows.ndim)
                in_order = rows if name == "objective" else rows.reshape(-1, *rows.shape[3:])[places]
                columns.setdefault(name, []).append(in_order)
        objective = {"objective": sum(x.sum() for x in columns.pop("objective"))} if "objective" in columns else {}
        return {name: jnp.concatenate(rows) for name, rows in columns.items()} | objective

    def _stacks_of(self, params: Any) -> Stacks:
        return self._blueprint.model(params).stacks()

    def _of_ends(self, ends: list[Array]) -> Model:
        """The model of which only what is no layer will be used."""
        ends, nothing = iter(ends), jnp.zeros(())
        leaves = [nothing if _is_stacked(letters) else next(ends) for letters in self._letters]
        return self._blueprint.model(self._tree.unflatten(leaves))

    def _through(self, stack: int, weights: Any, x_BRD: Array, part: dict[str, Array]) -> tuple[Array, Extras]:
        """Layers of one stack; extras have a row for each that a virtual stage may run."""
        model = self._blueprint.model(self._tree.unflatten([jnp.zeros(())] * len(self._letters)))
        x_BRD, extras = model.through(stack, weights, x_BRD, part["segments"], part["positions"])
        rows, most = len(next(iter(weights.values()))), self.division.rows[stack].shape[2]
        pad = lambda x: jnp.pad(x, [(0, most - rows), *[(0, 0)] * (x.ndim - 1)])  # noqa: E731
        return x_BRD, {name: x if name == "objective" else pad(x) for name, x in extras.items()}

    def _last(self, ends: list[Array], x_BRD: Array, part: dict[str, Array]) -> tuple[Array, Sums]:
        model = self._of_ends(ends)
        z_loss = self._blueprint.config.z_loss
        return cross_entropy(model.final(x_BRD), model.unembedding(), part["targets"], part["weights"], z_loss)

    @property
    def _within_stage(self) -> Mapping[str, Axes]:
        """How the compute copy lies within a stage: as stored, or gathered once."""
        return self._rules.acts if self._rules.gather == "step" else self._rules.within_stage

    def _lay_ends(self, ends: list[Array]) -> list[Array]:
        letters = [letters for letters in self._letters if not _is_stacked(letters)]
        return [meshes.store(end, name, self._within_stage) for end, name in zip(ends, letters, strict=True)]

    def _lay_weights(self, stacks: Stacks) -> Stacks:
        """Of any leading dims."""
        return tuple({name: self._lay(w, name, self._within_stage) for name, w in stack.items()} for stack in stacks)

    def _lay(self, w: Array, name: str, mapping: Mapping[str, Axes], first: str = "_") -> Array:
        letters = _dims(name)[1:]
        lead = first + "_" * (w.ndim - len(letters) - 1)
        return meshes.store(w, lead + letters, mapping)

    def _spread(self, w: Array, name: str, stack: int) -> Array:
        """Of L layers -> (stages, chunks, rows, ...). Layers that change their stage go by way of the other dims, and are
        gathered within it afterwards: in one go each device would gather those of all stages."""
        rows = self.division.rows[stack]
        if self.division.in_order(stack):
            w = w.reshape(*rows.shape, *w.shape[1:])
        else:
            w = self._lay(self._lay(w, name, self._rules.params)[rows], name, self._rules.params)
            w = self._lay(w, name, self._rules.within_stage | {"P": ("stage",)}, first="P")
        return self._lay(w, name, self._within_stage | {"P": ("stage",)}, first="P")

    def _gathered(self, w: Array, name: str, stack: int) -> Array:
        """The inverse of `_spread`."""
        places = self.division.places[stack]
        if not self.division.in_order(stack):
            w = self._lay(w, name, self._rules.params)
        w = w.reshape(-1, *w.shape[3:])
        return w if self.division.in_order(stack) else self._lay(w[places], name, self._rules.params)


def _is_stacked(letters: str) -> bool:
    return letters.startswith("L")


def _dims(name: str) -> str:
    """The letters at the end of a parameter's name."""
    return name.rsplit("_", 1)[1]
