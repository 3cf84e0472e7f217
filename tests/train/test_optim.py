"""Optimizers equal updates written out in numpy, and know which parameters they decay or orthogonalise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.train.optim import AdamW, Lion, Muon

LETTERS = {"embed": "VD", "blocks": {"norm": "LD", "q": "LDNH", "up": "LDF", "down": "LFD"}}
SHAPES = {"embed": (12, 8), "blocks": {"norm": (3, 8), "q": (3, 8, 2, 4), "up": (3, 8, 16), "down": (3, 16, 8)}}
ROUNDING = 1e-5  # relative; fp32 against float64 over a few operations
NEWTON_SCHULZ = 1e-4  # absolute, on entries near 1/sqrt(8); fp32 through five cubic iterations


def _trees(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=_is_shape)  # noqa: E731
    return draw(), draw(), draw()


def _is_shape(x):
    return isinstance(x, tuple)


def _updates(optim, params, *grads):
    tx = optim.transform(LETTERS)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    return updates


def test_adamw_equals_its_published_update_with_norms_not_decayed():
    params, g1, g2 = _trees()
    optim = AdamW(weight_decay=0.3)
    ours = _updates(optim, params, g1, g2)

    def expected(path, p, a, b):
        p, a, b = (np.asarray(x, np.float64) for x in (p, a, b))
        m = 0.9 * 0.1 * a + 0.1 * b
        v = 0.95 * 0.05 * a**2 + 0.05 * b**2
        decay = 0.0 if "norm" in jax.tree_util.keystr(path) else 0.3
        return m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.95**2)) + 1e-8) + decay * p

    reference = jax.tree_util.tree_map_with_path(expected, params, g1, g2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=ROUNDING, atol=ROUNDING), ours, reference)


def test_lion_is_a_sign_plus_decay():
    params, g1, _ = _trees()
    ours = _updates(Lion(weight_decay=0.0), params, g1)
    jax.tree.map(lambda x, g: np.testing.assert_array_equal(x, np.sign(g)), ours, g1)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_embeddings_and_norms_to_adam():
    params, g1, _ = _trees()
    ours = _updates(Muon(weight_decay=0.0), params, g1)
    adam = _updates(AdamW(weight_decay=0.0), params, g1)
    for path in (("embed",), ("blocks", "norm")):
        a, b = ours, adam
        for name in path:
            a, b = a[name], b[name]
        np.testing.assert_array_equal(a, b)
    for name, rows in (("q", 8), ("up", 8), ("down", 16)):
        for layer, grad in zip(np.asarray(ours["blocks"][name]), np.asarray(g1["blocks"][name], np.float64)):
            expected = 0.2 * np.sqrt(max(rows, grad.size // rows)) * _newton_schulz(grad.reshape(rows, -1))
            np.testing.assert_allclose(layer.reshape(rows, -1), expected, atol=NEWTON_SCHULZ)


def _newton_schulz(g):
    """Five steps of the quintic iteration of Jordan 2024; the first update's momentum only scales g, which cancels."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


def test_a_decay_mask_that_matches_nothing_is_refused_with_the_paths():
    with pytest.raises(ConfigError, match="matches no parameter.*") as error:
        AdamW(no_decay=("nrom",)).transform(LETTERS)
    assert "blocks/norm" in str(error.value)
