"""Initial values against JAX's own Threefry, the closed-form moments of a cut-off normal, and other meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import NamedSharding, PartitionSpec

import meshes
from models.draw import bits, normals


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5), (2, 3, 4, 5)])
def test_bits_are_threefry_of_the_first_index_and_of_the_index_in_the_rest(shape):
    key = jax.random.key(11)
    first, rest = np.divmod(np.arange(np.prod(shape), dtype=np.uint32), np.uint32(np.prod(shape[1:], dtype=int)))
    x, y = np.split(np.asarray(threefry_2x32(jax.random.key_data(key), jnp.concatenate([first, rest]))), 2)
    np.testing.assert_array_equal(bits(key, shape), (x ^ y).reshape(shape))


def test_normals_have_the_moments_of_a_normal_cut_off_at_two_deviations():
    x = np.asarray(normals(jax.random.key(0), (1000, 1000), 0.5), np.float64)
    cut = 2 * 0.5 / 0.87962566
    assert abs(x).max() < cut and abs(x).max() > 0.999 * cut
    assert abs(x.mean()) < 4 * 0.5e-3 and abs(x.std() - 0.5) < 4 * 0.5e-3  # four standard errors of a million draws
    inside = 0.68268949 / 0.95449974  # the share of the uncut normal's one deviation among what is within two
    assert abs((abs(x) < cut / 2).mean() - inside) < 4 * 0.5e-3


def test_rows_columns_and_keys_are_not_correlated():
    x = np.asarray(normals(jax.random.key(0), (300, 300), 1.0))
    y = np.asarray(normals(jax.random.key(1), (300, 300), 1.0))
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x, x.T.copy()), (x, y)):
        off = ~np.eye(*a.shape, dtype=bool)
        assert abs((a * b)[off].mean()) < 5 / 300


def test_a_sharded_draw_has_the_same_bits_and_no_collective():
    mesh = meshes.make(meshes.MeshConfig(fsdp=8))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    draw = jax.jit(lambda key: normals(key, (16, 6), 1.0), out_shardings=sharding)
    np.testing.assert_array_equal(draw(jax.random.key(3)), jax.jit(lambda k: normals(k, (16, 6), 1.0))(jax.random.key(3)))
    program = draw.lower(jax.random.key(3)).compile().as_text()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in program]
