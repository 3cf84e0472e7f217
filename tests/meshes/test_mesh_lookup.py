"""The gradient of a look-up: added up where the rows are, summed into the stored parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from meshes.lookup import BLOCK, block_by_block, look_up

FP32 = 1e-6  # relative to the largest: sums of some tens of numbers, which lose less than a digit of seven


@pytest.mark.parametrize(
    "sizes",
    [dict(fsdp=1), dict(tensor=2), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=2, tensor=2)],
    ids=lambda sizes: " ".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_a_look_up_and_its_gradient_equal_numpy(sizes):
    rng = np.random.default_rng(0)
    table, dx = (rng.normal(size=(*shape, 16)).astype(np.float32) for shape in ((64,), (8, 32)))
    ids = rng.integers(0, 64, (8, 32))
    mesh = meshes.make(meshes.MeshConfig(**({"fsdp": 1} | sizes)), jax.devices()[: int(np.prod(list(sizes.values())))])

    def run(table, dx):
        with meshes.use(mesh, meshes.DEFAULT):
            x, pull = jax.vjp(lambda table: look_up(table, ids), table)
            return x, pull(dx)[0]

    x, gradient = jax.jit(run)(table, dx)
    expected = np.zeros((64, 16))
    np.add.at(expected, ids, dx.astype(np.float64))
    np.testing.assert_array_equal(x, table[ids])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=FP32 * np.abs(expected).max())
    assert gradient.sharding.is_equivalent_to(meshes.sharding(mesh, "VD", meshes.DEFAULT.params), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_added_block_by_block_equal_numpy_however_often_a_place_comes(dtype):
    """As GPUs do it, whose scatter adds equal rows in any order; here the scatter is told that no place comes twice."""
    rng = np.random.default_rng(0)
    places = np.where(rng.random(3 * BLOCK - 7) < 0.5, 3, rng.integers(0, 70, 3 * BLOCK - 7))  # from 64 on beyond the end
    dx, table = jnp.asarray(rng.normal(size=(places.size, 16)), dtype), rng.normal(size=(64, 16)).astype(np.float32)
    expected = table.astype(np.float64)
    np.add.at(expected, places[places < 64], np.asarray(dx, np.float64)[places < 64])
    added = jax.jit(block_by_block)(table, places, dx)
    np.testing.assert_allclose(added, expected, rtol=0, atol=FP32 * np.abs(expected).max())


def test_a_look_up_without_a_layout_is_an_index():
    np.testing.assert_array_equal(look_up(np.eye(4, dtype=np.float32), np.array([[2, 0]])), np.eye(4)[[[2, 0]]])
