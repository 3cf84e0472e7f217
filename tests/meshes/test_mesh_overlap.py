"""Products in a ring: the values and gradients of plain ones, no gather of a whole sequence, hops between products."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from meshes.overlap import gathered, rings, scattered

RING = dataclasses.replace(meshes.DEFAULT, matmul="ring")
# fp32 sums of 32 terms in another order, relative to entries of size about 1.
REORDERED = 1e-5
MESHES = [dict(tensor=8, fsdp=1), dict(tensor=4, fsdp=2), dict(context=2, tensor=2, fsdp=2), dict(context=2, tensor=4, fsdp=1)]


def _arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = dict(x_BRD=(4, 32, 16), up_DF=(16, 32), q_DNH=(16, 8, 4), down_FD=(32, 16), o_NHD=(8, 4, 16))
    return {name: jax.random.normal(k, s) / 4 for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def _ringed(a):
    up, q = gathered(a["x_BRD"], [a["up_DF"], a["q_DNH"]], ["DF", "DNH"])
    return scattered(jnp.tanh(up), a["down_FD"], "FD") + scattered(jnp.sin(q), a["o_NHD"], "NHD")


def _plain(a):
    up, q = jnp.einsum("BRD,DF->BRF", a["x_BRD"], a["up_DF"]), jnp.einsum("BRD,DNH->BRNH", a["x_BRD"], a["q_DNH"])
    return jnp.tanh(up) @ a["down_FD"] + jnp.einsum("BRNH,NHD->BRD", jnp.sin(q), a["o_NHD"])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_plain_products(sizes):
    mesh, arrays = meshes.make(meshes.MeshConfig(**sizes)), _arrays()
    target = np.random.default_rng(0).normal(size=(4, 32, 16)).astype(np.float32)
    loss = lambda f: lambda a: (jnp.sum(f(a) * target), f(a))  # noqa: E731
    with meshes.use(mesh, RING):
        assert rings()
        (_, ours), grads = jax.jit(jax.value_and_grad(loss(_ringed), has_aux=True))(arrays)
    (_, expected), reference = jax.value_and_grad(loss(_plain), has_aux=True)(arrays)
    np.testing.assert_allclose(ours, expected, atol=REORDERED)
    for name in arrays:
        np.testing.assert_allclose(grads[name], reference[name], atol=REORDERED * np.abs(reference[name]).max(), err_msg=name)


def test_a_ring_of_n_devices_hops_n_minus_1_times_and_gathers_nothing():
    mesh = meshes.make(meshes.MeshConfig(tensor=4, fsdp=2))
    with meshes.use(mesh, RING):
        program = jax.jit(_ringed).lower(_arrays()).compile().as_text()
    hops = program.count(" collective-permute(") + program.count(" collective-permute-start(")
    assert hops == 3 + 2 * 3  # one gather feeds both products; each scatter has its own
    assert " all-gather(" not in program and " all-to-all(" not in program and " reduce-scatter(" not in program


@pytest.mark.parametrize(
    ("rules", "sizes"), [(meshes.DEFAULT, dict(tensor=8, fsdp=1)), (RING, dict(fsdp=8)), (dataclasses.replace(meshes.TP, matmul="ring"), dict(tensor=8, fsdp=1))]
)
def test_there_is_no_ring_where_none_is_asked_for_or_nothing_is_gathered(rules, sizes):
    assert not rings()
    with meshes.use(meshes.make(meshes.MeshConfig(**sizes)), rules):
        assert not rings()
