"""The chunked cross-entropy equals a float64 reference, values and gradients, whole or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from jaxtrain.train import loss

FP32_NOISE = 2e-5  # relative; fp32 sums of a few thousand terms of like size
BF16_LENGTH = 1e-3  # relative; rounding of 384 entries and more averages out, a factor that is rounded does not


def _inputs(batch=4, seq=24, dim=16, vocab=40, seed=0):
    rng = np.random.default_rng(seed)
    h, w = rng.normal(size=(batch, seq, dim)), rng.normal(size=(dim, vocab)) / 4
    targets = rng.integers(0, vocab, (batch, seq), dtype=np.int32)
    return h, w, targets, (rng.random((batch, seq)) < 0.8).astype(np.float64)


def _reference(h, w, targets, weights, z_weight):
    """-> (nll, z, dh, dw) of nll + z_weight * z, in float64 with all logits at once."""
    logits = h @ w
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    slope = np.exp(logits - log_z[..., None]) * (weights * (1 + 2 * z_weight * log_z))[..., None]
    slope -= np.eye(w.shape[1])[targets] * weights[..., None]
    dw = np.einsum("bsd,bsv->dv", h, slope)
    return (weights * (log_z - picked)).sum(), (weights * log_z**2).sum(), slope @ w.T, dw


def _ours(h, w, targets, weights, z_weight):
    single = [jnp.asarray(x, jnp.float32) for x in (h, w)]
    objective = lambda h, w: loss.cross_entropy(h, w, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), z_weight)  # noqa: E731
    (total, sums), (dh, dw) = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(*single)
    return total, sums, dh, dw


def _assert_equal(ours, inputs, z_weight):
    total, sums, dh, dw = ours
    nll, z, dh_ref, dw_ref = _reference(*inputs, z_weight)
    np.testing.assert_allclose(sums.nll, nll, rtol=FP32_NOISE)
    np.testing.assert_allclose(sums.z, z, rtol=FP32_NOISE)
    np.testing.assert_allclose(sums.count, inputs[3].sum(), rtol=FP32_NOISE)
    np.testing.assert_allclose(total, nll + z_weight * z, rtol=FP32_NOISE)
    np.testing.assert_allclose(dh, dh_ref, rtol=FP32_NOISE, atol=FP32_NOISE)
    np.testing.assert_allclose(dw, dw_ref, rtol=FP32_NOISE, atol=FP32_NOISE * np.abs(dw_ref).max())


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 4 * 40 * 7, 1 << 24])
def test_loss_and_gradients_equal_float64_whatever_the_chunk(monkeypatch, chunk_bytes, z_weight):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk_bytes)
    inputs = _inputs()
    _assert_equal(_ours(*inputs, z_weight), inputs, z_weight)


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"fsdp": 2, "tensor": 2, "context": 2}, {"fsdp": 4, "context": 2}])
def test_loss_and_gradients_are_the_same_with_the_vocabulary_and_the_batch_sharded(monkeypatch, sizes):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 4 * 40)
    inputs = _inputs()
    with meshes.use(meshes.make(meshes.MeshConfig(**{"fsdp": 1} | sizes)), meshes.DEFAULT):
        _assert_equal(_ours(*inputs, 1e-3), inputs, 1e-3)


def test_no_array_of_the_compiled_program_is_as_large_as_the_logits(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 4 * 512 * 2)  # two columns a chunk
    h, w, targets, weights = (jnp.asarray(x) for x in _inputs(vocab=512))
    objective = lambda h, w: loss.cross_entropy(h, w, targets, weights.astype(jnp.float32), 0.0)[0]  # noqa: E731
    compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(h.astype(jnp.float32), w.astype(jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * targets.size * 512


def test_a_gradient_in_bfloat16_has_the_length_of_the_exact_one():
    """Though each entry is rounded, their lengths agree, for any number that the sum is divided by."""
    h, w, targets, weights = (jnp.asarray(x, kind) for x, kind in zip(_inputs(), (jnp.float32,) * 2 + (jnp.int32, jnp.float32)))
    for count in (488, 510):

        def mean(h, w):
            return loss.cross_entropy(h, w, targets, weights, 0.0)[0] / count

        small = h.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        rounded = jax.grad(mean, argnums=(0, 1))(*small)
        exact = jax.grad(mean, argnums=(0, 1))(*(x.astype(jnp.float32) for x in small))
        for ours, theirs in zip(rounded, exact):
            assert float(jnp.linalg.norm(ours.astype(jnp.float32)) / jnp.linalg.norm(theirs)) == pytest.approx(1.0, abs=BF16_LENGTH)


def test_a_target_of_weight_zero_changes_nothing():
    h, w, targets, weights = _inputs()
    other = np.where(weights == 0, (targets + 1) % w.shape[1], targets)
    for ours, theirs in zip(jax.tree.leaves(_ours(h, w, targets, weights, 0.1)), jax.tree.leaves(_ours(h, w, other, weights, 0.1))):
        np.testing.assert_array_equal(ours, theirs)
