"""The training state and its blueprint: every array's shape, letters and sharding before any exists. It does no step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import meshes
from jaxtrain.config import RunConfig
from jaxtrain.layout import within_stages
from jaxtrain.protocols import Model
from jaxtrain.train import diloco
from jaxtrain.train.replicas import DiLoCo
from meshes import Rules
from meshes.rules import axes_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `step` counts completed updates (int32 scalar); `params` is a nested dict of fp32 arrays;
    `opt` is the optax state, whose moments are stored exactly as the parameters they belong to.

    Under DiLoCo `params` are the shared ones, `opt` has a leading dim G, and `outer` is a diloco.Outer; else ()."""

    step: Any
    params: Any
    opt: Any
    outer: Any = ()


class Blueprint:
    """A run's state as descriptions: same tree three times, of shapes, of letters and of shardings on `mesh`."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config, self.mesh, self.rules = config, mesh, _rules(config, mesh)
        abstract = nnx.eval_shape(lambda: config.model.build(jax.random.key(0)))
        self._graph, self._slots = nnx.split(abstract)
        self._exact = nnx.to_pure_dict(jax.tree.map(lambda p: getattr(p, "exact", False), self._slots, is_leaf=_is_param))
        params = nnx.to_pure_dict(self._slots)
        letters = nnx.to_pure_dict(jax.tree.map(lambda p: p.letters, self._slots, is_leaf=_is_param))
        self.tx = config.optim.transform(letters)
        opt = optax.tree_map_params(
            self.tx,
            lambda moment, name: moment if _is_masked(moment) else name,
            jax.eval_shape(self.tx.init, params),
            letters,
            transform_non_params=lambda x: "_" * x.ndim,
            is_leaf=_is_masked,
        )
        self.shapes, self.letters = jax.eval_shape(self._around, params), self._letters(letters, opt)
        self.shardings = jax.tree_util.tree_map_with_path(self._sharding, self.shapes, self.letters)

    def _sharding(self, path: Any, shape: Any, letters: meshes.rules.Letters) -> NamedSharding:
        mapping = self.rules.stored(letters, shape.shape, self.mesh.shape)
        meshes.check(self.mesh, mapping, letters, shape.shape, jax.tree_util.keystr(path))
        return meshes.sharding(self.mesh, letters, mapping)

    def model(self, params: Any) -> Model:
        """The module over these parameters (arrays or tracers, any dtype)."""
        return nnx.merge(self._graph, jax.tree.unflatten(jax.tree.structure(self._slots), jax.tree.leaves(params)))

    def compute_copy(self, params: Any) -> Any:
        """The parameters in the compute dtype, but those that the model marks as exact; their gradients come back in fp32."""
        dtype = self.config.precision.compute
        return jax.tree.map(lambda x, exact: x if exact else x.astype(dtype), params, self._exact)

    @cached_property
    def abstract(self) -> State:
        """ShapeDtypeStructs with shardings: what a restore fills."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.shapes, self.shardings)

    def init(self) -> State:
        """A fresh state, born sharded: no device and no host ever holds a whole array that the rules divide.

        The values depend on the seed alone, not on the mesh.
        """
        return jax.jit(self._init, out_shardings=self.shardings)(jax.random.key(self.config.seed))

    def _init(self, key: Any) -> State:
        return self._around(nnx.to_pure_dict(nnx.state(self.config.model.build(key))))

    def _around(self, params: Any) -> State:
        """The state of a run that begins with these parameters."""
        step = jnp.zeros((), jnp.int32)
        if not isinstance(self.config.replicas, DiLoCo):
            return State(step=step, params=params, opt=self.tx.init(params))
        groups = self.mesh.shape[diloco.AXIS]
        outer = diloco.start(self.config.replicas, groups, params)
        return State(step=step, params=params, opt=diloco.copies(groups, self.tx.init(params)), outer=outer)

    def _letters(self, params: Any, opt: Any) -> State:
        if not isinstance(self.config.replicas, DiLoCo):
            return State(step="", params=params, opt=opt)
        own_params, own_opt = jax.tree.map(lambda name: diloco.LETTER + name, (params, opt))
        error = () if self.config.replicas.sent == "float32" else own_params
        return State(step="", params=params, opt=own_opt, outer=diloco.Outer(own_params, params, error))

    def batch_sharding(self) -> NamedSharding:
        """Of every array "BS" of a batch."""
        return meshes.sharding(self.mesh, "BS", self.rules.acts)


def _rules(config: RunConfig, mesh: Mesh) -> Rules:
    """The config's, as this mesh takes them; where replicas train apart, that axis stores nothing but each one's own."""
    rules = within_stages(config, mesh.shape)
    if not isinstance(config.replicas, DiLoCo):
        return rules
    params = {letter: tuple(a for a in axes_of(rules.params, letter) if a != diloco.AXIS) for letter in rules.params}
    return dataclasses.replace(rules, params=params | {diloco.LETTER: diloco.AXIS})


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_masked(x: Any) -> bool:
    """Where a part of the optimizer leaves a parameter to another part."""
    return isinstance(x, optax.MaskedNode)
