"""Cross-entropy over a large vocabulary in fp32, a chunk of positions at a time. It never holds the logits of a whole batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import meshes

# fp32 logits of one chunk on one device. GPUs want matmuls of thousands of rows; a CPU wants the chunk near its cache.
CHUNK_BYTES = {"gpu": 1 << 30, "cpu": 1 << 24}


class Sums(NamedTuple):
    """Weighted sums over all targets: `nll` of -log p in nats, `z` of log(Z)^2, `count` of the weights."""

    nll: Array
    z: Array
    count: Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h_BSD: Array, w_DV: Array, targets_BS: Array, weights_BS: Array, z_weight: float) -> tuple[Array, Sums]:
    """-> (objective, sums): nll + z_weight * z, which carries the gradient to h and w, and the sums, which carry none.

    The gradient is formed beside the loss, so the logits exist once, in one chunk, and are not computed again. V may be
    sharded: maximum, sum and the target's logit are reduced over its axis and no device holds a whole row. w comes as it
    is stored, and is gathered here, so that its gradient is summed into the stored parts. A target of weight 0 may be
    any valid id.
    """
    w_DV = meshes.constrain(w_DV, "DV")
    plan = _Plan(h_BSD, w_DV)

    def body(sums: Sums, chunk: tuple) -> tuple[Sums, None]:
        parts, _ = _chunk_loss(w_DV, chunk, z_weight)
        return jax.tree.map(jnp.add, sums, parts), None

    sums, _ = lax.scan(body, zero_sums(), plan.split(h_BSD, targets_BS, weights_BS))
    return sums.nll + z_weight * sums.z, sums


def _forward(h_BSD, w_DV, targets_BS, weights_BS, z_weight):
    """As `cross_entropy`, keeping dh and dw in fp32, summed over chunks; dw not yet over batch shards."""
    w_DV = meshes.constrain(w_DV, "DV")
    plan = _Plan(h_BSD, w_DV)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        sums, dw_GXDV = carry
        parts, dlogits = _chunk_loss(w_DV, chunk, z_weight)
        dlogits = dlogits.astype(h_BSD.dtype)
        dh = jnp.einsum("gbxcv,dv->gbxcd", dlogits, w_DV, preferred_element_type=jnp.float32)
        dw = jnp.einsum("gbxcd,gbxcv->gxdv", chunk[0], dlogits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, parts), meshes.constrain(dw_GXDV + dw, "BS_V")), dh

    start = (zero_sums(), meshes.constrain(jnp.zeros((plan.rows, plan.columns, *w_DV.shape), jnp.float32), "BS_V"))
    (sums, dw_GXDV), dh = lax.scan(body, start, plan.split(h_BSD, targets_BS, weights_BS))
    gradients = plan.join(dh), meshes.store(dw_GXDV.sum((0, 1)), "DV")
    return (sums.nll + z_weight * sums.z, sums), (gradients, (jnp.zeros((), h_BSD.dtype), jnp.zeros((), w_DV.dtype)))


def _backward(z_weight, kept, cotangents):
    """The objective is a scalar, so its cotangent only scales what the forward pass formed.

    In fp32, rounded once: bfloat16's own 1 / count, or what was rounded before, is off by up to 0.4 % in length, by
    another part for every count.
    """
    scaled = [(x * cotangents[0]).astype(like.dtype) for x, like in zip(*kept)]
    return *scaled, None, None


cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(w_DV: Array, chunk: tuple, z_weight: float) -> tuple[Sums, Array]:
    """-> the chunk's sums and d(objective)/d(logits), fp32. The target is picked by comparison: a gather would need all V."""
    h, targets, weights = chunk
    logits = jnp.einsum("gbxcd,dv->gbxcv", h, w_DV, preferred_element_type=jnp.float32)
    logits = meshes.constrain(logits, "B_S_V")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    hit = targets[..., None] == jnp.arange(logits.shape[-1])[None, None, None, None]
    target_logit = jnp.where(hit, logits, 0.0).sum(-1)
    sums = Sums((weights * (log_z - target_logit)).sum(), (weights * log_z**2).sum(), weights.sum())
    probability = jnp.exp(logits - log_z[..., None])
    slope = weights * (1.0 + 2.0 * z_weight * log_z)
    return sums, probability * slope[..., None] - jnp.where(hit, weights[..., None], 0.0)


class _Plan:
    """How (B, S) divides into chunks whose rows and columns stay on their devices.

    x_BS... -> x_ngbxc...: n chunks; g batch shards of b rows; x sequence shards, of which a chunk takes c columns each.
    Keeping g and x apart lets dw be summed over chunks locally and over devices once.
    """

    def __init__(self, h_BSD: Array, w_DV: Array):
        self.shape = h_BSD.shape[:2]
        self.rows, self.columns = meshes.axis_size("B"), meshes.axis_size("S")
        rows, columns = self.shape[0] // self.rows, self.shape[1] // self.columns
        column_bytes = 4 * rows * w_DV.shape[1] // meshes.axis_size("V")
        fits = max(1, CHUNK_BYTES["gpu" if meshes.platform() == "gpu" else "cpu"] // column_bytes)
        self.chunks = next(n for n in range(1, columns + 1) if columns % n == 0 and columns // n <= fits)

    def split(self, *arrays: Array) -> tuple[Array, ...]:
        return tuple(self._split(x) for x in arrays)

    def _split(self, x: Array) -> Array:
        x = x.reshape(self.rows, -1, self.columns, self.chunks, self.shape[1] // self.columns // self.chunks, *x.shape[2:])
        return meshes.constrain(jnp.moveaxis(x, 3, 0), "_B_S" + "_" * (x.ndim - 4))

    def join(self, x: Array) -> Array:
        return meshes.constrain(jnp.moveaxis(x, 0, 3).reshape(*self.shape, x.shape[-1]), "BSD")


def zero_sums() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
