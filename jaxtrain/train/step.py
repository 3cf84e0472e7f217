"""The pure step: (state, batch) -> (state, metrics), and its evaluation twin. No clock, no file, no host decision in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

import meshes
from jaxtrain.background import in_background
from jaxtrain.layout import num_microbatches, runs_pipeline
from jaxtrain.protocols import BATCH_FIELDS, Extras
from jaxtrain.resilience.health import Skip
from jaxtrain.train import diloco, pipeline
from jaxtrain.train.loss import Sums, cross_entropy
from jaxtrain.train.replicas import DiLoCo
from jaxtrain.train.state import Blueprint, State
from meshes.context import balanced
from meshes.rules import axes_of

Batch = dict[str, Array]


def train_step(blueprint: Blueprint) -> Callable[[State, Batch, Array], tuple[State, dict[str, Array]]]:
    """The compiled update. The state is donated; the batch is "BS" arrays sharded by the activation rules.

    `stop` is an int32 per device, any of them nonzero when that device's process wants to stop: the maximum comes back
    in the metrics, so all processes learn of it at the same step. Metrics are replicated; the model's may be arrays.
    """
    config = blueprint.config

    def step(state: State, batch: Batch, stop: Array) -> tuple[State, dict[str, Array]]:
        with meshes.use(blueprint.mesh, blueprint.rules), balanced(batch) as batch:
            before = state
            state, (sums, extras, norm) = _advance(blueprint, before, batch)
            if skips := isinstance(config.health.not_finite, Skip):
                state, skipped = _kept_if_bad(before, state, sums.nll / sums.count, norm)
            state = _met(blueprint, state)
            metrics = {
                "train/loss": sums.nll / sums.count,
                "train/grad_norm": norm,
                "train/param_norm": optax.tree.norm(state.params),
                "train/learning_rate": _rate(blueprint, state.step - 1),
                "train/tokens": sums.count,
                "stop": stop.max(),
            }
            if config.z_loss:
                metrics["train/z_loss"] = config.z_loss * sums.z / sums.count
            if skips:
                metrics["train/skipped"] = skipped
            if "objective" in extras:
                metrics["train/auxiliary_loss"] = extras["objective"] / sums.count
            metrics |= blueprint.model(state.params).metrics(extras)
        return state, metrics

    return _compiled(blueprint, step, state=blueprint.shardings, out=(blueprint.shardings, _replicated(blueprint)))


def lowered(blueprint: Blueprint) -> jax.stages.Lowered:
    """`train_step` traced for the arrays of this run, none of which has to exist."""
    config, stop = blueprint.config, meshes.per_device(blueprint.mesh)
    shape, rows = (config.batch, config.seq_len), blueprint.batch_sharding()
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in BATCH_FIELDS.items()}
    flags = jax.ShapeDtypeStruct((blueprint.mesh.size,), jnp.int32, sharding=stop)
    return train_step(blueprint).lower(blueprint.abstract, batch, flags)


def compiled_ahead(blueprint: Blueprint) -> Callable[[State, Batch, Array], tuple[State, dict[str, Array]]]:
    """`train_step`, compiled on a thread from now on, while the caller draws a state and opens files; a call waits for it."""

    def compiled() -> jax.stages.Compiled:
        program = lowered(blueprint).compile()
        if runs_pipeline(blueprint.config, blueprint.mesh.shape):
            pipeline.check(program, blueprint.mesh)
        return program

    made = in_background(compiled)
    return lambda *arguments: made.result()(*arguments)


def _advance(blueprint: Blueprint, state: State, batch: Batch) -> tuple[State, tuple[Sums, Extras, Array]]:
    """-> the next state; sums and extras of the whole batch; the gradient's norm (of replicas that train apart: the mean)."""
    if not isinstance(blueprint.config.replicas, DiLoCo):
        params, opt, sums = _update(blueprint, lambda sums: sums, state.step, state.params, state.opt, batch)
        return State(step=state.step + 1, params=params, opt=opt), sums
    update, mesh = partial(_update, blueprint, diloco.summed), blueprint.mesh
    mine, opt, (sums, extras, norm) = diloco.inner(mesh, update, state.step, state.outer.local, state.opt, batch)
    outer = dataclasses.replace(state.outer, local=mine)
    return State(state.step + 1, state.params, opt, outer), (sums, extras, norm / mesh.shape[diloco.AXIS])


def _met(blueprint: Blueprint, state: State) -> State:
    """The state after the outer step that is due, if any, whether or not the update before it was kept."""
    config = blueprint.config
    if not isinstance(config.replicas, DiLoCo):
        return state
    where = blueprint.shardings.params, blueprint.shardings.outer
    how = config.replicas, config.steps, blueprint.mesh, blueprint.letters.params, where
    params, outer = diloco.meet(*how, state.step, (state.params, state.outer))
    return dataclasses.replace(state, params=params, outer=outer)


def _kept_if_bad(before: State, after: State, *watched: Array) -> tuple[State, Array]:
    """-> `after`, but for its step `before` where a watched value is not finite; and 1 or 0, whether that was so.

    A choice between values and no branch: it joins the update's own pass over the arrays.
    """
    bad = ~jnp.isfinite(jnp.stack(watched)).all()
    kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)
    return dataclasses.replace(kept, step=after.step), bad.astype(jnp.int32)


def _update(
    blueprint: Blueprint, whole: Callable[[Any], Any], completed: Array, params: Any, opt: Any, batch: Batch
) -> tuple[Any, Any, Any]:
    """-> parameters and optimizer state after one update; (sums, extras, gradient's norm before clipping), made `whole`.

    `whole` sums over the replicas that train apart: what follows the load of experts follows that of the whole batch.
    """
    (sums, extras), grads = _gradients(blueprint, params, batch)
    norm, clip = optax.tree.norm(grads), blueprint.config.optim.clip
    if clip is not None:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), grads)
    updates, opt = blueprint.tx.update(grads, opt, params)
    rate = _rate(blueprint, completed)
    sums, extras, norm = whole((sums, extras, norm))
    params = blueprint.model(params).after_update(jax.tree.map(lambda p, u: p - rate * u, params, updates), extras)
    return params, opt, (sums, extras, norm)


def _rate(blueprint: Blueprint, completed: Array) -> Array:
    optim = blueprint.config.optim
    return optim.peak_lr * optim.schedule.factor(completed, blueprint.config.steps)


def eval_step(blueprint: Blueprint) -> Callable[[Any, Batch, Array], tuple[Array, Array, Array]]:
    """(params, batch, token_bytes_V) -> the batch's sums: nll in nats, targets counted, bytes that they stand for."""

    def step(params: Any, batch: Batch, token_bytes_V: Array) -> tuple[Array, Array, Array]:
        with meshes.use(blueprint.mesh, pipeline.unstaged(blueprint)), balanced(batch) as batch:
            batch = jax.tree.map(lambda x_BS: meshes.constrain(x_BS, "BS"), batch)
            sums, _ = _loss(blueprint, _compute_copy(blueprint, params), batch)[1]
            num_bytes = (token_bytes_V[batch["targets"]] * batch["weights"]).sum()
        return sums.nll, sums.count, num_bytes

    shardings = (blueprint.shardings.params, blueprint.batch_sharding(), _replicated(blueprint))
    return jax.jit(step, in_shardings=shardings, out_shardings=_replicated(blueprint))


def _compiled(blueprint: Blueprint, step: Callable, state: Any, out: Any) -> Callable:
    shardings = (state, blueprint.batch_sharding(), meshes.per_device(blueprint.mesh))
    return jax.jit(step, in_shardings=shardings, out_shardings=out, donate_argnums=0)


def _replicated(blueprint: Blueprint) -> NamedSharding:
    return meshes.sharding(blueprint.mesh, "", blueprint.rules.acts)


def _loss(blueprint: Blueprint, params: Any, batch: Batch) -> tuple[Array, tuple[Sums, Extras]]:
    """-> the objective, a sum over targets, and what it is made of."""
    model = blueprint.model(params)
    h_BSD, extras = model(batch["tokens"], batch["segments"], batch["positions"])
    total, sums = cross_entropy(h_BSD, model.unembedding(), batch["targets"], batch["weights"], blueprint.config.z_loss)
    return total + extras.get("objective", 0.0), (sums, lax.stop_gradient(extras))


def _gradients(blueprint: Blueprint, params: Any, batch: Batch) -> tuple[tuple[Sums, Extras], Any]:
    """Sums over the whole batch and the gradient of the mean objective, fp32, laid out as the parameters are stored.

    Each microbatch's objective is divided by the whole batch's count, so accumulation changes no weight of any token.
    """
    if runs_pipeline(blueprint.config, blueprint.mesh.shape):
        parts = num_microbatches(blueprint.config, blueprint.mesh.shape)
        return pipeline.gradients(blueprint, params, jax.tree.map(lambda x: _microbatches(x, parts), batch))
    count = jnp.maximum(batch["weights"].sum(), 1.0)
    inside = jax.sharding.get_abstract_mesh()
    apart = inside.manual_axes
    once, every = _reduced(blueprint, apart)
    if not once or (blueprint.config.accumulate == 1 and not every):
        return _accumulated(blueprint, params, batch, count)
    if blueprint.rules.gather == "step":
        params = _compute_copy(blueprint, params)

    def local(params: Any, batch: Batch, count: Array) -> tuple[tuple[Sums, Extras], Any]:
        return jax.tree.map(lambda x: x[None], _accumulated(blueprint, params, batch, count))

    # By hand over these axes alone: the partitioner would sum over the devices after every microbatch, and whole
    # gradients over all axes at once, where a part of each is to be summed over the copies of that part.
    along = PartitionSpec(tuple(once))
    specs = dict(in_specs=(PartitionSpec(), along, PartitionSpec()), out_specs=along, axis_names=set(once))
    mesh = inside if apart else blueprint.mesh
    parts = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(params, batch, count)
    sums, grads = jax.tree.map(lambda x: x.sum(0).astype(jnp.float32), parts)  # a weight gathered before has its bf16
    return sums, _stored(blueprint, grads)


def _reduced(blueprint: Blueprint, apart: Collection[str]) -> tuple[list[str], list[str]]:
    """The axes over which gradients are summed once a step, as they are stored, and in every microbatch, into parts."""
    rules, once = blueprint.rules, blueprint.rules.reduced_once()
    summed = [axis for letter in "BS" for axis in axes_of(rules.acts, letter)]
    summed = [axis for axis in summed if blueprint.mesh.shape.get(axis, 1) > 1 and axis not in apart]
    parts = [axis for axis in summed if axis not in once and axis in axes_of(rules.params, "D")]
    return [axis for axis in summed if axis in once], parts


def _accumulated(blueprint: Blueprint, params: Any, batch: Batch, count: Array) -> tuple[tuple[Sums, Extras], Any]:
    """One microbatch after the other; within a shard_map those of the devices' own rows."""
    if blueprint.config.accumulate == 1:
        return _microbatch_gradients(blueprint, params, batch, count)

    def gradients(part: Batch) -> tuple[tuple[Sums, Extras], Any]:
        return _microbatch_gradients(blueprint, params, part, count)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(part)), None

    parts = jax.tree.map(lambda x: _microbatches(x, blueprint.config.accumulate), batch)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
    sums, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return lax.scan(add, (sums, _stored(blueprint, grads)), parts)[0]


def _microbatch_gradients(
    blueprint: Blueprint, params: Any, part: Batch, count: Array
) -> tuple[tuple[Sums, Extras], Any]:
    def objective(params: Any) -> tuple[Array, tuple[Sums, Extras]]:
        total, sums = _loss(blueprint, _compute_copy(blueprint, params), part)
        return total / count, sums

    (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return sums, _stored(blueprint, grads)


def _microbatches(x_BS: Array, parts: int) -> Array:
    """(B, S) -> (parts, B / parts, S): microbatch m holds rows m, m + parts, ..., so rows stay on their devices."""
    return meshes.constrain(jnp.moveaxis(x_BS.reshape(-1, parts, x_BS.shape[1]), 1, 0), "_BS")


def _compute_copy(blueprint: Blueprint, params: Any) -> Any:
    """The parameters in the compute dtype: still stored as they were (gathered layer by layer), or gathered once."""
    copy = blueprint.compute_copy(params)
    if blueprint.rules.gather == "step":
        return jax.tree.map(meshes.constrain, copy, blueprint.letters.params)
    return _stored(blueprint, copy)


def _stored(blueprint: Blueprint, tree: Any) -> Any:
    """A tree like the parameters, laid out as they are stored."""
    return jax.tree.map(meshes.store, tree, blueprint.letters.params)
