"""The decoder under presets of rules: the values and gradients of one device, and no resharding that XLA warns of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import meshes
from models.attention import Chunked, Dense
from models.llama import Config
from tests.models import reference

CONFIG = Config(vocab_size=64, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, ffn=48)
# Relative to the largest entry: fp32 keeps 7 digits, sums of some hundred terms in another order lose two.
REORDERED = 1e-5
BATCH = np.random.default_rng(0).integers(64, size=(8, 16))
SEGMENTS = np.repeat([[1] * 7 + [2] * 9], 8, axis=0)
MESHES = {
    "context": dict(fsdp=2, context=2, tensor=2),
    "tensor": dict(data=2, fsdp=1, tensor=4),
    "all data": dict(replica=2, stage=2, fsdp=1, expert=2),
}


def _value_and_gradients(config, mesh=None, rules=None):
    graph, params = nnx.split(reference.model(config))
    letters = {name: p.letters for name, p in config.parameters().items()}

    def loss(params):
        model = nnx.merge(graph, params)
        logits = model(BATCH, SEGMENTS)[0] @ meshes.constrain(model.unembedding(), "DV")
        return (jax.nn.logsumexp(logits, axis=-1) ** 2 - (logits * jnp.cos(jnp.arange(64))[None, None]).sum(-1)).mean()

    if mesh is None:
        return jax.jit(jax.value_and_grad(loss))(params)
    stored = jax.tree_util.tree_map_with_path(
        lambda path, _: meshes.sharding(mesh, letters[path[0].key], rules.params), params
    )
    with meshes.use(mesh, rules):
        return jax.jit(jax.value_and_grad(loss), in_shardings=(stored,), out_shardings=(None, stored))(params)


def _assert_equal(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=REORDERED * np.abs(y).max())


@pytest.fixture(scope="module")
def one_device():
    return _value_and_gradients(CONFIG)


FAST = [("context", preset) for preset in ("ZERO1", "FSDP", "TP_SP", "DEFAULT")]  # tests/parity trains on every one
LAYOUTS = [
    pytest.param(name, preset, marks=[] if (name, preset) in FAST else pytest.mark.slow)
    for name in MESHES
    for preset in meshes.PRESETS
]


@pytest.mark.parametrize(("name", "preset"), LAYOUTS)
def test_every_layout_computes_what_one_device_does(name, preset, one_device, capfd):
    mesh, rules = meshes.make(meshes.MeshConfig(**MESHES[name])), meshes.PRESETS[preset]
    _assert_equal(_value_and_gradients(CONFIG, mesh, rules), one_device)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_the_warning_that_these_tests_look_for_is_seen_when_it_is_given(capfd):
    mesh = meshes.make(meshes.MeshConfig(fsdp=4, tensor=2))
    rows, columns = (meshes.sharding(mesh, letters, {"S": "fsdp", "B": "tensor"}) for letters in ("B__", "_S_"))
    constrain = jax.lax.with_sharding_constraint
    jax.jit(lambda x: constrain(constrain(x, columns) + 1, rows)).lower(jnp.ones((8, 16, 12))).compile()
    assert "Involuntary full rematerialization" in capfd.readouterr().err


OTHERS = [
    dict(scan_layers=False, remat="full"),
    dict(tied=True, attention=Dense()),
    dict(remat="dots", attention=Chunked()),
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHERS)
@pytest.mark.parametrize("preset", ["DEFAULT", "FSDP"])
def test_other_ways_to_compute_are_laid_out_as_well(changes, preset, capfd):
    config, mesh = dataclasses.replace(CONFIG, **changes), meshes.make(meshes.MeshConfig(fsdp=2, context=2, tensor=2))
    _assert_equal(_value_and_gradients(config, mesh, meshes.PRESETS[preset]), _value_and_gradients(config))
    assert "rematerialization" not in capfd.readouterr().err
